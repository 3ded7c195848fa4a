"""Command lines of ``spo-ray`` and of the scripts in ``pipelines/``."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from spo_ray import __version__
from spo_ray.config.load import load
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.runtime.artifact import write_json
from spo_ray.runtime.console import LOGGER, installed, log, place, quieten, redact, set_verbosity, warn
from spo_ray.runtime.failure import AGAIN, card_of, recorded
from spo_ray.runtime.run import Run

quieten()  # before the importing program loads the libraries

Stages = Callable[[Run], Iterator[str]]
Outline = Callable[[Run], str]
"""Returns the text that ``--dry-run`` prints."""
Part = Literal["data", "sample", "sft", "pairs", "reference", "train", "evaluate", "report"]
Overrides = Annotated[str, Parameter(help="Dotted keys of the configuration, such as methods.spo.lambda_sft=5.")]
ConfigPath = Annotated[Path, Parameter(name=["--config", "-c"], help="A file from configs/ or one of your own.")]
DryRun = Annotated[bool, Parameter(negative="", help="Print the plan and do nothing.")]
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


USAGE = "Overrides are dotted keys of the configuration: methods.spo.lambda_sft=5"
EXAMPLES = """Examples:

* spo-ray doctor --config configs/quickstart.yaml
* spo-ray run --config configs/quickstart.yaml name=lambda-5 methods.spo.lambda_sft=5
* spo-ray plan --config configs/quickstart.yaml
* spo-ray inspect --data preferences.jsonl
* spo-ray report runs/quickstart runs/lambda-5

Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped."""


def script(stages: Stages, until: Part, description: str, outline: Outline | None = None) -> int:
    """Run the command line of a script in ``pipelines/``, which runs a job up to a part, and return the exit code."""
    app = App(help=f"{description}\n\n{USAGE}", version=__version__)

    @app.default
    def command(*overrides: Overrides, config: ConfigPath, dry_run: DryRun = False, output: Output = Output()) -> int:
        if dry_run and outline:
            return guarded(lambda: print(outline(Run(load(config, overrides)))))
        return guarded(lambda: follow(stages, config, overrides, until, dry_run, output.verbose), output)

    command.__doc__ = f"{description} Finished stages are reused."
    return int(app() or 0)


def follow(
    stages: Stages, config: Path, overrides: tuple[str, ...], until: Part, dry_run: bool = False, verbose: bool = False
) -> None:
    """Load the configuration and run the job up to a part, or print the plan of the run."""
    run = Run(load(config, [*overrides, "ray.worker_logs=true"] if verbose else overrides))
    if dry_run:
        show_plan(run.config, stages)
        return
    if not run.config.output.is_absolute() and "working_dir_files" in Path.cwd().parts:
        warn("job", "output is relative to the submitted job's own folder: set output=/some/shared/folder")
    with run.locked(), recorded(run):
        write_json(run.root / "config.json", run.config.model_dump(mode="json"))
        for stage in stages(run):
            if stage == until:
                break
    log("job", f"{until} finished; results in {place(run.root)}")


def show_plan(config: Config, stages: Stages) -> None:
    """Print the plan of a run.

    Raises:
        UserError: the run would be refused.
    """
    from spo_ray.pipeline.plan import plan

    text, problem = plan(config, stages)
    print(text)
    if problem:
        raise UserError(problem)


def guarded(work: Callable[[], None], output: Output = Output()) -> int:
    """Run a command's work with log output on the terminal, and return the exit code.

    Bad input ends with its message, any other error with its card; the traceback is shown if no file holds it.
    """
    set_verbosity(output.verbose)
    with installed(output.quiet, output.log_json):
        try:
            work()
        except UserError as error:
            LOGGER.error(f"error: {error}")
            return 2
        except (KeyboardInterrupt, SystemExit):  # Ray's handler of SIGTERM exits
            LOGGER.error(f"stopped; {AGAIN}")
            return 130
        except Exception as error:
            card = getattr(error, "card", None) or card_of(error)  # recorded() attaches one
            LOGGER.error(card.text() if card.details else f"{traceback.format_exc()}\n{card.text()}")
            return 1
    return 0


app = App(name="spo-ray", help="Stable Preference Optimization on Ray.", help_epilogue=EXAMPLES, version=__version__)
app.register_install_completion_command()


@app.command
def run(
    *overrides: Overrides,
    config: ConfigPath,
    until: Part = "report",
    dry_run: DryRun = False,
    output: Output = Output(),
) -> int:
    """Run the whole job, or the job up to a stage; finished stages are reused.

    Parameters
    ----------
    until
        The part of the job to stop after.
    """
    return guarded(lambda: follow(whole_job, config, overrides, until, dry_run, output.verbose), output)


def whole_job(run: Run) -> Iterator[str]:
    """Run the stages of the whole job; they are imported here, because that takes seconds."""
    from spo_ray.pipeline.job import stages

    return stages(run)


@app.command
def plan(*overrides: Overrides, config: ConfigPath) -> int:
    """Show the resolved configuration, what each stage would do and why, and what it would take; do nothing.

    Example: spo-ray plan --config configs/quickstart.yaml methods.spo.lambda_sft=5
    """
    set_verbosity(False)
    return guarded(lambda: show_plan(load(config, overrides), whole_job))


@app.command
def doctor(*overrides: Overrides, config: ConfigPath | None = None, json: Json = False) -> int:
    """Check Python, packages, GPU, vLLM, ports and authentication; with a configuration also disk, hub and cluster.

    A failed check says what to do, and makes the exit code 1. Example: spo-ray doctor -c configs/quickstart.yaml
    """
    from spo_ray.pipeline.doctor import as_json, examine, passed, table

    set_verbosity(False)
    loaded, problem = None, None
    try:
        loaded = load(config, overrides) if config else None
    except UserError as error:
        problem = str(error)
    with contextlib.redirect_stdout(sys.stderr), installed():  # stdout holds only the answer
        checks = examine(loaded, problem)
    print(redact(as_json(checks) if json else table(checks)))
    return 0 if passed(checks) else 1


@app.command
def inspect(
    *overrides: Overrides, config: ConfigPath = Path("configs/quickstart.yaml"), data: Path | None = None, rows: int = 3
) -> int:
    """Show how training reads preference data: tokens, masks, lengths, and which rows would be dropped.

    Parameters
    ----------
    data
        A .jsonl or .parquet file, a folder with train.jsonl, or a dataset on the hub.
    rows
        Number of rows to show.
    """

    def work() -> None:
        from rich.console import Console

        from spo_ray.data.inspect import inspect_data

        inspect_data(load(config, overrides), data, rows, Console())

    return guarded(work)


@app.command
def evaluate(
    *overrides: str,
    config: ConfigPath,
    checkpoint: Annotated[list[str], Parameter(name=["--checkpoint", "-k"])],
    output: Output = Output(),
) -> int:
    """Evaluate checkpoints with the suites of a configuration; results are written to OUTPUT/NAME-evaluation.

    Parameters
    ----------
    overrides
        Dotted keys of the configuration, such as eval.suites=[accuracy].
    config
        The file with the data, the engine and the suites.
    checkpoint
        NAME=PATH, once for each checkpoint: a folder (a model or a PEFT adapter) or a hub id. The probabilities of the
        others are compared with those of the checkpoint named sft.
    """

    def work() -> None:
        from spo_ray.pipeline.job import evaluate_apart

        named = dict(text.partition("=")[::2] for text in checkpoint)
        if not all(named.values()) or len(named) < len(checkpoint):
            raise UserError("checkpoints are given as NAME=PATH, each with a different name")
        shown = ["ray.worker_logs=true"] if output.verbose else []
        evaluate_apart(load(config, [*overrides, *shown]), named)

    return guarded(work, output)


@app.command
def sweep(*overrides: str, config: ConfigPath, dry_run: bool = False, output: Output = Output()) -> int:
    """Try many settings of a method with Ray Tune; the same command goes on with an unfinished sweep.

    Parameters
    ----------
    overrides
        Dotted keys of the configuration, such as sweep.seeds=[0,1,2].
    config
        A file from configs/sweeps/, or one of your own with a section sweep.
    dry_run
        Print the resolved configuration and the trials, and do nothing.
    """
    from spo_ray.pipeline.sweep_job import stages
    from spo_ray.pipeline.sweep_outline import sweep_outline

    if dry_run:
        return guarded(lambda: print(sweep_outline(Run(load(config, overrides)))))
    return guarded(lambda: follow(stages, config, overrides, "report", verbose=output.verbose), output)


@app.command
def report(
    *runs: Annotated[Path, Parameter(help="Folders of finished runs or sweeps, such as runs/quickstart.")],
    out: Path | None = None,
    output: Output = Output(),
) -> int:
    """Write a finished run's page anew, or with several runs one page that compares them; no cluster is started.

    A sweep is a run too: a comparison shows its best point, and how its objective depends on its parameters.

    Example: spo-ray report runs/quickstart runs/lambda-5 --out comparison.html

    Parameters
    ----------
    out
        Where a comparison goes, a folder or an .html file; report-comparison beside the first run unless given.
    """

    def work() -> None:
        from spo_ray.report.comparison import write_reports

        write_reports(runs, out)

    return guarded(work, output)


score = App(name="score", help="Grade responses of other programs.")
app.command(score)


@score.command
def gsm8k(file: Path) -> int:
    """Grade a JSONL file with question, answer and response; write FILE.scored.jsonl and print the accuracy.

    Parameters
    ----------
    file
        JSONL file; answers are GSM8K solutions or numbers.
    """

    def work() -> None:
        from spo_ray.evaluate.grade_file import score_gsm8k

        result, defects = score_gsm8k(file)
        print(json.dumps(result))
        for defect in defects:
            print(f"left out, {defect}", file=sys.stderr)

    return guarded(work)


@score.command(name="alpaca-eval")
def alpaca_eval(annotations: Path, *, lc: Literal["minimal", "v1"] = "v1") -> int:
    """Print the win rates of AlpacaEval's annotations.json as JSON.

    Parameters
    ----------
    annotations
        Records with instruction, output_1, output_2, generator_1, generator_2 and preference (1 to 2, or null).
    lc
        Formula of the length-controlled win rate. v1, the leaderboard's, needs a table from the hub; without it the
        minimal formula is used, and lc_method in the result says so.
    """

    def work() -> None:
        from spo_ray.evaluate.win_rates import read_annotations, win_rates

        result = win_rates(read_annotations(annotations), lc)
        unjudged = result.pop("unjudged")
        print(json.dumps(result))
        if unjudged:
            print(f"{unjudged} records without a preference are left out", file=sys.stderr)
        if not result["lc_method"].endswith(lc):
            print(
                "the table of v1 can't be downloaded: length-controlled by the minimal formula, not by v1",
                file=sys.stderr,
            )

    return guarded(work)


def main() -> None:
    """Run the ``spo-ray`` command line and exit with its code."""
    sys.exit(app() or 0)
