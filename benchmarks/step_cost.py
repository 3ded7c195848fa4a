"""What an SPO step costs, as ratios to a DPO step on the same pairs: efficient here, and done naively.

Variants take turns on every batch, in one process; ratios are medians over batches. Batches are turned so that the
hinge of R is active. ``naive`` computes every term by itself: a forward and backward for each loss, a copy of the model
for the lower level, R's gradient by double backward.

    python -m benchmarks.step_cost [--steps 20] [--variants NAME ...]
"""

import argparse
import copy
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common
from spo_ray.core.spo import spo_gradients

BETA, LAMBDA, GAMMA, ETA, PAIRS = 0.1, 1.0, 0.1, 2e-5, 4
Batch = dict[str, Tensor]

DPO = {"lambda_sft": 0.0, "gamma": 0.0, "inner_steps": 0, "share_prompt": False, "pairs_per_backward": 1}
SPO = {"lambda_sft": LAMBDA, "gamma": 0.0, "inner_steps": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "dpo": DPO,
    "dpo, shared prompt": DPO | {"share_prompt": True, "pairs_per_backward": None},
    "dpo, batched": DPO | {"pairs_per_backward": PAIRS},
    "spo": SPO | {"pairs_per_backward": 1},
    "spo, batched": SPO | {"pairs_per_backward": PAIRS},
    "spo, hinge": SPO | {"gamma": GAMMA, "pairs_per_backward": 1},
    "spo, hinge per pair": SPO | {"gamma": GAMMA, "hinge": "pair"},
    "dpo, bf16": DPO | {"bf16": True},
    "spo, bf16": SPO | {"pairs_per_backward": 1, "bf16": True},
    "spo, hinge, bf16": SPO | {"gamma": GAMMA, "pairs_per_backward": 1, "bf16": True},
    "spo, K = 0": SPO | {"inner_steps": 0, "pairs_per_backward": PAIRS},
    "dpo, batched, bf16": DPO | {"pairs_per_backward": PAIRS, "bf16": True},
    "spo, K = 0, bf16": SPO | {"inner_steps": 0, "pairs_per_backward": PAIRS, "bf16": True},
}
NAIVE = {"naive": 0.0, "naive, hinge": GAMMA}
BASELINES = {
    "dpo, bf16": "dpo, bf16",
    "spo, batched": "dpo, batched",
    "spo, bf16": "dpo, bf16",
    "spo, hinge, bf16": "dpo, bf16",
    "spo, K = 0": "dpo, batched",
    "spo, K = 0, bf16": "dpo, batched, bf16",
}
"""What a variant is compared with, where it is not ``dpo``."""
EXACT = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
EXACT["MALLOC_MMAP_THRESHOLD_"] = "65536"
"""Environment in which freed memory goes back to the system at once, so that resident memory is what is alive."""


def make_policy() -> tuple[nn.Module, list[str], list[str]]:
    """The model with adapters away from their start at zero, and the names of theta's and phi's parameters."""
    model = common.with_adapters(common.make_model(), 0.02)
    return model, *common.groups(model).values()


def step(policy: tuple[nn.Module, list[str], list[str]], batch: Batch, options: dict[str, Any]) -> dict[str, float]:
    """One gradient by the project's own path; its metrics."""
    model, backbone, adapters = policy
    fixed = {"backbone": backbone, "adapters": adapters, "beta": BETA, "eta": ETA}
    bf16, options = options.get("bf16", False), {key: value for key, value in options.items() if key != "bf16"}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return spo_gradients(model, batch, **fixed, **options)[1]


def naive_step(policy: tuple[nn.Module, list[str], list[str]], batch: Batch, gamma: float) -> list[Tensor]:
    """The same gradient, term by term."""
    model, backbone, adapters = policy
    model.eval()
    named = dict(model.named_parameters())
    theta, phi = [named[n] for n in backbone], [named[n] for n in adapters]
    reference = batch["ref_chosen_logps"] - batch["ref_rejected_logps"]
    loss = -F.logsigmoid(
        BETA * (plain_logps(model, batch, "chosen") - plain_logps(model, batch, "rejected") - reference)
    )
    grads = list(torch.autograd.grad(loss.mean(), [*theta, *phi]))
    sft = torch.autograd.grad(-plain_logps(model, batch, "chosen").mean(), [*theta, *phi])
    if gamma:
        with sdpa_kernel(SDPBackend.MATH):
            norms = []
            for side in ("chosen", "rejected"):
                g = torch.autograd.grad(plain_logps(model, batch, side).mean(), [*theta, *phi], create_graph=True)
                norms.append(torch.sqrt(sum((x * x).sum() for x in g)))
            hinge = torch.autograd.grad(gamma * torch.relu(norms[0] - norms[1]), [*theta, *phi])
        grads = [a + b for a, b in zip(grads, hinge, strict=True)]
    inner = copy.deepcopy(model)
    moved = dict(inner.named_parameters())
    with torch.no_grad():
        for name, g in zip(backbone, sft, strict=False):
            moved[name].sub_(ETA * g)
    there = torch.autograd.grad(-plain_logps(inner, batch, "chosen").mean(), [moved[n] for n in adapters])
    here = sft[len(theta) :]
    lower = [LAMBDA * g for g in sft[: len(theta)]] + [LAMBDA * (a - b) for a, b in zip(here, there, strict=True)]
    return [a + b for a, b in zip(grads, lower, strict=True)]


def plain_logps(model: nn.Module, batch: Batch, side: str) -> Tensor:
    """Log-probabilities [B] from logits of the whole completion part of a padded batch."""
    ids, labels = batch[f"{side}_input_ids"], batch[f"{side}_labels"][:, 1:]
    start = int((labels != -100).any(dim=0).int().argmax())
    kept = ids.shape[1] - start
    output = model(input_ids=ids, attention_mask=batch[f"{side}_attention_mask"], logits_to_keep=kept, use_cache=False)
    every = output.logits[:, :-1].log_softmax(-1).gather(2, ids[:, start + 1 :, None])[..., 0]
    return (every * (labels[:, start:] != -100)).sum(1)


def active(policy: tuple[nn.Module, list[str], list[str]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs, each turned so that its own hinge is active."""
    turned = []
    for row in rows:
        metrics = step(policy, common.batches([row], 1)[0], DPO | {"side_gradients": {}})
        if metrics["dynamics/norm_chosen"] < metrics["dynamics/norm_rejected"]:
            names = {"chosen": "rejected", "rejected": "chosen"}
            swap = {key.replace(a, b): row[key] for a, b in names.items() for key in row if a in key}
            turned.append(row | swap)
        else:
            turned.append(row)
    return turned


def calls(policy: tuple[nn.Module, list[str], list[str]]) -> dict[str, Callable[[Batch], Any]]:
    """Every variant as a function of a batch."""
    ours = {name: lambda b, o=options: step(policy, b, o) for name, options in VARIANTS.items()}
    return ours | {name: lambda b, g=gamma: naive_step(policy, b, g) for name, gamma in NAIVE.items()}


def measure_memory(variant: str) -> None:
    """Print how far a step lifts this process's peak memory, in MiB: two steps, so that all is allocated once."""
    policy = make_policy()
    problems = common.gsm8k()
    rows = common.tokenised(common.make_pairs(problems, 2 * PAIRS), common.make_tokenizer(problems))
    batches = common.batches(active(policy, rows) if "hinge" in variant else rows, PAIRS)
    del problems, rows
    gc.collect()
    before = rss()
    peak_reset()
    for batch in batches:
        calls(policy)[variant](batch)
    print(peak() - before)


def rss() -> float:
    """Resident memory in MiB."""
    return _status("VmRSS")


def peak() -> float:
    """Peak resident memory in MiB since the last reset."""
    return _status("VmHWM")


def peak_reset() -> None:
    """Forget the peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--memory", choices=[*VARIANTS, *NAIVE])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS, *NAIVE], choices=[*VARIANTS, *NAIVE])
    options = parser.parse_args()
    torch.set_num_threads(common.THREADS)
    if options.memory:
        measure_memory(options.memory)
        return
    policy = make_policy()
    problems = common.gsm8k()
    pairs = common.make_pairs(problems, PAIRS * (options.steps + 1))
    rows = active(policy, common.tokenised(pairs, common.make_tokenizer(problems)))
    wanted = {name: calls(policy)[name] for name in options.variants}
    records: dict[str, list[tuple[float, float]]] = {name: [] for name in wanted}
    for batch in common.batches(rows, PAIRS):
        for name, call in wanted.items():
            records[name].append(common.elapsed(lambda c=call, b=batch: c(b)))
    show({name: times[1:] for name, times in records.items()}, options.steps)


def show(records: dict[str, list[tuple[float, float]]], steps: int) -> None:
    """The table of medians, ratios and memory."""
    theta = 4 * sum(p.numel() for p in common.make_model().parameters()) / 2**20
    print(f"steps of {PAIRS} pairs, float32, {common.THREADS} threads, medians of {steps}; theta takes {theta:.0f} MiB")
    print(f"{'variant':22} {'wall s':>7} {'against':>14} {'wall':>6} {'CPU':>6} {'memory MiB':>11}")
    for name, times in records.items():
        against = BASELINES.get(name, "dpo")
        pairs = list(zip(times, records.get(against, times), strict=True))
        wall, cpu = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
        command = [sys.executable, "-m", "benchmarks.step_cost", "--memory", name]
        memory = float(subprocess.run(command, env=EXACT, check=True, capture_output=True, text=True).stdout)
        seconds = statistics.median(t[0] for t in times)
        print(f"{name:22} {seconds:7.2f} {against:>14} {wall:6.2f} {cpu:6.2f} {memory:11.0f}", flush=True)
    if "spo, hinge" in records and "naive, hinge" in records:
        shares = [a[0] / b[0] for a, b in zip(records["spo, hinge"], records["naive, hinge"], strict=True)]
        print(f"spo, hinge takes {statistics.median(shares):.2f} of naive")


if __name__ == "__main__":
    main()
