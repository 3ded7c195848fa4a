"""Suites ``lm_eval:TASK``: tasks of lm-evaluation-harness on this run's engines, with its chat template."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spo_ray import rows
from spo_ray.core.stats import Z95
from spo_ray.errors import UserError
from spo_ray.eval_config import EvalConfig, LmEvalConfig
from spo_ray.evaluate.suite import Bench, Estimate, Suite
from spo_ray.run import Artifact, Ledger, external, write_json, write_rows

RESULTS = "results.json"


def suite(task: str) -> Suite:
    """The suite of one task or group of tasks."""
    return Suite(partial(_measure, task), _estimate)


def _measure(task: str, bench: Bench, name: str, checkpoint: Artifact) -> Artifact:
    """The harness's own results, as it prints them (results.json)."""
    settings: LmEvalConfig = bench.run.config.eval.lm_eval
    if settings.include_path:  # actors work elsewhere
        settings = settings.model_copy(update={"include_path": settings.include_path.absolute()})

    def build(out: Path, ledger: Ledger) -> None:
        sampling = settings.model_dump(mode="json", exclude={"include_path"}) | {"task": task}
        ledger.facts |= bench.provenance(checkpoint, sampling)
        found = bench.call("harness", str(checkpoint.path), task, settings, bench.run.config.seed)
        ledger.read = ledger.kept = sum(found["n"].values())
        write_json(out / RESULTS, found)
        write_rows(out / "part-0.parquet", [], rows.Score)  # the harness keeps its rows to itself

    identity = bench.identity | settings.model_dump(exclude={"include_path"}) | {"task": task}
    inputs = {"model": checkpoint}
    if settings.include_path:
        inputs["tasks"] = external(settings.include_path)
    return bench.run.stage(f"lm_eval_{task}@{name}", build, config=identity, inputs=inputs)


def _estimate(config: EvalConfig, measured: Artifact, concluded: Sequence[Artifact]) -> list[Estimate]:
    found = json.loads((measured.path / RESULTS).read_text())
    estimates = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            bounds = ()
            if isinstance(error, int | float):
                bounds = (value - Z95 * error, value + Z95 * error, "normal, the harness's standard error")
            name = metric if filtered == "none" else f"{metric}/{filtered}"
            estimates.append(Estimate(f"{task}/{name}", value, found["n"].get(task, 0), *bounds))
    return estimates


def known_task(task: str, settings: LmEvalConfig) -> Any:
    """The harness's task manager.

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
    return manager


def run_task(local: Any, task: str, settings: LmEvalConfig, seed: int) -> dict[str, Any]:
    """Run a task with an engine in this process (:class:`spo_ray.data.engines.LocalAnswers`).

    Returns:
        The harness's ``results`` by task, and ``n``, the documents of each.
    """
    from lm_eval import simple_evaluate

    from spo_ray.evaluate.harness_model import EngineLM

    manager = known_task(task, settings)
    found: Any = simple_evaluate(
        model=EngineLM(local),
        tasks=[task],
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=manager,
        apply_chat_template=True,
        log_samples=False,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    counts = {name: samples["effective"] for name, samples in found["n-samples"].items()}
    counts |= {name: sum(counts.values()) for name in found["results"] if name not in counts}  # a group of tasks
    return {"results": found["results"], "n": counts}
