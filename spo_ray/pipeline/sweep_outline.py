"""``--dry-run`` of a sweep: its trials."""

import json

from spo_ray.runtime.run import Run
from spo_ray.sweep.space import listed_points, short_text, sweep_of


def sweep_outline(run: Run) -> str:
    """The resolved configuration, and every trial as far as it is known before."""
    config, sweep = run.config, sweep_of(run.config)
    lines = [json.dumps(config.model_dump(mode="json"), indent=2), ""]
    stops = ", ".join(f"{share:.0%}" for share in sweep.score_at)
    lines.append(
        f"trials of {sweep.method}, scored after {stops} of their steps; scheduler {sweep.scheduler.type}, objectives "
        f"{', '.join(sweep.objectives)}"
    )
    if sweep.searcher.type == "optuna":
        space = "; ".join(f"{key}: {_range(dimension)}" for key, dimension in sweep.space.items())
        return "\n".join([*lines, f"{sweep.samples} suggestions by Optuna from {space}"])
    points = listed_points(config)
    for point in points:
        values = ", ".join(f"{key}={short_text(value, 6)}" for key, value in point["values"].items())
        lines.append(f"{point['number']:05d}  {values}  seed={point['seed']}")
    return "\n".join([*lines, f"{len(points)} trials"])


def _range(dimension: object) -> str:
    low, high = getattr(dimension, "low", None), getattr(dimension, "high", None)
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return ", ".join(map(str, getattr(dimension, "values", [])))
