"""Sampling from models: Ray Data over a pool of engines, or over requests to an endpoint."""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from spo_ray.config.data import EndpointConfig, EngineConfig, SamplingConfig, TeacherModel
from spo_ray.config.model import OWN_TEMPLATE, TemplateConfig
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.model.completion import Generations, Skipped, choose_engine
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, external, require_rows
from spo_ray.runtime.cluster import engine_gpus, engine_work
from spo_ray.runtime.map_rows import Mapped, Mapper, Pool, Row, map_shards
from spo_ray.runtime.run import Run, Stage, times

Answerer = Callable[[Sequence[tuple[str, int]]], Sequence[Generations | Skipped]]
"""Returns the answers to each (prompt, seed)."""


class SamplingJob(NamedTuple):
    """Model, engine and settings of a sampling stage."""

    model: Artifact
    engine: EngineConfig | EndpointConfig
    sampling: SamplingConfig
    template: TemplateConfig = OWN_TEMPLATE
    enough: int | None = None
    """Number of responses with which a question is passed on without samples; None: all questions are sampled."""
    settings: str = "engine.replicas, engine.cpus"
    """Settings to lower where the cluster is too small."""

    @classmethod
    def policy(cls, config: Config, model: Artifact) -> "SamplingJob":
        """Return the job for the base model, or a checkpoint that was trained from it."""
        return cls(model, config.engine, config.sampling, config.model)

    @classmethod
    def teacher(cls, config: Config, teacher: TeacherModel) -> "SamplingJob":
        """Return the job for a teacher, which answers questions that the policy fails.

        The artifact of a hub id or of an endpoint's model is its name.
        """
        served = isinstance(teacher.engine, EndpointConfig)
        model = Artifact(Path(teacher.model), teacher.model) if served else external(teacher.model)
        enough = config.sft_data.responses_per_question
        template = TemplateConfig(template_date=config.model.template_date)
        settings = "the engine of sft_data.teachers"
        return cls(model, teacher.engine, teacher.sampling, template, enough, settings)

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that samples depend on, besides the model and the questions."""
        if isinstance(self.engine, EndpointConfig):
            engine: dict[str, Any] = {"engine": "endpoint", "url": self.engine.url}
            engine |= {"request": self.engine.request} if self.engine.request else {}
        else:
            engine = {"engine": choose_engine(self.engine)[0]}
            engine |= self.engine.model_dump(include={"dtype", "max_model_len", "arguments"})
        own = {"template": self.template.template_settings, "enough": self.enough}
        return engine | own | self.sampling.model_dump()


def sample(run: Run, name: str, source: SamplingJob, questions: Artifact) -> Artifact:
    """Sample ``sampling.samples`` responses to every question (:class:`schema.Samples`).

    ``questions`` holds :class:`schema.Prompt` or :class:`schema.SftQuestion`. Each question has a seed of its own, made
    of the run's seed, the stage and the question's id, so a retried batch gives the same samples.
    """
    sampling, kind = source.sampling, source.identity["engine"]

    def build(out: Path, counts: RowCounts) -> None:
        require_rows(questions.count, f"questions for {name}")
        counts.facts |= {"engine": kind, "model": str(source.model.path)}
        mapper, pool = _answering(source, f"{run.config.seed}:{name}")
        size = sampling.batch_size
        map_shards(name, questions, out, counts, mapper=mapper, kind=schema.Samples, batch_size=size, pool=pool)
        _count_refusals(name, out, counts)

    inputs, bound = {"model": source.model, "questions": questions}, questions.max_rows
    note = f"{sampling.samples} samples a question by {source.model.path.name}"
    tokens = times(bound, sampling.samples * sampling.max_tokens)
    work = engine_work(source.engine, source.settings, note, rows=bound, tokens=tokens)
    return run.execute(Stage(name, build, source.identity, inputs, work, resumable=True))


def _count_refusals(name: str, out: Path, counts: RowCounts) -> None:
    """Count the questions that a teacher refused.

    Raises:
        UserError: it refused all; the parts are deleted, so that the next run asks again.
    """
    made = Artifact(out, "")
    asked = sum(seed is not None for seed in made.column("seed"))
    reasons = [reason for reason in made.column("refused") if reason]
    counts.facts |= {"asked": asked, "refused": {reason: reasons.count(reason) for reason in sorted(set(reasons))}}
    if asked and len(reasons) == asked:
        for part in made.parts:
            Path(part).unlink()
        raise UserError(f"{name}: the teacher answered none of {asked} questions: {reasons[0]}")


def row_seed(*parts: object) -> int:
    """Return a 31-bit seed that depends on the printed form of the parts."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def _answering(source: SamplingJob, seed: str) -> tuple[Any, Pool]:
    engine = source.engine
    if isinstance(engine, EndpointConfig):
        return partial(_sampler, source, seed, key=os.environ.get(engine.api_key_env)), Pool(1, 0.1)
    pool = Pool(engine.replicas, engine.cpus, engine_gpus(engine), engine.max_replicas, engine.timeout_s)
    return partial(_sampler, source, seed, kind=choose_engine(engine)[0]), pool


def _sampler(source: SamplingJob, seed: str, kind: str = "", key: str | None = None) -> Mapper:
    """Connect to an endpoint with ``key``, or load the model into an engine of ``kind``."""
    engine, model, settings = source.engine, str(source.model.path), source.sampling
    if isinstance(engine, EndpointConfig):
        from spo_ray.model.endpoint import EndpointAnswers

        return _Sampler(EndpointAnswers(key, model, engine, settings), source, seed)
    from spo_ray.model.engines import LocalAnswers

    answers = LocalAnswers(kind, model, engine, source.template)
    ask = partial(answers, n=settings.samples, temperature=settings.temperature, max_tokens=settings.max_tokens)
    return _Sampler(ask, source, seed)


class _Sampler:
    """Mapper from questions to questions with samples."""

    def __init__(self, answer: Answerer, source: SamplingJob, seed: str) -> None:
        self.answer, self.source, self.seed = answer, source, seed

    def __call__(self, batch: list[Row]) -> Mapped:
        carried: list[Row] = [{"responses": [], "response_sources": []} | row for row in batch]
        enough = self.source.enough
        seeds = [
            row_seed(self.seed, row["id"]) if enough is None or len(row["responses"]) < enough else None
            for row in carried
        ]
        asked = [(row["prompt"], seed) for row, seed in zip(carried, seeds, strict=True) if seed is not None]
        answers = iter(self.answer(asked) if asked else [])
        kept: list[Row] = []
        rejected: list[schema.Rejected] = []
        for row, seed in zip(carried, seeds, strict=True):
            found = next(answers) if seed is not None else Generations([], [])
            if isinstance(found, Skipped) and enough is None:
                rejected.append({"id": row["id"], "reason": found.reason, "excerpt": row["prompt"][:200]})
                continue
            refused = None
            if isinstance(found, Skipped):  # another teacher may answer the question
                found, refused = Generations([], []), found.reason
            made = {"seed": seed, "prompt_ids": found.prompt_ids, "refused": refused}
            kept.append(row | made | _columns(found))
        return kept, rejected


def _columns(answers: Generations) -> Row:
    names = {"samples": "text", "sample_logps": "logp", "sample_tokens": "tokens", "finished": "finished"}
    return {column: [getattr(c, field) for c in answers.completions] for column, field in names.items()}
