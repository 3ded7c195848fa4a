"""Term (b) of a real model: how large it is, how far the lower level moves, and what its computations give.

    python -m benchmarks.term_b [--model models/smollm2-135m] [--etas 2e-6 2e-5] [--steps 1 3] [--sft 30] [--pairs 2]

Pairs of real text: GSM8K's reference solutions, the model's own samples for the same questions, and UltraFeedback's
preferred answers, each beside its rejected side or another sample. ``share`` is the predicted fall of L_SFT over the
inner step, eta |v|^2 / L_SFT, ``gap`` the real one in nats, ``b/a`` the size of term (b) against DPO's term (a). The
other columns compare with the literal difference in float32: first order (a small step, scaled up), and what ``auto``
computes under bfloat16 autocast. ``--steps`` are values of K. ``--sft`` first trains the model on other solutions of
GSM8K for so many steps of AdamW (4 solutions, learning rate 5e-5).
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from spo_ray.core.logps import completion_logps
from spo_ray.core.lower_level import USED
from spo_ray.core.spo import spo_gradients
from spo_ray.model.collate import collate, collate_pairs
from spo_ray.model.load import load_model
from spo_ray.model.tokenizer import ChatTokenizer

LONGEST, FIRST_ORDER = 256, 1e-9
"""Tokens of a sequence, and a step size at which term (b) is linear in it."""
Batch = dict[str, Tensor]


def texts(model: nn.Module, chat: ChatTokenizer, count: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield a name and rows of pairs, for each kind of text."""
    problems = common.gsm8k()[:count]
    prompts = [chat.prompt_ids(p["question"]) for p in problems]
    samples = [sample(model, prompt, chat.end_id) for prompt in prompts for _ in range(2)]
    gold = [chat.completion_ids(p["answer"]) for p in problems]
    pairs = zip(prompts, gold, samples[::2], samples[1::2], strict=True)
    made = {"GSM8K's solutions": [], "own samples": []}
    for prompt, solution, one, other in pairs:
        made["GSM8K's solutions"].append({"prompt_ids": prompt, "chosen_ids": solution, "rejected_ids": one})
        made["own samples"].append({"prompt_ids": prompt, "chosen_ids": one, "rejected_ids": other})
    with (common.DATA / "ultrafeedback" / "train.jsonl").open() as lines:
        made["UltraFeedback"] = [tokenised(chat, json.loads(next(lines))) for _ in range(200)]
    for name, rows in made.items():
        short = [r for r in rows if max(len(r[f"{s}_ids"]) for s in common.SIDES) + len(r["prompt_ids"]) <= LONGEST]
        yield name, short[:count]


def tokenised(chat: ChatTokenizer, row: dict[str, Any]) -> dict[str, Any]:
    """Tokenise a pair."""
    sides = {f"{side}_ids": chat.completion_ids(row[side]) for side in common.SIDES}
    return {"prompt_ids": chat.prompt_ids(row["prompt"])} | sides


@torch.no_grad()
def sample(model: Any, prompt: list[int], end: int) -> list[int]:
    """Sample an answer at temperature 0.7."""
    ids = torch.tensor([prompt])
    options = {"do_sample": True, "temperature": 0.7, "eos_token_id": end, "pad_token_id": end}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, **options)
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def batch_of(model: nn.Module, rows: list[dict[str, Any]]) -> Batch:
    """Return pairs with the model itself as the reference."""
    batch = collate_pairs([row | {f"ref_{side}_logps": 0.0 for side in common.SIDES} for row in rows], 0)
    for side in common.SIDES:
        inputs = (batch[f"{side}_{key}"] for key in ("input_ids", "labels", "attention_mask"))
        batch[f"ref_{side}_logps"] = completion_logps(model, *inputs)[0]
    return batch


def term(policy: nn.Module, batch: Batch, **options: Any) -> tuple[Tensor, dict[str, float]]:
    """Return phi's gradient as a vector, by default of term (b) alone, and metrics."""
    fixed = {"beta": 0.5, "lambda_sft": 1.0, "gamma": 0.0, "inner_steps": 1, "base": lambda p: p.chosen * 0.0}
    names = common.groups(policy)
    grads, metrics = spo_gradients(policy, batch, **names, **(fixed | options))
    return torch.cat([grads[name].double().flatten() for name in names["adapters"]]), metrics


def measure(policy: nn.Module, batch: Batch, eta: float, **options: Any) -> dict[str, Any]:
    """Return a row of the table, for options of ``spo_gradients``."""
    literal, _ = term(policy, batch, **options, eta=eta, inner_method="difference")
    _, metrics = term(policy, batch, **options, eta=eta, inner_method="difference", base="dpo")
    first, slope = term(policy, batch, **options, eta=FIRST_ORDER, inner_method="exact")
    with torch.autocast("cpu", torch.bfloat16):
        half, used = term(policy, batch, **options, eta=eta)
    first *= eta / FIRST_ORDER

    def against(found: Tensor) -> str:
        return f"{torch.cosine_similarity(found, literal, dim=0):.4f}, {found.norm() / literal.norm():.2f}"

    return {
        "L_SFT": metrics["spo/sft_loss"],
        "share": slope["spo/inner_gap_share"] * eta / FIRST_ORDER,
        "gap": metrics["spo/inner_gap"],
        "b/a": metrics["spo/term_b_over_a"],
        "first order: cosine, size": against(first),
        "bfloat16: cosine, size": against(half),
        "by": USED[int(used["spo/inner_method"])],
    }


def train(model: nn.Module, chat: ChatTokenizer, steps: int) -> None:
    """Train the model on GSM8K's solutions, from the 1,000th on, which no text here is from."""
    problems = common.gsm8k()[1000 : 1000 + 4 * steps]
    rows = [(chat.prompt_ids(p["question"]), chat.completion_ids(p["answer"])) for p in problems]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for start in range(0, len(rows), 4):
        side = collate(rows[start : start + 4], 0)
        logps, tokens = completion_logps(model, side["input_ids"], side["labels"], side["attention_mask"])
        optimizer.zero_grad()
        (-logps.sum() / tokens.sum()).backward()
        optimizer.step()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--etas", type=float, nargs="+", default=[2e-6, 2e-5])
    parser.add_argument("--steps", type=int, nargs="+", default=[1])
    parser.add_argument("--reductions", nargs="+", default=["sum", "token_mean"], choices=["sum", "token_mean"])
    parser.add_argument("--sft", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(common.THREADS)
    model, chat = load_model(options.model).eval(), ChatTokenizer.load(options.model)
    train(model, chat, options.sft)
    made = list(texts(model, chat, options.pairs))
    policy, rows = common.with_adapters(model, 0.02), []
    for name, pairs in made:
        batch = batch_of(policy, pairs)
        for reduction, steps, eta in itertools.product(options.reductions, options.steps, options.etas):
            case = {"text": name, "L_SFT is a": reduction, "K": steps, "eta": f"{eta:g}"}
            rows.append(case | measure(policy, batch, eta, sft_reduction=reduction, inner_steps=steps))
            print(rows[-1], flush=True)
    print(common.table(rows))


if __name__ == "__main__":
    main()
