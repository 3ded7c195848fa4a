"""What the commands of ``spo-ray`` share: options, reading of the configuration, errors and exit codes."""

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spo_ray.config.load import load
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.pipeline.paths import check_data_paths, check_model_paths
from spo_ray.runtime.console import LOGGER, installed, set_verbosity
from spo_ray.runtime.failure import AGAIN, card_of

Overrides = Annotated[str, Parameter(help="Dotted keys of the configuration, such as methods.spo.lambda_sft=5.")]
ConfigPath = Annotated[Path, Parameter(name=["--config", "-c"], help="A file from configs/ or one of your own.")]
DryRun = Annotated[bool, Parameter(negative="", help="Print the plan and do nothing.")]
Full = Annotated[bool, Parameter(negative="", help="Print the resolved configuration too, with all defaults.")]
Flag = Annotated[bool, Parameter(negative="")]
Verify = Annotated[bool, Parameter(negative="", help="Compare contents of finished stages' files, not sizes alone.")]
Json = Annotated[bool, Parameter(negative="", help="Print JSON.")]


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class Output:
    """Options of every command that runs stages."""

    verbose: Annotated[bool, Parameter(alias="-v")] = False
    """Show what vLLM, Ray and the workers print."""
    quiet: Annotated[bool, Parameter(alias="-q")] = False
    """Log warnings and errors only."""
    log_json: bool = False
    """Log JSON lines to stderr: time, level, stage, message."""
    verify: Verify = False


def configured(config: Path | None, overrides: tuple[str, ...], verbose: bool, *, model: bool = True) -> Config:
    """Load a configuration and check the files that it names, those of the model if ``model`` is True.

    ``verbose`` lets its workers' output through.

    Raises:
        UserError: there is no configuration, or it or one of its files can't be used.
    """
    if config is None:
        files = [word for word in overrides if "=" not in word]
        raise UserError(f"name the configuration with --config {files[0] if files else 'FILE'}: configs/ has examples")
    loaded = load(config, [*overrides, "ray.worker_logs=true"] if verbose else overrides)
    check_data_paths(loaded)
    if model:
        check_model_paths(loaded)
    return loaded


def guarded(work: Callable[[], None], output: Output = Output()) -> int:
    """Run a command's work with log output on the terminal, and return the exit code.

    Bad input ends with its message, any other error with its card; the traceback is shown if no file holds it, and a
    bug can be the cause. Where the reader of the output has left, as ``head -1`` does, nothing is said.
    """
    set_verbosity(output.verbose)
    with installed(output.quiet, output.log_json):
        try:
            work()
        except UserError as error:
            LOGGER.error(f"error: {error}")
            return 2
        except (KeyboardInterrupt, SystemExit) as error:  # Ray's handler of SIGTERM exits
            if isinstance(error.__context__, BrokenPipeError):  # rich has made it an exit
                return 1
            LOGGER.error(f"stopped; {AGAIN}")
            return 130
        except Exception as error:
            card = getattr(error, "card", None)  # recorded() attaches one
            if isinstance(error, BrokenPipeError) and not card:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again at the end, and says so
                return 1
            # A file that can't be read or written needs no traceback: the message names it, the card the place.
            trace = "" if card or isinstance(error, OSError) else f"{traceback.format_exc()}\n"
            LOGGER.error(trace + (card or card_of(error)).text())
            return 1
    return 0
