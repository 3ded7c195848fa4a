"""SPO in a plain PyTorch loop, with ``spo_ray.core``, transformers and PEFT.

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
        "prompt": "Ida owns 3 apples. Kim owns 5 times as many as Ida. How many apples do they own together?",
        "chosen": "First, 3 * 5 = 15. Then, 3 + 15 = 18.\n#### 18",
        "rejected": "3 * 5 = 15.\n#### 15",
    },
    {
        "prompt": "Dee owns 25 toys. Ada owns 20 fewer than Dee. How many toys do they own together?",
        "chosen": "First, 25 - 20 = 5. Then, 25 + 5 = 30.\n#### 30",
        "rejected": "25 - 20 = 15.\n#### 15",
    },
    {
        "prompt": "Ned owns 24 disks, which is 11 fewer than Jon owns. How many disks does Jon own?",
        "chosen": "24 + 11 = 35.\n#### 35",
        "rejected": "24 - 11 = 13.\n#### 13",
    },
    {
        "prompt": "Dee owns 5 boxes of 3 rings each and 18 loose rings. How many rings does Dee own?",
        "chosen": "First, 5 * 3 = 15. Then, 15 + 18 = 33.\n#### 33",
        "rejected": "First, 5 * 3 = 15. Then, 15 + 17 = 33.\n#### 33",
    },
]
SPO = {"base": "dpo", "beta": 0.5, "lambda_sft": 1.0, "gamma": 0.01, "inner_steps": 1, "eta": 2e-5}
BACKBONE_RATE, ADAPTER_RATE = 1e-4, 3e-4  # for the toy model; a large one wants smaller steps
SIDES = ("chosen", "rejected")


def load(path: str) -> nn.Module:
    """The model with LoRA adapters, backbone (theta) and adapters (phi) both trainable."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # SPO takes differences of gradients
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.requires_grad_(True)  # PEFT has frozen theta


def names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of theta's parameters and of phi's."""
    every = [name for name, _ in model.named_parameters()]
    return [n for n in every if ".lora_" not in n], [n for n in every if ".lora_" in n]


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
    """Log-probabilities of completions under the reference, which is the model before its first step."""
    rows = {side: [batch[f"{side}_{key}"] for key in ("input_ids", "labels", "attention_mask")] for side in SIDES}
    return {f"ref_{side}_logps": completion_logps(model, *inputs)[0] for side, inputs in rows.items()}


def arguments(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TOY), help="name or folder of a chat model")
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    """Train on all pairs at every step."""
    args = arguments(__doc__)
    torch.manual_seed(0)  # the adapters' start is random
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), load(args.model).to(device)
    batch = {key: value.to(device) for key, value in collate([encode(pair, tokenizer) for pair in PAIRS]).items()}
    batch |= reference(model, batch)

    named = dict(model.named_parameters())
    backbone, adapters = names(model)
    theta = {"params": [named[name] for name in backbone], "lr": BACKBONE_RATE}
    phi = {"params": [named[name] for name in adapters], "lr": ADAPTER_RATE}
    optimizer = torch.optim.AdamW([theta, phi], weight_decay=0.0)
    for step in range(1, args.steps + 1):
        grads, metrics = spo_gradients(model, batch, backbone=backbone, adapters=adapters, **SPO)
        for name, grad in grads.items():  # whole gradients: there is no loss to call backward on
            named[name].grad = grad
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shown = [f"{key} {metrics[key]:.4f}" for key in ("loss", "logps/chosen", "logps/rejected")]
        print(f"step {step}", *shown, sep="  ")
    # PEFT saves phi alone, and theta has moved too: model.merge_and_unload().save_pretrained(folder) keeps both.


if __name__ == "__main__":
    main()
