"""The results of a run as three to six sentences; only differences that a paired test finds are called differences."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from spo_ray.evaluate.statistics import LEVEL

FLAT = 0.005
"""Changes of log-probability (nats) below this are shown as 0.00, and called none."""
FEW = 0.1
"""Half-width of an accuracy's interval from which the page says that the questions are few."""
ONE_BY_ONE = 3
"""Largest number of rising methods that are told one by one."""
MARKED = re.compile(r"\[([^]]+)\]\((\w+):(\w+)\)")
"""A number in a sentence: [text](stage:name)."""


class Fact(NamedTuple):
    """A number of a sentence, which links to its rows."""

    text: str
    stage: str
    """Kind of the stage that has the rows: eval, comparisons or method."""
    name: str
    """Checkpoint that the number belongs to."""


Methods = Mapping[str, Any]
PValues = Mapping[frozenset[str], float]


def headline(methods: Methods, compared: Sequence[Mapping[str, Any]], reference: str, words: str) -> list[str]:
    """Return the results in sentences, whose numbers are marked, see :func:`pieces` and :func:`plain`.

    Args:
        methods, compared: ``methods`` and ``comparisons`` of ``summary.json``.
        reference: name of the checkpoint that all trainings start from.
        words: what the text calls it, such as "the SFT model".
    """
    trained = {name: entry for name, entry in methods.items() if name not in ("base", reference)}
    start = methods.get(reference, {}).get("accuracy_greedy")
    found = list(_accuracies(trained, start, p_values(compared), reference, words))
    return [*(found or _reward_accuracies(trained)), *_alike(trained, compared), *_displacement(trained)]


def pieces(sentence: str) -> list[str | Fact]:
    """Return a sentence's text and the numbers in it, in their order."""
    parts = MARKED.split(sentence)
    facts = [Fact(*parts[i : i + 3]) for i in range(1, len(parts), 4)]
    return [parts[0], *(piece for pair in zip(facts, parts[4::4], strict=True) for piece in pair)]


def plain(sentences: Sequence[str]) -> str:
    """Return sentences as text."""
    return MARKED.sub(r"\1", " ".join(sentences))


def p_text(p_value: float) -> str:
    """Return a p-value to read: 0.031, 2e-5."""
    return f"{p_value:.2g}" if p_value >= 0.001 else f"{p_value:.0e}".replace("e-0", "e-")


def p_values(compared: Sequence[Mapping[str, Any]]) -> dict[frozenset[str], float]:
    """Return the adjusted p-values of the greedy accuracies by pair of checkpoints."""
    rows = [row for row in compared if row["metric"] == "accuracy_greedy"]
    return {frozenset((row["first"], row["second"])): row["p_adjusted"] for row in rows}


def _accuracies(trained: Methods, start: Any, p_values: PValues, reference: str, words: str) -> Iterator[str]:
    """Yield the sentences about greedy accuracy; none without graded answers."""
    own = {name: entry["accuracy_greedy"]["value"] for name, entry in trained.items() if entry["accuracy_greedy"]}
    if not own or not start:
        return
    order = sorted(own, key=lambda name: -own[name])
    sure = {name for name in order if p_values.get(frozenset((name, reference)), 1.0) < LEVEL}
    better = [name for name in order if name in sure and own[name] > start["value"]]
    solved = {name: f"[{value:.1%}](eval:{name})" for name, value in own.items()}
    usual, asked = f"[{start['value']:.1%}](eval:{reference})", f" of the {start['n']} held-out questions"
    points = {name: f"{100 * abs(value - start['value']):.1f} points" for name, value in own.items()}
    p_facts = {name: _p_fact(p_values, name, reference) for name in sure}
    if better:
        best = better[0]
        yield f"{best} solves {solved[best]}{asked}, {points[best]} more than {words} ({usual}, {p_facts[best]})."
        yield from _also_better(better, solved, p_values, words)
    else:
        subject = "No method is" if len(own) > 1 else f"{order[0]} is not"
        yield f"{subject} shown to be better than {words}, which solves {usual}{asked}."
    if level := [name for name in order if name not in sure]:
        yield f"{_listed(level, solved)} can't be told apart from {words if better else 'it'}."
    if worse := [name for name in order if name in sure and name not in better]:
        yield _joined([f"{name} lost {points[name]} ({solved[name]}, {p_facts[name]})" for name in worse]) + "."
    if (half := (start["high"] - start["low"]) / 2) > FEW:
        yield f"With only {start['n']} questions, an accuracy is known to about ±{100 * half:.0f} points."


def _p_fact(p_values: PValues, name: str, other: str) -> str:
    return f"[p = {p_text(p_values[frozenset((name, other))])}](comparisons:{name})"


def _also_better(better: Sequence[str], solved: Mapping[str, str], p_values: PValues, words: str) -> Iterator[str]:
    """Yield a sentence about the methods that are better than the reference model, but not the best."""
    first, *rest = better
    if not rest:
        return
    behind = [name for name in rest if p_values.get(frozenset((first, name)), 1.0) < LEVEL]
    apart = [name for name in rest if name not in behind]
    told = [f"{_listed(rest, solved)} {_be(rest)} better than {words} too"]
    if apart:
        subject = ("it" if len(rest) == 1 else "they") if not behind else _joined(apart)
        told.append(f"{subject} can't be told apart from {first}")
    if behind:
        p_facts = {name: _p_fact(p_values, name, first) for name in behind}
        told.append(f"{_listed(behind, p_facts)} {_be(behind)} behind {first}")
    yield "; ".join(told) + "."


def _alike(trained: Methods, compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence about methods whose greedy answers are right on the same questions."""
    greedy = [row for row in compared if row["metric"] == "accuracy_greedy"]
    pairs = [(row["first"], row["second"]) for row in greedy if not row["wins"] + row["losses"]]
    told = ["/".join(pair) for pair in pairs if set(pair) <= trained.keys()]
    return [f"The very same questions are solved by {_joined(told)}."] if told else []


def _reward_accuracies(trained: Methods) -> list[str]:
    """Return a sentence about the held-out pairs in which the preferred answer gained more; none without such pairs."""
    shares = {name: entry["held_out"]["reward_accuracy"] for name, entry in trained.items() if "held_out" in entry}
    parts = []
    for name, share in sorted(shares.items(), key=lambda item: -item[1]["value"]):
        low, high = share["low"], share["high"]
        chance = "above chance" if low > 0.5 else "below chance" if high < 0.5 else "no different from chance"
        interval = f"95% interval {100 * low:.0f} to {100 * high:.0f}: {chance}"
        parts.append(f"[{share['value']:.1%}](method:{name}) with {name} ({interval})")
    pairs = f"Of {next(iter(shares.values()))['n']} held-out pairs" if shares else ""
    return [f"{pairs}, the preferred answer gained more than the rejected one in {_joined(parts)}."] if parts else []


def _displacement(trained: Methods) -> list[str]:
    """Return a sentence about the change of the preferred answers' log-probability."""
    held_out = all("held_out" in entry for entry in trained.values())
    entries = {name: entry["held_out"] if held_out else entry for name, entry in trained.items()}
    changes = {n: entry["delta_logp_chosen"] for n, entry in entries.items() if entry["delta_logp_chosen"] is not None}
    facts = {name: f"[{change:+.2f}](method:{name}) nats" for name, change in changes.items()}
    fell = [name for name in changes if changes[name] <= -FLAT]
    rose = sorted((name for name in changes if changes[name] >= FLAT), key=lambda name: changes[name])
    same = [name for name in changes if name not in fell + rose]
    parts = [f"fell with {_listed(fell, facts)}"] if fell else []
    if len(rose) > ONE_BY_ONE:
        which = "all " if len(rose) == len(changes) else "the other " if fell and not same else ""
        low = facts[rose[0]].removesuffix(" nats")
        parts.append(f"rose with {which}{len(rose)} methods ({low} to {facts[rose[-1]]})")
    elif rose:
        parts.append(f"rose with {_listed([name for name in changes if name in rose], facts)}")
    parts += [f"did not change with {_joined(same)}"] if same else []
    where = "held-out pairs" if held_out else "training pairs"
    return [f"On the {where} the preferred answers' log-probability {_joined(parts)}."] if parts else []


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: Sequence[str], facts: Mapping[str, str]) -> str:
    """Return names with their facts in brackets: a (1), b (2) and c (3)."""
    return _joined([f"{name} ({facts[name]})" for name in names])


def _joined(parts: Sequence[str]) -> str:
    """Return parts with commas between them, and "and" before the last one."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
