"""Command lines of ``spo-ray`` and of the scripts in ``pipelines/``."""

import contextlib
import json
import sys
import traceback
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

from spo_ray import __version__
from spo_ray.config.load import load
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.pipeline import Part
from spo_ray.runtime.artifact import write_json
from spo_ray.runtime.console import LOGGER, installed, log, place, prepare_process, set_verbosity, show, warn
from spo_ray.runtime.failure import AGAIN, card_of
from spo_ray.runtime.run import PlannedRun, Run
from spo_ray.runtime.status import recorded, settle
from spo_ray.runtime.supervisor import supervise

prepare_process()  # before the importing program loads the libraries

Overrides = Annotated[str, Parameter(help="Dotted keys of the configuration, such as methods.spo.lambda_sft=5.")]
ConfigPath = Annotated[Path, Parameter(name=["--config", "-c"], help="A file from configs/ or one of your own.")]
DryRun = Annotated[bool, Parameter(negative="", help="Print the plan and do nothing.")]
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


EXAMPLES = """Examples:

* spo-ray doctor --config configs/quickstart.yaml
* spo-ray run --config configs/quickstart.yaml name=lambda-5 methods.spo.lambda_sft=5
* spo-ray plan --config configs/quickstart.yaml
* spo-ray inspect --data preferences.jsonl
* spo-ray report runs/quickstart runs/lambda-5

Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped."""


def execute(job: Callable[[Run], Any], config: Config, until: Part = "report", *, verify: bool = False) -> None:
    """Run a job in its folder, under the folder's lock, with its state in ``status.json``."""
    run = Run(config, verify=verify)
    if not config.output.is_absolute() and "working_dir_files" in Path.cwd().parts:
        warn("job", "output is relative to the submitted job's own folder: set output=/some/shared/folder")
    with run.locked(), recorded(run):
        write_json(run.root / "config.json", run.config.model_dump(mode="json"))
        job(run)
    log("job", f"{until} finished; results in {place(run.root)}")


def show_plan(plan: PlannedRun, more: str = "") -> None:
    """Print a plan.

    Raises:
        UserError: the run would be refused.
    """
    from spo_ray.pipeline.plan import plan_text

    show("\n".join(filter(None, [plan_text(plan), more])))
    if plan.problem:
        raise UserError(plan.problem)


def configured(config: Path, overrides: tuple[str, ...], verbose: bool) -> Config:
    """Load a configuration; ``verbose`` lets its workers' output through."""
    return load(config, [*overrides, "ray.worker_logs=true"] if verbose else overrides)


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
            card = getattr(error, "card", None)  # recorded() attaches one
            LOGGER.error(card.text() if card else f"{traceback.format_exc()}\n{card_of(error).text()}")
            return 1
    return 0


app = App(name="spo-ray", help="Stable Preference Optimization on Ray.", help_epilogue=EXAMPLES, version=__version__)
app.register_install_completion_command()
app.command("spo_ray.pipeline.chat:chat")


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

    def work() -> None:
        loaded = configured(config, overrides, output.verbose)
        from spo_ray.pipeline.job import plan_job, run_job

        if dry_run:
            show_plan(plan_job(loaded, until, verify=output.verify))
        else:
            execute(partial(run_job, until=until), loaded, until, verify=output.verify)

    return guarded(work, output)


@app.command
def plan(*overrides: Overrides, config: ConfigPath, verify: Verify = False) -> int:
    """Show the resolved configuration, what each stage would do and why, and what it would take; do nothing.

    Example: spo-ray plan --config configs/quickstart.yaml methods.spo.lambda_sft=5
    """
    return run(*overrides, config=config, dry_run=True, output=Output(verify=verify))


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
    show(as_json(checks) if json else table(checks))
    return 0 if passed(checks) else 1


@app.command
def inspect(
    *overrides: Overrides,
    config: ConfigPath = Path("configs/quickstart.yaml"),
    data: Path | None = None,
    rows: int = 3,
    displacement: bool = False,
) -> int:
    """Show how training reads preference data: tokens, masks, lengths, and which rows would be dropped.

    Parameters
    ----------
    data
        A .jsonl or .parquet file, a folder with train.jsonl, or a dataset on the hub.
    rows
        Number of rows to show.
    displacement
        Load the model, and list the pairs that lower the chosen response's probability most.
    """

    def work() -> None:
        from rich.console import Console

        from spo_ray.data.inspect import inspect_data

        inspect_data(load(config, overrides), data, rows, Console(markup=False), displacement)

    return guarded(work)


@app.command
def import_gguf(file: Path, folder: Path) -> int:
    """Write the model of a GGUF file as safetensors in float32, with tokenizer and chat template, to train it here.

    Example: spo-ray import-gguf SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m

    Parameters
    ----------
    file
        GGUF file of an architecture that transformers reads, such as llama, qwen2 or gemma2.
    folder
        Folder for the model, which must be new or empty.
    """

    def work() -> None:
        set_verbosity(False)
        from spo_ray.model.gguf import import_gguf

        import_gguf(file, folder)

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
        others are compared with those of the checkpoint named sft (reference where sft is null).
    """

    def work() -> None:
        from spo_ray.pipeline.evaluate_job import evaluate_checkpoints

        named = dict(text.partition("=")[::2] for text in checkpoint)
        if not all(named.values()) or len(named) < len(checkpoint):
            raise UserError("checkpoints are given as NAME=PATH, each with a different name")
        evaluate_checkpoints(configured(config, overrides, output.verbose), named, verify=output.verify)

    return guarded(work, output)


@app.command
def sweep(*overrides: str, config: ConfigPath, dry_run: bool = False, output: Output = Output()) -> int:
    """Try many settings of a method with Ray Tune; the same command resumes an unfinished sweep.

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
        loaded = configured(config, overrides, output.verbose)
        from spo_ray.pipeline.plan import trials_text
        from spo_ray.pipeline.sweep_job import plan_sweep, run_sweep

        if dry_run:
            show_plan(plan_sweep(loaded, verify=output.verify), trials_text(loaded))
        else:
            execute(run_sweep, loaded, verify=output.verify)

    return guarded(work, output)


@app.command
def report(
    *runs: Annotated[Path, Parameter(help="Folders of finished runs or sweeps, such as runs/quickstart.")],
    out: Path | None = None,
    samples: Annotated[int | None, Parameter(validator=Number(gt=0))] = None,
    open: Flag = False,
    markdown: Flag = False,
    csv: Flag = False,
    output: Output = Output(),
) -> int:
    """Write a finished run's page anew, or with several runs one page that compares them; no cluster is started.

    A sweep is a run too: a comparison shows its best point, and how its objective depends on its parameters.

    Example: spo-ray report runs/quickstart runs/lambda-5 --out comparison.html

    Parameters
    ----------
    out
        Where a comparison goes, a folder or an .html file; report-comparison beside the first run unless given.
    samples
        Number of held-out prompts whose answers a run's page shows; 50 unless given.
    open
        Open the page in the browser.
    markdown
        Print the results as Markdown, for a pull request or a model card, and write no page.
    csv
        Print every score with its interval as CSV, and write no page.
    """

    def work() -> None:
        set_verbosity(False)
        from spo_ray.pipeline.finished import read_finished
        from spo_ray.report.comparison import named, write_reports
        from spo_ray.report.texts import as_csv, as_markdown

        found = named([read_finished(folder, verify=output.verify) for folder in runs])
        if markdown or csv:
            print((as_markdown if markdown else as_csv)(found))
            return
        page = write_reports(found, out, samples)
        if open:
            webbrowser.open(page.absolute().as_uri())

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
            show(f"left out, {defect}", error=True)

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
            show(f"{unjudged} records without a preference are left out", error=True)
        if not result["lc_method"].endswith(lc):
            show("the table of v1 can't be downloaded: length-controlled by the minimal formula, not by v1", error=True)

    return guarded(work)


JOBS = ("run", "sweep", "evaluate")  # they use Ray


def main(*command: str) -> None:
    """Run a command line and exit with its code; ``command`` stands before the words that were typed."""
    words = [*command, *sys.argv[1:]]
    sys.exit(supervised(app, words) if words[:1] and words[0] in JOBS else app(words) or 0)


def supervised(command: App, words: list[str]) -> int:
    """Run a command that uses Ray in a child process, and return an exit code that agrees with ``status.json``."""
    ending = supervise(lambda: command(words) or 0, verbose=bool({"-v", "--verbose"} & set(words)))
    with installed(as_json="--log-json" in words):
        return settle(ending)
