"""Figures of runs as Vega-Lite specifications: tooltips show values, the legend switches series on and off.

Every figure has a description for screen readers that states what it shows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pyarrow.parquet as pq
from scipy import stats

from spo_ray.runtime.artifact import STEP_LOG, read_lines
from spo_ray.train.spec import CHANGES

SIDES = {"chosen": "#1b9e57", "rejected": "#d6449a"}
OWN = "#7a8ca5"
ALARM = "#e08a00"
PROBE = {"chosen": "probe/logps/chosen", "rejected": "probe/logps/rejected"}
"""Columns of the step log with the mean log-probability of the probe pairs' responses."""
SIGNS = ("repetition", "distinct_2", "entropy", "length", "unfinished")
"""Metrics of text health that are measured during training."""
EMA = 0.9
"""Weight of the past in the smoothed curves."""
MOST_POINTS = 120
"""Largest number of points of a smoothed curve."""
MOST_PAIRS = 1000
"""Largest number of pairs in a panel; of more, evenly many along their scores are shown."""
WIDE = 5.0
"""Largest absolute value on an axis that is linear: with larger ones its ends are logarithmic, so that small changes
stay visible."""
Paths = Mapping[str, Path]
"""Folders of trainings by method."""
Record = dict[str, Any]
"""A point of a curve: ``method`` (its panel), ``series``, ``step`` and ``value``."""
Spec = dict[str, Any]
CONFIG = {
    "background": None,
    "view": {"stroke": "#8884"},
    "axis": {"labelColor": "currentColor", "titleColor": "currentColor", "gridColor": "#8883", "domainColor": "#8888"}
    | {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal"},
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "orient": "top", "labelFontSize": 13},
    "header": {"labelColor": "currentColor", "labelFontWeight": "bold", "labelFontSize": 13},
    "title": {"color": "currentColor", "fontSize": 13, "fontWeight": "normal"},
}
"""Colours of the page, also in dark mode."""


def log_probability_figure(trainings: Paths, alarms: Iterable[Record] = ()) -> Spec | None:
    """Plot how the mean log pi of the probe pairs' and of the first model's own responses changed, a panel per method.

    ``alarms`` are marked on the curve of the chosen responses: method, step and text of each.
    """
    own = "own answers before"
    records = _changes(_series(trainings, PROBE | {own: "probe/logps/top"}))
    shown = {record["series"] for record in records}
    colors = {name: color for name, color in (SIDES | {own: OWN}).items() if name in shown}
    chosen = {(r["method"], r["step"]): r["value"] for r in records if r["series"] == "chosen"}
    places = [(alarm, chosen.get((alarm["method"], alarm["step"]))) for alarm in alarms]
    marks = [alarm | {"series": "chosen", "value": value} for alarm, value in places if value is not None]
    return _lines(records, trainings, "change of log π since the start, nats", colors, marks=marks)


def batch_figure(trainings: Paths) -> Spec | None:
    """Plot the mean log pi of each step's own pairs minus the reference's, smoothed by a moving average.

    The paper's figure 4, without the differences between the pairs of different steps.
    """
    records = _smoothed(_series(trainings, {side: f"logps/{side}_change" for side in SIDES}))
    return _lines(records, trainings, "log π minus the reference's, nats", SIDES)


def dynamics_figure(trainings: Paths) -> Spec | None:
    """Plot Theorem 1's terms, one panel for each method; None if no training has measured them twice.

    Under the base loss alone log pi(y_w) rises with ``||g_w||^2 - <g_w,g_l>`` and log pi(y_l) with ``<g_w,g_l> -
    ||g_l||^2``, of the batch's mean gradients.
    """
    terms = {"‖g_w‖² − ⟨g_w,g_l⟩": "dynamics/chosen_term", "⟨g_w,g_l⟩ − ‖g_l‖²": "dynamics/rejected_term"}
    colors = dict(zip(terms, SIDES.values(), strict=True))
    return _lines(_series(trainings, terms), trainings, "gradient term", colors)


def health_figure(trainings: Paths) -> Spec | None:
    """Plot text health during training, one panel for each metric; None if no training has measured it twice."""
    found = _series(trainings, {sign: f"health/{sign}" for sign in SIGNS})
    records = [record | {"method": record["series"], "series": record["method"]} for record in found]
    return _lines(records, SIGNS, "", apart=True)


def overlaid_figure(trainings: Sequence[tuple[str, str, Path]]) -> Spec | None:
    """Plot the change of the mean log pi of the probe pairs' responses by run, one panel for each method.

    ``trainings`` holds run, method and folder; several trainings of one run and method have the same colour. Dashed:
    rejected.
    """
    records = [
        record | {"series": run, "side": record["series"], "number": number}
        for number, (run, method, path) in enumerate(trainings)
        for record in _changes(_series({method: path}, PROBE))
    ]
    panels = dict.fromkeys(method for _, method, _ in trainings)
    return _lines(records, panels, "change of log π since the start, nats", dashed="side")


def accuracy_figure(methods: Mapping[str, Any], reference: str) -> Spec:
    """Plot greedy accuracy with its 95% interval, one row for each method; dashed: the reference's."""
    records = [{"method": k, **entry["accuracy_greedy"]} for k, entry in methods.items() if entry["accuracy_greedy"]]
    tips = ["method:N", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("value", "low", "high")), "n:Q"]
    base = chart(records).encode(y=alt.Y("method:N", title=None, sort=list(methods)), tooltip=tips)
    axis = alt.Axis(format="%", tickCount=5)
    x = alt.X("low:Q", title="greedy accuracy, 95% interval", axis=axis, scale=alt.Scale(zero=True))
    bars = base.mark_rule(strokeWidth=3, color=OWN).encode(x=x, x2="high:Q")
    points = base.mark_point(filled=True, size=70, color="#4c78c8", opacity=1).encode(x="value:Q")
    usual = chart([r for r in records if r["method"] == reference]).mark_rule(strokeDash=[4, 3], color=OWN)
    told = [f"{r['method']} {r['value']:.1%} ({r['low']:.1%} to {r['high']:.1%})" for r in records]
    return spec(
        (usual.encode(x=alt.X("value:Q")) + bars + points).properties(height=28 * len(records)),
        f"Greedy accuracy: {', '.join(told)}.",
    )


def displacement_figure(methods: Mapping[str, Any]) -> Spec | None:
    """Plot the changes of the chosen and the rejected responses' log pi, one row for each method, which says its kind.

    Filled points are measured on held-out pairs where there are any, hollow ones on the training pairs.
    """
    records = []
    for method, entry in methods.items():
        pairs = {"held-out pairs": entry.get("held_out", {}), "training pairs": entry}
        sides = {k: [e.get("delta_logp_chosen"), e.get("delta_logp_rejected")] for k, e in pairs.items()}
        changes = {kind: both for kind, both in sides.items() if None not in both}
        for number, (kind, values) in enumerate(changes.items()):
            row = f"{method}\n{_direction(*next(iter(changes.values())))}"
            own = {"method": method, "row": row, "pairs": kind, "first": not number}
            records += [own | {"side": side, "value": value} for side, value in zip(SIDES, values, strict=True)]
    if not records:
        return None
    rows = list(dict.fromkeys(record["row"] for record in records))
    axis, scale, squeezed = _axis([record["value"] for record in records])
    y = alt.Y("row:N", title=None, sort=rows, axis=alt.Axis(labelExpr="split(datum.label, '\\n')", labelLimit=200))
    x = alt.X("value:Q", title=["change of log π, nats", *squeezed], axis=axis, scale=scale)
    base = chart(records)
    colors = alt.Scale(domain=list(SIDES), range=list(SIDES.values()))
    color = alt.Color("side:N", title=None, scale=colors)
    tips = ["method:N", "side:N", "pairs:N", alt.Tooltip("value:Q", format="+.2f")]
    joined = base.transform_filter("datum.first").mark_line(color=OWN, strokeWidth=2).encode(x=x, y=y, detail="row:N")
    drawn = [chart([{}]).mark_rule(color=OWN).encode(x=alt.datum(0)), joined]
    for first in {record["first"]: None for record in records}:
        points = base.transform_filter(f"datum.first == {str(first).lower()}")
        drawn.append(points.mark_point(filled=first, size=80, opacity=1).encode(x=x, y=y, color=color, tooltip=tips))
    told = [f"{r['method']} {r['side']} {r['value']:+.2f}" for r in records if r["first"]]
    text = f"Change of log-probability, nats, on {records[0]['pairs']}: {', '.join(told)}."
    return spec(alt.layer(*drawn).properties(height=48 * len(rows)), text)


def ches_figure(trainings: Paths, score: str) -> Spec | None:
    """Plot the change of each training pair's log pi(y_w) against its CHES score, a panel per method.

    ``score`` is ``ches`` or ``ches_per_token``. None where the pairs have no scores.
    """
    records, told = [], []
    for method, path in trainings.items():
        table = pq.read_table(path / CHANGES).to_pylist() if (path / CHANGES).is_file() else []
        points = sorted((row[score], row["delta_logp_chosen"]) for row in table if row[score] is not None)
        rank = stats.spearmanr(points).statistic if len(points) > 2 else math.nan
        panel = f"{method}: rank correlation {rank:+.2f}" if math.isfinite(rank) else method
        every = math.ceil(len(points) / MOST_PAIRS) or 1
        records += [{"method": panel, "score": x, "value": y} for x, y in points[::every]]
        told += [panel] if points else []
    if not records:
        return None
    axis, scale, squeezed = _axis([record["value"] for record in records])
    title = ["change of log π of the chosen response, nats", *squeezed]
    x = alt.X("score:Q", title="CHES score", scale=alt.Scale(zero=False))
    drawn = chart(records).mark_point(filled=True, size=25, opacity=0.5, color=SIDES["chosen"])
    drawn = drawn.encode(x=x, y=alt.Y("value:Q", title=None, axis=axis, scale=scale))
    return spec(_panels(drawn, told, title), f"{title[0]}, by CHES score; {'; '.join(told)}.")


def _direction(chosen: float, rejected: float) -> str:
    """Return the name of the quadrant of two changes."""
    if (chosen < 0) == (rejected < 0):
        return "both fell" if chosen < 0 else "both rose"
    return "chosen rose, rejected fell" if rejected < 0 else "chosen fell, rejected rose"


def _series(trainings: Paths, columns: Mapping[str, str]) -> list[Record]:
    """Return the records of some columns of the step logs, by name of the series; nulls are left out."""
    return [
        {"method": method, "step": step["step"], "series": name, "value": step[key]}
        for method, path in trainings.items()
        for step in read_lines(path / STEP_LOG)
        for name, key in columns.items()
        if step.get(key) is not None
    ]


def _changes(records: Iterable[Record]) -> list[Record]:
    """Return the records with the difference from the first value of their curve."""
    first: dict[tuple[str, str], float] = {}
    return [r | {"value": r["value"] - first.setdefault((r["method"], r["series"]), r["value"])} for r in records]


def _smoothed(records: list[Record]) -> list[Record]:
    """Return the records as exponential moving averages that start at the first value, at evenly spaced steps."""
    last: dict[tuple[str, str], float] = {}
    found, every = [], math.ceil(max((record["step"] for record in records), default=1) / MOST_POINTS)
    for record in records:
        key = (record["method"], record["series"])
        last[key] = EMA * last.get(key, record["value"]) + (1 - EMA) * record["value"]
        found += [record | {"value": last[key]}] if record["step"] % every == 0 else []
    return found


def _axis(values: Sequence[float]) -> tuple[Any, Any, list[str]]:
    """Return axis, scale and words about it: beyond ``WIDE`` the axis is logarithmic on both sides of 0."""
    most = max(map(abs, values))
    if most <= WIDE:
        return alt.Axis(tickCount=5), alt.Scale(padding=8), []
    decades = int(math.log10(most))
    unit = 1 if decades < 2 else 10 ** (decades - 2)
    steps = [2**i for i in range(12)] if decades < 2 else [10**i for i in range(3)]
    ticks = [sign * unit * step for step in steps if unit * step <= 1.5 * most for sign in (1, -1)]
    scale = alt.Scale(type="symlog", constant=unit, padding=8)
    return alt.Axis(values=[0, *ticks]), scale, [f"(logarithmic beyond ±{unit:,})"]


def _lines(
    records: list[Record],
    panels: Iterable[str],
    title: str,
    colors: Mapping[str, str] | None = None,
    *,
    marks: Sequence[Record] = (),
    apart: bool = False,
    dashed: str | None = None,
) -> Spec | None:
    """Plot lines against the step, one panel for each method; None if no curve has two points.

    ``apart`` gives each panel its own axis without 0, ``dashed`` names a field whose values have different strokes,
    ``marks`` are drawn as triangles.
    """
    if len({record["step"] for record in records}) < 2:
        return None
    records = [record | {"value": float(f"{record['value']:.4g}")} for record in records]
    axis, scale, squeezed = (alt.Axis(), alt.Scale(zero=False), []) if apart else _axis([r["value"] for r in records])
    scheme = alt.Scale(domain=list(colors), range=list(colors.values())) if colors else alt.Undefined
    picked = alt.selection_point(fields=["series"], bind="legend")
    strokes = {"strokeDash": alt.StrokeDash(f"{dashed}:N", title=None), "detail": "number:N"} if dashed else {}
    names = ["method:N", "series:N", *([f"{dashed}:N"] if dashed else [])]
    base, order = chart([*records, *marks]), list(panels)
    x = alt.X("step:Q", title="step" if len(order) == 1 else None, axis=alt.Axis(tickCount=4, format="d"))
    y = alt.Y("value:Q", title=None, scale=scale, axis=axis)
    drawn = base.transform_filter("!datum.text").mark_line(strokeWidth=2, point={"size": 12, "opacity": 0.01})
    drawn = drawn.encode(
        x=x,
        y=y,
        color=alt.Color("series:N", title=None, scale=scheme),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.1)),
        tooltip=[*names, "step:Q", alt.Tooltip("value:Q", format=".4g")],
        **strokes,
    ).add_params(picked)
    if marks:
        triangle = {"shape": "triangle-down", "filled": True, "size": 110, "yOffset": -9, "opacity": 1, "color": ALARM}
        sign = base.transform_filter("datum.text").mark_point(**triangle)
        drawn = drawn + sign.encode(x=x, y=y, tooltip=["method:N", "step:Q", "text:N"])
    text = f"{title or 'Text health'}, at the last measurement: {_told(records)}."
    heading = [title, *squeezed] if title else []
    if len(order) == 1:
        return spec(drawn.properties(height=220, title=alt.Title(heading, anchor="start")), text)
    panels = _panels(drawn, order, heading).resolve_axis(x="independent")
    return spec(panels.resolve_scale(y="independent") if apart else panels, text)


def _panels(drawn: Any, order: Sequence[str], heading: Sequence[str]) -> Any:
    """Return a small chart for each method, three in a row, under one heading."""
    panels = drawn.properties(width=220, height=150).facet(alt.Facet("method:N", title=None, sort=order), columns=3)
    return panels.properties(title=alt.Title(heading, anchor="start")) if heading else panels


def _told(records: Iterable[Record]) -> str:
    """Return the last value of each curve in words."""
    last: dict[str, dict[str, float]] = {}
    for record in records:
        last.setdefault(record["method"], {})[record["series"]] = record["value"]
    return "; ".join(f"{name}: {', '.join(f'{k} {v:.3g}' for k, v in found.items())}" for name, found in last.items())


def chart(records: Sequence[Mapping[str, Any]]) -> Any:
    """Return an empty Altair chart of the records."""
    return alt.Chart(alt.Data(values=records))


def spec(drawn: Any, description: str = "") -> Spec:
    """Return an Altair chart as a specification for the page; ``description`` is its text for screen readers."""
    return drawn.to_dict() | {"config": CONFIG} | ({"description": description} if description else {})


def svg(drawn: Any) -> str:
    """Return an Altair chart, or a specification of this module, as SVG on a white background."""
    import vl_convert

    drawn = drawn if isinstance(drawn, dict) else drawn.to_dict()
    return vl_convert.vegalite_to_svg(drawn | {"config": drawn.get("config", {}) | {"background": "white"}})
