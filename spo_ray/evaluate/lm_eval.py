"""Suites ``lm_eval:TASK``: tasks of lm-evaluation-harness on this project's engines, with the chat template."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from spo_ray.config.evaluate import EvalConfig, LmEvalConfig
from spo_ray.errors import UserError
from spo_ray.evaluate.statistics import Z95
from spo_ray.evaluate.suite import Metric, Suite, SuiteContext
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, external, write_json, write_rows
from spo_ray.runtime.run import Stage

RESULTS = "results.json"


def suite(task: str) -> Suite:
    """Return the suite of one task or group of tasks."""
    return Suite(partial(_measure, task), _metrics)


def known_task(task: str, settings: LmEvalConfig) -> None:
    """Check that lm-evaluation-harness is installed and knows a task.

    Raises:
        UserError: the harness is not installed, or knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError("eval.suites has lm_eval tasks, which need: pip install 'spo-ray[lm-eval]'") from error
    manager = TaskManager(include_path=str(settings.include_path) if settings.include_path else None)
    if task not in manager.all_tasks:
        raise UserError(f"lm-evaluation-harness has no task {task!r}: see its list, or eval.lm_eval.include_path")


def _measure(task: str, context: SuiteContext, name: str, checkpoint: Artifact) -> Artifact:
    """Write the harness's own results to results.json; its rows are not kept."""
    settings: LmEvalConfig = context.run.config.eval.lm_eval
    if settings.include_path:  # actors have another working directory
        settings = settings.model_copy(update={"include_path": settings.include_path.absolute()})

    def build(out: Path, counts: RowCounts) -> None:
        sampling = settings.model_dump(mode="json", exclude={"include_path"}) | {"task": task}
        counts.facts |= context.provenance(checkpoint, sampling)
        found = context.evaluator.run_lm_eval(checkpoint.path, task, settings, context.run.config.seed)
        counts.read = counts.kept = sum(found["n"].values())
        write_json(out / RESULTS, found)
        write_rows(out / "part-0.parquet", [], schema.Score)

    identity = context.identity | settings.model_dump(exclude={"include_path"}) | {"task": task}
    inputs = {"model": checkpoint}
    if settings.include_path:
        inputs["tasks"] = external(settings.include_path)
    work = context.work("a task of lm-evaluation-harness")
    return context.run.execute(Stage(f"lm_eval_{task}@{name}", build, identity, inputs, work))


def _metrics(config: EvalConfig, measured: Artifact, second_pass: Sequence[Artifact]) -> list[Metric]:
    found = json.loads((measured.path / RESULTS).read_text())
    metrics = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error, bounds = values.get(f"{metric}_stderr,{filtered}"), ()
            if isinstance(error, int | float):
                bounds = (value - Z95 * error, value + Z95 * error, "normal, the harness's standard error")
            name = metric if filtered == "none" else f"{metric}/{filtered}"
            metrics.append(Metric(f"{task}/{name}", value, found["n"].get(task, 0), *bounds))
    return metrics
