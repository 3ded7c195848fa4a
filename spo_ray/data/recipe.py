"""Appendix B of the paper: the SFT set from low-pass questions and teachers, and pairs from a policy's own mistakes."""

from collections.abc import Sequence

from spo_ray.data.clean import clean_pairs
from spo_ray.data.sample import Source, sample
from spo_ray.data.stages import add_responses, choose_sft_questions, pair_samples, score
from spo_ray.data_config import TeacherModel
from spo_ray.run import Artifact, Run


def sft_set(run: Run, base: Artifact, questions: Artifact) -> Artifact:
    """Questions that the base model often fails, with up to so many correct responses each (:class:`rows.SftQuestion`).

    Teachers are asked in their order, models only where responses still lack.
    """
    config = run.config
    groups = teacher_groups(config.sft_data.teachers)
    samples = sample(run, "base_samples", Source.policy(config, base), questions)
    scored = score(run, "base_scores", samples)
    chosen = choose_sft_questions(run, "sft_questions", scored, groups[0][1], last=len(groups) == 1)
    for number, (teacher, others) in enumerate(groups[1:], 1):
        name = f"teacher{number}"
        assert teacher is not None
        answers = sample(run, f"{name}_samples", Source.teacher(config, teacher), chosen)
        graded = score(run, f"{name}_scores", answers)
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


def preference_pairs(run: Run, policy: Artifact, questions: Artifact, suffix: str = "") -> Artifact:
    """SFT responses against wrong samples of a policy (:class:`rows.Pair`), cleaned."""
    name = suffix.removeprefix("_") or "sft"
    samples = sample(run, f"{name}_samples", Source.policy(run.config, policy), questions)
    scored = score(run, f"{name}_scores", samples)
    return clean_pairs(run, f"pairs{suffix}", pair_samples(run, f"pair_candidates{suffix}", scored))
