"""Evaluates checkpoints that were trained elsewhere, in a run of its own."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from spo_ray.config.schema import Config
from spo_ray.data.sources import load_data
from spo_ray.errors import UserError
from spo_ray.evaluate.evaluations import Evaluation, Evaluations
from spo_ray.evaluate.statistics import in_words
from spo_ray.model.adapter import adapted, is_adapter
from spo_ray.model.checkpoint_files import check_checkpoint
from spo_ray.pipeline.checks import check_evaluation
from spo_ray.runtime.artifact import Artifact, external, on_hub, write_json
from spo_ray.runtime.cluster import connect
from spo_ray.runtime.console import show
from spo_ray.runtime.run import PlannedRun, Run
from spo_ray.runtime.status import recorded


def evaluate_checkpoints(config: Config, checkpoints: Mapping[str, str], *, verify: bool = False) -> None:
    """Evaluate checkpoints in the run ``NAME-evaluation``, and print their metrics.

    Args:
        config: names the data, the engine and the suites.
        checkpoints: folders or hub ids by name; a folder may contain a PEFT adapter. The log-probabilities of the
            others are compared with those of the checkpoint named ``sft`` (``reference`` where the section ``sft`` is
            null).
        verify: compare the contents of finished stages' files too, see :class:`spo_ray.runtime.run.Run`.

    Raises:
        UserError: a folder contains neither a model nor an adapter, or the data or the cluster can't be used.
    """
    config = config.model_copy(update={"name": f"{config.name}-evaluation"})
    artifacts = {name: _checkpoint(name, path) for name, path in checkpoints.items()}
    check_evaluation(config)
    plan, run = PlannedRun(config, verify=verify), Run(config, verify=verify)
    _evaluate(plan, artifacts)
    with run.locked(), recorded(run):
        run.planned = plan.planned
        found = _evaluate(run, artifacts)
        table = found.scores.rows()
        write_json(run.root / "scores.json", {"scores": table, "comparisons": found.comparisons.rows()})
    for row in table:
        interval = "" if row["low"] is None else f"  ({row['low']:.4g} to {row['high']:.4g})"
        show(f"{row['checkpoint']:<12} {row['suite']}/{row['metric']:<28} {row['value']:.4g}{interval}")
    for row in found.comparisons.rows():
        show(f"{row['metric']}: {in_words(row)} (p {row['p_adjusted']:.2g})")


def _evaluate(run: Run, checkpoints: Mapping[str, Artifact]) -> Evaluation:
    data = load_data(run, "test")
    if run.mode == "execute":
        connect(run.config, run.planned)
    with Evaluations(run) as evaluations:
        return evaluations.finish(data, checkpoints)


def _checkpoint(name: str, path: str) -> Artifact:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"a checkpoint can't be called {name!r}: use letters, digits, '.', '_' and '-' only")
    if not on_hub(Path(path)) and not is_adapter(path) and not (Path(path) / "config.json").is_file():
        raise UserError(f"no model in {path} (neither config.json nor adapter_config.json there)")
    check_checkpoint(path)
    found = external(path)
    if not is_adapter(path):
        return found
    below = external(adapted(Path(path)))
    return Artifact(found.path, hashlib.sha256(f"{found.digest} {below.digest}".encode()).hexdigest())
