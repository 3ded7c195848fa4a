"""Builds the SFT set from graded samples and teachers; appendix B of the paper."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spo_ray.config.data import SftDataConfig, TeacherModel
from spo_ray.data.grade import ROWS_PER_SHARD, Sample, _samples, _stripped, grade_samples, pass_at_k
from spo_ray.data.sample import SamplingJob, sample
from spo_ray.errors import RowRejectedError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, require_rows
from spo_ray.runtime.map_rows import Mapper, Row, each_row, map_shards
from spo_ray.runtime.run import Run, Stage, Work


def sft_set(run: Run, base: Artifact, questions: Artifact) -> Artifact:
    """Choose questions that the base model often fails, with their correct responses (:class:`schema.SftQuestion`).

    Teachers are asked in their order, models only where responses still lack.
    """
    config = run.config
    groups = teacher_groups(config.sft_data.teachers)
    samples = sample(run, "base_samples", SamplingJob.policy(config, base), questions)
    scored = grade_samples(run, "base_scores", samples)
    chosen = choose_sft_questions(run, "sft_questions", scored, groups[0][1], last=len(groups) == 1)
    for number, (teacher, others) in enumerate(groups[1:], 1):
        name = f"teacher{number}"
        assert teacher is not None
        answers = sample(run, f"{name}_samples", SamplingJob.teacher(config, teacher), chosen)
        graded = grade_samples(run, f"{name}_scores", answers)
        last = number == len(groups) - 1
        chosen = add_responses(run, f"{name}_responses", graded, ["samples", *others], last)
    return chosen


def teacher_groups(teachers: Sequence[str | TeacherModel]) -> list[tuple[TeacherModel | None, list[str]]]:
    """The teachers that need no sampling of their own, then every model with those that come after it."""
    groups: list[tuple[TeacherModel | None, list[str]]] = [(None, [])]
    for teacher in teachers:
        if isinstance(teacher, TeacherModel):
            groups.append((teacher, []))
        else:
            groups[-1][1].append(teacher)
    return groups


def correct_responses(
    found: Sequence[tuple[str, str]],
    gold: str,
    samples: Sequence[Sample],
    *,
    stage: str,
    teachers: Sequence[str],
    limit: int,
) -> list[tuple[str, str]]:
    """Up to ``limit`` distinct correct (response, source) of one question, by the order of ``teachers``.

    Args:
        found: those from teachers before.
        gold: the reference solution, for the teacher ``gold``.
        samples: of a model, for the teacher ``samples``: correct ones that end by themselves.
        stage: what a sample's source is called after.
        teachers: the order.
        limit: how many.
    """
    sources = {
        "gold": [(gold, "gold")],
        "samples": [(s.text, f"{stage}:{s.index}") for s in samples if s.correct and s.finished],
    }
    texts: dict[str, str] = {}
    for text, source in (*found, *(pair for teacher in teachers for pair in sources[teacher])):
        if text.strip():
            texts.setdefault(text.strip(), source)
    return list(texts.items())[:limit]


ROUNDING = 1e-9  # 1 - 0.7 is more than 0.3


def choose_sft_questions(run: Run, name: str, scored: Artifact, teachers: Sequence[str], last: bool) -> Artifact:
    """Questions with a low pass@k, with correct responses by the first teachers (:class:`schema.SftQuestion`)."""
    config = run.config.sft_data
    chosen = config.model_dump(include={"pass_k", "max_pass", "quantile"})
    what = "questions for the SFT set (sft_data.max_pass, sft_data.teachers)"
    share = f"at most {config.max_pass}" if config.quantile is None else f"among the lowest {config.quantile:.0%}"
    note = f"questions with pass@{config.pass_k} {share}"
    return _collect(run, name, scored, teachers, what, last, chosen, note, partial(_highest_pass, config, scored))


def add_responses(run: Run, name: str, scored: Artifact, teachers: Sequence[str], last: bool) -> Artifact:
    """Correct responses of further teachers (:class:`schema.SftQuestion`); ``samples`` are those of the stage."""
    what = "questions with a correct response (sft_data.teachers)"
    return _collect(run, name, scored, teachers, what, last, {}, "correct responses added")


def _collect(
    run: Run,
    name: str,
    scored: Artifact,
    teachers: Sequence[str],
    what: str,
    last: bool,
    identity: dict[str, Any],
    note: str,
    highest_pass: Callable[[], float] | None = None,
) -> Artifact:
    config = run.config.sft_data
    stage = scored.path.name.replace("_scores", "_samples")

    def build(out: Path, counts: RowCounts) -> None:
        max_pass = highest_pass() if highest_pass else None
        collector = partial(_collector, config, stage, list(teachers), last, max_pass)
        map_shards(name, scored, out, counts, mapper=collector, kind=schema.SftQuestion, batch_size=ROWS_PER_SHARD)
        require_rows(Artifact(out, "").count, what)
        counts.facts |= {} if max_pass is None else {"max_pass": max_pass}

    settings = identity | config.model_dump(include={"responses_per_question", "strip"}) | {"teachers": list(teachers)}
    inputs = {"scored": scored}
    work = Work(scored.max_rows, cpus=1, note=note)
    return run.execute(Stage(name, build, settings | {"last": last}, inputs, work, resumable=True))


def _highest_pass(config: SftDataConfig, scored: Artifact) -> float:
    if config.quantile is None:
        return float(config.max_pass or 0.0)
    rates = sorted(pass_at_k(len(correct), sum(correct), config.pass_k) for correct in scored.column("correct"))
    return rates[max(0, round(config.quantile * len(rates)) - 1)] if rates else 0.0


def _collector(
    config: SftDataConfig, stage: str, teachers: Sequence[str], last: bool, max_pass: float | None
) -> Mapper:
    def collect(row: Row) -> list[Row]:
        if max_pass is not None:
            rate = pass_at_k(len(row["correct"]), sum(row["correct"]), config.pass_k)
            if rate > max_pass + ROUNDING:
                raise RowRejectedError(f"pass@{config.pass_k} above {max_pass:g}")
        found = correct_responses(
            list(zip(row["responses"], row["response_sources"], strict=True)),
            _stripped(row["gold"], config.strip),
            _samples(row),
            stage=stage,
            teachers=teachers,
            limit=config.responses_per_question,
        )
        if last and not found:
            names = [t.model if isinstance(t, TeacherModel) else t for t in config.teachers]
            raise RowRejectedError(f"no correct response from {', '.join(names)}")
        sides = {"responses": [text for text, _ in found], "response_sources": [source for _, source in found]}
        return [{key: row[key] for key in ("id", "prompt", "gold")} | sides]

    return each_row(collect)
