"""Command lines: ``spo-ray`` and the scripts in ``pipelines/``. Exit codes: 0, 1 failure, 2 bad input, 130 stopped."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from spo_ray import __version__
from spo_ray.config import load
from spo_ray.errors import UserError
from spo_ray.run import Run, say, write_json

Stages = Callable[[Run], Iterator[str]]
Part = Literal["data", "sample", "sft", "pairs", "reference", "train", "evaluate", "report"]
ConfigPath = Annotated[Path, Parameter(name=["--config", "-c"])]
USAGE = "Overrides are dotted keys of the configuration: methods.spo.lambda_sft=5"


def script(stages: Stages, until: Part, description: str) -> int:
    """The command line of one script in ``pipelines/``: run the job up to a stage; gives the exit code."""
    app = App(help=f"{description}\n\n{USAGE}", version=__version__)

    @app.default
    def job(*overrides: str, config: ConfigPath, dry_run: bool = False) -> int:
        return guarded(lambda: follow(stages, config, overrides, until, dry_run))

    return int(app() or 0)


def follow(stages: Stages, config: Path, overrides: tuple[str, ...], until: Part, dry_run: bool = False) -> None:
    """Load the configuration and run the job's stages up to the named one, or print what they would be."""
    run = Run(load(config, overrides))
    if dry_run:
        from spo_ray.outline import outline

        print(outline(run))
        return
    if not run.config.output.is_absolute() and "working_dir_files" in Path.cwd().parts:
        say(
            "job",
            "output is relative, so results land in the submitted job's own folder: set output=/some/shared/folder",
        )
    with run.locked():
        write_json(run.root / "config.json", run.config.model_dump(mode="json"))
        for stage in stages(run):
            if stage == until:
                break
    say("job", f"{until} finished; results in {os.path.relpath(run.root)}")


def guarded(work: Callable[[], None]) -> int:
    """Run and translate the outcome into an exit code; bad input gives its message without a traceback."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished stages are kept: the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"error: {error}\nfinished stages are kept: the same command goes on from there", file=sys.stderr)
        return 1
    return 0


app = App(name="spo-ray", help="Stable Preference Optimization on Ray.", version=__version__)


@app.command
def run(*overrides: str, config: ConfigPath, until: Part = "report", dry_run: bool = False) -> int:
    """Run the whole job, or the job up to a stage; finished stages are reused.

    Parameters
    ----------
    overrides
        Dotted keys of the configuration, such as methods.spo.lambda_sft=5.
    config
        A file from configs/, or one of your own.
    until
        The part of the job to stop after.
    dry_run
        Print the resolved configuration and the stages, and do nothing.
    """
    from pipelines.full import stages

    return guarded(lambda: follow(stages, config, overrides, until, dry_run))


@app.command
def inspect(
    *overrides: str, config: ConfigPath = Path("configs/quickstart.yaml"), data: Path | None = None, rows: int = 3
) -> int:
    """Show what training sees of preference data: tokens, masks, lengths, and what would be dropped.

    Parameters
    ----------
    overrides
        Dotted keys of the configuration, such as model.path=organisation/name.
    config
        Where the model, its template and the length limit are taken from, and the data without --data.
    data
        A .jsonl or .parquet file, a folder with train.jsonl, or a dataset on the hub.
    rows
        Rows to show.
    """

    def work() -> None:
        from rich.console import Console

        from spo_ray.data.inspect import inspect_data

        inspect_data(load(config, overrides), data, rows, Console())

    return guarded(work)


score = App(name="score", help="Grade responses that were made elsewhere.")
app.command(score)


@score.command
def gsm8k(file: Path) -> int:
    """Grade a JSONL file with question, answer and response; writes FILE.scored.jsonl and prints the accuracy.

    Parameters
    ----------
    file
        JSONL; answers are GSM8K solutions or numbers.
    """

    def work() -> None:
        from spo_ray.evaluate.score import score_gsm8k

        result, defects = score_gsm8k(file)
        print(json.dumps(result))
        for defect in defects:
            print(f"left out, {defect}", file=sys.stderr)

    return guarded(work)


def main() -> None:
    """Console script."""
    sys.exit(app() or 0)
