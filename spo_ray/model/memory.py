"""Estimate of the memory that a training needs, from the model's ``config.json``, before anything is allocated.

Each term is an upper bound over the whole step, in bytes per worker: w per parameter (4; float64: 8), c of the compute
type (bfloat16: 2), n workers that share parameters (``sharding: full``; else 1).

- Parameters (trained w, frozen c), their gradients (w), the optimizer's states (2w; ``adamw_8bit``: 2 and two float32
  scales per 256 values), SPO's gradients and moves (w each) and, on watched steps, both sides' gradients and a copy of
  the parameters, all divided by n. A checkpoint copies parameters and states to main memory.
- Sharded: the root (embeddings, norm, head) and two layers are gathered in the compute type, or in float32 where term
  (b) or R need it. Not sharded: autocast's copies of trained matrices, or float32 copies of frozen parameters.
- Gradients before they are added up. Sharded: c for the root's, w for the largest unit's. Else of the largest tensor.
- Activations of both sides of the pairs in a backward. With gradient checkpointing: a hidden state per layer, and one
  whole layer.
- Logits: three chunks of :mod:`spo_ray.core.logps` in float32.

Left out: batches, passes without gradients, Gloo's buffers, and anything that a Llama-style block does not have.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError
from torch import nn
from transformers import PretrainedConfig

from spo_ray.config.keys import with_values
from spo_ray.config.methods import MethodConfig, Spo
from spo_ray.config.model import ModelConfig, SecondAdapter, WholeBackbone
from spo_ray.config.schema import Config
from spo_ray.config.train import SftConfig
from spo_ray.core.batch_gradients import KEPT_TOKENS, tokens_per_backward
from spo_ray.core.logps import LOGITS_PER_CHUNK
from spo_ray.errors import UserError
from spo_ray.model.fsdp import decoder_layers
from spo_ray.model.load import build_policy, parameter_groups
from spo_ray.runtime.console import in_units

Device = Literal["cpu", "cuda"]
Changes = dict[str, Any]
"""New values by dotted configuration key."""
GIB = 2**30
DUAL, SCORES, SIDE_BY_SIDE = 3, 6, 2
"""Upper bounds for exact passes: activations and weights as multiples of a pass's, and tensors of attention scores."""
CUDA_BYTES = 3 * GIB // 2
"""CUDA's context, the workspaces of its libraries, and what the allocator loses."""
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
OFFLOADED = {"parameters", "gradients", "optimizer states", "SPO's sums and moves", "learning dynamics"}
CHECKPOINT = "checkpoint under way"


@dataclass(frozen=True)
class MemoryEstimate:
    """Upper bounds of a training's memory by item."""

    items: dict[str, int]
    """Bytes on a worker's device."""
    main_memory: dict[str, int]
    """Bytes in main memory of a worker with a GPU: what ``train.cpu_offload`` keeps there, and a checkpoint's copy."""
    parameters: dict[str, int]
    """Counts of parameters: ``theta``, ``phi``, ``frozen``, ``total``."""
    config: Config = field(repr=False)
    batch_size: int
    """Rows of a step, which is also the largest number of workers."""
    again: Callable[[Config], "MemoryEstimate"] = field(repr=False, compare=False)
    """Estimates the same training under another configuration."""

    @property
    def total(self) -> int:
        """Bytes on a worker's device."""
        return sum(self.items.values())

    def sentence(self) -> str:
        """Return the memory of a worker and what it trains as one line for the log."""
        workers = self.config.train.num_workers
        count = {name: in_units(number, "count") for name, number in self.parameters.items()}
        phi = f" and {count['phi']} LoRA" if count["phi"] else ""
        frozen = f"{count['frozen']} are" if count["frozen"] else "none is"
        return (
            f"{workers} worker{'s' if workers > 1 else ''} of {_gib(self.total)}. "
            f"Trains {count['theta'] or 0} backbone{phi} parameters; {frozen} frozen."
        )

    def table(self) -> str:
        """Return a table for the terminal with a line per item."""
        rows = [*self.items.items(), ("total", self.total)]
        rows += [(f"{name}, in main memory", size) for name, size in self.main_memory.items()]
        width = max(len(name) for name, _ in rows)
        counts = ", ".join(f"{count:,} {name}" for name, count in self.parameters.items())
        head = f"memory per worker, {self.config.train.num_workers} in all; parameters: {counts}"
        return "\n".join([head, *(f"{name:<{width}}  {_gib(size):>10}" for name, size in rows)])


class _Shape(NamedTuple):
    """Counts of a policy's parameters."""

    theta: int
    phi: int
    frozen: int
    tensors: list[tuple[int, int]]
    """(rows, values a row) of each trained tensor."""
    root: list[int]
    """(all, trained) outside of the decoder layers."""
    layer: tuple[int, int]
    """(all, trained) in the largest decoder layer."""
    norms: int
    """Norms in a decoder layer."""


def estimate_memory(
    config: Config, model_config: PretrainedConfig, stage: str, method: MethodConfig | None, device: Device = "cuda"
) -> MemoryEstimate:
    """Estimate a training: ``stage`` "sft" without a method, any other stage with the method that it trains.

    Raises:
        ValueError: a method for SFT, or none for another stage.
        UserError: ``model.theta`` or ``model.lora_targets`` don't fit the model, or the method needs whole parameters.
    """
    if (stage == "sft") != (method is None):
        raise ValueError(f"stage {stage!r} with method {method!r}: SFT has none, every other stage has one")
    if _sharded(config) and isinstance(method, Spo) and method.gamma and method.hinge == "pair":
        raise UserError("hinge=pair needs every parameter whole: set train.sharding=none, or hinge=batch")
    shape = _shape(model_config.to_json_string(), config.model.model_dump_json(), method is not None)
    items = _items(config, model_config.get_text_config(), shape, method, device)
    away = {CHECKPOINT, *(OFFLOADED if config.train.cpu_offload else ())} if device == "cuda" else set()
    return MemoryEstimate(
        {name: size for name, size in items.items() if size and name not in away},
        {name: size for name, size in items.items() if size and name in away},
        {"theta": shape.theta, "phi": shape.phi, "frozen": shape.frozen, "total": sum(shape[:3])},
        config,
        _batch_size(config, method),
        lambda other: estimate_memory(other, model_config, stage, method, device),
    )


@lru_cache(maxsize=16)
def _shape(architecture: str, model: str, with_phi: bool) -> _Shape:
    """Build the policy without memory for its weights, and count; the arguments are JSON."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(architecture)
        config = ModelConfig.model_validate_json(model).model_copy(update={"attention": "eager"})  # always installed
        policy: Any = build_policy(folder, config, 0, with_phi=with_phi, device="meta")
    named = dict(policy.named_parameters())
    theta, phi = (sum(named[name].numel() for name in names) for names in parameter_groups(policy))
    whole = _count(policy)
    try:
        blocks = decoder_layers(policy)
    except ValueError:  # such a model can't be sharded, and only sharding depends on layers
        blocks = [nn.Module()]
    layers = [_count(block) for block in blocks]
    norms = sum("Norm" in type(module).__name__ for module in blocks[0].modules()) or 2
    root = [size - sum(inside) for size, inside in zip(whole, zip(*layers, strict=True), strict=True)]
    tensors = [(len(p), prod(p.shape[1:])) for p in named.values() if p.requires_grad]
    return _Shape(theta, phi, whole[0] - theta - phi, tensors, root, max(layers), norms)


def _count(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of all and of trained parameters."""
    sizes = [(p.numel(), p.numel() if p.requires_grad else 0) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for _, size in sizes)


def _items(config: Config, text: Any, shape: _Shape, method: MethodConfig | None, device: Device) -> dict[str, int]:
    """Return the upper bound in bytes of each item."""
    train, every, c = config.train, shape.theta + shape.phi, BYTES[config.train.precision]
    w, sharded = max(4, c), _sharded(config)
    n = train.num_workers if sharded else 1
    sums = _spo_sums(config, shape, method) if isinstance(method, Spo) else 0
    precise, exact = _spo_passes(config, method)
    watched = method is not None and config.preference.dynamics_every is not None
    norms = isinstance(method, Spo) and method.gamma > 0 and method.hinge == "batch"  # both sides' gradients exist
    items = {
        "parameters": (every * w + shape.frozen * c) // n,
        "gradients": every * w // n,
        "optimizer states": sum(_states(rows, row, n, w, train.optimizer) for rows, row in shape.tensors),
        "SPO's sums and moves": sums * w // n,
        "learning dynamics": watched * (1 if norms else 3) * every * w // n,
    }
    copied = train.checkpoint.every is not None and train.checkpoint.asynchronous
    items[CHECKPOINT] = copied * (items["parameters"] + items["optimizer states"])
    if sharded:
        compute = w if precise else c
        items["gathered layers"] = (shape.root[0] + 2 * shape.layer[0]) * compute
        items["gradients on their way"] = shape.root[1] * compute + max(shape.root[1], shape.layer[1]) * w
    else:
        largest = max(map(prod, shape.tensors))  # the head, if it is trained, is copied for each side
        copies = max(precise * w * shape.frozen, c * (every + largest))
        items["copies for computing"] = copies if c < w else 0
        tied = 2 if getattr(text, "tie_word_embeddings", False) else 1  # its two gradients, before they are added up
        items["gradients on their way"] = largest * max(tied * w, w + c % w)
    rows = -(-_batch_size(config, method) // train.num_workers)
    tokens = min(rows, train.pairs_per_backward or rows) * train.max_length
    if not train.pairs_per_backward:
        tokens = min(tokens, max(tokens_per_backward(device, sharded), train.max_length))
    pair = isinstance(method, Spo) and method.gamma > 0 and method.hinge == "pair"  # both sides of one pair at a time
    held = max(2 * train.max_length, tokens) if pair else (2 if method else 1) * tokens
    both = _activations(config, text, shape.norms, method, c, held, tokens)
    one = _activations(config, text, shape.norms, method, w, tokens, tokens) if precise else 0  # a side in float32
    items["activations"] = max(both, one, _dual_activations(config, text, shape, method, c, tokens) if exact else 0)
    items["logits"] = 3 * min(max(1, LOGITS_PER_CHUNK // text.vocab_size), tokens) * text.vocab_size * w
    return items | {"CUDA and its libraries": CUDA_BYTES if device == "cuda" else 0}


def _batch_size(config: Config, method: MethodConfig | None) -> int:
    """Return the rows or pairs per step; without an SFT stage the plan still asks for the size of its model."""
    return (config.preference if method else config.sft or SftConfig()).batch_size


def _sharded(config: Config) -> bool:
    return config.train.sharding == "full" and (config.train.num_workers > 1 or config.train.cpu_offload)


def _states(rows: int, row: int, n: int, w: int, optimizer: str) -> int:
    """Return the bytes of the optimizer's two states of a tensor, or of its shard."""
    size = -(-rows // n) * row
    eight = optimizer == "adamw_8bit" and size >= 4096 and size % 256 == 0
    return 2 * (size + size // 64 + 1024 if eight else size * w)  # with a table of the codes' 256 values


def _spo_sums(config: Config, shape: _Shape, method: Spo) -> int:
    """Return the most values of gradients and moves in :mod:`spo_ray.core.spo`, besides the gradient itself."""
    every, inner = shape.theta + shape.phi, method.inner
    half, several = config.train.precision == "bfloat16", inner.steps > 1
    sft = every if method.lambda_sft or method.safe_region else 0
    norms, regularizer, lower = 2 * every if method.gamma else 0, 0, 0
    if method.gamma:
        move = {"all": every, "backbone": shape.theta, "adapters": shape.phi}[method.norm_scope]
        # R's gradient and a side's product; by differences a gradient at moved parameters too.
        regularizer = norms + (2 * every if half or inner.method == "exact" else move + 3 * every)
    if sft and inner.steps:
        steps = min(inner.steps, 3) * shape.theta if several else 0  # the move, a gradient while the next is computed
        lower = (0 if method.hinge == "pair" else norms) + max(steps, several * shape.theta + 2 * shape.phi)
    return sft + max(regularizer, lower)


def _spo_passes(config: Config, method: MethodConfig | None) -> tuple[bool, bool]:
    """Return True if there are passes in float32 where others are in half precision, and True if exact ones."""
    if not isinstance(method, Spo):
        return False, False
    lower = bool(method.lambda_sft or method.safe_region) and method.inner.steps > 0
    half, kind = config.train.precision == "bfloat16", method.inner.method
    precise = half and lower and kind == "difference"
    return precise, (half or kind == "exact") and (method.gamma > 0 or (lower and kind != "difference"))


def _dual_activations(
    config: Config, text: Any, shape: _Shape, method: MethodConfig | None, c: int, tokens: int
) -> int:
    """Return the bytes of an exact pass over one side: values and tangents, and attention from elementary operations.

    Linear layers keep their weight and direction side by side, and scores, their exponentials and probabilities are in
    float32, each with its tangent.
    """
    length, layers = config.train.max_length, text.num_hidden_layers
    kept = tokens <= KEPT_TOKENS and not _sharded(config) and not config.train.gradient_checkpointing
    once = config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": False})})
    one = DUAL * _activations(once, text, shape.norms, method, c, tokens, tokens)
    scores = tokens * length * text.num_attention_heads * max(4, c) * SCORES
    weights = SIDE_BY_SIDE * c * (shape.theta + shape.phi)
    if kept:
        return one + layers * scores + weights
    inputs = 2 * layers * tokens * text.hidden_size * max(4, c)
    return (one + weights) // layers + scores + inputs + SIDE_BY_SIDE * c * shape.root[1]


def _activations(
    config: Config, text: Any, norms: int, method: MethodConfig | None, c: int, held: int, tokens: int
) -> int:
    """Return the bytes that forwards keep of ``held`` tokens for their backward; ``tokens`` of them are of one side."""
    theta, layers, sharded = config.model.theta, text.num_hidden_layers, _sharded(config)
    autocast = c < 4 and not sharded
    ranks = ([config.model.lora_rank] if method else []) + ([theta.rank] if isinstance(theta, SecondAdapter) else [])
    trained = {WholeBackbone: layers, SecondAdapter: 0}.get(type(theta), getattr(theta, "count", 0))
    counts = {True: trained, False: layers - trained if ranks else 0}  # below the first trained layer nothing is kept
    each = {
        kind: _layer_bytes(config, text, norms, c, ranks, kind, autocast) for kind, count in counts.items() if count
    }
    kept, again = sum(counts[kind] * size for kind, size in each.items()), 0
    if config.train.gradient_checkpointing and config.train.precision != "float64":  # where a step can't recompute
        kept = sum(counts.values()) * text.hidden_size * (4 if autocast and trained else c)
        again = max(each.values()) * (held if sharded or _joint(method) else tokens)
    return held * (kept + text.hidden_size * (max(4, c) + 2 * c)) + again  # with the final norm and the head


def _joint(method: MethodConfig | None) -> bool:
    """Return True if both sides of pairs may go through one pass also where parameters are whole."""
    if not isinstance(method, Spo):
        return method is not None
    return not method.gamma and not (method.inner.steps and (method.lambda_sft or method.safe_region))


def _layer_bytes(config: Config, text: Any, norms: int, c: int, ranks: list[int], trained: bool, autocast: bool) -> int:
    """Return the bytes of a token that a decoder layer keeps, with D hidden, F wide and H heads of size d.

    A norm keeps its input in float32, and normalised if its weight is trained: (4 + c) * D. Attention keeps queries,
    keys, values (repeated for all heads where a padded batch meets PyTorch's attention), its output and a row of the
    mask, and rows of scores only if it is ``eager``: (4 * H * d + T) * c. Linear layers keep their inputs, the MLP also
    gate, up and the activated gate: (2D + 4F) * c. Under autocast every matrix and every adapter casts its own input.
    """
    hidden, heads, length = text.hidden_size, text.num_attention_heads, config.train.max_length
    wide = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * hidden
    wide *= getattr(text, "num_experts_per_tok", None) or 1
    size = getattr(text, "head_dim", None) or hidden // heads
    attention, capped = config.model.attention, getattr(text, "attn_logit_softcapping", None) is not None
    attention = "eager" if attention == "auto" and capped else attention
    flash = attention == "flash_attention_2"
    keys = (getattr(text, "num_key_value_heads", None) or heads) if flash else heads
    users = trained + len(ranks) if autocast else 1
    values = users * ((5 if autocast else 2) * hidden + wide) + 3 * wide + 7 * sum(ranks)
    values += 2 * (heads + keys) * size + (len(ranks) * heads * size if autocast else 0)
    normed = norms * (hidden * (max(4, c) + trained * (max(4, c) if autocast else c)) + 4) + 4 * heads
    softmax = max(4, c) + (c if c < 4 else 0) + (c if capped else 0)
    scores = {"flash_attention_2": 0, "eager": heads * length * softmax}
    return c * values + normed + scores.get(attention, length * c)


def check_memory(estimate: MemoryEstimate, available: int, what: str) -> None:
    """Refuse a training whose estimate is above the bytes of a worker's device.

    Raises:
        UserError: with the estimate, and changes that would make it fit, each with the total that it would give.
    """
    if estimate.total <= available:
        return
    advice = [f"  {_text(changes)}: {_gib(other.total)}" for changes, other in _advice(estimate, available)]
    how = ["it would fit with", *advice] if advice else ["no setting that was tried makes it fit"]
    need = f"{what} needs {_gib(estimate.total)} of memory per worker, and there are {_gib(available)}"
    raise UserError("\n".join([need, estimate.table(), *how, "train.memory_check=false skips this check"]))


def _advice(estimate: MemoryEstimate, available: int) -> list[tuple[Changes, MemoryEstimate]]:
    """Return the single changes that fit, the mildest of each kind, or else one combination."""
    length, workers = estimate.config.train.max_length, estimate.config.train.num_workers
    kinds: list[list[Changes]] = [  # first those that leave results as they are; each from mild to strong
        [{"train.gradient_checkpointing": True}],
        [{"train.pairs_per_backward": 1}],
        [{"train.num_workers": n, "train.sharding": "full"} for n in range(workers, estimate.batch_size + 1)],
        [{"train.cpu_offload": True, "train.sharding": "full"}],
        [{"preference.dynamics_every": None}],
        [{"train.optimizer": "adamw_8bit"}],
        [{"model.theta": {"type": "adapter"}}],
        [{"train.max_length": length >> shift} for shift in range(1, max(1, length.bit_length() - 7))],
    ]
    single = [_mildest(estimate, variants, available) for variants in kinds]
    fitting = [(changes, other) for changes, other in single if other.total <= available]
    combined, best = Changes(), estimate
    for variants in kinds:
        if not fitting and best.total > available:
            changes, best = _mildest(best, variants, available)
            combined |= changes
    return fitting or ([(combined, best)] if best.total <= available else [])


def _mildest(estimate: MemoryEstimate, variants: Iterable[Changes], available: int) -> tuple[Changes, MemoryEstimate]:
    """Return the first change that fits, or else the one with the smallest total, which may be no change."""
    best: tuple[Changes, MemoryEstimate] = ({}, estimate)
    for changes in variants:
        try:
            other = estimate.again(with_values(estimate.config, changes))
        except (ValidationError, UserError):  # no setting for this configuration, or this model
            continue
        best = (changes, other) if other.total < best[1].total else best
        if other.total <= available:
            break
    return best


def _text(changes: Changes) -> str:
    """Return changes as overrides on a command line."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in changes.items()).replace('"', "")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 2**20:.1f} MiB"
