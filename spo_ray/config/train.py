"""The schema of training: parameter groups, workers, sharding, checkpoints, what happens on failure."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from spo_ray.config.base import ConfigModel, Fraction

Dtype = Literal["float32", "bfloat16"]


class GroupConfig(ConfigModel):
    """How one group of parameters is optimised."""

    lr: PositiveFloat = 1e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to 0 after the warm-up; ``constant``: none."""
    warmup_ratio: Fraction = 0.1
    """Share of all steps in which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, on matrices; norms and biases have none."""
    max_grad_norm: PositiveFloat = 1.0
    """The group's gradient is scaled down to this norm."""


class SftConfig(GroupConfig):
    """Supervised fine-tuning of theta."""

    lr: PositiveFloat = 2e-5
    epochs: PositiveInt = 3
    batch_size: PositiveInt = 8
    """Rows of a step, over all workers."""


class AlarmConfig(ConfigModel):
    """Limits of what a method may do to preferred answers and to its text; None: no limit."""

    max_fall: PositiveFloat | None = 1.0
    """Fall of the probe pairs' mean log pi(y_w) below its start, in nats."""
    max_both_fell: Fraction | None = 0.5
    """Share of the probe pairs whose log-probabilities both fell."""
    max_repetition: Fraction | None = 0.5
    """Share of 4-grams in sampled answers that were there before in the same answer."""
    max_length_ratio: Annotated[float, Field(gt=1.0)] | None = 3.0
    """How many times as long, or as short, as at the start sampled answers may become."""
    on_alarm: Literal["warn", "stop", "increase_lambda"] = "warn"
    """``stop`` ends the method's training with the state that it has; ``increase_lambda`` raises ``lambda_sft`` of SPO
    at every measurement beyond a limit, and warns for other methods."""
    lambda_factor: Annotated[float, Field(gt=1.0)] = 2.0
    max_lambda: PositiveFloat = 100.0


class PreferenceConfig(ConfigModel):
    """What every preference method shares, so that methods differ in their gradient alone."""

    theta: GroupConfig = GroupConfig()
    """The backbone."""
    phi: GroupConfig = GroupConfig()
    """The adapters."""
    epochs: PositiveInt = 3
    batch_size: PositiveInt = 4
    """Pairs of a step, over all workers."""
    probe_every: PositiveInt = 200
    """Steps between measurements of the log-probabilities of ``probe_pairs`` fixed pairs."""
    probe_pairs: PositiveInt = 16
    probe_top_tokens: NonNegativeInt = 0
    """Tokens of the SFT model's own answers y* to the probe prompts, whose log-probability is followed; 0: none."""
    dynamics_every: PositiveInt | None = 200
    """Steps between measurements of the learning dynamics (gradient terms, forecasts, what came true); None: never."""
    health_every: PositiveInt | None = 500
    """Steps between looks at sampled answers to probe prompts (repetition, diversity, length, entropy); None: never."""
    alarm: AlarmConfig = AlarmConfig()


class BestConfig(ConfigModel):
    """Which checkpoint is the best."""

    metric: str = "probe/accuracy"
    """A key of the step log that is there at the steps that are checkpointed."""
    mode: Literal["max", "min"] = "max"


class CheckpointConfig(ConfigModel):
    """Checkpoints within training, to go on from after a failure."""

    every: PositiveInt | None = 100
    """Steps between checkpoints; None: none, a training that is cut off starts again."""
    keep: PositiveInt = 2
    """How many are kept: the newest, or the best and the newest."""
    best: BestConfig | None = None
    """Export the best checkpoint instead of the last state. The method then has a group of workers of its own."""
    storage: str | None = None
    """Folder or fsspec address (``s3://...``) that all nodes reach; None: beside the run's unfinished stages."""
    asynchronous: bool = True
    """Write in the background while training goes on; the state is copied to memory first."""


class TrainConfig(ConfigModel):
    """What SFT and every preference method share."""

    num_workers: PositiveInt = 1
    cpus_per_worker: PositiveFloat = 1.0
    use_gpu: bool | None = None
    """One GPU per worker; None: where the cluster has GPUs."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How workers are placed on nodes."""
    sharding: Literal["full", "none"] = "full"
    """Parameters, gradients and optimizer states in shards over the workers (FSDP2), or whole in each worker."""
    cpu_offload: bool = False
    """Keep shards and optimizer states in main memory; needs ``sharding: full``."""
    precision: Literal["float64", "float32", "bfloat16"] = "float32"
    """Compute type. Parameters, optimizer states and gradient sums are float32 (float64: float64 too, for checks)."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, with its two states in float32, or in 8 bits with a scale per block."""
    max_length: PositiveInt = 1024
    """Prompt plus completion, in tokens; longer rows are quarantined."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward instead of keeping them."""
    pairs_per_backward: PositiveInt | None = None
    """Pairs (in SFT: rows) that share a backward, per worker; None: few enough to fill the hardware. It changes speed
    and memory, not results: gradients are accumulated over a step's batch."""
    parallel_methods: PositiveInt = 1
    """Preference methods trained at the same time."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_failures: NonNegativeInt = 3
    """Restarts after lost workers or nodes, from the newest checkpoint."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds that a worker waits for the others before they count as lost."""
    memory_check: bool = True
    """Refuse a training whose planned memory is beyond the worker's."""
