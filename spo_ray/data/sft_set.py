"""Builds the SFT set from graded samples and teachers; appendix B of the paper."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from spo_ray.config.data import SftDataConfig, TeacherModel
from spo_ray.data.grade import ROWS_PER_SHARD, Sample, grade_samples, pass_at_k, samples_of, samples_stage, strip
from spo_ray.data.sample import SamplingJob, sample
from spo_ray.errors import RowRejectedError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, require_rows
from spo_ray.runtime.map_rows import Mapper, Row, each_row, map_shards
from spo_ray.runtime.run import Run, Stage, Work

ROUNDING = 1e-9
"""Tolerance when a pass@k is compared: in floating point, 1 - 0.7 is more than 0.3."""


def sft_set(run: Run, base: Artifact, questions: Artifact) -> Artifact:
    """Choose questions that the base model often fails, with correct responses (:class:`schema.SftQuestion`).

    Teachers are asked in their order. A teacher that is a model is only asked where responses are still missing.
    """
    config = run.config
    (_, others), *models = teacher_groups(config.sft_data.teachers)
    samples = sample(run, "base_samples", SamplingJob.policy(config, base), questions)
    scored = grade_samples(run, "base_scores", samples)
    chosen = collect_responses(run, "sft_questions", scored, others, choose=True, last=not models)
    for number, (teacher, others) in enumerate(models, 1):
        name = f"teacher{number}"
        assert teacher is not None
        answers = sample(run, f"{name}_samples", SamplingJob.teacher(config, teacher), chosen)
        scored = grade_samples(run, f"{name}_scores", answers)
        last = number == len(models)
        chosen = collect_responses(run, f"{name}_responses", scored, ["samples", *others], last=last)
    return chosen


def teacher_groups(teachers: Sequence[str | TeacherModel]) -> list[tuple[TeacherModel | None, list[str]]]:
    """Return (None, teachers before the first model), then every model with the teachers behind it."""
    groups: list[tuple[TeacherModel | None, list[str]]] = [(None, [])]
    for teacher in teachers:
        if isinstance(teacher, TeacherModel):
            groups.append((teacher, []))
        else:
            groups[-1][1].append(teacher)
    return groups


def collect_responses(
    run: Run, name: str, scored: Artifact, teachers: Sequence[str], *, choose: bool = False, last: bool
) -> Artifact:
    """Add correct responses of further teachers to questions (:class:`schema.SftQuestion`).

    ``teachers`` are ``samples`` (the graded ones) and ``gold``, in the order of preference. ``choose`` keeps only
    questions with a low pass@k; ``last`` drops questions that have no correct response.
    """
    config, fields = run.config.sft_data, {"responses_per_question", "strip"}
    what, note = "questions with a correct response (sft_data.teachers)", "correct responses added"
    if choose:
        fields |= {"pass_k", "max_pass", "quantile"}
        what = "questions for the SFT set (sft_data.max_pass, sft_data.teachers)"
        share = f"at most {config.max_pass}" if config.quantile is None else f"among the lowest {config.quantile:.0%}"
        note = f"questions with pass@{config.pass_k} {share}"

    def build(out: Path, counts: RowCounts) -> None:
        max_pass = _highest_pass(config, scored) if choose else None
        collector = partial(_collector, config, samples_stage(scored), teachers, last, max_pass)
        map_shards(name, scored, out, counts, mapper=collector, kind=schema.SftQuestion, batch_size=ROWS_PER_SHARD)
        require_rows(Artifact(out, "").count, what)
        if max_pass is not None:
            counts.facts["max_pass"] = max_pass

    settings = config.model_dump(include=fields) | {"teachers": list(teachers), "last": last}
    work = Work(scored.max_rows, cpus=1, note=note)
    return run.execute(Stage(name, build, settings, {"scored": scored}, work, resumable=True))


def correct_responses(
    found: Sequence[tuple[str, str]],
    gold: str,
    samples: Sequence[Sample],
    *,
    stage: str,
    teachers: Sequence[str],
    limit: int,
) -> list[tuple[str, str]]:
    """Return up to ``limit`` distinct correct (response, source) of one question, in the order of ``teachers``.

    Args:
        found: pairs of earlier teachers; they come first.
        gold: the reference solution, for the teacher ``gold``.
        samples: graded samples, for the teacher ``samples``; the correct ones that end by themselves are used.
        stage: the stage of the samples, for their source.
        teachers: ``samples`` and ``gold``, in the order of preference.
        limit: the highest number of pairs.
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


def _highest_pass(config: SftDataConfig, scored: Artifact) -> float:
    """Return the highest pass@k of a chosen question."""
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
        before = list(zip(row["responses"], row["response_sources"], strict=True))
        gold, limit = strip(row["gold"], config.strip), config.responses_per_question
        found = correct_responses(before, gold, samples_of(row), stage=stage, teachers=teachers, limit=limit)
        if last and not found:
            names = [t.model if isinstance(t, TeacherModel) else t for t in config.teachers]
            raise RowRejectedError(f"no correct response from {', '.join(names)}")
        sides = {"responses": [text for text, _ in found], "response_sources": [source for _, source in found]}
        return [{key: row[key] for key in ("id", "prompt", "gold")} | sides]

    return each_row(collect)
