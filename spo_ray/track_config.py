"""The schema of experiment trackers."""

from spo_ray.section import Section


class WandbConfig(Section):
    """Weights & Biases; the key is ``WANDB_API_KEY``, and ``WANDB_MODE=offline`` writes files alone."""

    project: str = "spo-ray"
    entity: str | None = None
    """Team or user; None: the key's own."""


class MlflowConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Server, database or folder; None: ``MLFLOW_TRACKING_URI``, else MLflow's own default."""
    experiment: str = "spo-ray"


class TrackingConfig(Section):
    """Where training curves go besides ``log.jsonl``; None and false: nowhere."""

    tensorboard: bool = False
    """Event files in the run's folder ``tensorboard``."""
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
