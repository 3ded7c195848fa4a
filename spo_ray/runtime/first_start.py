"""The day on which a run was first started: chat templates take it for today, also when the run is resumed later."""

from datetime import date
from pathlib import Path

from spo_ray.config.schema import Config
from spo_ray.runtime.artifact import write_text

FIRST_START = "first_start.txt"
"""File in a run's folder with the day."""


def dated(config: Config, root: Path) -> Config:
    """Return a configuration whose ``model.template_date`` is set: as given, as kept in the run's folder, or today."""
    if config.model.template_date is not None:
        return config
    day = _kept(root) or date.today()
    return config.model_copy(update={"model": config.model.model_copy(update={"template_date": day})})


def keep_date(config: Config, root: Path) -> None:
    """Write the day into the run's folder, if there is none yet."""
    if _kept(root) is None:
        write_text(root / FIRST_START, f"{config.model.template_date}\n")


def _kept(root: Path) -> date | None:
    """Return the day in a run's folder; None if there is none, or it can't be read."""
    try:
        return date.fromisoformat((root / FIRST_START).read_text().strip())
    except (OSError, ValueError):
        return None
