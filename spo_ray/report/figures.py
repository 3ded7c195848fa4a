"""Figures as inline SVG."""

import json
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from spo_ray.run import STEP_LOG

CHOSEN, REJECTED, OWN = "#1b7837", "#c51b7d", "#7a8ca5"


def log_probability_figure(checkpoints: dict[str, Path]) -> str:
    """Mean log pi of the probe pairs' responses and of the SFT model's own against the step, one panel a method."""
    names = {"chosen": "chosen", "rejected": "rejected", "SFT's own (y*)": "top"}
    records = _series(checkpoints, {side: f"probe/logps/{name}" for side, name in names.items()}, "side", "logp")
    shown = [side for side in names if any(record["side"] == side for record in records)]
    color = alt.Color("side:N", title=None, scale=alt.Scale(domain=shown, range=[CHOSEN, REJECTED, OWN]))
    base: Any = alt.Chart(alt.Data(values=records))
    lines = base.mark_line(strokeWidth=2).encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("logp:Q", title="mean log π(y|x), nats", scale=alt.Scale(type="symlog")),
        color=color,
    )
    start = (
        base.transform_filter("datum.step == 0")
        .mark_rule(strokeDash=[4, 3], opacity=0.6)
        .encode(y="logp:Q", color=color)
    )
    chart = (
        (lines + start)
        .properties(width=220, height=150)
        .facet(facet=alt.Facet("method:N", title=None, sort=list(checkpoints)), columns=3)
    )
    return _svg(chart)


def dynamics_figure(checkpoints: dict[str, Path]) -> str:
    """Theorem 1's terms of watched steps, one panel a method; empty where no step was watched.

    Under the base loss alone log pi(y_w) rises with ``||g_w||^2 - <g_w,g_l>`` and log pi(y_l) with ``<g_w,g_l> -
    ||g_l||^2``, of the batch's mean gradients.
    """
    terms = {"‖g_w‖² − ⟨g_w,g_l⟩": "dynamics/chosen_term", "⟨g_w,g_l⟩ − ‖g_l‖²": "dynamics/rejected_term"}
    records = _series(checkpoints, terms, "term", "value")
    if not records:
        return ""
    base: Any = alt.Chart(alt.Data(values=records))
    color = alt.Color("term:N", title=None, scale=alt.Scale(domain=list(terms), range=[CHOSEN, REJECTED]))
    lines = base.mark_line(strokeWidth=2, point=True).encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("value:Q", title="gradient term", scale=alt.Scale(type="symlog")),
        color=color,
    )
    chart = lines.properties(width=220, height=120).facet(
        facet=alt.Facet("method:N", title=None, sort=list(checkpoints)), columns=3
    )
    return _svg(chart)


def _series(checkpoints: dict[str, Path], keys: dict[str, str], label: str, value: str) -> list[dict[str, Any]]:
    """Records of some of the step logs' columns, in long form."""
    records = []
    for method, path in checkpoints.items():
        for line in (path / STEP_LOG).read_text().splitlines():
            step = json.loads(line)
            for name, key in keys.items():
                if key in step:
                    records.append({"method": method, "step": step["step"], label: name, value: step[key]})
    return records


def accuracy_figure(methods: dict[str, Any]) -> str:
    """Greedy accuracy with its 95% interval, one row a method."""
    records = [
        {"method": name, **entry["accuracy_greedy"]} for name, entry in methods.items() if entry["accuracy_greedy"]
    ]
    y = alt.Y("method:N", title=None, sort=list(methods))
    base: Any = alt.Chart(alt.Data(values=records))
    x = alt.X("low:Q", title="accuracy, greedy, 95% interval", axis=alt.Axis(format="%"), scale=alt.Scale(zero=True))
    bars = base.mark_rule(strokeWidth=3, color="#7a8ca5").encode(x=x, x2="high:Q", y=y)
    points = base.mark_point(filled=True, size=70, color="#1f3b64").encode(x="value:Q", y=y)
    return _svg((bars + points).properties(width=520, height=28 * len(records)))


def _svg(chart: Any) -> str:
    """SVG on white, so that it can be read on any page."""
    return vl_convert.vegalite_to_svg(chart.configure(background="white").to_json())
