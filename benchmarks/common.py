"""What the benchmarks share: a model, real text, clocks."""

import json
import os
import random
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from spo_ray.model.collate import collate_pairs
from spo_ray.runtime import schema as schemas
from spo_ray.runtime.artifact import write_rows

DATA = Path(os.environ.get("SPO_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
PROMPT = "Question: {question}\nAnswer:\n"
THREADS = 2


def gsm8k() -> list[dict[str, str]]:
    """GSM8K's training problems."""
    path = DATA / "gsm8k" / "train.jsonl"
    if not path.exists():
        raise SystemExit(f"{path} is missing: set SPO_SHARED_DATA to a folder with gsm8k/train.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_tokenizer(problems: Sequence[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a vocabulary of 32,000."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((f"{p['question']}\n{p['answer']}" for p in problems), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def make_model(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """A Qwen2 of 25 million random parameters, half of them in the tied embedding."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def make_pairs(problems: Sequence[dict[str, str]], count: int) -> list[dict[str, str]]:
    """Problems with their solution, against another problem's solution with a wrong number."""
    rng = random.Random(0)
    pairs = []
    for problem, other in zip(rng.sample(problems, count), rng.sample(problems, count), strict=True):
        wrong = re.sub(r"#### .*", f"#### {rng.randrange(1000)}", other["answer"])
        prompt = PROMPT.format(question=problem["question"])
        pairs.append({"prompt": prompt, "chosen": problem["answer"], "rejected": wrong})
    return pairs


def tokenised(pairs: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Pairs as token ids, the end token included, with made-up reference log-probabilities."""
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {"prompt_ids": tokenizer(pair["prompt"])["input_ids"]}
        for side in ("chosen", "rejected"):
            row[f"{side}_ids"] = tokenizer(pair[side] + "<eos>")["input_ids"]
            row[f"ref_{side}_logps"] = -10.4 * len(row[f"{side}_ids"])
        rows.append(row)
    return rows


def batches(rows: Sequence[dict[str, Any]], size: int) -> list[dict[str, torch.Tensor]]:
    """Batches for ``spo_gradients``."""
    return [collate_pairs(rows[i : i + size], 0) for i in range(0, len(rows), size)]


def useful_flops(model: nn.Module, rows: Sequence[dict[str, Any]]) -> float:
    """Multiplications and additions of forward and backward that a DPO step cannot do without.

    6 per weight and token: for the layers every prompt once and all completion tokens, for the head the latter alone.
    Attention's own products (a few per cent at these lengths) are left out.
    """
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()  # ty: ignore[call-non-callable, unresolved-attribute]
    completion = sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    tokens = completion + sum(len(r["prompt_ids"]) for r in rows)
    return 6.0 * (tokens * (total - head) + completion * head)


def random_inputs(folder: Path, count: int) -> None:
    """A Qwen2 of 4.2 million parameters in ``model``, pairs of random tokens in ``pairs``, their sides in ``sides``.

    Chosen completions are the longer ones, so that their gradient is, and the hinge is active.
    """
    from spo_ray.train.reference import ReferenceLogps

    torch.manual_seed(0)
    base = Path(__file__).parents[1] / "assets" / "toy_base"
    shutil.copytree(base, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    rng, pairs, sides = random.Random(0), [], []
    for i in range(count):
        prompt, chosen, rejected = (
            [rng.randrange(2, 4096) for _ in range(rng.randint(low, high))]
            for low, high in ((32, 64), (48, 64), (32, 47))
        )
        pairs.append({"id": f"{i:03d}", "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        sides += [
            {"id": f"{i:03d}{n}", "prompt_ids": prompt, "completion_ids": c} for n, c in enumerate((chosen, rejected))
        ]
    pairs, _ = ReferenceLogps(str(folder / "model"), "float32", 1024)(pairs)
    for name, kind, table in (("pairs", schemas.ReferencedPair, pairs), ("sides", schemas.SftRow, sides)):
        (folder / name).mkdir()
        write_rows(folder / name / "part-0.parquet", table, kind)


SHAPES = ((170, 384, 1024), (170, 1024, 384), (170, 384, 384), (95, 384, 32_000), (95, 32_000, 384))
"""Products of one sequence with the model's weights, as (rows, inner, columns)."""


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of this machine: the better of large square products and the model's own."""
    square = _rate(dtype, ((1024, 1024, 1024),))
    return max(square, _rate(dtype, SHAPES))


def _rate(dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> float:
    spent = flops = 0.0
    for m, k, n in shapes:
        a, b, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n, dtype=dtype)
        repeat = max(3, int(2e9 / (m * k * n)))

        def products(a: Tensor = a, b: Tensor = b, out: Tensor = out, repeat: int = repeat) -> None:
            for _ in range(repeat):
                torch.mm(a, b, out=out)

        products()
        spent += statistics.median(elapsed(products)[0] for _ in range(5)) / repeat
        flops += 2.0 * m * k * n
    return flops / spent


def rate_of_all(seconds: float = 0.7) -> float:
    """Matrix products a second of all processes of a group together, while each computes nothing else."""
    a = torch.randn(256, 256)
    dist.barrier()
    started, count = time.perf_counter(), torch.zeros(1)
    while time.perf_counter() - started < seconds:
        torch.mm(a, a)
        count += 1
    count /= time.perf_counter() - started
    dist.all_reduce(count)
    return count.item()


def clocks() -> tuple[float, float]:
    """Wall and CPU time in seconds."""
    return time.perf_counter(), time.process_time()


def elapsed(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = clocks()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu
