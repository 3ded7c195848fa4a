"""Sections for training: optimisation, workers, sharding, checkpoints and measurements."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from spo_ray.config.base import ConfigModel, Fraction, RowSource, Seconds

Dtype = Literal["float32", "bfloat16"]


class GroupConfig(ConfigModel):
    """Optimisation of one group of parameters."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate to 0 after the warm-up; constant: no decay."""
    warmup_ratio: Fraction = 0.1
    """Share of all steps in which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW, on matrices only; norms and biases have none."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest norm of the group's gradient; larger ones are scaled down."""


class SftConfig(GroupConfig):
    """Supervised fine-tuning of theta."""

    data: RowSource | None = None
    """Rows to train on: ``prompt`` and ``completion``, or ``messages``; None: the correct responses to the questions,
    or the chosen sides of the pairs."""
    lr: PositiveFloat = 2e-5
    """Peak learning rate."""
    epochs: PositiveInt = 3
    """Passes over the SFT set."""
    loss_on: Literal["last", "every_assistant_turn"] = "last"
    """Messages of a conversation that are learned: the answer, or each of the assistant's, as a row of its own.
    Preference methods compare the answers alone: what stands before is the same on both sides."""
    batch_size: PositiveInt = 8
    """Rows per step, over all workers."""


class AlarmConfig(ConfigModel):
    """Limits for a method in training, beyond which the displacement alarm goes off; None: no limit."""

    max_fall: PositiveFloat | None = 0.05
    """Largest fall of the probe pairs' log pi(y_w) below its start, in nats per token; 0.05 is 5% more perplexity."""
    max_both_fell: Fraction | None = 0.5
    """Largest share of the probe pairs whose two log-probabilities both fell."""
    max_repetition: Fraction | None = 0.5
    """Largest share of 4-grams in sampled answers that repeat an earlier one of the same answer."""
    max_length_ratio: Annotated[float, Field(gt=1.0)] | None = 3.0
    """Largest factor by which sampled answers may become longer or shorter than at the start."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """Reaction to an alarm; ``stop`` ends the method's training and exports the state that it has reached."""


class PreferenceConfig(ConfigModel):
    """Settings that all preference methods share, so that they differ in their gradients alone."""

    theta: GroupConfig = GroupConfig()
    """Optimisation of the backbone's trained parameters theta."""
    phi: GroupConfig = GroupConfig()
    """Optimisation of the adapters phi."""
    epochs: PositiveInt = 3
    """Passes over the pairs."""
    batch_size: PositiveInt = 4
    """Pairs per step, over all workers."""
    probe_every: PositiveInt | None = None
    """Steps between measurements of the probe pairs; None: 20 measurements, at most 200 steps apart."""
    probe_pairs: PositiveInt = 16
    """Number of probe pairs: fixed pairs that are watched in training."""
    probe_top_tokens: NonNegativeInt = 0
    """Length in tokens of the reference model's own answers y* to the probe prompts, which are watched too; 0: none."""
    dynamics_every: PositiveInt | None = 200
    """Steps between measurements of the learning dynamics (Theorem 1's gradient terms and forecasts); None: never."""
    health_every: PositiveInt | None = 500
    """Steps between samples of answers to probe prompts (repetition, diversity, length, entropy); None: never."""
    alarm: AlarmConfig = AlarmConfig()


class BestConfig(ConfigModel):
    """Choice of the best checkpoint."""

    metric: str = "probe/accuracy"
    """Key of the step log that is measured at every checkpoint."""
    mode: Literal["max", "min"] = "max"
    """Direction in which the metric is better."""


class CheckpointConfig(ConfigModel):
    """Checkpoints within a training, to resume from after a failure."""

    every: PositiveInt | None = 100
    """Steps between checkpoints; None: no checkpoints, so a training that is cut off starts again."""
    keep: PositiveInt = 2
    """Number of checkpoints that are kept: the newest, or the best and the newest."""
    best: BestConfig | None = None
    """Export the best checkpoint instead of the last state; each method then has a worker group of its own."""
    storage: str | None = None
    """Folder or address (``s3://...``) that all nodes reach; None: beside the run's unfinished stages."""
    asynchronous: bool = True
    """Write checkpoints in the background, from a copy of the state in main memory."""


class TrainConfig(ConfigModel):
    """Workers, precision and checkpoints of SFT and all preference methods."""

    num_workers: PositiveInt = 1
    """Training workers, of which each has one rank."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs per worker."""
    use_gpu: bool | None = None
    """One GPU per worker; None: where the cluster has GPUs."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Placement of the workers on nodes, as Ray's placement strategies."""
    sharding: Literal["full", "none"] = "full"
    """Sharding of parameters, gradients and optimizer states over the workers (FSDP2), or whole copies."""
    cpu_offload: bool = False
    """Keep shards and optimizer states in main memory; needs ``sharding: full``."""
    precision: Literal["float64", "float32", "bfloat16"] = "float32"
    """Compute type. Parameters, optimizer states and gradient sums stay float32 (with float64, for checks: float64)."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with optimizer states in float32, or in 8 bits with a scale per block."""
    max_length: PositiveInt = 1024
    """Longest prompt plus completion, in tokens; longer rows are quarantined."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    pairs_per_backward: PositiveInt | None = None
    """Pairs (in SFT: rows) per backward pass and worker; None: few enough to fill the hardware. It changes speed and
    memory, not results: gradients are accumulated over the batch."""
    parallel_methods: PositiveInt = 1
    """Preference methods trained at the same time."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_failures: NonNegativeInt = 3
    """Restarts from the newest checkpoint after lost workers or nodes."""
    timeout_s: Seconds = 1800.0
    """Seconds until a worker counts as lost: one that others wait for, or whose step or checkpoint takes longer."""
    memory_check: bool = True
    """Refuse a training whose memory estimate exceeds the worker's memory."""
