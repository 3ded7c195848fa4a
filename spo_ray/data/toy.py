"""The toy task: procedural word problems whose answers look like GSM8K's.

Eleven kinds of one- and two-step problems. A solution reads ``First, 20 + 9 = 29. Then, 20 + 29 = 49.`` and ends
in ``#### 49``. The pre-training text contains systematic reasoning errors and arithmetic slips, so a model trained
on it solves only part of the problems and leaves room for SFT and preference optimisation.

Whether a problem is held out depends on a hash of its question alone: a training row can never be a test row,
whatever the seeds.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
HELD_OUT_SHARE = 0.2
PREVIOUS = -1
"""Operand that stands for the result of the step before."""
Step = tuple[str, int, int]
"""(operator, left operand, right operand)."""
NAMES = ("Ada", "Bo", "Cal", "Dee", "Eli", "Fay", "Gus", "Ida", "Jon", "Kim", "Lou", "Mae", "Ned", "Pam", "Ray", "Sue")
ITEMS = ("apples", "beads", "cards", "disks", "forks", "kites", "lamps", "pens", "rings", "toys")
CONTAINERS = ("bags", "boxes", "crates", "jars", "trays")
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
SLIPS = (-10, -2, -1, 1, 2, 10)
SLIP_RATE = 0.10


@dataclass(frozen=True)
class Problem:
    """One word problem: its correct steps, and the step lists of its typical reasoning errors."""

    kind: str
    question: str
    steps: list[Step]
    mistakes: list[list[Step]]

    @property
    def solution(self) -> str:
        """The reference solution, ending in ``#### answer``."""
        return render(self.steps)

    @property
    def held_out(self) -> bool:
        """True for problems of the test split."""
        return hashlib.sha256(self.question.encode()).digest()[0] < 256 * HELD_OUT_SHARE


@dataclass(frozen=True)
class _Draw:
    """The random ingredients of one problem; ``x`` to ``n`` are numbers of falling size."""

    who: str
    other: str
    item: str
    box: str
    x: int
    y: int
    z: int
    m: int
    n: int


def _draw(rng: random.Random) -> _Draw:
    who, other = rng.sample(NAMES, 2)
    sizes = [rng.randint(2, top) for top in (30, 20, 15, 6, 9)]
    return _Draw(who, other, rng.choice(ITEMS), rng.choice(CONTAINERS), *sizes)


def _gain(d: _Draw) -> Problem:
    question = f"{d.who} owns {d.x} {d.item} and finds {d.y} more. How many {d.item} does {d.who} own now?"
    return Problem("gain", question, [("+", d.x, d.y)], [[("-", max(d.x, d.y), min(d.x, d.y))]])


def _loss(d: _Draw) -> Problem:
    start = d.x + d.y
    question = f"{d.who} owns {start} {d.item} and loses {d.y}. How many {d.item} does {d.who} own now?"
    return Problem("loss", question, [("-", start, d.y)], [[("+", start, d.y)]])


def _packed(d: _Draw) -> Problem:
    question = f"Each of {d.m} {d.box} holds {d.n} {d.item}. How many {d.item} do the {d.box} hold?"
    return Problem("packed", question, [("*", d.m, d.n)], [[("+", d.m, d.n)]])


def _gain_loss(d: _Draw) -> Problem:
    start = d.x + d.z
    question = (
        f"{d.who} owns {start} {d.item}, finds {d.y} more and then loses {d.z}. How many {d.item} does {d.who} own now?"
    )
    steps = [("+", start, d.y), ("-", PREVIOUS, d.z)]
    return Problem("gain_loss", question, steps, [[("+", start, d.y)], [("-", start, d.z)]])


def _more_both(d: _Draw) -> Problem:
    question = (
        f"{d.who} owns {d.x} {d.item}. {d.other} owns {d.y} more than {d.who}. How many {d.item} do they own together?"
    )
    return Problem("more_both", question, [("+", d.x, d.y), ("+", d.x, PREVIOUS)], [[("+", d.x, d.y)]])


def _fewer_both(d: _Draw) -> Problem:
    first = d.x + d.y
    question = (
        f"{d.who} owns {first} {d.item}. {d.other} owns {d.y} fewer than {d.who}. "
        f"How many {d.item} do they own together?"
    )
    steps = [("-", first, d.y), ("+", first, PREVIOUS)]
    return Problem("fewer_both", question, steps, [[("-", first, d.y)], [("+", first, d.y)]])


def _times_both(d: _Draw) -> Problem:
    question = (
        f"{d.who} owns {d.n} {d.item}. {d.other} owns {d.m} times as many as {d.who}. "
        f"How many {d.item} do they own together?"
    )
    return Problem("times_both", question, [("*", d.n, d.m), ("+", d.n, PREVIOUS)], [[("*", d.n, d.m)]])


def _packed_loss(d: _Draw) -> Problem:
    lost = min(d.z, d.m * d.n - 1)
    question = (
        f"{d.who} owns {d.m} {d.box} of {d.n} {d.item} each and loses {lost} {d.item}. "
        f"How many {d.item} does {d.who} own now?"
    )
    steps = [("*", d.m, d.n), ("-", PREVIOUS, lost)]
    mistakes: list[list[Step]] = [[("*", d.m, d.n)]]
    if d.m + d.n > lost:
        mistakes.append([("+", d.m, d.n), ("-", PREVIOUS, lost)])
    return Problem("packed_loss", question, steps, mistakes)


def _packed_gain(d: _Draw) -> Problem:
    question = (
        f"{d.who} owns {d.m} {d.box} of {d.n} {d.item} each and {d.y} loose {d.item}. "
        f"How many {d.item} does {d.who} own?"
    )
    steps = [("*", d.m, d.n), ("+", PREVIOUS, d.y)]
    return Problem("packed_gain", question, steps, [[("*", d.m, d.n)], [("+", d.m, d.n), ("+", PREVIOUS, d.y)]])


def _reverse_more(d: _Draw) -> Problem:
    first = d.x + d.y
    question = (
        f"{d.who} owns {first} {d.item}, which is {d.y} more than {d.other} owns. How many {d.item} does {d.other} own?"
    )
    return Problem("reverse_more", question, [("-", first, d.y)], [[("+", first, d.y)]])


def _reverse_fewer(d: _Draw) -> Problem:
    question = (
        f"{d.who} owns {d.x} {d.item}, which is {d.y} fewer than {d.other} owns. How many {d.item} does {d.other} own?"
    )
    return Problem("reverse_fewer", question, [("+", d.x, d.y)], [[("-", max(d.x, d.y), min(d.x, d.y))]])


MAKERS: dict[Callable[[_Draw], Problem], float] = {
    _gain: 0.10,
    _loss: 0.10,
    _packed: 0.10,
    _gain_loss: 0.35,
    _more_both: 0.50,
    _fewer_both: 0.50,
    _times_both: 0.40,
    _packed_loss: 0.35,
    _packed_gain: 0.40,
    _reverse_more: 0.65,
    _reverse_fewer: 0.65,
}
"""Every kind of problem, with the share of wrong reasoning in the pre-training text."""


def render(steps: list[Step], slip: tuple[int, int] | None = None) -> str:
    """Write steps out as a solution; ``slip = (step index, error)`` falsifies one result, and later steps use it."""
    sentences, result = [], 0
    for index, (operator, left, right) in enumerate(steps):
        left = result if left == PREVIOUS else left
        right = result if right == PREVIOUS else right
        result = OPERATORS[operator](left, right)
        if slip is not None and slip[0] == index:
            result = max(0, result + slip[1])
        opening = "" if len(steps) == 1 else "Then, " if index else "First, "
        sentences.append(f"{opening}{left} {operator} {right} = {result}.")
    return f"{' '.join(sentences)}\n#### {result}"


def problems(split: Split, seed: int) -> Iterator[Problem]:
    """Endless distinct problems of one split, the same for the same seed."""
    rng = random.Random(f"{split}-{seed}")
    makers, seen = list(MAKERS), set()
    while True:
        problem = rng.choice(makers)(_draw(rng))
        if problem.held_out == (split == "test") and problem.question not in seen:
            seen.add(problem.question)
            yield problem


def noisy_solutions(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (question, flawed solution) pairs for pre-training, from training problems only, repeats allowed."""
    rng = random.Random(f"corpus-{seed}")
    makers = list(MAKERS)
    while True:
        maker = rng.choice(makers)
        problem = maker(_draw(rng))
        if problem.held_out:
            continue
        steps = rng.choice(problem.mistakes) if rng.random() < MAKERS[maker] else problem.steps
        slip = (rng.randrange(len(steps)), rng.choice(SLIPS)) if rng.random() < SLIP_RATE else None
        yield problem.question, render(steps, slip)
