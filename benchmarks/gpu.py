"""Correctness and speed on one GPU, in one command of at most 8 minutes that needs only torch, transformers and peft.

    python -m benchmarks.gpu [--model FOLDER --pairs FILE.jsonl] [--out FILE.json] [--minutes 8] [--tiny]

Three parts, each with a share of the time: gradients and log-probabilities against float64 on the CPU; speed and memory
of a step at the shapes of Qwen2.5 with random weights; and, with ``--model``, trainings of real weights by DPO and SPO.
The JSON file is written anew after every case. A case that fails is a row with its error, and the others still run; the
exit code is 1 if a case failed or an error is above its bound. ``--tiny`` runs all cases on a CPU with small shapes.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common
from spo_ray.core.gradients import KeepFloat64
from spo_ray.core.lm_head import base_of
from spo_ray.core.logps import completion_logps
from spo_ray.core.spo import spo_gradients
from spo_ray.model.fsdp import shard
from spo_ray.model.generate import generate
from spo_ray.model.tokenizer import ChatTokenizer

transformers.utils.logging.disable_progress_bar()

Row = dict[str, Any]
Batch = dict[str, Tensor]
Case = tuple[str, Callable[[], list[Row]]]
"""A name, and a function that returns rows of results."""

FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
FIELDS += ("num_attention_heads", "num_key_value_heads")
SHAPES = {"Qwen2.5-0.5B": (151_936, 896, 4864, 24, 14, 2), "Qwen2.5-1.5B": (151_936, 1536, 8960, 28, 12, 2)}
TINY, CHECKED = (512, 64, 128, 2, 2, 1), (8192, 256, 768, 4, 4, 2)
"""Shapes of --tiny and of the checks, in the order of :data:`FIELDS`."""
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 products per second by the card's data sheet; for other devices the measured rate takes its place."""
SPO: dict[str, Any] = {"beta": 0.1, "lambda_sft": 1.0, "gamma": 0.0, "inner_steps": 1, "eta": 2e-5}
DPO = SPO | {"lambda_sft": 0.0, "inner_steps": 0}


def make_policy(shape: tuple[int, ...], device: str, spread: float = 0.02) -> nn.Module:
    """Build a Qwen2 of random weights with LoRA adapters away from zero; all parameters require gradients."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**dict(zip(FIELDS, shape, strict=True)), tie_word_embeddings=True)
    config.initializer_range, config.bos_token_id, config.pad_token_id = spread, None, None
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return common.with_adapters(base, spread)


def zero(pairs: Any) -> Tensor:
    """Base loss of value zero, which leaves the other terms alone."""
    return pairs.chosen * 0.0


TERMS = {"ac": DPO, "bd": SPO | {"base": zero, "eta": 1e-6}, "Re": DPO | {"base": zero, "gamma": 1.0}}
"""Settings that isolate two terms: one of phi's gradient (R: gamma's part), and one of theta's."""
EXACT, DIFFERENCE = {"inner_method": "exact"}, {"inner_method": "difference"}
MODES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fp32": ("fp32", "ac bd Re", {}),
    "fp32, exact": ("fp32", "bd Re", EXACT),
    "bf16": ("bf16", "ac bd Re", {}),
    "bf16, difference in (b)": ("bf16", "bd", DIFFERENCE),
    "bf16, TF32 difference in (b)": ("tf32", "bd", DIFFERENCE),
}
"""Precision, groups of :data:`TERMS` and options."""
BOUNDS = {"fp32": {"b": 0.02, "R": 0.02, "e": 0.02, "": 1e-5}, "bf16": {"": 0.05}}
"""Largest relative errors by precision and term, with "" for all others. Other modes are measured only."""
INPUTS = ("input_ids", "labels", "attention_mask")


def compared(case: str, check: str, found: Sequence[Tensor], truth: Sequence[Tensor], bound: float | None) -> Row:
    """Return relative error and cosine of tensors, taken as one vector, against the true ones."""
    x, y = (torch.cat([t.detach().cpu().double().flatten() for t in part]) for part in (found, truth))
    error = ((x - y).norm() / y.norm()).item()
    row = {"case": case, "check": check, "error": error, "cosine": F.cosine_similarity(x, y, dim=0).item()}
    return row | {"bound": bound, "ok": None if bound is None else error <= bound}


@dataclass
class Checks:
    """Checks of one small model on a device against a copy in float64 on the CPU."""

    device: str
    origin: nn.Module
    exact: nn.Module
    batch: Batch
    truth: dict[str, Any]
    """Gradients by :data:`TERMS`, and log-probabilities with their gradients, in float64."""

    def gradients(self, model: nn.Module, terms: str, **options: Any) -> dict[str, Tensor]:
        """Return the gradient of a group of terms on the device."""
        batch = {key: value.to(self.device) for key, value in self.batch.items()}
        return spo_gradients(model, batch, **common.groups(self.origin), **(TERMS[terms] | options))[0]

    def rows(self, case: str, terms: str, found: Any, truth: Any, bounds: dict[str, float]) -> list[Row]:
        """Compare phi's and theta's part of a gradient."""
        parts = zip(terms, ("adapters", "backbone"), strict=True)
        vectors = [(t, [[g[n] for n in common.groups(self.origin)[part]] for g in (found, truth)]) for t, part in parts]
        return [compared(case, f"term ({t})", *pair, bounds.get(t, bounds.get(""))) for t, pair in vectors]

    def mode(self, case: str) -> list[Row]:
        """Check the terms of one of :data:`MODES`."""
        name, terms, options = MODES[case]
        model, rows = copy.deepcopy(self.origin).to(self.device), []
        with common.precision(self.device, name):
            for group in terms.split():
                found = self.gradients(model, group, **options)
                rows += self.rows(case, group, found, self.truth[group], BOUNDS.get(case, {}))
        return rows

    def fsdp(self, name: str) -> list[Row]:
        """Compare FSDP2 of one rank with no sharding; in bfloat16, where casts differ, with float64."""
        with tempfile.TemporaryDirectory() as folder:
            store = dist.FileStore(f"{folder}/store", 1)
            dist.init_process_group("nccl" if self.device == "cuda" else "gloo", store=store, rank=0, world_size=1)
            try:
                mesh = dist.init_device_mesh(self.device, (1,))
                plain, sharded = (copy.deepcopy(self.origin).to(self.device) for _ in range(2))
                shard(sharded, mesh, torch.float32 if name == "fp32" else torch.bfloat16)
                rows, options = [], {"pairs_per_backward": 2, "share_prompt": False}
                for terms in TERMS:
                    found = {n: g.full_tensor() for n, g in self.gradients(sharded, terms, **options).items()}
                    truth = self.truth[terms] if name == "bf16" else self.gradients(plain, terms, **options)
                    rows += self.rows(f"FSDP2, {name}", terms, found, truth, BOUNDS[name])
                return rows
            finally:
                dist.destroy_process_group()

    def logps(self, case: str, name: str, attention: str = "sdpa", chunk: int = 0, kernel: str = "") -> list[Row]:
        """Compare logps, in chunks or from full logits, and the gradient of their sum with full logits in float64."""
        model = copy.deepcopy(self.origin).to(self.device)
        base_of(model).set_attn_implementation(attention)
        batch = {key: value[:1] for key, value in self.batch.items()} if kernel else self.batch  # one row: no padding
        there = {key: value.to(self.device) for key, value in batch.items()}
        with common.precision(self.device, name), sdpa_kernel(getattr(SDPBackend, kernel)) if kernel else nullcontext():
            found = []
            for side in common.SIDES:
                inputs = [there[f"{side}_{key}"] for key in INPUTS]
                one = completion_logps(model, *inputs, chunk_tokens=chunk)[0] if chunk else None
                found.append(common.full_logps(model, there, side) if one is None else one)
            grads = torch.autograd.grad(torch.cat(found).sum(), list(model.parameters()))
        key = f"logps of {len(batch['chosen_labels'])}"
        if key not in self.truth:
            with KeepFloat64():
                true = [common.full_logps(self.exact, batch, side) for side in common.SIDES]
                self.truth[key] = true, torch.autograd.grad(torch.cat(true).sum(), list(self.exact.parameters()))
        pairs, bound = zip(("logps", "gradient"), (found, grads), self.truth[key], strict=True), BOUNDS[name][""]
        return [compared(case, check, *pair, bound) for check, *pair in pairs]


def correctness(device: str, tiny: bool) -> Iterator[Case]:
    """Yield the checks against float64 on the CPU."""
    shape = TINY if tiny else CHECKED
    lengths = [(12, 20, 17), (9, 14, 11), (7, 9, 16)] if tiny else [(64, 64, 64), (40, 60, 50), (20, 90, 80)]
    origin, batch = make_policy(shape, "cpu", 0.08 if tiny else 0.04), common.random_batch(shape[0], lengths, "cpu")
    exact, names = copy.deepcopy(origin).double(), common.groups(origin)
    with torch.no_grad(), KeepFloat64():
        batch |= {f"ref_{side}_logps": common.full_logps(exact, batch, side) - 1.0 for side in common.SIDES}
    hinge = spo_gradients(exact, batch, **names, **TERMS["Re"])[1]["spo/R"]
    batch = batch if hinge else common.swapped(batch)
    truth = {key: spo_gradients(exact, batch, **names, **options)[0] for key, options in TERMS.items()}
    checks = Checks(device, origin, exact, batch, truth)
    for mode in MODES:
        yield mode, partial(checks.mode, mode)
    ways: dict[str, dict[str, Any]] = {"full logits": {}, "chunks of 7": {"chunk": 7}, "one chunk": {"chunk": 1000}}
    ways |= {f"attention {name}": {"attention": name, "chunk": 1000} for name in ("eager", "flash_attention_2")}
    kernels = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION") if device == "cuda" else ("MATH",)
    ways |= {f"SDPA {kernel}": {"chunk": 1000, "kernel": kernel} for kernel in kernels}
    for way, options in ways.items():
        for name in ("fp32", "bf16"):
            if name == "bf16" or ("FLASH" not in way.upper() and "CUDNN" not in way):  # these need half precision
                yield f"{way}, {name}", partial(checks.logps, f"{way}, {name}", name, **options)
    for name in ("fp32", "bf16"):
        yield f"FSDP2, {name}", partial(checks.fsdp, name)


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DPO": (6, DPO | {"share_prompt": False}),
    "DPO, shared prompt": (6, DPO | {"share_prompt": True}),
    "DPO, plain Hugging Face, full logits": (6, {}),
    "SFT": (3, {}),
    "SPO, K = 0": (6, SPO | {"inner_steps": 0}),
    "SPO, gamma 0": (12, SPO),
    "SPO, gamma 0, difference in (b)": (8, SPO | DIFFERENCE),
    "SPO, gamma 0, TF32 difference in (b)": (8, SPO | DIFFERENCE),
    "SPO, gamma > 0": (24, SPO | {"gamma": 0.1}),
}
"""Units of arithmetic of a pair (see :mod:`spo_ray.core.spo`), and options of ``spo_gradients``."""
PAIRS, SWEPT = 8, (1, 2, 4, 8, 16)
"""Pairs of a step, and pairs per backward in the sweep."""


class Steps:
    """Training steps of a model with AdamW on random pairs."""

    def __init__(self, name: str, device: str, tiny: bool, peak: float) -> None:
        self.name, self.device, self.peak = name, device, peak
        self.dpo: dict[tuple[int, int], float] = {}
        shape, prompt, completion = (TINY, 16, 16) if tiny else (SHAPES[name], 256, 768)
        self.repeats = 2 if tiny else 4
        self.model = make_policy(shape, device)
        self.names = common.groups(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-9, fused=device == "cuda")
        self.batch = common.random_batch(shape[0], [(prompt, completion, completion)] * SWEPT[-1], device)
        layers = sum(p.numel() for name, p in self.model.named_parameters() if "embed_tokens" not in name)
        self.length, width = prompt + completion, shape[1]
        attention = shape[3] * width * self.length**2  # causal
        self.unit = 2.0 * (layers * self.length + width * shape[0] * completion + attention)

    def spo(self, batch: Batch, size: int, options: dict[str, Any]) -> None:
        """Compute gradients by the project's own path; where R needs it, with the sides exchanged from now on."""
        options = self.names | options | {"pairs_per_backward": size}
        grads, metrics = spo_gradients(self.model, batch, **options)
        if options["gamma"] and not metrics["spo/R"]:
            batch |= common.swapped(batch)
            grads, metrics = spo_gradients(self.model, batch, **options)
        for name, p in self.model.named_parameters():
            p.grad = grads[name]

    def plain(self, batch: Batch, size: int, case: str) -> None:
        """Compute gradients of SFT, or of DPO as a plain Hugging Face loop does: both sides at once, full logits."""
        for start in range(0, count := len(batch["chosen_labels"]), size):
            part = {key: value[start : start + size] for key, value in batch.items()}
            if case == "SFT":
                loss = -completion_logps(self.model, *(part[f"chosen_{key}"] for key in INPUTS))[0].sum()
            else:
                both = {f"both_{key}": torch.cat([part[f"{side}_{key}"] for side in common.SIDES]) for key in INPUTS}
                chosen, rejected = common.full_logps(self.model, both, "both").chunk(2)
                ratio = chosen - rejected - part["ref_chosen_logps"] + part["ref_rejected_logps"]
                loss = -F.logsigmoid(SPO["beta"] * ratio).sum()
            (loss / count).backward()

    def measure(self, case: str, pairs: int = PAIRS, size: int = 2) -> list[Row]:
        """Time steps of some pairs with ``size`` of them per backward: one to warm up, then 3, or 6 seconds' worth."""
        units, options = VARIANTS[case]
        batch, times = {key: value[:pairs] for key, value in self.batch.items()}, []
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        while len(times) < self.repeats and sum(times[1:]) < 6:
            started = time.perf_counter()
            self.optimizer.zero_grad()
            with common.precision(self.device, "tf32" if "TF32" in case else "bf16"):
                self.spo(batch, size, options) if options else self.plain(batch, size, case)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        seconds, tokens = statistics.median(times[1:]), pairs * self.length * (1 if case == "SFT" else 2)
        self.dpo |= {(pairs, size): seconds} if case == "DPO" else {}
        dpo = self.dpo.get((pairs, size))
        row = {"case": f"{self.name}: {case}", "pairs": pairs, "tokens per backward": size * self.length}
        row |= {"step, s": seconds, "of DPO": dpo and seconds / dpo, "tokens/s": tokens / seconds}
        row |= {"MFU": units * pairs * self.unit / seconds / self.peak}
        return [row | {"peak GiB": torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None}]


def speed(device: str, tiny: bool) -> Iterator[Case]:
    """Yield the measurements of each model: all variants, then the sweep of tokens per backward."""
    rates = {name: matmul_rate(device, name, 256 if tiny else 8192) for name in ("fp32", "tf32", "bf16")}
    yield "products", lambda: [{"case": f"products in {key}", "TFLOP/s": rate / 1e12} for key, rate in rates.items()]
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((value for key, value in PEAKS.items() if key in card), rates["bf16"])
    for name in ["tiny"] if tiny else SHAPES:
        steps = Steps(name, device, tiny, peak)
        for case in VARIANTS:
            yield f"{name}: {case}", partial(steps.measure, case)
        for case, size in [(case, size) for case in ("DPO", "SPO, gamma 0") for size in SWEPT[:: 4 if tiny else 1]]:
            yield f"{name}: {case}, {size} per backward", partial(steps.measure, case, SWEPT[-1], size)
        del steps.model, steps.optimizer  # the last case still refers to the steps


def matmul_rate(device: str, name: str, size: int) -> float:
    """Return floating-point operations per second of large square products."""
    a, times = torch.randn(size, size, device=device), []
    a = a.bfloat16() if name == "bf16" else a
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    torch.set_float32_matmul_precision("highest")
    return 2.0 * size**3 / min(times[1:])


def real(args: argparse.Namespace, device: str, end: float) -> Iterator[Case]:
    """Yield a training by DPO and one by SPO from the same real weights on the same pairs."""
    chat = ChatTokenizer.load(args.model)
    rows: list[Row] = []
    for pair in map(json.loads, Path(args.pairs).read_text().splitlines()):
        ids = {f"{side}_ids": chat.completion_ids(pair[side]) for side in common.SIDES}
        row = {"prompt_ids": chat.prompt_ids(pair["prompt"])} | ids
        if len(row["prompt_ids"]) + max(map(len, ids.values())) <= 1024 and all(ids.values()):
            rows.append(row)
    if len(rows) < 20:
        raise ValueError(f"--pairs has {len(rows)} pairs of at most 1,024 tokens, and 20 are needed: add pairs")
    for index, (method, options) in enumerate({"DPO": DPO, "SPO": SPO}.items()):
        half = time.monotonic() + (end - time.monotonic()) / (2 - index)
        yield method, partial(train, args, method, options, rows, chat, device, half)


def train(
    args: argparse.Namespace, method: str, options: Row, rows: list[Row], chat: ChatTokenizer, device: str, end: float
) -> list[Row]:
    """Train on 4 pairs a step; return logps of 16 pairs that are not trained on, and greedy answers, as it goes."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    model, probe, rest = common.with_adapters(base), rows[:16], rows[16:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scored = rows[: 16 + 4 * args.steps]
    for row, logps in zip(scored, pair_logps(model, scored, device), strict=True):
        row |= {f"ref_{side}_logps": value for side, value in zip(common.SIDES, logps, strict=True)}
    found: list[Row] = []
    for step in range(args.steps + 1):
        late = time.monotonic() > end
        if late or step % max(1, args.steps // 4) == 0:
            means = torch.tensor(pair_logps(model, probe, device)).mean(0).tolist()
            row = {"case": method, "step": step}
            for side, now in zip(common.SIDES, means, strict=True):
                row |= {side: now, f"{side} change": now - (found[0][side] if found else now)}
            found.append(row)
        if late or step == args.steps:
            break
        batch = common.collate_pairs([rest[(4 * step + i) % len(rest)] for i in range(4)], chat.pad_id)
        with common.precision(device, "bf16"):
            batch = {key: value.to(device) for key, value in batch.items()}
            grads, _ = spo_gradients(model, batch, **common.groups(model), **options)
        for name, p in model.named_parameters():
            p.grad = grads[name]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    wanted: Row = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": chat.stop_ids, "pad_token_id": chat.pad_id}
    answers = generate(model, chat, [row["prompt_ids"] for row in probe[:3]], device, **wanted)
    return found + [{"case": method, "greedy": chat.decode(ids)} for ids in answers]


def pair_logps(model: nn.Module, rows: list[Row], device: str) -> list[list[float]]:
    """Return the logps of both sides of every pair."""
    found = []
    with torch.no_grad(), common.precision(device, "bf16"):
        for start in range(0, len(rows), 8):
            batch = common.collate_pairs(rows[start : start + 8], 0)
            sides = [[batch[f"{side}_{key}"].to(device) for key in INPUTS] for side in common.SIDES]
            found += torch.stack([completion_logps(model, *side)[0] for side in sides], 1).tolist()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; return 1 if a case failed or an error is above its bound."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder with real weights and a tokenizer with a chat template")
    parser.add_argument("--pairs", help="JSONL file with prompt, chosen and rejected in every line")
    parser.add_argument("--steps", type=int, default=200, help="steps of each training of real weights")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate of these trainings")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device was found: use --tiny to run on a CPU")
    if (args.model is None) != (args.pairs is None):
        parser.error("--model and --pairs go together")
    start, device = time.monotonic(), "cpu" if args.tiny else "cuda"
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    card = f"CPU, {platform.machine()}" if args.tiny else torch.cuda.get_device_name()
    report = common.Report(args.out, {"device": card, "python": platform.python_version(), **versions})
    at = {share: start + 60 * args.minutes * share for share in (0.25, 0.7, 0.95)}
    report.run("correctness", correctness(device, args.tiny), at[0.25])
    report.run("speed", speed(device, args.tiny), at[0.7 if args.model else 0.95])
    if args.model:
        report.run("real weights", real(args, device, at[0.95]), at[0.95])
    return int(any("failed" in row or row.get("ok") is False for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
