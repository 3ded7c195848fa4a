"""Command lines of ``spo-ray`` and of the scripts in ``pipelines/``."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from spo_ray import __version__
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.pipeline import Part, tools
from spo_ray.pipeline.command import (
    ConfigPath,
    DryRun,
    Full,
    Output,
    Overrides,
    Verify,
    configured,
    guarded,
)
from spo_ray.pipeline.init import init
from spo_ray.runtime.artifact import write_json
from spo_ray.runtime.console import installed, log, place, prepare_process, show, warn
from spo_ray.runtime.run import PlannedRun, Run
from spo_ray.runtime.status import recorded, settle
from spo_ray.runtime.supervisor import supervise

prepare_process()  # before the importing program loads the libraries

EXAMPLES = {
    "": "init --data preferences.jsonl --model models/mine --machine cpu",
    "run": "run --config configs/quickstart.yaml name=lambda-5 methods.spo.lambda_sft=5",
    "plan": "plan --config configs/quickstart.yaml methods.spo.lambda_sft=5",
    "sweep": "sweep --config configs/sweeps/toy.yaml sweep.seeds=[0,1,2]",
    "evaluate": "evaluate --config configs/quickstart.yaml --checkpoint sft=runs/quickstart/sft",
    "init": "init --data preferences.jsonl --model models/mine --machine cpu",
    "doctor": "doctor --config configs/quickstart.yaml",
    "inspect": "inspect --data preferences.jsonl --rows 5",
    "import-gguf": "import-gguf SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m",
    "report": "report runs/quickstart runs/lambda-5 --out comparison.html",
    "chat": 'chat runs/quickstart dpo spo -m "Ada owns 3 pens and finds 4 more. How many pens does Ada own now?"',
    "score": "score gsm8k answers.jsonl",
}
"""A command line for the help text of each command."""
CODES = "Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped."


def execute(job: Callable[[Run], Any], config: Config, until: Part = "report", *, verify: bool = False) -> None:
    """Run a job in its folder, under the folder's lock, with its state in ``status.json``."""
    run, started = Run(config, verify=verify), time.monotonic()
    if not config.output.is_absolute() and "working_dir_files" in Path.cwd().parts:
        warn("job", "output is relative to the submitted job's own folder: set output=/some/shared/folder")
    with run.locked(), recorded(run):
        write_json(run.root / "config.json", run.config.model_dump(mode="json"))
        job(run)
    if run.expected:
        from spo_ray.pipeline.plan import range_text

        took = time.monotonic() - started
        log("job", f"took {range_text((took, took))}; the plan said {range_text(run.expected)}")
    log("job", f"finished{'' if until == 'report' else f' with {until}'}; results in {place(run.root)}")


def show_plan(plan: PlannedRun, more: str = "", *, full: bool = False) -> None:
    """Print a plan; ``full``: after the resolved configuration.

    Raises:
        UserError: the run would be refused.
    """
    from spo_ray.pipeline.plan import plan_text

    show("\n".join(filter(None, [plan_text(plan, full), more])))
    if plan.problem:
        raise UserError(plan.problem)


def epilogue(name: str) -> str:
    """Return the end of a command's help text: its own example, and the exit codes."""
    return f"Example: spo-ray {EXAMPLES[name]}\n\n{CODES}"


app = App(
    name="spo-ray", help="Stable Preference Optimization on Ray.", help_epilogue=epilogue(""), version=__version__
)
app.register_install_completion_command()
app.command("spo_ray.pipeline.chat:chat", name="chat", help_epilogue=epilogue("chat"))


@app.command(help_epilogue=epilogue("run"))
def run(
    *overrides: Overrides,
    config: ConfigPath | None = None,
    until: Part = "report",
    dry_run: DryRun = False,
    full: Full = False,
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
            show_plan(plan_job(loaded, until, verify=output.verify), full=full)
        else:
            execute(partial(run_job, until=until), loaded, until, verify=output.verify)

    return guarded(work, output)


@app.command(help_epilogue=epilogue("plan"))
def plan(*overrides: Overrides, config: ConfigPath | None = None, verify: Verify = False, full: Full = False) -> int:
    """Show what each stage would do and why, and what it would take; do nothing."""
    return run(*overrides, config=config, dry_run=True, full=full, output=Output(verify=verify))


@app.command(help_epilogue=epilogue("evaluate"))
def evaluate(
    *overrides: str,
    config: ConfigPath | None = None,
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
        named = dict(text.partition("=")[::2] for text in checkpoint)
        if not all(named.values()) or len(named) < len(checkpoint):
            raise UserError("checkpoints are given as NAME=PATH, each with a different name")
        loaded = configured(config, overrides, output.verbose, model=False)
        from spo_ray.pipeline.evaluate_job import evaluate_checkpoints

        evaluate_checkpoints(loaded, named, verify=output.verify)

    return guarded(work, output)


@app.command(help_epilogue=epilogue("sweep"))
def sweep(*overrides: str, config: ConfigPath | None = None, dry_run: bool = False, output: Output = Output()) -> int:
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


for _command in (init, tools.doctor, tools.inspect, tools.import_gguf, tools.report):
    _name = _command.__name__.replace("_", "-")
    app.command(_command, name=_name, help_epilogue=epilogue(_name))
tools.score.help_epilogue = epilogue("score")
app.command(tools.score)

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
