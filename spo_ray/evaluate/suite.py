"""What a suite of tests is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spo_ray.config.evaluate import EvalConfig
from spo_ray.evaluate.actors import Actors, Call
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.cluster import engine_work
from spo_ray.runtime.run import Run, Work


class Metric(NamedTuple):
    """One figure, with its 95% interval where it has one; see :class:`spo_ray.runtime.schema.Score`."""

    metric: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    std: float | None = None
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class SuiteContext:
    """Where a checkpoint is measured."""

    run: Run
    data: Artifact
    """Held-out questions (:class:`spo_ray.runtime.schema.Prompt`) or pairs (:class:`spo_ray.runtime.schema.Pair`)."""
    actors: Actors
    call: Call
    sft: Artifact | None = None
    """The suite's result for the SFT model; None while that is measured, and for the base model."""

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on, besides the checkpoint and the suite's own settings."""
        config = self.run.config
        engine = config.engine.model_dump(include={"dtype", "max_model_len", "arguments"})
        return {"engine": self.actors.kind, "chat_template": config.model.chat_template, **engine}

    def work(self, note: str, **bounds: Any) -> Work:
        """Return the work of a stage that asks the policy's engines, with its ``bounds``: rows, out and tokens."""
        return engine_work(self.run.config.engine, "engine.replicas, engine.cpus", note, **bounds)

    def provenance(self, checkpoint: Artifact, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """For the manifest; :class:`spo_ray.runtime.schema.Provenance`."""
        described = self.call("describe", str(checkpoint.path))
        return {"provenance": {"model": checkpoint.digest, "sampling": dict(sampling), **described}}


Results = Mapping[str, Artifact]
"""By checkpoint."""


@dataclass(frozen=True)
class Suite:
    """Tests of checkpoints: each function makes or reads stages of the run."""

    measure: Callable[[SuiteContext, str, Artifact], Artifact]
    """One checkpoint by itself."""
    estimate: Callable[[EvalConfig, Artifact, Sequence[Artifact]], list[Metric]]
    """A checkpoint's figures, from what ``measure`` and ``conclude`` made."""
    conclude: Callable[[SuiteContext, Results, Results], dict[str, list[Artifact]]] | None = None
    """From all checkpoints and what was measured of them: what needs another model, by checkpoint."""
