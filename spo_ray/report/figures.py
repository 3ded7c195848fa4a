"""Figures of runs as Vega-Lite specifications: tooltips show values, the legend switches series on and off."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from spo_ray.runtime.artifact import STEP_LOG, read_lines

SIDES = {"chosen": "#1b9e57", "rejected": "#d6449a"}
OWN = "#7a8ca5"
PROBE = {"chosen": "probe/logps/chosen", "rejected": "probe/logps/rejected"}
"""Columns of the step log with the mean log-probability of the probe pairs' responses."""
SIGNS = ("repetition", "distinct_2", "entropy", "length", "unfinished")
"""Metrics of text health that are measured during training."""
EMA = 0.9
"""Weight of the past in the smoothed curves."""
Paths = Mapping[str, Path]
"""Folders of trainings by method."""
Record = dict[str, Any]
"""A point of a curve: ``method`` (its panel), ``series``, ``step`` and ``value``."""
Spec = dict[str, Any]
CONFIG = {
    "background": None,
    "view": {"stroke": "#8884"},
    "axis": {"labelColor": "currentColor", "titleColor": "currentColor", "gridColor": "#8883", "domainColor": "#8888"},
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "orient": "top"},
    "header": {"labelColor": "currentColor"},
}
"""Colours of the page, also in dark mode."""


def log_probability_figure(trainings: Paths, reference: str) -> Spec:
    """Plot the mean log pi of the probe pairs' and of the reference's own responses, one panel for each method."""
    own = f"{reference}'s own (y*)"
    records = _series(trainings, PROBE | {own: "probe/logps/top"})
    shown = {record["series"] for record in records}
    colors = {name: color for name, color in (SIDES | {own: OWN}).items() if name in shown}
    return _lines(records, trainings, "mean log π(y|x), nats", colors, start=True)


def batch_figure(trainings: Paths) -> Spec:
    """Plot the mean log pi of each step's own pairs, smoothed by a moving average; the paper's figure 4."""
    records = _smoothed(_series(trainings, {"chosen": "logps/chosen", "rejected": "logps/rejected"}))
    return _lines(records, trainings, "mean log π of a step's pairs, nats", SIDES)


def ratio_figure(trainings: Paths) -> Spec:
    """Plot the mean ``log pi(y_w) - log pi(y_l)`` of the probe pairs for all methods; the paper's figure 1c."""
    chosen, rejected = PROBE.values()
    records = [
        {"method": "all", "series": method, "step": step["step"], "value": step[chosen] - step[rejected]}
        for method, path in trainings.items()
        for step in read_lines(path / STEP_LOG)
        if None not in (step.get(chosen), step.get(rejected))
    ]
    return _lines(records, ["all"], "mean log π(chosen)/π(rejected), nats")


def dynamics_figure(trainings: Paths) -> Spec | None:
    """Plot Theorem 1's terms, one panel for each method; None if no training has measured them.

    Under the base loss alone log pi(y_w) rises with ``||g_w||^2 - <g_w,g_l>`` and log pi(y_l) with ``<g_w,g_l> -
    ||g_l||^2``, of the batch's mean gradients.
    """
    terms = {"‖g_w‖² − ⟨g_w,g_l⟩": "dynamics/chosen_term", "⟨g_w,g_l⟩ − ‖g_l‖²": "dynamics/rejected_term"}
    records = _series(trainings, terms)
    colors = dict(zip(terms, SIDES.values(), strict=True))
    return _lines(records, trainings, "gradient term", colors) if records else None


def health_figure(trainings: Paths) -> Spec | None:
    """Plot text health during training, one panel for each metric; None if no training has measured it."""
    found = _series(trainings, {sign: f"health/{sign}" for sign in SIGNS})
    records = [record | {"method": record["series"], "series": record["method"]} for record in found]
    return _lines(records, SIGNS, "", apart=True) if records else None


def overlaid_figure(trainings: Sequence[tuple[str, str, Path]]) -> Spec:
    """Plot the mean log pi of the probe pairs' responses by run, one panel for each method; dashed: rejected.

    ``trainings`` holds run, method and folder; several trainings of one run and method have the same colour.
    """
    records = [
        record | {"series": run, "side": record["series"], "number": number}
        for number, (run, method, path) in enumerate(trainings)
        for record in _series({method: path}, PROBE)
    ]
    panels = dict.fromkeys(method for _, method, _ in trainings)
    return _lines(records, panels, "mean log π(y|x), nats", dashed="side")


def accuracy_figure(methods: Mapping[str, Any]) -> Spec:
    """Plot greedy accuracy with its 95% interval, one row for each method."""
    records = [{"method": k, **entry["accuracy_greedy"]} for k, entry in methods.items() if entry["accuracy_greedy"]]
    title = "accuracy, greedy, 95% interval"
    tips = ["method:N", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("value", "low", "high")), "n:Q"]
    base = chart(records).encode(y=alt.Y("method:N", title=None, sort=list(methods)), tooltip=tips)
    x = alt.X("low:Q", title=title, axis=alt.Axis(format="%"), scale=alt.Scale(zero=True))
    bars = base.mark_rule(strokeWidth=3, color=OWN).encode(x=x, x2="high:Q")
    points = base.mark_point(filled=True, size=70, color="#4c78c8").encode(x="value:Q")
    return spec((bars + points).properties(width=520, height=28 * len(records)))


def _series(trainings: Paths, columns: Mapping[str, str]) -> list[Record]:
    """Return the records of some columns of the step logs, by name of the series; nulls are left out."""
    return [
        {"method": method, "step": step["step"], "series": name, "value": step[key]}
        for method, path in trainings.items()
        for step in read_lines(path / STEP_LOG)
        for name, key in columns.items()
        if step.get(key) is not None
    ]


def _smoothed(records: list[Record]) -> list[Record]:
    """Return the records as exponential moving averages that start at the first value."""
    last: dict[tuple[str, str], float] = {}
    found = []
    for record in records:
        key = (record["method"], record["series"])
        last[key] = EMA * last.get(key, record["value"]) + (1 - EMA) * record["value"]
        found.append(record | {"value": last[key]})
    return found


def _lines(
    records: list[Record],
    panels: Iterable[str],
    title: str,
    colors: Mapping[str, str] | None = None,
    *,
    start: bool = False,
    apart: bool = False,
    dashed: str | None = None,
) -> Spec:
    """Plot lines against the step, one panel for each method.

    ``start`` adds dashed lines at the start, ``apart`` gives each panel its own linear axis, ``dashed`` names a field
    whose values have different strokes.
    """
    scale = alt.Scale(domain=list(colors), range=list(colors.values())) if colors else alt.Undefined
    color = alt.Color("series:N", title=None, scale=scale)
    picked = alt.selection_point(fields=["series"], bind="legend")
    strokes = {"strokeDash": alt.StrokeDash(f"{dashed}:N", title=None), "detail": "number:N"} if dashed else {}
    names = ["method:N", "series:N", *([f"{dashed}:N"] if dashed else [])]
    base = chart(records)
    drawn = base.mark_line(strokeWidth=2, point={"size": 12, "opacity": 0.01}).encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False) if apart else alt.Scale(type="symlog")),
        color=color,
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.1)),
        tooltip=[*names, "step:Q", alt.Tooltip("value:Q", format=".4g")],
        **strokes,
    )
    drawn = drawn.add_params(picked)
    if start:
        rule = base.transform_filter("datum.step == 0").mark_rule(strokeDash=[4, 3], opacity=0.6)
        drawn = drawn + rule.encode(y="value:Q", color=color)
    order = list(panels)
    if len(order) == 1:
        return spec(drawn.properties(width=520, height=200))
    facet = alt.Facet("method:N", title=None, sort=order)
    panel = drawn.properties(width=220, height=150).facet(facet=facet, columns=3).resolve_axis(x="independent")
    return spec(panel.resolve_scale(y="independent") if apart else panel)


def chart(records: Sequence[Mapping[str, Any]]) -> Any:
    """Return an empty Altair chart of the records."""
    return alt.Chart(alt.Data(values=records))


def spec(drawn: Any) -> Spec:
    """Return an Altair chart as a specification for the page."""
    return drawn.to_dict() | {"config": CONFIG}


def svg(drawn: Any) -> str:
    """Return an Altair chart as SVG on a white background."""
    import vl_convert

    return vl_convert.vegalite_to_svg(drawn.configure(background="white").to_json())
