"""The sensitivity report's figures, as Altair charts."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
from scipy import stats

from spo_ray.config.sweep import LogUniform, SweepConfig, names_of
from spo_ray.evaluate.statistics import mean_std
from spo_ray.sweep.results import Row, one_each
from spo_ray.sweep.space import distributions, point_key, short_names, short_text

MOST_LINES = 8
MOST_VALUES = 10
BINS = 6
DOT = "#1f3b64"


class Estimate(NamedTuple):
    """The objective at one point of the search space."""

    values: dict[str, Any]
    mean: float
    low: float
    high: float
    """95% interval: Student's t over seeds; with one seed that of the score itself, over questions or pairs."""
    seeds: int
    finished: bool
    """Whether all its trials reached the end; else their last scores count."""


def sensitivity_figure(rows: Sequence[Row], key: str, sweep: SweepConfig) -> Any:
    """The first objective against one parameter, with its intervals; lines join points that agree in all others."""
    objective = names_of(sweep)[0]
    records = [_record(point, key) for point in estimates(rows, objective)]
    groups = {record["others"] for record in records}
    joined = len(records) > 1 and len(groups) <= MOST_LINES
    title = ", ".join(name for other, name in short_names(sweep.space).items() if other != key) or None
    color: Any = alt.Color("others:N", title=title) if joined and len(groups) > 1 else alt.value(DOT)
    base: Any = alt.Chart(alt.Data(values=records))
    x = _axis(key, rows, sweep)
    y = alt.Y("mean:Q", title=objective, scale=alt.Scale(zero=False))
    layers = [
        base.mark_rule(opacity=0.5).encode(x=x, y=alt.Y("low:Q", title=objective), y2="high:Q", color=color),
        *(
            base.transform_filter(f"datum.finished == {str(done).lower()}")
            .mark_point(filled=done, size=60)
            .encode(x=x, y=y, color=color)
            for done in sorted({record["finished"] for record in records})
        ),
    ]
    if joined:
        layers.append(base.mark_line(opacity=0.7).encode(x=x, y=y, color=color))
    return alt.layer(*layers).properties(width=460, height=260)


def _record(point: Estimate, key: str) -> dict[str, Any]:
    others = ", ".join(short_text(value, 3) for other, value in point.values.items() if other != key)
    return point._asdict() | {"x": point.values[key], "others": others}


def _axis(key: str, rows: Sequence[Row], sweep: SweepConfig) -> Any:
    name = short_names(sweep.space)[key]
    if not is_number(key, rows):
        return alt.X("x:N", title=name)
    scale = alt.Scale(type="log") if is_log(key, sweep) else alt.Scale(zero=False)
    return alt.X("x:Q", title=name, scale=scale)


def heat_figure(rows: Sequence[Row], first: str, second: str, sweep: SweepConfig) -> Any:
    """The first objective's mean over two parameters' values, over all others; many values are put into bins."""
    objective, titles, cells = names_of(sweep)[0], short_names(sweep.space), {}
    names = {key: _bins(rows, key, sweep) for key in (first, second)}
    for row in rows:
        if objective in row["scores"]:
            place = tuple(names[key][json.dumps(row["values"][key])] for key in (first, second))
            cells.setdefault(place, []).append(row["scores"][objective]["value"])
    records = [{"x": x, "y": y, "mean": sum(v) / len(v), "n": len(v)} for (x, y), v in cells.items()]
    orders = [list(dict.fromkeys(names[key].values())) for key in (first, second)]
    base: Any = alt.Chart(alt.Data(values=records)).encode(
        x=alt.X("x:N", title=titles[first], sort=orders[0], axis=alt.Axis(labelAngle=0)),
        y=alt.Y("y:N", title=titles[second], sort=orders[1][::-1]),
    )
    cells_drawn = base.mark_rect().encode(color=alt.Color("mean:Q", title=objective, scale=alt.Scale(scheme="viridis")))
    middle = sum(r["mean"] for r in records) / len(records)
    ink = alt.condition(f"datum.mean > {middle}", alt.value("black"), alt.value("white"))
    text = base.mark_text().encode(text=alt.Text("mean:Q", format=".3f"), color=ink)
    return (cells_drawn + text).properties(width=70 * len(orders[0]), height=46 * len(orders[1]))


def _bins(rows: Sequence[Row], key: str, sweep: SweepConfig) -> dict[str, str]:
    """Every value, as JSON, with the name of its row or column, in their order."""
    values = {json.dumps(row["values"][key]): row["values"][key] for row in rows}
    if not is_number(key, rows):
        return {text: str(value) for text, value in values.items()}
    ordered = dict(sorted(values.items(), key=lambda item: item[1]))
    if len(ordered) <= MOST_VALUES:
        return {text: short_text(value, 3) for text, value in ordered.items()}
    scale, back = (math.log, math.exp) if is_log(key, sweep) else (float, float)
    low, high = scale(min(ordered.values())), scale(max(ordered.values()))
    edges = [back(low + (high - low) * i / BINS) for i in range(BINS + 1)]
    labels = [f"{a:.2g}–{b:.2g}" for a, b in itertools.pairwise(edges)]
    place = {text: min(BINS - 1, int(BINS * (scale(value) - low) / (high - low))) for text, value in ordered.items()}
    return {text: labels[index] for text, index in place.items()}


def parallel_figure(rows: Sequence[Row], sweep: SweepConfig) -> Any:
    """Parallel coordinates: a line a trial over its parameters and objectives, coloured by the first objective."""
    objective = names_of(sweep)[0]
    scored = [row for row in rows if objective in row["scores"]]
    axes: dict[str, dict[str, Any]] = {
        name: _column(scored, key, sweep) for key, name in short_names(sweep.space).items()
    }
    for name in names_of(sweep):
        axes[name] = _scaled(
            {row["trial"]: row["scores"][name]["value"] for row in scored if name in row["scores"]}, float
        )
    records: list[dict[str, Any]] = [
        {
            "axis": axis,
            "height": place,
            "label": short_text(value, 3),
            "trial": row["trial"],
            objective: row["scores"][objective]["value"],
        }
        for axis, column in axes.items()
        for row in scored
        if row["trial"] in column
        for place, value in [column[row["trial"]]]
    ]
    ticks = {(r["axis"], round(r["height"], 1)): r for r in sorted(records, key=lambda r: r["height"])}
    x = alt.X(
        "axis:N", sort=list(axes), title=None, axis=alt.Axis(labelAngle=0, grid=True), scale=alt.Scale(padding=0.4)
    )
    y = alt.Y("height:Q", axis=None)
    color = alt.Color(f"{objective}:Q", scale=alt.Scale(scheme="viridis"))
    base: Any = alt.Chart(alt.Data(values=records))
    lines = base.mark_line(opacity=0.7).encode(x=x, y=y, detail="trial:N", color=color)
    marks: Any = alt.Chart(alt.Data(values=list(ticks.values()))).mark_text(dx=-6, align="right", fontSize=9)
    return (lines + marks.encode(x=x, y=y, text="label:N")).properties(
        width=130 * len(axes), height=280, usermeta={"fixed": True}
    )


def _column(rows: Sequence[Row], key: str, sweep: SweepConfig) -> dict[str, Any]:
    values = {row["trial"]: row["values"][key] for row in rows}
    if not is_number(key, rows):
        order = list(dict.fromkeys(map(str, values.values())))
        return {trial: (order.index(str(v)) / max(1, len(order) - 1), v) for trial, v in values.items()}
    return _scaled(values, math.log if is_log(key, sweep) else float)


def _scaled(values: dict[str, Any], scale: Any) -> dict[str, Any]:
    """Each value with its height between 0 and 1."""
    places = {trial: scale(value) for trial, value in values.items()}
    low, high = min(places.values(), default=0.0), max(places.values(), default=1.0)
    return {trial: ((place - low) / ((high - low) or 1.0), values[trial]) for trial, place in places.items()}


def importance_figure(found: dict[str, float]) -> Any:
    """A bar for each parameter."""
    names = short_names(found)
    records = [{"parameter": names[key], "importance": value} for key, value in found.items()]
    bars: Any = alt.Chart(alt.Data(values=records)).mark_bar(color=DOT)
    chart = bars.encode(
        x=alt.X(
            "importance:Q", title="share of the variance", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])
        ),
        y=alt.Y("parameter:N", title=None, sort="-x"),
    )
    return chart.properties(width=460, height=30 * len(records))


FEWEST_TRIALS = 4
"""For importances."""


def estimates(rows: Sequence[Row], objective: str) -> list[Estimate]:
    """One for each point that was scored, in the order of the trials; of equal trials one counts."""
    points: dict[str, list[Row]] = {}
    for row in one_each(row for row in rows if objective in row["scores"]):
        points.setdefault(point_key(row["values"]), []).append(row)
    return [_estimate(group, objective) for group in points.values()]


def _estimate(group: list[Row], objective: str) -> Estimate:
    scores = [row["scores"][objective] for row in group]
    mean, std = mean_std([score["value"] for score in scores])
    half = stats.t.ppf(0.975, len(scores) - 1) * std / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    low, high = mean - half, mean + half
    if len(scores) == 1:
        low, high = scores[0].get("low", mean), scores[0].get("high", mean)
    finished = all(row["status"] == "finished" for row in group)
    return Estimate(group[0]["values"], mean, low, high, len(scores), finished)


def importances(rows: Sequence[Row], sweep: SweepConfig) -> dict[str, float]:
    """Share of the first objective's variance that each parameter explains, by fANOVA (Hutter et al., ICML 2014).

    Over the last scores of all scored trials; empty with fewer than ``FEWEST_TRIALS``, or where nothing differs.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objective = names_of(sweep)[0]
    scored = [row for row in rows if objective in row["scores"]]
    if len(scored) < FEWEST_TRIALS or len({row["scores"][objective]["value"] for row in scored}) == 1:
        return {}
    study = optuna.create_study(direction="maximize")
    space = distributions(sweep)
    for row in scored:
        value = row["scores"][objective]["value"]
        study.add_trial(optuna.trial.create_trial(params=row["values"], distributions=space, value=value))
    found = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    return {key: float(found.get(key, 0.0)) for key in sweep.space}


def is_log(key: str, sweep: SweepConfig) -> bool:
    """Whether a parameter belongs on a logarithmic axis."""
    dimension = sweep.space[key]
    return isinstance(dimension, LogUniform) or (
        len(dimension.values) > 2 and all(_positive(value) for value in dimension.values)
    )


def is_number(key: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all values of a parameter are numbers."""
    values = [row["values"].get(key) for row in rows]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
