"""The text of a trained model's card: data, settings and results, without paths of this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_ray.runtime.artifact import on_hub
from spo_ray.train.spec import TrainJob

RESULTS = {
    "delta_logp_chosen": "change of log π of preferred answers, in nats",
    "delta_logp_rejected": "change of log π of rejected answers, in nats",
    "accuracy": "share of pairs whose preferred answer gained more",
}
"""Measurements at the end of a training that the card shows, with their names there."""


def card_text(job: TrainJob, result: Mapping[str, Any]) -> str:
    """Return the sections of a card as Markdown; ``result`` has the means over pairs, empty for SFT."""
    config, method = job.config, job.method_config
    own = config.sft.data if config.sft and not job.method else None
    path = Path(getattr(own or config.data, "path", config.data.type))
    count = f"{job.rows.count:,} {'pairs' if job.method else 'rows'} of {path if on_hub(path) else path.name}"
    training = config.preference if job.method else config.sft
    assert training is not None
    settings = {
        "seed": config.seed,
        "train": config.train.model_dump(mode="json", include={"precision", "optimizer", "max_length"}),
        **training.model_dump(mode="json", include={"lr", "theta", "phi", "epochs", "batch_size", "schedule"}),
        **({"method": {"type": method.type} | method.model_dump(mode="json", exclude_none=True)} if method else {}),
    }
    lines = ["## Data", "", f"{count}. The terms of use of the data hold too.", "", "## Settings", ""]
    lines += [f"- `{name}`: {_plain(value)}" for name, value in settings.items()]
    columns = {side: result[side] for side in ("train", "held_out") if side in result}
    if columns:
        lines += [
            "",
            "## Results",
            "",
            f"| against the reference model | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for key, name in RESULTS.items():
            lines.append(f"| {name} | {' | '.join(f'{means[key]:.4g}' for means in columns.values())} |")
        lines.append(f"| pairs | {' | '.join(str(means['n']) for means in columns.values())} |")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    parts = {key: f"({_plain(item)})" if isinstance(item, dict) else item for key, item in value.items()}
    return ", ".join(f"{key} {text}" for key, text in parts.items())
