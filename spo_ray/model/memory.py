"""How much memory a training will take, worked out from the model's ``config.json`` before anything is allocated.

Bytes per worker, with w of a parameter (4; float64: 8), c of the compute type (bfloat16: 2) and n workers that share
parameters (``sharding: full``; else 1). The moments of a step are added up one by one; the largest is the plan.

- parameters (trained w, frozen c), their gradient (w), AdamW's states (2w; ``adamw_8bit``: 2 and two float32 scales per
  256 values) and SPO's gradients and moves (w each, see :func:`_moments`), all divided by n. Watched steps keep both
  sides' gradients and the parameters before; a checkpoint is a copy of parameters and states in main memory;
- sharded: the root (embeddings, norm, head) and two layers gathered in the compute type (at full precision in float32).
  Whole, in bfloat16: autocast's copies of trained matrices (at full precision, float32 copies of frozen parameters);
- gradients on their way. Sharded: c for the root's, w for the largest unit's. Whole: w + c for the largest tensor's;
- what backwards keep, see :func:`_per_token`: in a pair's pass for both sides, in inner passes for one. With gradient
  checkpointing a hidden state per layer, and one layer of a pass;
- logits: three chunks of :mod:`spo_ray.core.logps` in float32.

Left out: batches, passes without gradients, Gloo's buffers, and what a Llama-style block does not have.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
from spo_ray.core.batch_gradients import tokens_per_backward
from spo_ray.core.lm_head import base_of
from spo_ray.core.logps import LOGITS_PER_CHUNK
from spo_ray.errors import UserError
from spo_ray.model.fsdp import decoder_layers
from spo_ray.model.load import build_policy, parameter_groups

Device = Literal["cpu", "cuda"]
Changes = dict[str, Any]
"""New values by dotted configuration key."""
GIB = 2**30
CUDA_BYTES = 3 * GIB // 2
"""CUDA's context, the workspaces of its libraries, and what the allocator loses."""
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
OFFLOADED = ("parameters", "gradients", "optimizer states", "SPO's sums and moves", "learning dynamics")
SNAPSHOT = "checkpoint under way"


@dataclass(frozen=True)
class MemoryPlan:
    """The largest moment of a training step."""

    items: dict[str, int]
    """Bytes on a worker's device, by what takes them."""
    main_memory: dict[str, int]
    """Bytes of a worker with a GPU in main memory: what ``train.cpu_offload`` keeps there, and a checkpoint's copy."""
    parameters: dict[str, int]
    """Counts: ``theta``, ``phi``, ``frozen``, ``total``."""
    workers: int
    batch_size: int
    """Rows of a step: no more workers can share it."""
    config: Config = field(repr=False)
    again: Callable[[Config], "MemoryPlan"] = field(repr=False, compare=False)
    """The same training's plan under another configuration."""

    @property
    def total(self) -> int:
        """Bytes on a worker's device."""
        return sum(self.items.values())

    def table(self) -> str:
        """The plan for a terminal: a line per item, in GiB."""
        rows = [*self.items.items(), ("total", self.total)]
        rows += [(f"{name}, in main memory", size) for name, size in self.main_memory.items()]
        width = max(len(name) for name, _ in rows)
        counts = ", ".join(f"{count:,} {name}" for name, count in self.parameters.items())
        head = f"memory per worker, {self.workers} in all; parameters: {counts}"
        return "\n".join([head, *(f"{name:<{width}}  {_gib(size):>10}" for name, size in rows)])


class _Shape(NamedTuple):
    """Counts of a policy's parameters.

    ``tensors`` has (rows, values a row) of the trained ones; ``root`` and ``layer`` (all, trained) outside and in the
    largest of the decoder layers; ``head`` and ``matrices`` the trained values that autocast copies; ``norms`` is per
    layer.
    """

    theta: int
    phi: int
    frozen: int
    tensors: list[tuple[int, int]]
    root: list[int]
    layer: tuple[int, int]
    head: int
    matrices: int
    norms: int


class _Moment(NamedTuple):
    """When memory may be at its largest.

    ``sums`` counts the values of SPO's gradients and moves, ``sides`` those of a pair whose activations are held;
    passes are in float32 if ``precise``, pairs go one by one if ``single``; both sides of a pair go through one pass if
    ``together`` and sharded.
    """

    sums: int
    sides: int
    precise: bool = False
    single: bool = False
    together: bool = False


def memory_plan(
    config: Config, model_config: PretrainedConfig, stage: str, method: MethodConfig | None, device: Device = "cuda"
) -> MemoryPlan:
    """Plan a training: of ``stage`` "sft" without a method, of any other stage with the method that it trains.

    Raises:
        ValueError: a method for SFT, or none for another stage.
        UserError: ``model.theta`` or ``model.lora_targets`` don't fit the model, or the method no sharded parameters.
    """
    if (stage == "sft") != (method is None):
        raise ValueError(f"stage {stage!r} with method {method!r}: SFT has none, every other stage has one")
    if _sharded(config) and isinstance(method, Spo) and method.gamma and method.hinge == "pair":
        raise UserError("hinge=pair needs every parameter whole: set train.sharding=none, or hinge=batch")
    text = model_config.get_text_config()
    shape = _shape(model_config.to_json_string(), config.model.model_dump_json(), method is not None)
    away = {SNAPSHOT, *(OFFLOADED if config.train.cpu_offload else ())} if device == "cuda" else set()
    every = [_items(config, text, shape, method, at, device) for at in _moments(config, shape, method)]
    items = max(every, key=lambda items: sum(size for name, size in items.items() if name not in away))
    return MemoryPlan(
        {name: size for name, size in items.items() if size and name not in away},
        {name: size for name, size in items.items() if size and name in away},
        {"theta": shape.theta, "phi": shape.phi, "frozen": shape.frozen, "total": sum(shape[:3])},
        config.train.num_workers,
        (config.preference if method else config.sft).batch_size,
        config,
        lambda other: memory_plan(other, model_config, stage, method, device),
    )


@lru_cache(maxsize=16)
def _shape(architecture: str, model: str, with_phi: bool) -> _Shape:
    """Count what training would build, without memory for it; the arguments are JSON."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(architecture)
        config = ModelConfig.model_validate_json(model).model_copy(update={"attention": "eager"})  # everywhere there
        policy: Any = build_policy(folder, config, 0, with_phi=with_phi, device="meta")
    named = dict(policy.named_parameters())
    theta, phi = (sum(named[name].numel() for name in names) for names in parameter_groups(policy))
    whole = _count(policy)
    try:
        blocks = decoder_layers(policy)
    except ValueError:  # it can't be sharded, and units matter to nothing else
        blocks = [nn.Module()]
    layers = [_count(block) for block in blocks]
    norms = sum("Norm" in type(module).__name__ for module in blocks[0].modules()) or 2
    root = [size - sum(inside) for size, inside in zip(whole, zip(*layers, strict=True), strict=True)]
    head = base_of(policy).get_output_embeddings().weight
    linear = [module.weight for module in policy.modules() if isinstance(module, nn.Linear)]
    matrices = sum(weight.numel() for weight in linear if weight.requires_grad and weight is not head)
    tensors = [(len(p), prod(p.shape[1:])) for p in named.values() if p.requires_grad]
    head_size = head.numel() if head.requires_grad else 0
    return _Shape(theta, phi, whole[0] - theta - phi, tensors, root, max(layers), head_size, matrices, norms)


def _count(module: nn.Module) -> tuple[int, int]:
    sizes = [(p.numel(), p.numel() if p.requires_grad else 0) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for _, size in sizes)


def _moments(config: Config, shape: _Shape, method: MethodConfig | None) -> Iterator[_Moment]:
    """The moments of :func:`spo_ray.core.spo.spo_gradients`: the pairs' passes, R, inner steps, term (b)."""
    if not isinstance(method, Spo):
        yield _Moment(0, 2 if method else 1, together=config.preference.dynamics_every is None)
        return
    every, inner = shape.theta + shape.phi, method.inner
    sft = every if method.lambda_sft or method.safe_region else 0
    single, central = method.hinge == "pair" and method.gamma > 0, method.difference == "central"
    norms = 2 * every if method.gamma else 0  # of the batch, or of a pair
    yield _Moment(sft + norms, 2, single=single)
    if method.gamma:
        anew = norms if config.train.precision == "bfloat16" else 0  # at full precision
        move = {"all": every, "backbone": shape.theta, "adapters": shape.phi}[method.norm_scope]
        ahead = (4 if central else 3) * every  # R's gradient, and there of one side while the next one's is computed
        yield _Moment(sft + norms + anew + move + ahead, 1, precise=True, single=single)
    held = sft + (0 if single else norms)
    if sft and inner.steps > 1:  # the move, and the gradient of one step while the next one's is computed
        yield _Moment(held + min(inner.steps, 3) * shape.theta, 1)
    if sft and inner.steps:
        rescaled = inner.mode == "rescaled"
        moves = ((central and rescaled) + (inner.steps > 1)) * shape.theta
        yield _Moment(held + moves + 2 * shape.phi, 1, precise=rescaled and inner.full_precision)


def _items(
    config: Config, text: Any, shape: _Shape, method: MethodConfig | None, at: _Moment, device: Device
) -> dict[str, int]:
    """Bytes at a moment."""
    train, every, c = config.train, shape.theta + shape.phi, BYTES[config.train.precision]
    w = max(4, c)
    compute = w if at.precise else c
    sharded = _sharded(config)
    n = train.num_workers if sharded else 1
    watched = method is not None and config.preference.dynamics_every is not None
    norms = isinstance(method, Spo) and method.gamma > 0 and method.hinge == "batch"
    items = {
        "parameters": (every * w + shape.frozen * c) // n,
        "gradients": every * w // n,
        "optimizer states": sum(_states(rows, row, n, w, train.optimizer) for rows, row in shape.tensors),
        "SPO's sums and moves": at.sums * w // n,
        "learning dynamics": watched * (1 if norms else 3) * every * w // n,
    }
    copied = train.checkpoint.every is not None and train.checkpoint.asynchronous
    items[SNAPSHOT] = copied * (items["parameters"] + items["optimizer states"])
    if sharded:
        items["gathered layers"] = (shape.root[0] + 2 * shape.layer[0]) * compute
        items["gradients on their way"] = shape.root[1] * compute + max(shape.root[1], shape.layer[1]) * w
    else:
        copies = w * shape.frozen if at.precise else c * (at.sides * shape.head + shape.matrices)
        items["copies for computing"] = copies if c < w else 0
        tied = 2 if getattr(text, "tie_word_embeddings", False) else 1  # its gradients, before they are added up
        items["gradients on their way"] = max(map(prod, shape.tensors)) * max(tied * w, w + compute % w)
    items |= _passes(config, text, shape.norms, method, at, device, compute, compute < w and not sharded)
    return items | {"CUDA and its libraries": CUDA_BYTES if device == "cuda" else 0}


def _sharded(config: Config) -> bool:
    return config.train.sharding == "full" and (config.train.num_workers > 1 or config.train.cpu_offload)


def _states(rows: int, row: int, n: int, w: int, optimizer: str) -> int:
    """Bytes of the optimizer's two states of a tensor, or of its shard."""
    size = -(-rows // n) * row
    eight = optimizer == "adamw_8bit" and size >= 4096 and size % 256 == 0
    return 2 * (size + size // 64 + 1024 if eight else size * w)  # with a table of the codes' 256 values


def _passes(
    config: Config,
    text: Any,
    norms: int,
    method: MethodConfig | None,
    at: _Moment,
    device: Device,
    c: int,
    autocast: bool,
) -> dict[str, int]:
    """What grows with the tokens of a backward; ``c`` bytes of the type that passes compute in."""
    train, theta = config.train, config.model.theta
    rows = 1 if at.single else -(-(config.preference if method else config.sft).batch_size // train.num_workers)
    longest = max(tokens_per_backward(device, _sharded(config)), train.max_length)
    tokens = min(rows, train.pairs_per_backward or rows) * train.max_length
    tokens = tokens if train.pairs_per_backward else min(tokens, longest)
    ranks = [config.model.lora_rank] if method else []
    ranks += [theta.rank] if isinstance(theta, SecondAdapter) else []
    trained = {WholeBackbone: text.num_hidden_layers, SecondAdapter: 0}.get(type(theta), getattr(theta, "count", 0))
    kinds = {True: trained, False: text.num_hidden_layers - trained if ranks else 0}
    each = {kind: _per_token(config, text, norms, c, ranks, kind, autocast) for kind in kinds if kinds[kind]}
    kept = at.sides * sum(kinds[kind] * size for kind, size in each.items())
    if train.gradient_checkpointing and train.precision != "float64":  # which the step does not compute again
        states = text.hidden_size * (4 if autocast and trained else c)
        again = at.sides if at.together and _sharded(config) else 1
        kept = at.sides * sum(kinds.values()) * states + again * max(each.values())
    kept += at.sides * text.hidden_size * (max(4, c) + 2 * c)  # in the final norm and the head
    logits = min(max(1, LOGITS_PER_CHUNK // text.vocab_size), tokens) * text.vocab_size
    return {"activations": tokens * kept, "logits": 3 * logits * max(4, c)}


def _per_token(config: Config, text: Any, norms: int, c: int, ranks: list[int], trained: bool, autocast: bool) -> int:
    """Bytes of a token that a decoder layer keeps for its backward, with D hidden, F wide and H heads of size d.

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


def check_memory(plan: MemoryPlan, available: int, what: str) -> None:
    """Refuse a plan that is beyond the bytes of a worker's device.

    Raises:
        UserError: with the plan, and changes that would make it fit, each with the total that it would give.
    """
    if plan.total <= available:
        return
    advice = [f"  {_text(changes)}: {_gib(other.total)}" for changes, other in _advice(plan, available)]
    how = ["it would fit with", *advice] if advice else ["no setting that was tried makes it fit"]
    need = f"{what} needs {_gib(plan.total)} of memory per worker, and there are {_gib(available)}"
    raise UserError("\n".join([need, plan.table(), *how, "train.memory_check=false starts it all the same"]))


def _advice(plan: MemoryPlan, available: int) -> list[tuple[Changes, MemoryPlan]]:
    """Single changes that fit, the mildest of each kind; else one made of several."""
    alone: list[tuple[Changes, MemoryPlan]] = []
    together: Changes = {}
    best = plan
    for kind in _changes(plan):
        variants = list(kind)
        changes, other = _mildest(plan, variants, available)
        alone += [(changes, other)] if other.total <= available else []
        if best.total > available:
            changes, best = _mildest(best, variants, available)
            together |= changes
    return alone or ([(together, best)] if best.total <= available else [])


def _mildest(plan: MemoryPlan, variants: Iterable[Changes], available: int) -> tuple[Changes, MemoryPlan]:
    """The first that fits; else the one that takes least, which may be no change."""
    best: tuple[Changes, MemoryPlan] = ({}, plan)
    for changes in variants:
        try:
            other = plan.again(with_values(plan.config, changes))
        except (ValidationError, UserError):  # no setting for this configuration, or this model
            continue
        best = (changes, other) if other.total < best[1].total else best
        if other.total <= available:
            break
    return best


def _changes(plan: MemoryPlan) -> Iterator[Iterable[Changes]]:
    """Kinds of changes, first those that leave results as they are; each from mild to strong."""
    length = plan.config.train.max_length
    yield [{"train.gradient_checkpointing": True}]
    yield [{"train.pairs_per_backward": 1}]
    workers = range(plan.workers, plan.batch_size + 1)
    yield [{"train.num_workers": count, "train.sharding": "full"} for count in workers]
    yield [{"train.cpu_offload": True, "train.sharding": "full"}]
    yield [{"preference.dynamics_every": None}]
    yield [{"train.optimizer": "adamw_8bit"}]
    yield [{"model.theta": {"type": "adapter"}}]
    yield [{"train.max_length": length >> shift} for shift in range(1, max(1, length.bit_length() - 7))]


def _text(changes: Changes) -> str:
    """As overrides on a command line."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in changes.items()).replace('"', "")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 2**20:.1f} MiB"
