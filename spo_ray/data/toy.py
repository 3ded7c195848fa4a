"""The toy task: generated word problems whose answers look like those of GSM8K.

There are eleven kinds of one-step and two-step problems. A solution reads ``First, 20 + 9 = 29. Then, 20 + 29 = 49.``
and ends in ``#### 49``. The pre-training text contains wrong reasoning and arithmetic slips, so a model trained on it
solves only some of the problems, which leaves room for SFT and preference optimisation.

A hash of the question decides if a problem is held out, so no training row can be a test row, whatever the seeds.
"""

import hashlib
import operator
import random
from collections.abc import Iterator
from typing import Literal, NamedTuple

Split = Literal["train", "test"]
HELD_OUT_SHARE = 0.2
"""Share of all problems that belong to the test split."""
PREVIOUS = -1
"""Operand that stands for the result of the step before."""
Step = tuple[str, int, int]
"""(operator, left operand, right operand)."""
NAMES = ("Ada", "Bo", "Cal", "Dee", "Eli", "Fay", "Gus", "Ida", "Jon", "Kim", "Lou", "Mae", "Ned", "Pam", "Ray", "Sue")
ITEMS = ("apples", "beads", "cards", "disks", "forks", "kites", "lamps", "pens", "rings", "toys")
CONTAINERS = ("bags", "boxes", "crates", "jars", "trays")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SLIPS = (-10, -2, -1, 1, 2, 10)
"""Errors of an arithmetic slip."""
SLIP_RATE = 0.10
"""Share of the solutions in the pre-training text that have a slip."""


class Problem(NamedTuple):
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


def problems(split: Split, seed: int) -> Iterator[Problem]:
    """Yield distinct problems of one split without end, the same ones for the same seed."""
    rng, seen = random.Random(f"{split}-{seed}"), set()
    while True:
        problem = _problem(rng.choice(KINDS), rng)
        if problem.held_out == (split == "test") and problem.question not in seen:
            seen.add(problem.question)
            yield problem


def noisy_solutions(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (question, possibly wrong solution) without end, for pre-training; only training problems, with repeats."""
    rng = random.Random(f"corpus-{seed}")
    while True:
        kind = rng.choice(KINDS)
        problem = _problem(kind, rng)
        if problem.held_out:
            continue
        steps = rng.choice(problem.mistakes) if rng.random() < kind.wrong else problem.steps
        slip = (rng.randrange(len(steps)), rng.choice(SLIPS)) if rng.random() < SLIP_RATE else None
        yield problem.question, render(steps, slip)


def render(steps: list[Step], slip: tuple[int, int] | None = None) -> str:
    """Write steps out as a solution; ``slip = (step index, error)`` falsifies one result, and later steps use it."""
    sentences, result = [], 0
    for index, (sign, left, right) in enumerate(steps):
        left = result if left == PREVIOUS else left
        right = result if right == PREVIOUS else right
        result = OPERATORS[sign](left, right)
        if slip is not None and slip[0] == index:
            result = max(0, result + slip[1])
        opening = "" if len(steps) == 1 else "Then, " if index else "First, "
        sentences.append(f"{opening}{left} {sign} {right} = {result}.")
    return f"{' '.join(sentences)}\n#### {result}"


class Kind(NamedTuple):
    """One kind of problem, in terms of the words and numbers that :func:`_problem` draws."""

    name: str
    wrong: float
    """Share of solutions with wrong reasoning in the pre-training text, from 0 to 1."""
    story: str
    question: str
    """Text behind "How many ITEMS"."""
    steps: str
    """The correct steps, separated by commas."""
    mistakes: list[str]
    """Steps of each reasoning error, written in the same way."""


NOW, TOGETHER = "does {who} own now", "do they own together"
KINDS = [
    Kind("gain", 0.10, "{who} owns {x} {items} and finds {y} more.", NOW, "x + y", ["larger - smaller"]),
    Kind("loss", 0.10, "{who} owns {xy} {items} and loses {y}.", NOW, "xy - y", ["xy + y"]),
    Kind("packed", 0.10, "Each of {m} {boxes} holds {n} {items}.", "do the {boxes} hold", "m * n", ["m + n"]),
    Kind("gain_loss", 0.35, "{who} owns {xz} {items}, finds {y} more and then loses {z}.", NOW,
         "xz + y, previous - z", ["xz + y", "xz - z"]),
    Kind("more_both", 0.50, "{who} owns {x} {items}. {other} owns {y} more than {who}.", TOGETHER,
         "x + y, x + previous", ["x + y"]),
    Kind("fewer_both", 0.50, "{who} owns {xy} {items}. {other} owns {y} fewer than {who}.", TOGETHER,
         "xy - y, xy + previous", ["xy - y", "xy + y"]),
    Kind("times_both", 0.40, "{who} owns {n} {items}. {other} owns {m} times as many as {who}.", TOGETHER,
         "n * m, n + previous", ["n * m"]),
    Kind("packed_loss", 0.35, "{who} owns {m} {boxes} of {n} {items} each and loses {lost} {items}.", NOW,
         "m * n, previous - lost", ["m * n", "m + n, previous - lost"]),
    Kind("packed_gain", 0.40, "{who} owns {m} {boxes} of {n} {items} each and {y} loose {items}.", "does {who} own",
         "m * n, previous + y", ["m * n", "m + n, previous + y"]),
    Kind("reverse_more", 0.65, "{who} owns {xy} {items}, which is {y} more than {other} owns.", "does {other} own",
         "xy - y", ["xy + y"]),
    Kind("reverse_fewer", 0.65, "{who} owns {x} {items}, which is {y} fewer than {other} owns.", "does {other} own",
         "x + y", ["larger - smaller"]),
]  # fmt: skip


def _problem(kind: Kind, rng: random.Random) -> Problem:
    """Draw a problem; mistakes with a result below 1 are left out unless there is no other."""
    who, other = rng.sample(NAMES, 2)
    x, y, z, m, n = (rng.randint(2, top) for top in (30, 20, 15, 6, 9))
    text = {"who": who, "other": other, "items": rng.choice(ITEMS), "boxes": rng.choice(CONTAINERS)}
    numbers = {"x": x, "y": y, "z": z, "m": m, "n": n, "xy": x + y, "xz": x + z, "previous": PREVIOUS}
    numbers |= {"larger": max(x, y), "smaller": min(x, y), "lost": min(z, m * n - 1)}

    def steps(formula: str) -> list[Step]:
        return [(sign, numbers[a], numbers[b]) for a, sign, b in map(str.split, formula.split(","))]

    question = f"{kind.story} How many {{items}} {kind.question}?".format(**text, **numbers)
    mistakes = [steps(formula) for formula in kind.mistakes]
    positive = [mistake for mistake in mistakes if int(render(mistake).rpartition(" ")[2]) > 0]
    return Problem(kind.name, question, steps(kind.steps), positive or mistakes)
