"""Figures of sweeps as Altair charts, and the estimates that they show."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import altair as alt
import scipy

from spo_ray.config.sweep import LogUniform, SweepConfig, names_of
from spo_ray.evaluate.statistics import mean_std
from spo_ray.report.figures import chart
from spo_ray.sweep.results import Row, one_each
from spo_ray.sweep.space import distributions, point_key, short_names, short_text

MOST_LINES = 8
"""Largest number of lines in a sensitivity figure; with more, points are not joined."""
MOST_VALUES = 10
"""Largest number of values on an axis of a heat map; with more, values are put into bins."""
BINS = 6
FEWEST_TRIALS = 4
"""Smallest number of scored trials for importances."""
MOST_MAPS = 6
DOT = "#1f3b64"


class Estimate(NamedTuple):
    """Objective at one point of the search space."""

    values: dict[str, Any]
    mean: float
    low: float
    high: float
    """95% interval: Student's t over seeds; with one seed the interval of the score itself, over questions or pairs."""
    seeds: int
    finished: bool
    """True if all trials of the point reached the end; else their last scores count."""


def sensitivity_figures(rows: Sequence[Row], sweep: SweepConfig, found: dict[str, float]) -> list[tuple[str, Any]]:
    """Return titles and charts: the first objective against each parameter and pair, all parameters, importances.

    ``found`` holds the importance of each parameter, and may be empty.
    """
    objective, names = names_of(sweep)[0], short_names(sweep.space)
    scored = one_each(_scored(rows, objective))
    figures = [(f"{objective} against {name}", sensitivity_figure(scored, key, sweep)) for key, name in names.items()]
    for first, second in itertools.islice(itertools.combinations(names, 2), MOST_MAPS):
        figures.append((f"{names[first]} x {names[second]}", heat_figure(scored, first, second, sweep)))
    figures.append(("Parallel coordinates", parallel_figure(scored, sweep)))
    return [*figures, ("Importance", importance_figure(found))] if found else figures


def sensitivity_figure(rows: Sequence[Row], key: str, sweep: SweepConfig) -> Any:
    """Plot the first objective against one parameter with intervals; lines join points that agree in all others."""
    objective, names = names_of(sweep)[0], short_names(sweep.space)
    records: list[dict[str, Any]] = []
    for point in estimates(rows, objective):
        others = ", ".join(short_text(value, 3) for other, value in point.values.items() if other != key)
        records.append(point._asdict() | {"x": point.values[key], "others": others})
    groups = {record["others"] for record in records}
    joined = len(records) > 1 and len(groups) <= MOST_LINES
    title = ", ".join(name for other, name in names.items() if other != key) or None
    color: Any = alt.Color("others:N", title=title) if joined and len(groups) > 1 else alt.value(DOT)
    kind, scale = "Q", alt.Scale(type="log") if is_log(key, sweep) else alt.Scale(zero=False)
    if not is_number(key, rows):
        kind, scale = "N", alt.Undefined
    base = chart(records).encode(x=alt.X(f"x:{kind}", title=names[key], scale=scale), color=color)
    y = alt.Y("mean:Q", title=objective, scale=alt.Scale(zero=False))
    layers = [base.mark_rule(opacity=0.5).encode(y=alt.Y("low:Q", title=objective), y2="high:Q")]
    for done in sorted({record["finished"] for record in records}):
        points = base.transform_filter(f"datum.finished == {str(done).lower()}")
        layers.append(points.mark_point(filled=done, size=60).encode(y=y))
    if joined:
        layers.append(base.mark_line(opacity=0.7).encode(y=y))
    return alt.layer(*layers).properties(width=460, height=260)


def heat_figure(rows: Sequence[Row], first: str, second: str, sweep: SweepConfig) -> Any:
    """Plot the first objective over two parameters' values, as the mean over all other parameters."""
    objective, titles, cells = names_of(sweep)[0], short_names(sweep.space), {}
    names = {key: _bins(rows, key, sweep) for key in (first, second)}
    for row in _scored(rows, objective):
        place = tuple(names[key][json.dumps(row["values"][key])] for key in (first, second))
        cells.setdefault(place, []).append(row["scores"][objective]["value"])
    records = [{"x": x, "y": y, "mean": sum(v) / len(v), "n": len(v)} for (x, y), v in cells.items()]
    orders = [list(dict.fromkeys(names[key].values())) for key in (first, second)]
    base = chart(records).encode(
        x=alt.X("x:N", title=titles[first], sort=orders[0], axis=alt.Axis(labelAngle=0)),
        y=alt.Y("y:N", title=titles[second], sort=orders[1][::-1]),
    )
    squares = base.mark_rect().encode(color=alt.Color("mean:Q", title=objective, scale=alt.Scale(scheme="viridis")))
    middle = sum(r["mean"] for r in records) / len(records)
    ink = alt.condition(f"datum.mean > {middle}", alt.value("black"), alt.value("white"))
    text = base.mark_text().encode(text=alt.Text("mean:Q", format=".3f"), color=ink)
    return (squares + text).properties(width=70 * len(orders[0]), height=46 * len(orders[1]))


def _bins(rows: Sequence[Row], key: str, sweep: SweepConfig) -> dict[str, str]:
    """Return the label of the heat map's row or column for each value as JSON, in the order of the axis."""
    values = {json.dumps(row["values"][key]): row["values"][key] for row in rows}
    if not is_number(key, rows):
        return {text: str(value) for text, value in values.items()}
    ordered = dict(sorted(values.items(), key=lambda item: item[1]))
    if len(ordered) <= MOST_VALUES:
        return {text: short_text(value, 3) for text, value in ordered.items()}
    log = is_log(key, sweep)
    scale, back = (math.log, math.exp) if log else (float, float)
    low, high = scale(min(ordered.values())), scale(max(ordered.values()))
    edges = [f"{back(low + (high - low) * i / BINS):.2g}" for i in range(BINS + 1)]
    indices = {text: min(BINS - 1, int(BINS * height)) for text, height in _heights(ordered, log).items()}
    return {text: f"{edges[i]}–{edges[i + 1]}" for text, i in indices.items()}


def parallel_figure(rows: Sequence[Row], sweep: SweepConfig) -> Any:
    """Plot parallel coordinates: a line for each trial over its parameters and objectives."""
    objective, names = names_of(sweep)[0], short_names(sweep.space)
    found = {row["trial"]: row for row in _scored(rows, objective)}
    columns = {n: ({t: row["values"][k] for t, row in found.items()}, is_log(k, sweep)) for k, n in names.items()}
    for name in names_of(sweep):
        columns[name] = {t: r["scores"][name]["value"] for t, r in found.items() if name in r["scores"]}, False
    records: list[dict[str, Any]] = [
        {"axis": axis, "height": height, "label": short_text(values[trial], 3), "trial": trial}
        | {objective: found[trial]["scores"][objective]["value"]}
        for axis, (values, log) in columns.items()
        for trial, height in _heights(values, log).items()
    ]
    ticks = {(r["axis"], round(r["height"], 1)): r for r in sorted(records, key=lambda r: r["height"])}
    look = alt.Axis(labelAngle=0, grid=True)
    x = alt.X("axis:N", sort=list(columns), title=None, axis=look, scale=alt.Scale(padding=0.4))
    y = alt.Y("height:Q", axis=None)
    color = alt.Color(f"{objective}:Q", scale=alt.Scale(scheme="viridis"))
    lines = chart(records).mark_line(opacity=0.7).encode(x=x, y=y, detail="trial:N", color=color)
    marks = chart(list(ticks.values())).mark_text(dx=-6, align="right", fontSize=9).encode(x=x, y=y, text="label:N")
    return (lines + marks).properties(width=130 * len(columns), height=280, usermeta={"fixed": True})


def _heights(values: Mapping[str, Any], log: bool) -> dict[str, float]:
    """Return a height between 0 and 1 for each value; values that are no numbers stand in their order."""
    numbers, order = all(map(_is_number, values.values())), list(dict.fromkeys(map(str, values.values())))
    places = {k: (math.log(v) if log else v) if numbers else order.index(str(v)) for k, v in values.items()}
    low, high = min(places.values(), default=0.0), max(places.values(), default=1.0)
    return {key: (place - low) / ((high - low) or 1.0) for key, place in places.items()}


def importance_figure(found: dict[str, float]) -> Any:
    """Plot the importance of each parameter as a bar."""
    names = short_names(found)
    records = [{"parameter": names[key], "importance": value} for key, value in found.items()]
    share = alt.X(
        "importance:Q", title="share of the variance", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])
    )
    bars = chart(records).mark_bar(color=DOT).encode(x=share, y=alt.Y("parameter:N", title=None, sort="-x"))
    return bars.properties(width=460, height=30 * len(records))


def estimates(rows: Sequence[Row], objective: str) -> list[Estimate]:
    """Return an estimate for each scored point, in the order of the trials; of equal trials one counts."""
    points: dict[str, list[Row]] = {}
    for row in one_each(_scored(rows, objective)):
        points.setdefault(point_key(row["values"]), []).append(row)
    return [_estimate(group, objective) for group in points.values()]


def _estimate(group: list[Row], objective: str) -> Estimate:
    scores = [row["scores"][objective] for row in group]
    mean, std = mean_std([score["value"] for score in scores])
    if std is None:
        low, high = scores[0].get("low", mean), scores[0].get("high", mean)
    else:
        low, high = scipy.stats.t.interval(0.95, len(scores) - 1, mean, std / math.sqrt(len(scores)))
    finished = all(row["status"] == "finished" for row in group)
    return Estimate(group[0]["values"], mean, low, high, len(scores), finished)


def importances(rows: Sequence[Row], sweep: SweepConfig) -> dict[str, float]:
    """Return the share of the first objective's variance that each parameter explains, by fANOVA.

    Hutter et al., ICML 2014; over the last scores of all scored trials. Empty with fewer than ``FEWEST_TRIALS``
    trials, or if all scores are equal.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objective, space = names_of(sweep)[0], distributions(sweep)
    scores = [(row["values"], row["scores"][objective]["value"]) for row in _scored(rows, objective)]
    if len(scores) < FEWEST_TRIALS or len({value for _, value in scores}) == 1:
        return {}
    study = optuna.create_study(direction="maximize")
    for params, value in scores:
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(found.get(key, 0.0)) for key in sweep.space}


def is_log(key: str, sweep: SweepConfig) -> bool:
    """Return True if a parameter belongs on a logarithmic axis."""
    dimension = sweep.space[key]
    if isinstance(dimension, LogUniform):
        return True
    return len(dimension.values) > 2 and all(_is_number(value) and value > 0 for value in dimension.values)


def is_number(key: str, rows: Sequence[Row]) -> bool:
    """Return True if all values of a parameter are numbers."""
    return all(_is_number(row["values"].get(key)) for row in rows)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scored(rows: Sequence[Row], objective: str) -> list[Row]:
    return [row for row in rows if objective in row["scores"]]
