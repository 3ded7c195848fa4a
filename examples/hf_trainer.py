"""SPO in Hugging Face's Trainer, on a dataset with TRL's columns: prompt, chosen, rejected.

python examples/hf_trainer.py --model NAME_OR_FOLDER --steps 20

The pairs, their tokenisation and the model with its adapters come from plain_pytorch.py.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from plain_pytorch import ADAPTER_RATE, BACKBONE_RATE, PAIRS, SPO, arguments, collate, encode, load, names, reference
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

from spo_ray.core import spo_gradients


class SpoTrainer(Trainer):
    """A Trainer whose steps are SPO's, in one process; ``args.learning_rate`` is the backbone's."""

    def __init__(self, *args: Any, spo: Mapping[str, Any], adapter_rate: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:  # gradients would have to be summed, by the all_reduce of spo_gradients
            raise ValueError("this example trains in one process")
        self.spo, self.adapter_rate = spo, adapter_rate
        self.backbone, self.adapters = names(self.model)
        self.pending: dict[str, list[float]] = defaultdict(list)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Add the batch's share to ``.grad``; clipping and the optimizer's step are the Trainer's."""
        model.train()  # for gradient checkpointing; spo_gradients itself turns dropout off
        with self.accelerator.autocast():  # accelerate puts it into the model's forward, which SPO does not call
            batch, theta_and_phi = self._prepare_inputs(inputs), {"backbone": self.backbone, "adapters": self.adapters}
            grads, metrics = spo_gradients(self.model, batch, **theta_and_phi, **self.spo)
        share = 1 / self.current_gradient_accumulation_steps  # the last step of an epoch may have fewer batches
        for name, p in self.model.named_parameters():
            p.grad = grads[name] * share if p.grad is None else p.grad.add_(grads[name], alpha=share)
        for key, value in metrics.items():
            self.pending[key].append(value)
        return torch.tensor(metrics["loss"] * share, device=self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Two groups, so that the schedule scales two learning rates."""
        if self.optimizer is None:
            named = dict(self.model.named_parameters())
            theta = {"params": [named[n] for n in self.backbone], "lr": self.args.learning_rate}
            phi = {"params": [named[n] for n in self.adapters], "lr": self.adapter_rate}
            self.optimizer = torch.optim.AdamW([theta, phi], weight_decay=self.args.weight_decay)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the Trainer's own logs, the means of SPO's metrics since the last."""
        means = {key: fmean(values) for key, values in self.pending.items()}
        self.pending.clear()
        super().log(means | logs, start_time)


def prepare(pairs: Sequence[Mapping[str, str]], tokenizer: Any, model: nn.Module) -> Dataset:
    """TRL's columns mapped to token ids, with log-probabilities under the reference, computed once."""
    data = Dataset.from_list(list(pairs)).map(encode, fn_kwargs={"tokenizer": tokenizer})
    references = [reference(model, collate([row])) for row in data]
    for name in references[0]:
        data = data.add_column(name, [logps[name].item() for logps in references])
    return data


def collate_with_reference(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The batch that ``spo_gradients`` takes."""
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    return collate(rows) | {name: torch.tensor([row[name] for row in rows]) for name in columns}


def main() -> None:
    """Train on the pairs of plain_pytorch.py."""
    options = arguments(__doc__)
    torch.manual_seed(0)  # the adapters' start is random
    tokenizer, model = AutoTokenizer.from_pretrained(options.model), load(options.model)
    args = TrainingArguments(
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=BACKBONE_RATE,
        logging_steps=1,
        report_to="none",
        save_strategy="no",  # Trainer would save phi alone: model.merge_and_unload().save_pretrained(folder) keeps both
        remove_unused_columns=False,  # the columns are none of the model's forward
        use_cpu=not torch.cuda.is_available(),
    )
    data = prepare(PAIRS, tokenizer, model)
    kinds = {"train_dataset": data, "data_collator": collate_with_reference}
    SpoTrainer(model, args, spo=SPO, adapter_rate=ADAPTER_RATE, **kinds).train()


if __name__ == "__main__":
    main()
