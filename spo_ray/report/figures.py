"""Figures as Vega-Lite specifications; values show under the pointer, legends switch series on and off."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from spo_ray.runtime.artifact import STEP_LOG

CHOSEN, REJECTED, OWN = "#1b9e57", "#d6449a", "#7a8ca5"
EMA = 0.9
"""Weight of the past in the smoothed curves."""
Spec = dict[str, Any]
VALUE = alt.Tooltip("value:Q", format=".4g")
CONFIG = {
    "background": None,
    "view": {"stroke": "#8884"},
    "axis": {"labelColor": "currentColor", "titleColor": "currentColor", "gridColor": "#8883", "domainColor": "#8888"},
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "orient": "top"},
    "header": {"labelColor": "currentColor"},
}
"""Takes the page's colours, also in dark mode."""


def log_probability_figure(checkpoints: Mapping[str, Path]) -> Spec:
    """Mean log pi of the probe pairs' responses and of the SFT model's own against the step, one panel a method."""
    names = {"chosen": "chosen", "rejected": "rejected", "SFT's own (y*)": "top"}
    records = _series(checkpoints, {side: f"probe/logps/{name}" for side, name in names.items()})
    shown = [side for side in names if any(record["series"] == side for record in records)]
    colors = dict(zip(names, (CHOSEN, REJECTED, OWN), strict=True))
    return _lines(records, checkpoints, "mean log π(y|x), nats", {name: colors[name] for name in shown}, start=True)


def batch_figure(checkpoints: Mapping[str, Path]) -> Spec:
    """Mean log pi of each step's own pairs, smoothed by an exponential moving average; the paper's figure 4."""
    names = {"chosen": "logps/chosen", "rejected": "logps/rejected"}
    records = _smoothed(_series(checkpoints, names))
    return _lines(records, checkpoints, "mean log π of a step's pairs, nats", {"chosen": CHOSEN, "rejected": REJECTED})


def ratio_figure(checkpoints: Mapping[str, Path]) -> Spec:
    """Mean ``log pi(y_w) - log pi(y_l)`` of the probe pairs, all methods in one panel; the paper's figure 1c."""
    both = _series(checkpoints, {"chosen": "probe/logps/chosen", "rejected": "probe/logps/rejected"})
    sides: dict[tuple[str, int], dict[str, float]] = {}
    for record in both:
        sides.setdefault((record["method"], record["step"]), {})[record["series"]] = record["value"]
    records = [
        {"method": "all", "series": method, "step": step, "value": values["chosen"] - values["rejected"]}
        for (method, step), values in sides.items()
        if {"chosen", "rejected"} <= values.keys()
    ]
    return _lines(records, ["all"], "mean log π(chosen)/π(rejected), nats", None)


def dynamics_figure(checkpoints: Mapping[str, Path]) -> Spec | None:
    """Theorem 1's terms of watched steps, one panel a method; None where no step was watched.

    Under the base loss alone log pi(y_w) rises with ``||g_w||^2 - <g_w,g_l>`` and log pi(y_l) with ``<g_w,g_l> -
    ||g_l||^2``, of the batch's mean gradients.
    """
    terms = {"‖g_w‖² − ⟨g_w,g_l⟩": "dynamics/chosen_term", "⟨g_w,g_l⟩ − ‖g_l‖²": "dynamics/rejected_term"}
    records = _series(checkpoints, terms)
    colors = dict(zip(terms, (CHOSEN, REJECTED), strict=True))
    return _lines(records, checkpoints, "gradient term", colors) if records else None


def health_figure(checkpoints: Mapping[str, Path]) -> Spec | None:
    """Signs of decay in text sampled during training, one panel a sign; None where none were looked for."""
    signs = ("repetition", "distinct_2", "entropy", "length", "unfinished")
    found = _series(checkpoints, {sign: f"health/{sign}" for sign in signs})
    records = [record | {"method": record["series"], "series": record["method"]} for record in found]
    return _lines(records, signs, "", None, apart=True) if records else None


def overlaid_figure(runs: Mapping[str, Mapping[str, Sequence[Path]]]) -> Spec:
    """Mean log pi of the probe pairs' responses by run, one panel a method; dashed: rejected.

    ``runs`` holds each run's trainings by the method's name; several of one method have the same colour.
    """
    records = []
    for run, methods in runs.items():
        for method, paths in methods.items():
            for number, path in enumerate(paths):
                for side in ("chosen", "rejected"):
                    for found in _series({method: path}, {side: f"probe/logps/{side}"}):
                        records.append(found | {"series": run, "side": side, "number": number})
    panels = dict.fromkeys(record["method"] for record in records)
    return _lines(records, panels, "mean log π(y|x), nats", None, dashed="side")


def accuracy_figure(methods: Mapping[str, Any]) -> Spec:
    """Greedy accuracy with its 95% interval, one row a method."""
    records = [
        {"method": name, **entry["accuracy_greedy"]} for name, entry in methods.items() if entry["accuracy_greedy"]
    ]
    y = alt.Y("method:N", title=None, sort=list(methods))
    base: Any = alt.Chart(alt.Data(values=records))
    x = alt.X("low:Q", title="accuracy, greedy, 95% interval", axis=alt.Axis(format="%"), scale=alt.Scale(zero=True))
    tips = ["method:N", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("value", "low", "high")), "n:Q"]
    bars = base.mark_rule(strokeWidth=3, color=OWN).encode(x=x, x2="high:Q", y=y, tooltip=tips)
    points = base.mark_point(filled=True, size=70, color="#4c78c8").encode(x="value:Q", y=y, tooltip=tips)
    return spec((bars + points).properties(width=520, height=28 * len(records)))


def _series(checkpoints: Mapping[str, Path], keys: Mapping[str, str]) -> list[dict[str, Any]]:
    """Records of some of the step logs' columns, in long form; what was no finite number is left out."""
    records = []
    for method, path in checkpoints.items():
        for line in (path / STEP_LOG).read_text().splitlines():
            step = json.loads(line)
            for name, key in keys.items():
                if step.get(key) is not None:
                    records.append({"method": method, "step": step["step"], "series": name, "value": step[key]})
    return records


def _smoothed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Moving averages that start at the first value."""
    last: dict[tuple[str, str], float] = {}
    found = []
    for record in records:
        key = (record["method"], record["series"])
        last[key] = EMA * last.get(key, record["value"]) + (1 - EMA) * record["value"]
        found.append(record | {"value": last[key]})
    return found


def _lines(
    records: list[dict[str, Any]],
    panels: Any,
    title: str,
    colors: Mapping[str, str] | None,
    *,
    start: bool = False,
    apart: bool = False,
    dashed: str | None = None,
) -> Spec:
    """Lines against the step, one panel a method.

    ``start`` adds dashed lines at the start, ``apart`` gives each panel its own linear axis, ``dashed`` names a field
    whose values have other strokes.
    """
    scale = alt.Scale(domain=list(colors), range=list(colors.values())) if colors else alt.Undefined
    color = alt.Color("series:N", title=None, scale=scale)
    picked = alt.selection_point(fields=["series"], bind="legend")
    base: Any = alt.Chart(alt.Data(values=records))
    more: dict[str, Any] = (
        {"strokeDash": alt.StrokeDash(f"{dashed}:N", title=None), "detail": "number:N"} if dashed else {}
    )
    lines = base.mark_line(strokeWidth=2, point={"size": 12, "opacity": 0.01}).encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False) if apart else alt.Scale(type="symlog")),
        color=color,
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.1)),
        tooltip=["method:N", "series:N", *([f"{dashed}:N"] if dashed else []), "step:Q", VALUE],
        **more,
    )
    chart = lines.add_params(picked)
    if start:
        rule = base.transform_filter("datum.step == 0").mark_rule(strokeDash=[4, 3], opacity=0.6)
        chart = chart + rule.encode(y="value:Q", color=color)
    names = list(panels)
    if len(names) == 1:
        return spec(chart.properties(width=520, height=200))
    facet = alt.Facet("method:N", title=None, sort=names)
    panel = chart.properties(width=220, height=150).facet(facet=facet, columns=3).resolve_axis(x="independent")
    return spec(panel.resolve_scale(y="independent") if apart else panel)


def spec(chart: Any) -> Spec:
    """An Altair chart for the page."""
    return chart.to_dict() | {"config": CONFIG}


def svg(chart: Any) -> str:
    """An Altair chart as SVG on white, for a page of its own."""
    import vl_convert

    return vl_convert.vegalite_to_svg(chart.configure(background="white").to_json())
