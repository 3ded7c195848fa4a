"""A DPO step here against TRL's DPOTrainer: the same model, pairs, order, precision and optimizer, in one process.

Reference log-probabilities are precomputed on both sides, gradient checkpointing is off. After every step of TRL the
same batch goes through a step here on a copy of the model; ratios are medians over steps. TRL scores every position
where there is no Triton; ``completions only`` patches it to score completions as it does on a GPU.

    python -m benchmarks.vs_trl [--steps 20]
"""

import argparse
import logging
import os
import statistics
import tempfile
import warnings
from typing import Any

import torch
from torch import nn

from benchmarks import common
from spo_ray.config.train import GroupConfig
from spo_ray.core.spo import spo_gradients
from spo_ray.model.collate import collate_pairs
from spo_ray.model.optimizer import Group, make_optimizer

os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore")

import datasets  # noqa: E402  after the switch for progress bars
import trl.trainer.utils  # noqa: E402
from transformers import PrinterCallback, TrainerCallback  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

BETA = 0.1
CASES = {"fp32": (False, False), "fp32, completions only": (False, True), "bf16, completions only": (True, True)}


class Ours:
    """A DPO training step on the project's own path."""

    def __init__(self, bf16: bool) -> None:
        self.model = common.make_model()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.params = list(self.model.parameters())
        self.optimizer = make_optimizer(
            [Group("all", {str(i): p for i, p in enumerate(self.params)}, GroupConfig(lr=1e-5))], "adamw"
        )
        self.bf16 = bf16

    def step(self, rows: list[dict[str, Any]]) -> None:
        """Collate, gradient, clip, AdamW."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            grads, _ = spo_gradients(
                self.model,
                collate_pairs(rows, 0),
                backbone=self.names,
                adapters=[],
                base="dpo",
                beta=BETA,
                lambda_sft=0.0,
                gamma=0.0,
                inner_steps=0,
                eta=0.0,
            )
        for p, grad in zip(self.params, grads.values(), strict=True):
            p.grad = grad
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Alternate(TrainerCallback):
    """Times TRL's steps, and after each the same step here."""

    def __init__(self, ours: Ours) -> None:
        self.ours, self.inputs = ours, {}
        self.records: list[dict[str, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock = common.clocks()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wall, cpu = (b - a for a, b in zip(self.clock, common.clocks(), strict=True))
        rows = unpadded(self.inputs)
        own_wall, own_cpu = common.elapsed(lambda: self.ours.step(rows))
        flops = common.useful_flops(self.ours.model, rows)
        self.records.append(
            {"trl wall": wall, "trl cpu": cpu, "ours wall": own_wall, "ours cpu": own_cpu, "rate": flops / own_wall}
        )


def unpadded(inputs: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """TRL's batch (chosen rows, then rejected rows) as rows of ids."""
    ids, completion = inputs["input_ids"], inputs["completion_mask"].bool()
    prompt = inputs["attention_mask"].bool() & ~completion
    count = len(ids) // 2
    return [
        {
            "prompt_ids": ids[i][prompt[i]].tolist(),
            "chosen_ids": ids[i][completion[i]].tolist(),
            "rejected_ids": ids[i + count][completion[i + count]].tolist(),
            "ref_chosen_logps": inputs["ref_chosen_logps"][i].item(),
            "ref_rejected_logps": inputs["ref_rejected_logps"][i].item(),
        }
        for i in range(count)
    ]


def compare(bf16: bool, completions_only: bool, steps: int) -> list[dict[str, float]]:
    """One run of TRL's trainer, with ours after each of its steps; the first step warms up and is left out."""
    problems = common.gsm8k()
    rows = datasets.Dataset.from_list(common.make_pairs(problems, 4 * (steps + 1)))
    trl.trainer.utils._use_triton = lambda device: completions_only
    alternate = Alternate(Ours(bf16))
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=4,
            max_length=1024,
            max_steps=steps + 1,
            beta=BETA,
            learning_rate=1e-5,
            bf16=bf16,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            report_to="none",
            save_strategy="no",
            logging_steps=10_000,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=common.make_model(),
            args=config,
            train_dataset=rows,
            processing_class=common.make_tokenizer(problems),
            callbacks=[alternate],
        )
        compute_loss = trainer.compute_loss

        def seen(model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            alternate.inputs = inputs
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = seen
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return alternate.records[1:]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.set_num_threads(common.THREADS)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    print(f"DPO step of 4 pairs, {common.THREADS} threads, medians over {steps} steps")
    print(f"{'case':24} {'TRL s':>7} {'ours s':>7} {'ratio wall':>11} {'ratio CPU':>10} {'ours / matmul rate':>19}")
    for name, (bf16, completions_only) in CASES.items():
        records = compare(bf16, completions_only, steps)
        rate = common.matmul_rate(torch.bfloat16 if bf16 else torch.float32)
        wall, cpu = (statistics.median(r[f"trl {c}"] / r[f"ours {c}"] for r in records) for c in ("wall", "cpu"))
        trl_s, ours_s = (statistics.median(r[f"{who} wall"] for r in records) for who in ("trl", "ours"))
        use = statistics.median(r["rate"] for r in records) / rate
        print(f"{name:24} {trl_s:7.2f} {ours_s:7.2f} {wall:11.2f} {cpu:10.2f} {use:19.0%}", flush=True)


if __name__ == "__main__":
    main()
