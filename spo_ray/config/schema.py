"""Schema of the whole configuration: one YAML file holds a run."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from spo_ray.config.base import ConfigModel, Seed, is_secret
from spo_ray.config.data import (
    DataConfig,
    EngineConfig,
    PairsConfig,
    PreferenceData,
    SamplingConfig,
    SftDataConfig,
)
from spo_ray.config.evaluate import EvalConfig
from spo_ray.config.methods import MethodConfig, MethodName, Spo, WithScores, base_loss
from spo_ray.config.model import ModelConfig
from spo_ray.config.sweep import SweepConfig, unmeasured
from spo_ray.config.train import PreferenceConfig, SftConfig, TrainConfig

PASSED_ENV = [
    *("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"),
    *("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
]


class RayConfig(ConfigModel):
    """Ray cluster of the run."""

    address: str | None = None
    """Address of the cluster to join; None: the one of ``RAY_ADDRESS``, or else a local one that is started."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a local cluster; None: the number of cores, and at least 4."""
    start_timeout_s: PositiveFloat = 300.0
    """Seconds that a local cluster may take to start on a busy machine."""
    worker_logs: bool = False
    """Show what the workers print; errors are always shown."""
    pass_env: list[str] = PASSED_ENV
    """Environment variables that workers on a cluster get from the process that starts the run. Secrets are refused:
    everybody could read them in the job's description."""

    @field_validator("pass_env")
    @classmethod
    def _no_secrets(cls, value: list[str]) -> list[str]:
        for name in value:
            if is_secret(name):
                raise ValueError(f"{name} may be a secret: set it in the environment of the nodes instead")
        return value


class Config(ConfigModel):
    """All settings of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
    """Name of the run, and of its folder under ``output``."""
    output: Path = Path("runs")
    """Folder of all runs; on a cluster all nodes must share it."""
    seed: Seed = 0
    """Seed of data, sampling, adapters and the order of batches."""
    ray: RayConfig = RayConfig()
    data: DataConfig
    """Data of the run: questions, or ready preference pairs."""
    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig()
    sft_data: SftDataConfig = SftDataConfig()
    pairs: PairsConfig = PairsConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig | None = SftConfig()
    """Supervised fine-tuning of theta; None: no such stage, every method starts from ``model.path`` itself."""
    preference: PreferenceConfig = PreferenceConfig()
    rounds: PositiveInt = 1
    """Rounds of sampling, pairing and training; from the second on each method starts from its own last checkpoint."""
    methods: dict[MethodName, MethodConfig] = Field(min_length=1)
    """Preference methods to train, by names of your own."""
    eval: EvalConfig = EvalConfig()
    tracking: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Trackers that training curves go to besides ``log.jsonl``. Their own environment variables say where:
    ``WANDB_API_KEY``, ``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI`` and
    ``MLFLOW_EXPERIMENT_NAME``. TensorBoard's event files are in the run's folder ``tensorboard``."""
    sweep: SweepConfig | None = None
    """Search over settings, for ``spo-ray sweep`` alone."""

    @property
    def reference(self) -> str:
        """Name of the checkpoint that every method starts from and is compared with."""
        return "sft" if self.sft else "reference"

    @property
    def with_scores(self) -> list[str]:
        """Names of the methods whose loss reads the pairs' scores."""
        return [name for name, method in self.methods.items() if isinstance(base_loss(method), WithScores)]

    @model_validator(mode="after")
    def _fields_agree(self) -> "Config":
        if self.reference in self.methods:
            raise ValueError(
                f"{self.reference!r} is reserved for a checkpoint of runs without SFT: choose another name"
            )
        if self.sft_data.pass_k > self.sampling.samples:
            raise ValueError(f"sft_data.pass_k={self.sft_data.pass_k} needs as many sampling.samples")
        if self.rounds > 1 and isinstance(self.data, PreferenceData):
            raise ValueError("rounds sample new pairs, and need questions: with preference data, set rounds=1")
        if self.with_scores and not isinstance(self.data, PreferenceData):
            raise ValueError(
                f"methods.{self.with_scores[0]} reads the scores of pairs, which only preference data can have: pairs "
                "made from samples have none"
            )
        if "accuracy" in (self.eval.suites or []) and isinstance(self.data, PreferenceData):
            raise ValueError("suite accuracy needs questions: with preference data, leave it out of eval.suites")
        if self.train.cpu_offload and self.train.sharding == "none":
            raise ValueError("train.cpu_offload needs train.sharding=full")
        sharded = self.train.sharding == "full" and (self.train.num_workers > 1 or self.train.cpu_offload)
        for name, method in self.methods.items():
            if sharded and isinstance(method, Spo) and method.gamma > 0 and method.hinge == "pair":
                raise ValueError(f"methods.{name}.hinge=pair needs train.sharding=none: sharded passes sum over pairs")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "Config":
        checkpoint, kinds = self.train.checkpoint, {"probe": "probe_every", "health": "health_every"}
        if checkpoint.best is None:
            return self
        if checkpoint.every is None:
            raise ValueError("train.checkpoint.best is chosen among checkpoints: set train.checkpoint.every")
        metric = checkpoint.best.metric
        field = kinds.get(metric.partition("/")[0])
        every = getattr(self.preference, field) if field else 1
        if every is None or checkpoint.every % every:
            raise ValueError(
                f"train.checkpoint.best.metric={metric} is measured every preference.{field}={every} steps: "
                f"set it so that train.checkpoint.every={checkpoint.every} is a multiple of it"
            )
        return self

    @model_validator(mode="after")
    def _sweep_fits(self) -> "Config":
        if self.sweep is None:
            return self
        if self.sweep.method not in self.methods:
            raise ValueError(f"sweep.method={self.sweep.method} is none of the methods: {', '.join(self.methods)}")
        if self.preference.alarm.on_alarm == "stop":
            raise ValueError(
                "preference.alarm.on_alarm=stop would end trials before they are scored: set sweep.max_fall"
            )
        suites = self.eval.chosen(self.data)
        wrong = unmeasured(self.sweep, suites)
        if wrong:
            raise ValueError(f"sweep.objectives: {wrong[0]} is measured by none of the suites {', '.join(suites)}")
        if isinstance(self.data, PreferenceData) and not self.sweep.validation.pairs:
            raise ValueError("preference data is validated on pairs: set sweep.validation.pairs")
        annotators = self.eval.alpaca.annotators if self.eval.alpaca else []
        if any(isinstance(annotator.engine, EngineConfig) for annotator in annotators):
            raise ValueError(
                "a sweep has room for judges at endpoints alone: give every annotator engine.type=endpoint"
            )
        if self.rounds > 1:
            raise ValueError("a sweep's trials have one round: set rounds=1")
        return self
