"""What is watched while a preference method trains: fixed probe pairs, and the learning dynamics of single steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spo_ray.core.dynamics import forecast
from spo_ray.core.gradients import Gradients
from spo_ray.core.losses import Metrics
from spo_ray.core.sharded import is_sharded
from spo_ray.model.tokenise import ChatTokenizer
from spo_ray.train.rank import Rank

SIDES = ("chosen", "rejected")


class StepWatch:
    """Theorem 1 on real steps: what the optimizer's update should change to first order, and what it did.

    Every ``every`` steps it keeps a copy of the parameters and the gradients of both mean log-probabilities, for which
    plain SGD's forecast would be ``-alpha * <g, grad F>``; the optimizer's own is ``<g, update>``.
    """

    def __init__(self, params: Sequence[Tensor], every: int | None) -> None:
        self.params, self.every = params, every
        self.gradients: dict[str, Gradients] = {}
        self.before: list[Tensor] = []

    def start(self, step: int) -> dict[str, Any]:
        """Before a step: arguments for ``spo_gradients`` where this step is watched."""
        self.gradients, self.before = {}, []
        if not self.every or (step - 1) % self.every:
            return {}
        self.before = [p.detach().clone() for p in self.params]
        return {"side_gradients": self.gradients}

    def finish(self, before: Mapping[str, float], after: Mapping[str, float]) -> Metrics:
        """After a watched step, from the batch's mean log-probabilities before and after it."""
        update = [p.detach() - start for p, start in zip(self.params, self.before, strict=True)]
        metrics = {}
        for side in SIDES:
            metrics[f"dynamics/forecast_{side}"] = forecast(self.gradients[side], update)
            metrics[f"dynamics/realised_{side}"] = after[f"logps/{side}"] - before[f"logps/{side}"]
        self.gradients, self.before = {}, []
        return metrics


@torch.no_grad()
def top_answers(
    model: nn.Module, chat: ChatTokenizer, table: Sequence[Mapping[str, Any]], max_tokens: int, rank: Rank
) -> list[tuple[list[int], list[int]]]:
    """A model's own greedy answers y* (prompt ids, completion ids), where they are not the chosen response.

    Theorem 2 says that mass which leaves y_w goes to the most probable output that is not y_w. A collective; all ranks
    get all answers. None with 0 tokens.
    """
    generator: Any = model
    generator.eval()
    own, valid = rank.share(table)
    if not own or not max_tokens:
        return []
    width, sharded = max(len(row["prompt_ids"]) for row in own), is_sharded(model.parameters())
    ids = torch.full((len(own), width), chat.pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(own):
        ids[i, width - len(row["prompt_ids"]) :] = torch.tensor(row["prompt_ids"])
        mask[i, width - len(row["prompt_ids"]) :] = 1
    output = generator.generate(
        input_ids=ids.to(rank.device),
        attention_mask=mask.to(rank.device),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=chat.stop_ids,
        pad_token_id=chat.pad_id,
        synced_gpus=sharded,  # every token is a collective, until the last rank has ended
    )
    if sharded:
        generator.reshard()
    answers = []
    for row, counts, tokens in zip(own, valid, output[:, width:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(tokens) if token in chat.stop_ids), len(tokens))
        if counts and tokens[:end] != list(row["chosen_ids"]):
            answers.append((list(row["prompt_ids"]), tokens[:end]))
    return rank.gather(answers)
