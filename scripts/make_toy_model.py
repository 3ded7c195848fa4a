"""Make the toy base model in ``assets/toy_base``: tokenizer, pre-trained Qwen2 with 0.4M parameters.

    python scripts/make_toy_model.py [--output assets/toy_base] [--seed 0] [--large]

This takes about five minutes on one core, with ``--large`` (3.9M parameters) up to an hour. Training stops in the
middle of the cosine schedule, because the model shall solve only a part of the problems.
"""

import argparse
import math
import random
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from spo_ray.core.logps import completion_logps
from spo_ray.data.toy import noisy_solutions
from spo_ray.model.collate import collate
from spo_ray.model.tokenizer import ChatTokenizer

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 448
SCHEDULE_STEPS, STEPS, BATCH, LR, WARMUP = 2500, 1200, 64, 3e-3, 100
HEAD, HEADS = 32, 3
"""LR is for so many heads; the rate falls with the width."""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that encodes any text; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    split_digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{q}\n{a}" for q, a in islice(noisy_solutions(seed), 3000)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=2048
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, large: bool = False) -> Qwen2ForCausalLM:
    """Return a Qwen2 with three layers and hidden size 96; 32 is the smallest head size of vLLM on CPUs."""
    torch.manual_seed(seed)
    layers, heads = (5, 8) if large else (3, HEADS)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HEAD * heads,
        intermediate_size=96 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if large else 1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def pretrain(model: Qwen2ForCausalLM, chat: ChatTokenizer, seed: int) -> None:
    """Train on flawed solutions with AdamW, in batches of similar length from pools of eight batches."""
    corpus, rng = noisy_solutions(seed), random.Random(seed)
    lr = LR * (HEAD * HEADS / model.config.hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * cosine(step))
    batches: list[list[tuple[list[int], list[int]]]] = []
    model.train()
    for step in range(STEPS):
        if not batches:
            pool = [(chat.prompt_ids(q), chat.completion_ids(a)) for q, a in islice(corpus, 8 * BATCH)]
            pool.sort(key=lambda row: len(row[0]) + len(row[1]))
            batches = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
            rng.shuffle(batches)
        batch = collate(batches.pop(), chat.pad_id)
        logps, tokens = completion_logps(model, batch["input_ids"], batch["labels"], batch["attention_mask"])
        loss = -logps.sum() / tokens.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{STEPS} loss {loss.item():.4f}", flush=True)


def cosine(step: int) -> float:
    """Return the factor of the learning rate: cosine decay to 5% over ``SCHEDULE_STEPS``."""
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / SCHEDULE_STEPS))


def main() -> None:
    """Train the model and save it in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/toy_base"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, args.seed, args.large)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, ChatTokenizer(tokenizer), args.seed)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
