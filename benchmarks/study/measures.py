"""What is measured of a checkpoint in the study."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import nn

from benchmarks.study.world import SAMPLES, TEMPERATURE, Pair, World, is_right, own_rows, sample, score
from spo_ray.core.text_metrics import repetition
from spo_ray.data.grade import pass_at_k
from spo_ray.data.toy import Problem
from spo_ray.runtime.schema import SIDES

Measured = dict[str, Any]


def validated(world: World, model: nn.Module) -> Measured:
    """Return greedy and sampled accuracy on the validation questions, by which settings are chosen."""
    return greedy(world, model, world.validation) | sampled(world, model, world.validation, 4)


def tested(world: World, model: nn.Module) -> Measured:
    """Return all measures: those of :func:`front`, of samples of the test questions, and of the training pairs."""
    found = front(world, model) | sampled(world, model, world.test, SAMPLES)
    return found | pair_changes(world, model, world.pairs, "train")


def front(world: World, model: nn.Module) -> Measured:
    """Return the measures of the fronts, on the test questions and the held-out pairs.

    ``right`` has a digit for each question. KL divergences are estimated from one sample at temperature 1 for each test
    question, in nats.
    """
    found = greedy(world, model, world.test) | pair_changes(world, model, world.held_out, "held_out")
    samples = own_rows(model, world.chat, [world.chat.prompt_ids(q.question) for q in world.test])
    from_reference = [score(m, world.chat, world.own) for m in (world.reference, model)]
    from_policy = [score(m, world.chat, samples) for m in (model, world.reference)]
    found["kl_reference_to_policy"] = fmean(a - b for a, b in zip(*from_reference, strict=True))
    found["kl_policy_to_reference"] = fmean(a - b for a, b in zip(*from_policy, strict=True))
    found["entropy"] = -fmean(from_policy[0])
    found["tokens"] = fmean(len(ids) for _, ids in samples)
    return found | {"repetition": fmean(repetition(ids) for _, ids in samples)}


def greedy(world: World, model: nn.Module, questions: Sequence[Problem]) -> Measured:
    """Return the greedy accuracy with each question's digit."""
    answers = sample(model, world.chat, questions, 1, 0.0)
    right = [is_right(texts[0], question) for texts, question in zip(answers, questions, strict=True)]
    return {"greedy": fmean(right), "right": "".join(str(int(value)) for value in right)}


def sampled(world: World, model: nn.Module, questions: Sequence[Problem], count: int) -> Measured:
    """Return accuracy and pass@k of ``count`` samples."""
    drawn = sample(model, world.chat, questions, count, TEMPERATURE)
    counts = [sum(is_right(text, q) for text in texts) for texts, q in zip(drawn, questions, strict=True)]
    return {"sampled": fmean(counts) / count, f"pass@{count}": fmean(pass_at_k(count, c, count) for c in counts)}


def pair_changes(world: World, model: nn.Module, pairs: Sequence[Pair], where: str) -> Measured:
    """Return the pairs' mean changes of log pi since the reference in nats, margin, and share in the right order."""
    changes = {side: change(world, model, pairs, side) for side in SIDES}
    margins = [w - losing for w, losing in zip(*(changes[side] for side in SIDES), strict=True)]
    found = {f"{where}/{side}": fmean(values) for side, values in changes.items()}
    return found | {f"{where}/in_order": fmean(m > 0 for m in margins), f"{where}/margin": fmean(margins)}


def change(world: World, model: nn.Module, pairs: Sequence[Pair], side: str) -> list[float]:
    """Return the change of each pair's log pi on one side since the reference."""
    now = score(model, world.chat, [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs])
    return [value - pair[f"ref_{side}_logps"] for value, pair in zip(now, pairs, strict=True)]
