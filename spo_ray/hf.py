"""SPO in a training script of one's own: a Trainer of Hugging Face's that is used like TRL's DPOTrainer.

It needs ``pip install 'spo-ray[hf]'``, no Ray, and trains in one process; ``spo-ray run`` trains in many.
"""

import logging
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import PairLogps, bind
from spo_ray.core.spo import spo_gradients
from spo_ray.data.preference_formats import preference
from spo_ray.errors import RowRejectedError, UserError
from spo_ray.model.collate import collate_pairs
from spo_ray.model.tokenizer import ChatTokenizer, tokenise_row
from spo_ray.runtime.schema import SIDES

SPO_FIELDS = ("base", "beta", "margin", "lambda_sft", "gamma", "inner_steps", "eta", "sft_reduction")
"""Fields of :class:`SPOConfig` that are arguments of ``spo_gradients``."""


@dataclass
class SPOConfig(TrainingArguments):
    """Arguments of Hugging Face's Trainer, and of :func:`spo_ray.core.spo_gradients`."""

    learning_rate: float = 1e-5
    """Peak learning rate of the backbone theta."""
    adapter_learning_rate: float | None = None
    """Peak learning rate of the adapters phi; None: the backbone's."""
    logging_steps: float = 10
    """Steps between logs, as in TRL."""
    max_length: int = 1024
    """Longest prompt plus completion, in tokens; longer pairs are left out, never cut."""
    base: str = "dpo"
    """Base loss, a name in ``spo_ray.core.losses.LOSSES``."""
    beta: float = 0.5
    """Factor of the base loss's log-ratios."""
    margin: float = 0.0
    """Margin of the base losses that have one."""
    lambda_sft: float = 1.0
    """Weight of the SFT loss on the chosen completions; 0 drops it."""
    gamma: float = 0.0
    """Weight of the hinge R on gradient norms; 0 drops it."""
    inner_steps: int = 1
    """Steps K of the lower level; 0 drops term (b)."""
    eta: float = 2e-5
    """Size of a step of the lower level."""
    sft_reduction: str = "sum"
    """SFT loss ``sum``med over a completion's tokens, or their ``token_mean``."""
    remove_unused_columns: bool = False
    """Must stay False: the columns are none of the model's forward."""


class SPOTrainer(Trainer):
    """Trainer whose steps are SPO's. ``save_model`` and ``push_to_hub`` write the model with its adapters merged.

    Args:
        model: a causal language model, its name or folder, or one that PEFT has given LoRA adapters. Its state before
            the first step is the reference model. All its weights are trained.
        args: an :class:`SPOConfig`; None: the defaults.
        train_dataset, eval_dataset: preference rows in any format that the pipeline reads (docs/data.md), TRL's among
            them. Rows that can't be used are left out, with their reasons in the log.
        processing_class: the tokenizer, with a chat template; None: the model's.
        peft_config: LoRA configuration of the adapters phi; None: rank 8 on all linear layers.
        kwargs: further arguments of Trainer.

    Raises:
        ValueError: ``args`` of another kind, several processes, fp16, or adapters of another kind than LoRA.
        UserError: the chat template can't be used, or no row can.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: SPOConfig | None = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = SPOConfig() if args is None else args
        if not isinstance(args, SPOConfig):
            raise ValueError(f"args must be an SPOConfig, not a {type(args).__name__}: docs/trl.md maps its fields")
        if args.world_size > 1 or args.fp16:
            raise ValueError("SPOTrainer trains in one process, in bf16 or float32: for many GPUs use spo-ray run")
        whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32") if isinstance(model, str) else model
        tokenizer: Any = processing_class or AutoTokenizer.from_pretrained(whole.name_or_path)
        self.chat = ChatTokenizer(tokenizer, rows=whole.config.get_text_config().vocab_size)
        if isinstance(whole, PeftModel):
            whole = whole.get_base_model()
        elif not any(isinstance(module, LoraLayer) for module in whole.modules()):
            whole = inject_adapter_in_model(peft_config or LoraConfig(r=8, target_modules="all-linear"), whole)
        every = [name for name, _ in whole.requires_grad_(True).named_parameters()]  # PEFT has frozen the backbone
        self.adapters = [name for name in every if ".lora_" in name]
        self.backbone = [name for name in every if ".lora_" not in name]
        if not self.adapters:
            raise ValueError("SPO needs LoRA adapters: leave peft_config out, or give a LoraConfig")
        kwargs.setdefault("data_collator", partial(collate_pairs, pad_id=self.chat.pad_id))
        kwargs |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": tokenizer}
        super().__init__(whole, args, **kwargs)
        self.policy: Any = self.model
        self.max_length, self.adapter_rate = args.max_length, args.adapter_learning_rate
        self.spo = {name: getattr(args, name) for name in SPO_FIELDS}
        self.pending: dict[str, dict[str, list[float]]] = {"": defaultdict(list), "eval_": defaultdict(list)}
        self.train_dataset: Any = train_dataset and self.prepared(train_dataset)
        self.eval_dataset: Any = eval_dataset and self.prepared(eval_dataset)

    def prepared(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the token ids of pairs, with log-probabilities under the model as it is now, the reference."""
        found, dropped = [], Counter()
        for number, row in enumerate(rows):
            try:
                pair = preference(row)._asdict() | {"id": str(number)}
                ids = tokenise_row(self.chat, pair, SIDES, self.max_length)
                found.append({key: array("l", ids[key]) for key in ("prompt_ids", *SIDES.values())})
                found[-1]["score_gap"] = ids["score_gap"]
            except RowRejectedError as error:
                dropped[str(error)] += 1
        for reason, count in dropped.items():
            logging.getLogger(__name__).warning("%d of the pairs left out: %s", count, reason)
        if not found:
            raise UserError(f"no pair can be used: {', '.join(dropped) or 'there is none'}")
        size = self.args.eval_batch_size
        for part in (found[start : start + size] for start in range(0, len(found), size)):
            sides = self._logps(collate_pairs(part, self.chat.pad_id))
            for side, (logps, _) in zip(SIDES, sides, strict=True):
                for row, value in zip(part, logps.tolist(), strict=True):
                    row[f"ref_{side}_logps"] = value
        return found

    @torch.no_grad()
    def _logps(self, batch: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return log-probabilities and lengths [B] of the chosen and of the rejected completions."""
        inputs, keys = self._prepare_inputs(dict(batch)), ("input_ids", "labels", "attention_mask")
        self.policy.eval()
        with self.accelerator.autocast():
            return [completion_logps(self.policy, *(inputs[f"{side}_{key}"] for key in keys)) for side in SIDES]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Add the batch's share to ``.grad``; clipping and the optimizer's step are the Trainer's."""
        self.policy.train()  # for gradient checkpointing; spo_gradients itself turns dropout off
        names: Any = {"backbone": self.backbone, "adapters": self.adapters}
        with self.accelerator.autocast():  # accelerate puts it into the model's forward, which SPO does not call
            grads, metrics = spo_gradients(self.policy, self._prepare_inputs(inputs), **names, **self.spo)
        share = 1 / self.current_gradient_accumulation_steps  # the last step of an epoch may have fewer batches
        for name, p in self.policy.named_parameters():
            p.grad = grads[name] * share if p.grad is None else p.grad.add_(grads[name], alpha=share)
        self._remember("", metrics)
        return torch.tensor(metrics["loss"] * share, device=self.args.device)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
        """Return the base loss of a batch of held-out pairs; log its metrics with ``eval_`` before their names."""
        (chosen, n_w), (rejected, n_l) = self._logps(inputs)
        ref_w, ref_l = (inputs[f"ref_{side}_logps"].to(chosen) for side in SIDES)
        gaps, mean = inputs.get("score_gaps"), n_w.double().mean().item()
        pairs = PairLogps(chosen, rejected, ref_w, ref_l, n_w, n_l, mean, score_gaps=gaps)
        loss, metrics = bind(self.spo["base"], beta=self.spo["beta"], margin=self.spo["margin"])(pairs)
        for side, logps, change in zip(SIDES, (chosen, rejected), pairs.ratios, strict=True):
            metrics |= {f"logps/{side}": logps.mean().item(), f"logps/{side}_change": change.mean().item()}
        self._remember("eval_", metrics)
        return loss, None, None

    def _remember(self, prefix: str, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.pending[prefix][f"{prefix}{key}"].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the Trainer's own values the means of the metrics since the last call."""
        pending = self.pending["eval_" if "eval_loss" in logs else ""]
        means = {key: fmean(values) for key, values in pending.items()}
        pending.clear()
        super().log(means | logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the Trainer's optimizer, with groups of their own for the adapters, whose learning rate may differ."""
        optimizer, own = super().create_optimizer(model), dict(self.policy.named_parameters())
        phi, groups = {id(own[name]) for name in self.adapters}, []
        for group in optimizer.param_groups:
            for inside in (False, True):
                rate = {"lr": self.adapter_rate or group["lr"]} if inside else {}
                params = [p for p in group["params"] if (id(p) in phi) == inside]
                groups += [group | rate | {"params": params}] if params else []
        optimizer.param_groups = groups
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with its adapters merged; a checkpoint to resume from keeps both apart."""
        if _internal_call and output_dir:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir, state_dict=merged(self.policy))


@torch.no_grad()
def merged(model: Any) -> dict[str, Tensor]:
    """Return the weights of a model with LoRA layers as those of the plain model, without changing it."""
    state = {n.replace(".base_layer", ""): value for n, value in model.state_dict().items() if ".lora_" not in n}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in layer.active_adapters:
                state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(adapter)
    return state
