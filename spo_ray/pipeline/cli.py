"""Command lines: ``spo-ray`` and the scripts in ``pipelines/``. Exit codes: 0, 1 failure, 2 bad input, 130 stopped."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from spo_ray import __version__
from spo_ray.config.load import load
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.pipeline import Part
from spo_ray.runtime.artifact import write_json
from spo_ray.runtime.console import end_view, log, place, quieten, redact, set_verbosity
from spo_ray.runtime.failure import AGAIN, card_on, recorded
from spo_ray.runtime.run import PlannedRun, Run

quieten()  # before the heavy imports of whoever imports this


Overrides = Annotated[str, Parameter(help="Dotted keys of the configuration, such as methods.spo.lambda_sft=5.")]
ConfigPath = Annotated[Path, Parameter(name=["--config", "-c"], help="A file from configs/, or one of your own.")]
DryRun = Annotated[bool, Parameter(negative="", help="Print the plan, and do nothing.")]
Verbose = Annotated[bool, Parameter(negative="", help="Show what vLLM, Ray and the workers print.")]
Json = Annotated[bool, Parameter(negative="", help="Print JSON.")]
EXAMPLES = """Examples:

* spo-ray doctor --config configs/quickstart.yaml
* spo-ray run --config configs/quickstart.yaml name=lambda-5 methods.spo.lambda_sft=5
* spo-ray plan --config configs/quickstart.yaml
* spo-ray inspect --data preferences.jsonl
* spo-ray report runs/quickstart runs/lambda-5

Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped."""


def execute(job: Callable[[Run], Any], config: Config, until: Part = "report") -> None:
    """Run a job in its folder, under the folder's lock, with its state in ``status.json``."""
    run = Run(config)
    if not config.output.is_absolute() and "working_dir_files" in Path.cwd().parts:
        log(
            "job",
            "output is relative, so results land in the submitted job's own folder: set output=/some/shared/folder",
        )
    with run.locked(), recorded(run):
        write_json(run.root / "config.json", config.model_dump(mode="json"))
        job(run)
    log("job", f"{until} finished; results in {place(run.root)}")


def show_plan(plan: PlannedRun, more: str = "") -> None:
    """Print a plan.

    Raises:
        UserError: the run would be refused.
    """
    from spo_ray.pipeline.plan import plan_text

    print(plan_text(plan))
    if more:
        print(more)
    if plan.problem:
        raise UserError(plan.problem)


def configured(config: Path, overrides: tuple[str, ...], verbose: bool = False) -> Config:
    """Load a configuration, and let the libraries that are imported later print all, or errors alone."""
    set_verbosity(verbose)
    return load(config, [*overrides, "ray.worker_logs=true"] if verbose else overrides)


def guarded(work: Callable[[], None]) -> int:
    """Run and translate the outcome into an exit code; bad input gives its message without a traceback."""
    try:
        work()
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):  # Ray's handler of SIGTERM exits
        print(f"stopped; {AGAIN}", file=sys.stderr)
        return 130
    except Exception as error:
        card = card_on(error)
        if not card.details:
            print(redact(traceback.format_exc()), file=sys.stderr)
        print(card.text(), file=sys.stderr)
        return 1
    finally:
        end_view()
    return 0


app = App(name="spo-ray", help="Stable Preference Optimization on Ray.", help_epilogue=EXAMPLES, version=__version__)


app.register_install_completion_command()


@app.command
def run(
    *overrides: Overrides, config: ConfigPath, until: Part = "report", dry_run: DryRun = False, verbose: Verbose = False
) -> int:
    """Run the whole job, or the job up to a stage; finished stages are reused.

    Parameters
    ----------
    until
        The part of the job to stop after.
    """

    def work() -> None:
        loaded = configured(config, overrides, verbose)
        from spo_ray.pipeline.job import plan_job, run_job

        if dry_run:
            show_plan(plan_job(loaded))
        else:
            execute(partial(run_job, until=until), loaded, until)

    return guarded(work)


@app.command
def plan(*overrides: Overrides, config: ConfigPath) -> int:
    """Show the resolved configuration, what each stage would do and why, and what it would take; do nothing.

    Example: spo-ray plan --config configs/quickstart.yaml methods.spo.lambda_sft=5
    """
    return run(*overrides, config=config, dry_run=True)


@app.command
def doctor(*overrides: Overrides, config: ConfigPath | None = None, json: Json = False) -> int:
    """Check Python, packages, GPU, vLLM, ports and authentication; with a configuration also disk, hub and cluster.

    Every failed check says what to do, and makes the exit code 1. Example: spo-ray doctor -c configs/quickstart.yaml
    """
    from spo_ray.pipeline.doctor import as_json, examine, passed, table

    set_verbosity(False)
    loaded, problem = None, None
    try:
        loaded = load(config, overrides) if config else None
    except UserError as error:
        problem = str(error)
    with contextlib.redirect_stdout(sys.stderr):  # what is printed on the way is no part of the answer
        checks = examine(loaded, problem)
    print(redact(as_json(checks) if json else table(checks)))
    return 0 if passed(checks) else 1


@app.command
def inspect(
    *overrides: Overrides, config: ConfigPath = Path("configs/quickstart.yaml"), data: Path | None = None, rows: int = 3
) -> int:
    """Show what training sees of preference data: tokens, masks, lengths, and what would be dropped.

    Parameters
    ----------
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


@app.command
def evaluate(
    *overrides: str, config: ConfigPath, checkpoint: Annotated[list[str], Parameter(name=["--checkpoint", "-k"])]
) -> int:
    """Measure checkpoints by the suites of a configuration; results land in OUTPUT/NAME-evaluation.

    Parameters
    ----------
    overrides
        Dotted keys of the configuration, such as eval.suites=[accuracy].
    config
        Where the data, the engine and the suites are taken from.
    checkpoint
        NAME=PATH, as often as wanted: a folder (a model, or a PEFT adapter) or a hub id. The one that is named sft is
        what the others' probabilities are compared with.
    """

    def work() -> None:
        from spo_ray.pipeline.evaluate_job import evaluate_checkpoints

        named = dict(text.partition("=")[::2] for text in checkpoint)
        if not all(named.values()) or len(named) < len(checkpoint):
            raise UserError("checkpoints look like NAME=PATH, each with a name of its own")
        evaluate_checkpoints(load(config, overrides), named)

    return guarded(work)


@app.command
def sweep(*overrides: str, config: ConfigPath, dry_run: bool = False, verbose: Verbose = False) -> int:
    """Try many settings of a method with Ray Tune; the same command goes on with an unfinished sweep.

    Parameters
    ----------
    overrides
        Dotted keys of the configuration, such as sweep.seeds=[0,1,2].
    config
        A file from configs/sweeps/, or one of your own with a section sweep.
    dry_run
        Print the plan and the trials, and do nothing.
    """

    def work() -> None:
        loaded = configured(config, overrides, verbose)
        from spo_ray.pipeline.plan import trials_text
        from spo_ray.pipeline.sweep_job import plan_sweep, run_sweep

        if dry_run:
            show_plan(plan_sweep(loaded), trials_text(loaded))
        else:
            execute(run_sweep, loaded)

    return guarded(work)


@app.command
def report(
    *runs: Annotated[Path, Parameter(help="Folders of finished runs or sweeps, such as runs/quickstart.")],
    out: Path | None = None,
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
        set_verbosity(False)
        from spo_ray.pipeline.finished import read_finished
        from spo_ray.report.comparison import write_reports

        write_reports([read_finished(folder) for folder in runs], out)

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
        from spo_ray.evaluate.grade_file import score_gsm8k

        result, defects = score_gsm8k(file)
        print(json.dumps(result))
        for defect in defects:
            print(f"left out, {defect}", file=sys.stderr)

    return guarded(work)


@score.command(name="alpaca-eval")
def alpaca_eval(annotations: Path, *, lc: Literal["minimal", "v1"] = "v1") -> int:
    """Win rates of AlpacaEval's annotations.json, as JSON.

    Parameters
    ----------
    annotations
        Records with instruction, output_1, output_2, generator_1, generator_2 and preference (1 to 2, or null).
    lc
        Formula of the length-controlled win rate. The leaderboard's, v1, needs a table from the hub; where that can't
        be had, the result is of the minimal one, and lc_method says so.
    """

    def work() -> None:
        from spo_ray.evaluate.win_rates import read_annotations, win_rates

        result = win_rates(read_annotations(annotations), lc)
        unjudged = result.pop("unjudged")
        print(json.dumps(result))
        if unjudged:
            print(f"{unjudged} records without a preference are left out", file=sys.stderr)
        if not result["lc_method"].endswith(lc):
            print("v1's table can't be had: length-controlled by the minimal formula, not by v1", file=sys.stderr)

    return guarded(work)


def main(*command: str) -> None:
    """Run a command line and exit; ``command`` stands before what was typed."""
    sys.exit(app([*command, *sys.argv[1:]]) or 0)
