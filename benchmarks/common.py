"""What the benchmarks share: a model, real text, clocks, results that are written as they come."""

import gc
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from spo_ray.model.collate import collate_pairs

DATA = Path(os.environ.get("SPO_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
PROMPT = "Question: {question}\nAnswer:\n"
THREADS = 2
SIDES = ("chosen", "rejected")


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
    from spo_ray.runtime import schema as schemas  # needs packages that benchmarks.gpu does without
    from spo_ray.runtime.artifact import write_rows
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


def with_adapters(base: nn.Module, spread: float = 0.0) -> nn.Module:
    """Wrap a model by LoRA adapters and train all parameters."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).requires_grad_(True).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name and spread:
            nn.init.normal_(p, std=spread)
    return model


def groups(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of theta's and of phi's parameters, as arguments of ``spo_gradients``."""
    names = [name for name, _ in model.named_parameters()]
    return {
        "backbone": [name for name in names if ".lora_" not in name],
        "adapters": [name for name in names if ".lora_" in name],
    }


def random_batch(vocabulary: int, lengths: Sequence[tuple[int, int, int]], device: str) -> dict[str, Tensor]:
    """Return pairs of random tokens from (prompt, chosen, rejected) lengths, with made-up reference logps."""
    rng = torch.Generator().manual_seed(1)
    rows = []
    for sizes in lengths:
        ids = [torch.randint(2, vocabulary, (size,), generator=rng).tolist() for size in sizes]
        row = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))
        rows.append(row | {f"ref_{s}_logps": -math.log(vocabulary) * len(row[f"{s}_ids"]) for s in SIDES})
    return {key: value.to(device) for key, value in collate_pairs(rows, 0).items()}


def swapped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exchange the chosen and the rejected side."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {key.replace(side, other[side]): batch[key] for side in SIDES for key in batch if side in key}


@contextmanager
def precision(device: str, name: str) -> Iterator[None]:
    """Compute in ``fp32``, in ``bf16`` (autocast), or in ``tf32``: autocast, with TensorFloat-32 where it is left."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with torch.autocast(device, torch.bfloat16, enabled=name != "fp32"):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def full_logps(model: nn.Module, batch: dict[str, Tensor], side: str) -> Tensor:
    """Return logps [B] from logits of all positions: a plain Hugging Face loop, and the reference of the checks."""
    ids, labels = batch[f"{side}_input_ids"], batch[f"{side}_labels"][:, 1:]
    logits = model(input_ids=ids, attention_mask=batch[f"{side}_attention_mask"], use_cache=False).logits[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    every = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (every * (labels != -100)).sum(1)


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


class Report:
    """Rows of all parts, printed and written as they come."""

    def __init__(self, out: Path | None, machine: dict[str, Any]) -> None:
        self.out, self.rows, self.machine = out, [], machine
        print(json.dumps(machine), flush=True)

    def run(self, part: str, cases: Iterator[tuple[str, Callable[[], Any]]], end: float) -> None:
        """Run the cases of a part until its time is over; then print its table."""
        name, first = "preparation", len(self.rows)
        try:
            for name, case in cases:
                late = time.monotonic() > end
                self.add(part, [{"case": name, "note": "no time left"}] if late else guarded(name, case))
        except Exception as error:
            self.add(part, [failure(f"after {name}", error)])
        print(f"\n{table(self.rows[first:])}\n", flush=True)

    def add(self, part: str, rows: list[dict[str, Any]]) -> None:
        """Add rows, and write all."""
        self.rows += [{"part": part} | row for row in rows]
        print(f"{part}: {rows[0]['case']}", file=sys.stderr, flush=True)
        if self.out:
            unfinished = self.out.with_name(f".{self.out.name}")
            unfinished.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1))
            unfinished.replace(self.out)  # at once, so that a kill leaves a whole file


def guarded(name: str, case: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of a case, or a row with its error."""
    try:
        return case()
    except Exception as error:
        return [failure(name, error)]
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def failure(name: str, error: Exception) -> dict[str, Any]:
    """Return a row with an error; it is a note if the case needs more memory, or a kernel that is not there."""
    text = f"{type(error).__name__}: {error}"[:300]
    expected = isinstance(error, (torch.OutOfMemoryError, ImportError)) or "No available kernel" in text
    return {"case": name, "note" if expected else "failed": text}


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "part"]
    lines = [keys, ["---"] * len(keys), *([_cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else " ".join(str(value).split()).replace("|", "/")


def with_made_part(page: str, start: str, end: str, text: str) -> str:
    """Return a page with what stands between the lines ``start`` and ``end`` replaced by a text."""
    before, _, rest = page.partition(start)
    return f"{before}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def question_means(rights: Iterable[str]) -> list[float]:
    """Return each question's mean over trainings, each of which has a digit for every question, 1 for a right one."""
    return [statistics.fmean(map(int, digits)) for digits in zip(*rights, strict=True)]
