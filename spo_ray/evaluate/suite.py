"""Interface of an evaluation suite, and the context in which it measures checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spo_ray.config.evaluate import EvalConfig
from spo_ray.evaluate.actors import EvaluatorHandle, Pass
from spo_ray.model.completion import Generations, Skipped
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.cluster import engine_work
from spo_ray.runtime.console import progress
from spo_ray.runtime.map_rows import Row
from spo_ray.runtime.run import Run, Work


class Metric(NamedTuple):
    """A measured figure with its 95% interval, if it has one; see :class:`spo_ray.runtime.schema.Score`."""

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
    """Run, data and evaluator with which a suite measures checkpoints."""

    run: Run
    data: Artifact
    """Held-out questions (:class:`spo_ray.runtime.schema.Prompt`) or pairs (:class:`spo_ray.runtime.schema.Pair`)."""
    evaluator: EvaluatorHandle
    reference: Artifact | None = None
    """The suite's result for the reference model; None while that is measured, and for the base model."""

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that answers depend on, besides the checkpoint and the suite's own settings."""
        config = self.run.config
        engine = config.engine.model_dump(include={"dtype", "max_model_len", "arguments"})
        return {"engine": self.evaluator.kind, "template": config.model.template_settings, **engine}

    def work(self, note: str, **bounds: Any) -> Work:
        """Return the work of a stage that asks the policy's engines, with its ``bounds``: rows, out and tokens."""
        return engine_work(self.run.config.engine, "engine.replicas, engine.cpus", note, **bounds)

    def provenance(self, checkpoint: Artifact, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Return the facts for a stage's manifest (:class:`spo_ray.runtime.schema.Provenance`)."""
        described = self.evaluator.describe(checkpoint.path)
        return {"provenance": {"model": checkpoint.digest, "sampling": dict(sampling), **described}}

    def answer(
        self, checkpoint: Artifact, rows: Sequence[Row], passes: Sequence[Pass], max_tokens: int, column: str = "prompt"
    ) -> Iterator[tuple[int | None, Row, Generations | Skipped]]:
        """Answer the prompts in a column once for each pass; yield (seed, row, answer)."""
        size, total = self.run.config.eval.batch_size, len(passes) * len(rows)
        with progress(f"answers of {checkpoint.path.name}") as update:
            for done, one in enumerate(passes):
                for start in range(0, len(rows), size):
                    part = rows[start : start + size]
                    asked = [(row["id"], row[column]) for row in part]
                    (answers,) = self.evaluator.answer(checkpoint.path, asked, [one], max_tokens, size)
                    count = done * len(rows) + start + len(part)
                    update(count, total, f"{count}/{total} written")
                    yield from ((one.seed, row, answer) for row, answer in zip(part, answers, strict=True))


Results = Mapping[str, Artifact]
"""Artifacts by checkpoint."""


@dataclass(frozen=True)
class Suite:
    """Functions that measure checkpoints; each one makes or reads stages of the run."""

    measure: Callable[[SuiteContext, str, Artifact], Artifact]
    """Measures one checkpoint by itself."""
    metrics: Callable[[EvalConfig, Artifact, Sequence[Artifact]], list[Metric]]
    """Computes a checkpoint's metrics from the artifacts of ``measure`` and ``second_pass``."""
    second_pass: Callable[[SuiteContext, Results, Results], dict[str, list[Artifact]]] | None = None
    """Measures what needs another model, such as a judge, from all checkpoints and the results of ``measure``; returns
    artifacts by checkpoint."""
