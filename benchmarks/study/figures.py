"""The fronts of docs/study.md as figures: each method with several weights, means over the seeds."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import altair as alt

from benchmarks.study.jobs import DIAL, Row
from spo_ray.report.figures import chart, svg

FRONTS = {
    "order": ("held_out/chosen", "change of held-out log π of the preferred answers, nats", "held_out/in_order"),
    "accuracy": ("kl_policy_to_reference", "KL divergence to the reference, nats an answer", "greedy"),
}
"""Name of a figure: its measure across, what that is called, and its measure up."""
TITLES = {"held_out/in_order": "held-out pairs in order", "greedy": "greedy accuracy"}


def front_files(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return the figures' file names with their regimes and names in :data:`FRONTS`."""
    regimes = dict.fromkeys(row["start"]["regime"] for row in rows if row["part"] == "fronts")
    return {f"study-{regime}-{name}.svg": (regime, name) for regime in regimes for name in FRONTS}


def write_fronts(rows: Sequence[Row], folder: Path) -> None:
    """Write the figures of the fronts from the rows of trainings that did not fail."""
    for file, (regime, name) in front_files(rows).items():
        points = list(front_points([row for row in rows if row["start"]["regime"] == regime]))
        (folder / file).write_text(svg(front_figure(points, name)), encoding="utf-8")


def front_points(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield each method's measures by weight, and those of SPO with its adapters scaled, as means over the seeds."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        method, _, setting = row["name"].partition(", ")
        if row["part"] == "fronts" or (row["part"] == "dial" and method == "dpo_nll"):
            found.setdefault((method, float(setting.split()[-1])), []).append(row["measured"])
        if row["part"] == "dial" and row["name"] == "spo":
            for scale in map(str, DIAL):
                found.setdefault(("spo, phi scaled", float(scale)), []).append(row["scales"][scale])
    for (method, weight), group in sorted(found.items()):
        measures = {key for across, _, up in FRONTS.values() for key in (across, up)}
        yield {"method": method, "weight": weight} | {key: fmean(each[key] for each in group) for key in measures}


def front_figure(points: Sequence[dict[str, Any]], name: str) -> Any:
    """Plot a front: one line for each method, joined in the order of its weight, which stands beside each point."""
    across, title, up = FRONTS[name]
    records = [{"method": p["method"], "weight": p["weight"], "x": p[across], "y": p[up]} for p in points]
    base = chart(records).encode(
        x=alt.X("x:Q", title=title, scale=alt.Scale(type="symlog")),
        y=alt.Y("y:Q", title=TITLES[up], axis=alt.Axis(format="%"), scale=alt.Scale(zero=False)),
        color=alt.Color("method:N", title=None, legend=alt.Legend(orient="bottom", columns=4, labelLimit=0)),
    )
    lines = base.mark_line(point=True, opacity=0.8).encode(order="weight:Q")
    text = base.mark_text(dy=-8, fontSize=9).encode(text=alt.Text("weight:Q", format="~g"))
    return (lines + text).properties(width=560, height=320)
