"""The results of a run as three to six sentences; only differences that a paired test finds are called differences."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spo_ray.evaluate.statistics import LEVEL

FLAT = 0.005
"""Changes of log-probability (nats) below this are shown as 0.00, and called none."""
FEW = 0.1
"""Half-width of an accuracy's interval from which the page says that the questions are few."""
ONE_BY_ONE = 3
"""Largest number of rising methods that are told one by one."""


class Fact(NamedTuple):
    """A number of a sentence, which links to its rows."""

    text: str
    stage: str
    """Kind of the stage that has the rows: eval, comparisons or method."""
    name: str
    """Checkpoint that the number belongs to."""


Sentence = list[str | Fact]
Methods = Mapping[str, Any]


def headline(methods: Methods, compared: Sequence[Mapping[str, Any]], reference: str, words: str) -> list[Sentence]:
    """Return the results in sentences.

    Args:
        methods, compared: ``methods`` and ``comparisons`` of ``summary.json``.
        reference: name of the checkpoint that all trainings start from.
        words: what the text calls it, such as "the SFT model".
    """
    trained = {name: entry for name, entry in methods.items() if name not in ("base", reference)}
    start = methods.get(reference, {}).get("accuracy_greedy")
    found = _accuracies(trained, start, p_values(compared), reference, words)
    return [*(found or _reward_accuracies(trained)), *_displacement(trained)]


def plain(sentences: Sequence[Sentence]) -> str:
    """Return sentences as text."""
    return " ".join("".join(piece if isinstance(piece, str) else piece.text for piece in each) for each in sentences)


def p_text(p_value: float) -> str:
    """Return a p-value to read: 0.031, 2e-5."""
    return f"{p_value:.2g}" if p_value >= 0.001 else f"{p_value:.0e}".replace("e-0", "e-")


def p_values(compared: Sequence[Mapping[str, Any]]) -> dict[frozenset[str], float]:
    """Return the adjusted p-values of the greedy accuracies by pair of checkpoints."""
    rows = [row for row in compared if row["metric"] == "accuracy_greedy"]
    return {frozenset((row["first"], row["second"])): row["p_adjusted"] for row in rows}


def _accuracies(
    trained: Methods, start: Any, p_values: Mapping[frozenset[str], float], reference: str, words: str
) -> list[Sentence]:
    """Return the sentences about greedy accuracy; none without graded answers."""
    own = {name: entry["accuracy_greedy"]["value"] for name, entry in trained.items() if entry["accuracy_greedy"]}
    if not own or not start:
        return []
    order = sorted(own, key=lambda name: -own[name])
    sure = {name for name in order if p_values.get(frozenset((name, reference)), 1.0) < LEVEL}
    better = [name for name in order if name in sure and own[name] > start["value"]]
    level = [name for name in order if name not in sure]
    solved = {name: Fact(f"{value:.1%}", "eval", name) for name, value in own.items()}
    usual, asked = Fact(f"{start['value']:.1%}", "eval", reference), f" of the {start['n']} held-out questions"

    points = {name: f"{100 * abs(value - start['value']):.1f} points" for name, value in own.items()}
    told: list[Sentence] = []
    if better:
        best = better[0]
        told.append([best, " solves ", solved[best], f"{asked}, {points[best]} more than {words} ("])
        told[0] += [usual, ", ", _p_fact(p_values, best, reference), ")."]
        told += _also_better(better, solved, p_values, words)
    else:
        subject = "No method is" if len(own) > 1 else f"{order[0]} is not"
        told.append([f"{subject} shown to be better than {words}, which solves ", usual, f"{asked}."])
    if level:
        told.append([*_listed(level, solved), f" can't be told apart from {words if better else 'it'}."])
    if worse := [name for name in order if name in sure and name not in better]:
        p_facts = [_p_fact(p_values, name, reference) for name in worse]
        lost = [[f"{n} lost {points[n]} (", solved[n], ", ", p, ")"] for n, p in zip(worse, p_facts, strict=True)]
        told.append([*_joined(lost), "."])
    if (half := (start["high"] - start["low"]) / 2) > FEW:
        told.append([f"With only {start['n']} questions, an accuracy is known to about ±{100 * half:.0f} points."])
    return told


def _p_fact(p_values: Mapping[frozenset[str], float], name: str, other: str) -> Fact:
    return Fact(f"p = {p_text(p_values[frozenset((name, other))])}", "comparisons", name)


def _also_better(
    better: Sequence[str], solved: Mapping[str, Fact], p_values: Mapping[frozenset[str], float], words: str
) -> list[Sentence]:
    """Return a sentence about the methods that are better than the reference model, but not the best."""
    first, *rest = better
    if not rest:
        return []
    behind = [name for name in rest if p_values.get(frozenset((first, name)), 1.0) < LEVEL]
    apart = [name for name in rest if name not in behind]
    told: Sentence = [*_listed(rest, solved), f" {_be(rest)} better than {words} too"]
    if apart:
        subject = ("it" if len(rest) == 1 else "they") if len(apart) == len(rest) else _and(apart)
        told.append(f"; {subject} can't be told apart from {first}")
    if behind:
        p_facts = {name: _p_fact(p_values, name, first) for name in behind}
        told += ["; ", *_listed(behind, p_facts), f" {_be(behind)} behind {first}"]
    return [[*told, "."]]


def _reward_accuracies(trained: Methods) -> list[Sentence]:
    """Return a sentence about the held-out pairs in which the preferred answer gained more; none without such pairs."""
    shares = {name: entry["held_out"]["reward_accuracy"] for name, entry in trained.items() if "held_out" in entry}
    parts: list[Sentence] = []
    for name, share in sorted(shares.items(), key=lambda item: -item[1]["value"]):
        low, high = share["low"], share["high"]
        chance = "above chance" if low > 0.5 else "below chance" if high < 0.5 else "no different from chance"
        interval = f" with {name} (95% interval {100 * low:.0f} to {100 * high:.0f}: {chance})"
        parts.append([Fact(f"{share['value']:.1%}", "method", name), interval])
    pairs = next((share["n"] for share in shares.values()), 0)
    told = f"Of {pairs} held-out pairs, the preferred answer gained more than the rejected one in "
    return [[told, *_joined(parts), "."]] if parts else []


def _displacement(trained: Methods) -> list[Sentence]:
    """Return a sentence about the change of the preferred answers' log-probability."""
    held_out = all("held_out" in entry for entry in trained.values())
    entries = {name: entry["held_out"] if held_out else entry for name, entry in trained.items()}
    changes = {n: entry["delta_logp_chosen"] for n, entry in entries.items() if entry["delta_logp_chosen"] is not None}
    if not changes:
        return []
    facts = {name: Fact(f"{change:+.2f}", "method", name) for name, change in changes.items()}
    fell = [name for name in changes if changes[name] <= -FLAT]
    rose = [name for name in changes if changes[name] >= FLAT]
    same = [name for name in changes if name not in fell + rose]
    parts: list[Sentence] = [["fell with ", *_listed(fell, facts, " nats")]] if fell else []
    if len(rose) > ONE_BY_ONE:
        low, high = (facts[pick(rose, key=lambda name: changes[name])] for pick in (min, max))
        which = "all " if len(rose) == len(changes) else "the other " if fell and not same else ""
        parts.append([f"rose with {which}{len(rose)} methods (", low, " to ", high, " nats)"])
    elif rose:
        parts.append(["rose with ", *_listed(rose, facts, " nats")])
    parts += [[f"did not change with {_and(same)}"]] if same else []
    where = "held-out pairs" if held_out else "training pairs"
    return [[f"On the {where} the preferred answers' log-probability ", *_joined(parts), "."]]


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _and(names: Sequence[str]) -> str:
    return "".join(map(str, _joined([[name] for name in names])))


def _listed(names: Sequence[str], facts: Mapping[str, Fact], unit: str = "") -> Sentence:
    """Return names with their facts in brackets: a (1), b (2) and c (3)."""
    return _joined([[f"{name} (", facts[name], f"{unit})"] for name in names])


def _joined(parts: Sequence[Sentence]) -> Sentence:
    """Return parts with commas between them, and "and" before the last one."""
    joined: Sentence = []
    for number, part in enumerate(parts):
        between = ([" and "] if number == len(parts) - 1 else [", "]) if number else []
        joined += [*between, *part]
    return joined
