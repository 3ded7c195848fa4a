"""SPO in Hugging Face's Trainer, on a data set with TRL's columns: prompt, chosen, rejected.

python examples/hf_trainer.py --model NAME_OR_FOLDER --steps 20

The model, its adapters and the tokens of a pair are those of plain_pytorch.py.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from plain_pytorch import LEARNING_RATES, PAIRS, SPO, TOY, collate, encode, load, parameter_names, reference
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainingArguments


class SpoTrainer(Trainer):
    """A Trainer whose steps are SPO's; ``args.learning_rate`` is the backbone's.

    Raises:
        ValueError: several processes, over whose gradients ``spo_gradients`` would have to sum by its ``all_reduce``.
    """

    def __init__(self, *args: Any, spo: Mapping[str, Any], adapter_learning_rate: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:
            raise ValueError("this example trains in one process")
        self.spo, self.adapter_learning_rate = spo, adapter_learning_rate
        self.backbone, self.adapters = parameter_names(self.model)
        self.pending: dict[str, list[float]] = defaultdict(list)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the batch's share to ``.grad``; clipping and the optimizer's step are the Trainer's."""
        model.train()  # gradient checkpointing wants it; spo_gradients itself turns dropout off
        with self.accelerator.autocast():  # accelerate's own is in forward, but log-probabilities skip the outermost
            names = {"backbone": self.backbone, "adapters": self.adapters}
            grads, metrics = spo_gradients(self.model, self._prepare_inputs(inputs), **names, **self.spo)
        share = 1 / self.current_gradient_accumulation_steps  # an epoch's last step may have fewer batches
        for name, parameter in self.model.named_parameters():
            grad = grads[name] * share
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        for key, value in metrics.items():
            self.pending[key].append(value)
        return torch.tensor(metrics["loss"] * share, device=self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Two groups, so that the schedule scales two learning rates."""
        if self.optimizer is None:
            named = dict(self.model.named_parameters())
            groups = [
                {"params": [named[n] for n in self.backbone], "lr": self.args.learning_rate},
                {"params": [named[n] for n in self.adapters], "lr": self.adapter_learning_rate},
            ]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the Trainer's own logs, means of SPO's metrics since the last."""
        means = {key: fmean(values) for key, values in self.pending.items()}
        self.pending.clear()
        super().log(means | logs, start_time)


def prepare(pairs: Sequence[Mapping[str, str]], tokenizer: Any, model: nn.Module) -> Dataset:
    """TRL's columns mapped to token ids, and log-probabilities under the reference, computed once."""
    data = Dataset.from_list(list(pairs)).map(encode, fn_kwargs={"tokenizer": tokenizer})
    device, references = next(model.parameters()).device, defaultdict(list)
    for row in data:
        batch = {key: value.to(device) for key, value in collate([row]).items()}
        for name, logps in reference(model, batch).items():
            references[name].append(logps.item())
    for name, values in references.items():
        data = data.add_column(name, values)
    return data


def collate_with_reference(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The batch that ``spo_gradients`` takes."""
    names = ("ref_chosen_logps", "ref_rejected_logps")
    return collate(rows) | {name: torch.tensor([row[name] for row in rows]) for name in names}


def main() -> None:
    """Train on the pairs of plain_pytorch.py."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(TOY), help="name or folder of a chat model")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    tokenizer, model = AutoTokenizer.from_pretrained(args.model), load(args.model)
    settings = TrainingArguments(
        max_steps=args.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=LEARNING_RATES["backbone"],
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",  # Trainer would save phi alone: model.merge_and_unload().save_pretrained(folder) keeps both
        remove_unused_columns=False,  # the model's forward knows none of ours
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SpoTrainer(
        model=model,
        args=settings,
        data_collator=collate_with_reference,
        train_dataset=prepare(PAIRS, tokenizer, model.to(settings.device)),
        spo=SPO,
        adapter_learning_rate=LEARNING_RATES["adapters"],
    )
    trainer.train()


if __name__ == "__main__":
    main()
