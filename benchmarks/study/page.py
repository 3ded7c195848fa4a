"""The made part of docs/study.md: tables of the rows, tests and verdicts."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import scipy

from benchmarks.common import question_means, table, with_made_part
from benchmarks.study.figures import FRONTS, front_files, write_fronts
from benchmarks.study.jobs import DIAL, METHODS, STARTS, Row, searched_by
from benchmarks.study.world import REGIMES
from spo_ray.evaluate.statistics import LEVEL, holm, mean_interval, paired_bootstrap, sign_flip
from spo_ray.report.headline import p_text

PAGE = Path(__file__).parents[2] / "docs" / "study.md"
START, END = "<!-- made by: python -m benchmarks.study tables -->", "<!-- end of the made part -->"
LOWEST = -8.0
"""Change of held-out log pi, and minus the divergence, at which an area under a front begins."""
FEWEST = 3
"""Seeds that a comparison needs to be tested."""
Group = list[Row]
"""A training's rows of all seeds."""


class PairedTest(NamedTuple):
    """One paired test of a hypothesis."""

    hypothesis: str
    what: str
    difference: float
    low: float | None
    high: float | None
    p_value: float
    seeds: int


def write_page(rows: Sequence[Row]) -> None:
    """Write the figures, and the tables into the page."""
    write_fronts([row for row in rows if "error" not in row], PAGE.parent)
    PAGE.write_text(written(PAGE.read_text("utf-8"), rows), encoding="utf-8")


def written(page: str, rows: Sequence[Row]) -> str:
    """Return the page with its made part written anew."""
    return with_made_part(page, START, END, results(rows))


def results(rows: Sequence[Row]) -> str:
    """Return the made part of the page."""
    failed = [row for row in rows if "error" in row]
    hours = sum(row.get("seconds", 0) for row in rows) / 3600
    told = f"{len(rows)} trainings and references, {len(failed)} of them failed"
    parts = [f"{told}; {hours:.1f} hours of training on one core each."]
    good = [row for row in rows if "error" not in row]
    for regime in REGIMES:
        parts += methods_table(f"Pairs: {regime}", groups(good, "final", regime=regime))
    searches = [line for regime in REGIMES for line in search_lines(regime, groups(good, "tune", regime=regime))]
    parts += ["### Search for settings", table(searches)] if searches else []
    for title, changes in STARTS.items():
        parts += methods_table(f"Gold pairs, {title}", groups(good, "starts", **changes))
    parts += [f"![Front of {name}, pairs: {regime}]({file})" for file, (regime, name) in front_files(good).items()]
    tests = [test for ask in (dial, decoupled, lower, anchor, untuned, hinge, ches) for test in ask(good)]
    if tests:
        parts += ["### Hypotheses", table(list(verdicts(tests)))]
    effects = lower_table(good)
    return "\n\n".join([*parts, *(["Lower levels, means over the seeds:", table(effects)] if effects else [])])


def groups(rows: Iterable[Row], part: str, **start: Any) -> dict[str, Group]:
    """Return a part's rows with these fields of the start, by their names, each in the order of seeds."""
    found: dict[str, Group] = {}
    for row in sorted(rows, key=lambda row: row["start"]["seed"]):
        if row["part"] == part and start.items() <= row["start"].items():
            found.setdefault(row["name"], []).append(row)
    return found


def methods_table(title: str, found: dict[str, Group]) -> list[str]:
    """Return the table of methods at their settings, and the paired tests."""
    if "reference" not in found:
        return []
    ordered = sorted(found, key=lambda name: -_mean(found[name], "greedy"))
    lines = [_line(name, found[name]) for name in ordered]
    pairs = ((a, b) for a in found if a.startswith("spo") for b in ("reference", *RIVALS, _base(a)) if b in found)
    tests = [_questions("", f"{a} − {b}", found[a], found[b]) for a, b in dict.fromkeys(pairs) if a != b]
    return [
        f"### {title}",
        table(lines),
        "SPO against its rivals, greedy accuracy:",
        table(list(verdicts(tests, told=False))),
    ]


def search_lines(regime: str, found: dict[str, Group]) -> list[dict[str, str]]:
    """Return a line for each method, by the median of what its settings reach on the validation questions."""
    lines = []
    for name, group in found.items():
        scores = [100 * searched_by(row) for row in group]
        line = {"pairs": regime, "method": name, "settings": f"{len(scores)}", "best %": f"{max(scores):.1f}"}
        lines.append(line | {"median %": f"{median(scores):.1f}", "worst %": f"{min(scores):.1f}"})
    return sorted(lines, key=lambda line: -float(line["median %"]))


RIVALS = ("nll", "dpo_nll", "dpop", "spo")
"""What each variant of SPO is tested against, beside the reference and its own base loss."""


def _base(name: str) -> str:
    return METHODS[name][0].get("base", {"type": "dpo"})["type"]


def _line(name: str, group: Group) -> dict[str, str]:
    recipe = group[0].get("recipe", {}).get("method", {})
    own = {key for settings in METHODS.get(name, ()) for key, value in settings.items() if isinstance(value, float)}
    low, high, _ = mean_interval(_pooled(group), "questions", shares=True)
    ends = "" if low is None or high is None else f" ({100 * low:.0f}–{100 * high:.0f})"
    line = {"method": name, "rate": f"{recipe['lr']:g}" if recipe else ""}
    line["own"] = ", ".join(f"{key} {recipe[key]:g}" for key in sorted(own) if key in recipe)
    line["greedy %"] = f"{100 * _mean(group, 'greedy'):.1f}{ends}"
    line |= {"T 0.7 %": f"{100 * _mean(group, 'sampled'):.1f}", "pass@8 %": f"{100 * _mean(group, 'pass@8'):.1f}"}
    for key, form in COLUMNS.items():
        line[key] = form(group)
    return line


def _number(key: str, form: str, factor: float = 1) -> Callable[[Group], str]:
    return lambda group: form.format(factor * _mean(group, key))


COLUMNS = {
    "Δ log π chosen": _number("train/chosen", "{:+.2f}"),
    "rejected": _number("train/rejected", "{:+.2f}"),
    "held out: chosen": _number("held_out/chosen", "{:+.2f}"),
    "in order %": _number("held_out/in_order", "{:.0f}", 100),
    "KL from SFT": _number("kl_reference_to_policy", "{:.2f}"),
    "KL to SFT": _number("kl_policy_to_reference", "{:.2f}"),
    "entropy": _number("entropy", "{:.2f}"),
    "repeated 4-grams %": _number("repetition", "{:.1f}", 100),
    "s": lambda group: f"{fmean(row.get('seconds', 0) for row in group):.0f}",
}


def dial(rows: Sequence[Row]) -> Iterable[PairedTest]:
    """H1: areas under the fronts of one dialled training against those of trainings with six weights.

    The reference is a point of every front. Seeds that lack a training are left out.
    """
    for regime in REGIMES:
        found = {name: _by_seed(group) for name, group in groups(rows, "dial", regime=regime).items()}
        weights = [group for name, group in found.items() if name.startswith("dpo_nll")]
        references = groups(rows, "final", regime=regime).get("reference", [])
        start = {seed: [row["measured"]] for seed, row in _by_seed(references).items()}
        for name in (key for key in found if key.startswith("spo")):
            seeds = sorted(set(start).intersection(found[name], *weights))
            if len(seeds) < FEWEST:
                continue
            own = [[*start[seed], *_front(found[name][seed], "scales")] for seed in seeds]
            trained = [[*start[seed], *(group[seed]["measured"] for group in weights)] for seed in seeds]
            shares = (next(group[seed] for group in weights if "shares" in group[seed]) for seed in seeds)
            between = [[*start[seed], *_front(row, "shares")] for seed, row in zip(seeds, shares, strict=True)]
            for other, fronts in (("trained weights", trained), ("weights between", between)):
                for front, (x, _, y) in FRONTS.items():
                    values = [area(a, x, y) - area(b, x, y) for a, b in zip(own, fronts, strict=True)]
                    yield _seeds("H1", f"{regime}: {name} dialled − {other}, front of {front}", values)


def decoupled(rows: Sequence[Row]) -> Iterable[PairedTest]:
    """H1: theta trained by the SFT loss alone against the paper's theta, and against DPO+NLL's largest weight."""
    name = "spo, theta by SFT alone"
    for regime in REGIMES:
        pairs = [(f"{regime}: {name} − {other}", name, other) for other in ("spo", "dpo_nll, mu 10")]
        yield from _between("H1", groups(rows, "dial", regime=regime), pairs)


def _by_seed(group: Group) -> dict[int, Row]:
    return {row["start"]["seed"]: row for row in group}


def _front(row: Row, kind: str) -> list[Row]:
    return [row["measured"], *(row[kind][str(value)] for value in DIAL if str(value) in row[kind])]


def area(points: Sequence[Row], x: str, y: str) -> float:
    """Return the mean over x, from :data:`LOWEST` to the reference's 0, of the best y at that x or a better one.

    x is a change of log pi, or a divergence with its sign turned, so that higher is better; above 0 it counts as 0.
    """
    sign = -1 if x.startswith("kl") else 1
    sorted_points = sorted(((min(0.0, sign * point[x]), point[y]) for point in points), reverse=True)
    total, best, last = 0.0, 0.0, 0.0
    for value, height in sorted_points:
        value = max(value, LOWEST)
        total, best, last = total + best * (last - value), max(best, height), value
    return (total + best * (last - LOWEST)) / -LOWEST


def lower(rows: Sequence[Row]) -> Iterable[PairedTest]:
    """H2: accuracy with each lower level against none; H7: the same for the best of them on other pairs."""
    for hypothesis, part in (("H2", "lower"), ("H7", "lower again")):
        for regime in REGIMES:
            found = groups(rows, part, regime=regime)
            pairs = ((f"{regime}: {name} − K 0", name, "K 0") for name in found if name != "K 0")
            yield from _between(hypothesis, found, pairs)


def lower_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return how far the lower level moves L_SFT, and what comes of it."""
    lines = []
    for name, group in groups(rows, "lower").items():
        share, size = (
            fmean(row["steps"].get(key, 0.0) for row in group) for key in ("spo/inner_gap_share", "spo/term_b_over_a")
        )
        lines.append(
            {
                "lower level": name,
                "lowers L_SFT by %": f"{100 * share:.2g}",
                "term (b) / term (a)": f"{size:.2g}",
                "greedy %": f"{100 * _mean(group, 'greedy'):.1f}",
                "Δ log π chosen": f"{_mean(group, 'train/chosen'):+.2f}",
                "KL to SFT": f"{_mean(group, 'kl_policy_to_reference'):.2f}",
            }
        )
    return lines


def anchor(rows: Sequence[Row]) -> Iterable[PairedTest]:
    """H3: the SFT model's own samples as the anchor against the preferred answers; H6: both by half."""
    for regime in REGIMES:
        found = groups(rows, "anchor", regime=regime)
        yield from _between("H3", found, [(f"{regime}: own samples − preferred answers", "own", "chosen")])
        yield from _between("H6", found, ((f"{regime}: both − {told}", "both", name) for name, told in ANCHORS.items()))


def untuned(rows: Sequence[Row]) -> Iterable[PairedTest]:
    """H8: both anchors at the quickstart's rate against each method's best weight at it, by accuracy on the test."""
    swept, weights, anchors = (groups(rows, part, regime="weaker") for part in ("fronts", "dial", "anchor"))
    rivals = swept | {name: group for name, group in weights.items() if swept and name.startswith("dpo_nll")}
    order = sorted(rivals, key=lambda name: _mean(rivals[name], "greedy"))
    highest = {name.partition(",")[0]: name for name in order}.values()
    pairs = [(f"weaker: both anchors − {name}", "both", name) for name in highest]
    yield from _between("H8", anchors | rivals, pairs)


ANCHORS = {"chosen": "preferred answers", "own": "own samples"}


def hinge(rows: Sequence[Row]) -> Iterable[PairedTest]:
    """H4: the SFT loss of fallen pairs alone against that of all."""
    for regime in REGIMES:
        found = groups(rows, "hinge", regime=regime)
        hinged = (name for name in found if name.startswith("hinge"))
        pairs = ((f"{regime}: {name} − {rival}", name, rival) for name in hinged for rival in ("spo", "dpo_nll"))
        yield from _between("H4", found, pairs)


def ches(rows: Sequence[Row]) -> Iterable[PairedTest]:
    """H5: DPO on filtered pairs against SPO on all, and SPO on filtered ones."""
    filtered = [f"{name}, without {share}" for share in ("25%", "50%") for name in ("dpo", "spo")]
    pairs = ((f"{name} − spo with all", name, "spo, without 0%") for name in filtered)
    yield from _between("H5", groups(rows, "ches"), pairs)


def verdicts(tests: Sequence[PairedTest], *, told: bool = True) -> Iterable[dict[str, str]]:
    """Yield a line for each test, with p-values adjusted over all of them."""
    adjusted = holm([test.p_value for test in tests])
    for test, p_value in zip(tests, adjusted, strict=True):
        ends = "" if test.low is None else f" ({test.low:+.1f} to {test.high:+.1f})"
        verdict = "not shown" if p_value >= LEVEL else "better" if test.difference > 0 else "worse"
        line = {"hypothesis": test.hypothesis} if told else {}
        line |= {"compared": test.what, "seeds": str(test.seeds), "difference": f"{test.difference:+.1f}{ends}"}
        yield line | {"adjusted p": p_text(p_value), "verdict": verdict}


def _between(hypothesis: str, found: dict[str, Group], pairs: Iterable[tuple[str, str, str]]) -> Iterable[PairedTest]:
    """Yield the test of each (what, name, other name) of which both were trained with :data:`FEWEST` seeds or more."""
    for what, name, other in pairs:
        seeds = [{row["start"]["seed"] for row in found.get(key, [])} for key in (name, other)]
        if len(seeds[0] & seeds[1]) >= FEWEST:
            yield _questions(hypothesis, what, found[name], found[other])


def _questions(hypothesis: str, what: str, first: Group, second: Group) -> PairedTest:
    """Test greedy accuracy on the seeds that both have; in points."""
    shared = {row["start"]["seed"] for row in first} & {row["start"]["seed"] for row in second}
    values = [_pooled([row for row in group if row["start"]["seed"] in shared]) for group in (first, second)]
    differences = [100 * (a - b) for a, b in zip(*values, strict=True)]
    low, high = paired_bootstrap(differences)
    return PairedTest(hypothesis, what, fmean(differences), low, high, sign_flip(differences), len(shared))


def _seeds(hypothesis: str, what: str, values: Sequence[float]) -> PairedTest:
    """Test a difference of areas over seeds; in points."""
    scaled = [100 * value for value in values]
    if len(scaled) < 2 or stdev(scaled) == 0:
        return PairedTest(hypothesis, what, fmean(scaled), None, None, 1.0, len(scaled))
    found = scipy.stats.ttest_1samp(scaled, 0.0)
    ends = found.confidence_interval()
    return PairedTest(
        hypothesis, what, fmean(scaled), float(ends.low), float(ends.high), float(found.pvalue), len(scaled)
    )


def _pooled(group: Group) -> list[float]:
    """Return each question's mean over the seeds."""
    return question_means(row["measured"]["right"] for row in group)


def _mean(group: Group, key: str) -> float:
    return fmean(row["measured"][key] for row in group)
