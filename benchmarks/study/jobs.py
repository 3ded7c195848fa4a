"""The study's trainings: which methods, settings, regimes and seeds, and what each part of the study asks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from typing import Any

from benchmarks.study.training import OWN_SHARE, Recipe
from benchmarks.study.world import REGIMES, Start

Row = dict[str, Any]
TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
"""Peak learning rates of theta and phi that every method is tried with."""
NLL_RATES = (3e-5, 5e-5, 1e-4, 2e-4, 3e-4, 6e-4, 8e-4, 1e-3)
"""NLL has no second setting."""
BASES = {"": "dpo", "_simpo": "simpo", "_alpha_dpo": "alpha_dpo"}
REGION = {"epsilon": 0.0, "lr": 0.1}
METHODS: dict[str, Sequence[Mapping[str, Any]]] = {
    "dpo": [{"beta": 0.1}, {"beta": 0.5}],
    "dpo_nll": [{"mu": 0.3}, {"mu": 1.0}],
    "dpop": [{"penalty": 5.0}, {"penalty": 50.0}],
    "ipo": [{"beta": 0.1}, {"beta": 0.5}],
    "simpo": [{"beta": 2.0}, {"beta": 10.0}],
    "alpha_dpo": [{"alpha": 0.1}, {"alpha": 0.5}],
    **{f"spo{name}": [{"base": {"type": base}, "lambda_sft": w} for w in (0.3, 1.0)] for name, base in BASES.items()},
    **{
        f"spo{name}_region": [{"base": {"type": base}, "lambda_sft": w, "safe_region": REGION} for w in (0.3, 1.0)]
        for name, base in BASES.items()
    },
    "spo_both": [{"lambda_sft": w, "inner": {"steps": 0}} for w in (0.3, 1.0)],
}
"""Each method's two settings of its own, beside four rates: eight runs each."""
MAIN = ("nll", "dpo", "dpo_nll", "dpop", "simpo", "spo")
SEARCHED = (*MAIN, "spo_region", "spo_both")
"""What is searched in the regimes other than gold, where every method is."""
TUNED_ON = {
    "own": "gold",
    "similar": "gold",
    "dissimilar": "gold",
    "flipped 10%": "flipped 30%",
    "flipped 20%": "flipped 30%",
}
"""Regimes without a search of their own: the main methods are trained there at the settings of another regime."""
STARTS: dict[str, dict[str, Any]] = {
    "without SFT": {"sft_epochs": 0},
    "after one epoch of SFT": {"sft_epochs": 1},
    "after twelve epochs of SFT": {"sft_epochs": 12},
    "another pretraining seed": {"model": "models/toy-seed-1"},
    "a toy of ten times the size": {"model": "models/toy-large"},
}
"""Starts beside the usual one; ``make models/toy-seed-1 models/toy-large`` makes the models."""


@dataclass(frozen=True)
class Job:
    """One training and the measurements of its checkpoint."""

    part: str
    start: Start
    name: str
    recipe: Recipe | None
    """None: the reference itself."""
    scales: tuple[float, ...] = ()
    """Measured too: phi multiplied by these."""
    shares: tuple[float, ...] = ()
    """Measured too: weights at these shares of the way from the reference."""

    @property
    def key(self) -> Row:
        """What names the job's row; equal keys are equal trainings."""
        recipe = {"recipe": asdict(self.recipe)} if self.recipe else {}
        return {"part": self.part, "start": asdict(self.start), "name": self.name} | recipe


def candidates(name: str) -> Iterator[Recipe]:
    """Yield the eight recipes that a method is tried with."""
    if name == "nll":
        yield from (Recipe({"type": "nll", "lr": rate}) for rate in NLL_RATES)
    else:
        kind, anchor = "spo" if name.startswith("spo") else name, "both" if name == "spo_both" else "chosen"
        for rate, own in product(RATES, METHODS[name]):
            yield Recipe({"type": kind, "lr": rate, **own}, anchor=anchor)


def tune(regime: str) -> Iterator[Job]:
    """Yield eight settings of each method, on a seed of their own, measured on validation questions."""
    if regime in TUNED_ON:
        return
    start = Start(seed=TUNING_SEED, regime=regime)
    yield Job("tune", start, "reference", None)
    for name in ("nll", *METHODS) if regime == "gold" else SEARCHED:
        yield from (Job("tune", start, name, recipe) for recipe in candidates(name))


def final(regime: str, rows: Sequence[Row]) -> Iterator[Job]:
    """Yield the methods at their best settings on all seeds; the measures are on the test questions."""
    chosen = best(TUNED_ON.get(regime, regime), rows)
    for seed in SEEDS:
        start = Start(seed=seed, regime=regime)
        yield Job("final", start, "reference", None)
        for name, recipe in chosen.items():
            if regime not in TUNED_ON or name in SEARCHED:
                yield Job("final", start, name, Recipe(**recipe))


def starts(rows: Sequence[Row]) -> Iterator[Job]:
    """Yield the main methods from other starts, at the settings that were chosen on gold pairs after the usual SFT."""
    chosen = best("gold", rows)
    for seed, changes in product(SEEDS, STARTS.values()):
        start = Start(seed=seed, **changes)
        yield Job("starts", start, "reference", None)
        for name in MAIN:
            if name in chosen:
                yield Job("starts", start, name, Recipe(**chosen[name]))


def searched_by(row: Row) -> float:
    """Return what settings are chosen by: the mean of greedy and sampled accuracy on the validation questions."""
    return (row["measured"]["greedy"] + row["measured"]["sampled"]) / 2


def best(regime: str, rows: Sequence[Row]) -> dict[str, Row]:
    """Return each method's recipe with the highest :func:`searched_by`; trainings that failed are left out."""
    found: dict[str, tuple[float, Row]] = {}
    for row in rows:
        if row["part"] == "tune" and row["start"]["regime"] == regime and "recipe" in row and "error" not in row:
            score = searched_by(row)
            if row["name"] not in found or score > found[row["name"]][0]:
                found[row["name"]] = (score, row["recipe"])
    return {name: recipe for name, (_, recipe) in found.items()}


def spo(**changes: Any) -> dict[str, Any]:
    """Return SPO around DPO at the rate of the quickstart, with changes."""
    return {"type": "spo", "lr": 3e-4, "lambda_sft": 1.0, **changes}


DIAL = (0.0, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
HINGED = "benchmarks.study.training:hinged"


SWEPT: dict[str, Sequence[Mapping[str, Any]]] = {
    "dpo": [{"beta": value} for value in (0.03, 0.1, 0.3, 1.0, 3.0)],
    "ipo": [{"beta": value} for value in (0.03, 0.1, 0.3, 1.0, 3.0)],
    "dpop": [{"penalty": value} for value in (0.5, 5.0, 50.0, 500.0)],
    "simpo": [{"beta": value} for value in (0.5, 2.0, 10.0)],
    "spo": [{"lambda_sft": value} for value in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)],
}
"""Each method's weight or scale, along which it has a front; DPO+NLL's is among the trainings of H1."""


def fronts() -> Iterator[Job]:
    """Yield each method over its weight, all at one rate."""
    for seed, regime, (name, swept) in product(SEEDS[:3], ("gold", "weaker"), SWEPT.items()):
        for own in swept:
            ((key, value),) = own.items()
            recipe = Recipe({"type": name, "lr": 3e-4, **own})
            yield Job("fronts", Start(seed=seed, regime=regime), f"{name}, {key} {value:g}", recipe)


def hypotheses() -> Iterator[Job]:
    """Yield the trainings of hypotheses H1 to H7; docs/study.md states them."""
    for seed, regime in product(SEEDS, ("gold", "weaker")):
        start = Start(seed=seed, regime=regime)
        for name, theta in (("spo", "all"), ("spo, theta by SFT alone", "sft")):
            yield Job("dial", start, name, Recipe(spo(), theta=theta), scales=DIAL)
        for weight in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
            recipe = Recipe({"type": "dpo_nll", "lr": 3e-4, "mu": weight})
            yield Job("dial", start, f"dpo_nll, mu {weight:g}", recipe, shares=DIAL[1:] if weight == 1 else ())
    for seed, steps, eta in product(SEEDS, (1, 3), (2e-5, 2e-4, 2e-3, 2e-2)):
        inner = {"steps": steps, "eta": eta}
        yield Job("lower", Start(seed=seed), f"K {steps}, eta {eta:g}", Recipe(spo(inner=inner)))
    for seed in SEEDS:
        yield Job("lower", Start(seed=seed), "K 0", Recipe(spo(inner={"steps": 0})))
    again = {"K 0": {"steps": 0}, "K 3, eta 0.0002": {"steps": 3, "eta": 2e-4}}
    for seed, regime, (name, inner) in product(SEEDS, ("own", "flipped 30%"), again.items()):
        yield Job("lower again", Start(seed=seed, regime=regime), name, Recipe(spo(inner=inner)))
    for seed, regime, anchor in product(SEEDS, ("gold", "weaker", "flipped 30%"), OWN_SHARE):
        yield Job("anchor", Start(seed=seed, regime=regime), anchor, Recipe(spo(inner={"steps": 0}), anchor=anchor))
    for seed, regime in product(SEEDS, ("gold", "flipped 30%")):
        start = Start(seed=seed, regime=regime)
        for weight in (1.0, 10.0):
            method = {"type": HINGED, "lr": 3e-4, "beta": 0.5, "weight": weight}
            yield Job("hinge", start, f"hinge, weight {weight:g}", Recipe(method))
        yield Job("hinge", start, "spo", Recipe(spo()))
        yield Job("hinge", start, "dpo_nll", Recipe({"type": "dpo_nll", "lr": 3e-4}))
    for seed, drop in product(SEEDS, (0.0, 0.25, 0.5)):
        for name, method in (("dpo", {"type": "dpo", "lr": 3e-4}), ("spo", spo())):
            yield Job("ches", Start(seed=seed), f"{name}, without {drop:.0%}", Recipe(method, drop=drop))


PARTS = ("tune", "final", "starts", "fronts", "dial", "lower", "lower again", "anchor", "hinge", "ches")


def jobs(part: str, regimes: Sequence[str], rows: Sequence[Row]) -> list[Job]:
    """Return a part's jobs in these regimes; ``final`` and ``starts`` need the rows of ``tune``.

    Raises:
        ValueError: an unknown regime.
    """
    if unknown := set(regimes) - set(REGIMES):
        raise ValueError(f"unknown regimes: {', '.join(sorted(unknown))}; known: {', '.join(REGIMES)}")
    by_regime = (job for regime in regimes for job in chain(tune(regime), final(regime, rows)))
    every = chain(by_regime, starts(rows), fronts(), hypotheses())
    return [job for job in every if job.part == part and job.start.regime in regimes]
