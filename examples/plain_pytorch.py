"""SPO in a plain PyTorch loop: of spo_ray only the mathematics, beside it transformers and PEFT.

python examples/plain_pytorch.py --model NAME_OR_FOLDER --steps 20
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from spo_ray.core import completion_logps, spo_gradients

TOY = Path(__file__).resolve().parents[1] / "assets" / "toy_base"
PAIRS = [
    {
        "prompt": "Ada owns 12 apples and finds 9 more. How many apples does Ada own now?",
        "chosen": "First, 12 + 9 = 21.\n#### 21",
        "rejected": "First, 12 - 9 = 3.\n#### 3",
    },
    {
        "prompt": "Bo owns 17 cards and loses 5. How many cards does Bo own now?",
        "chosen": "First, 17 - 5 = 12.\n#### 12",
        "rejected": "First, 17 + 5 = 22.\n#### 22",
    },
    {
        "prompt": "Sue owns 25 beads and finds 14 more. How many beads does Sue own now?",
        "chosen": "First, 25 + 14 = 39.\n#### 39",
        "rejected": "First, 25 + 14 = 41.\n#### 41",
    },
    {
        "prompt": "Jon owns 30 pens and loses 11. How many pens does Jon own now?",
        "chosen": "First, 30 - 11 = 19.\n#### 19",
        "rejected": "First, 30 - 11 = 29.\n#### 29",
    },
]
SPO = {"base": "dpo", "beta": 0.5, "lambda_sft": 1.0, "gamma": 0.01, "inner_steps": 1, "eta": 2e-5}
LEARNING_RATES = {"backbone": 1e-4, "adapters": 3e-4}  # for the toy model; a large one wants smaller steps
SIDES = ("chosen", "rejected")


def load(path: str) -> nn.Module:
    """The model with LoRA adapters, backbone (theta) and adapters (phi) both trainable."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # SPO takes differences of gradients
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.requires_grad_(True)  # PEFT has frozen theta


def parameter_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of theta's parameters and of phi's."""
    names = [name for name, _ in model.named_parameters()]
    return [n for n in names if ".lora_" not in n], [n for n in names if ".lora_" in n]


def encode(pair: Mapping[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """Token ids of both sides of a pair, and labels on their completions alone."""
    turn, row = [{"role": "user", "content": pair["prompt"]}], {}
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    for side in SIDES:  # a completion has tokens of its own, and ends: its length is part of what is preferred
        completion = tokenizer(pair[side] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        row[f"{side}_input_ids"] = prompt + completion
        row[f"{side}_labels"] = [-100] * len(prompt) + completion
    return row


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A right-padded batch; the attention mask hides what pads."""
    batch = {}
    for side in SIDES:
        ids = [torch.tensor(row[f"{side}_input_ids"]) for row in rows]
        labels = [torch.tensor(row[f"{side}_labels"]) for row in rows]
        batch[f"{side}_input_ids"] = pad_sequence(ids, batch_first=True)
        batch[f"{side}_labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        batch[f"{side}_attention_mask"] = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    return batch


@torch.no_grad()
def reference(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Log-probabilities under the reference, which is the model before its first step."""
    parts = ("input_ids", "labels", "attention_mask")
    return {f"ref_{side}_logps": completion_logps(model, *(batch[f"{side}_{p}"] for p in parts))[0] for side in SIDES}


def main() -> None:
    """Train on all pairs at every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(TOY), help="name or folder of a chat model")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    torch.manual_seed(0)  # the adapters' start is random
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), load(args.model).to(device)
    batch = {key: value.to(device) for key, value in collate([encode(p, tokenizer) for p in PAIRS]).items()}
    batch |= reference(model, batch)

    named = dict(model.named_parameters())
    backbone, adapters = parameter_names(model)
    groups = [
        {"params": [named[n] for n in backbone], "lr": LEARNING_RATES["backbone"]},
        {"params": [named[n] for n in adapters], "lr": LEARNING_RATES["adapters"]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(1, args.steps + 1):
        grads, metrics = spo_gradients(model, batch, backbone=backbone, adapters=adapters, **SPO)
        for name, grad in grads.items():  # these are the gradients: there is no loss to call backward on
            named[name].grad = grad
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shown = "  ".join(f"{key} {metrics[key]:.4f}" for key in ("loss", "logps/chosen", "logps/rejected"))
        print(f"step {step}  {shown}")
    # PEFT saves phi alone, and theta has moved too: model.merge_and_unload().save_pretrained(folder) keeps both.


if __name__ == "__main__":
    main()
