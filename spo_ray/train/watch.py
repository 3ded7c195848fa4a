"""What is watched while a preference method trains: fixed probe pairs, and the learning dynamics of single steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spo_ray.core.dynamics import forecast
from spo_ray.core.gradients import Gradients
from spo_ray.core.losses import Metrics
from spo_ray.core.sharded import is_sharded
from spo_ray.model.collate import rows_at_once
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
    model: nn.Module,
    chat: ChatTokenizer,
    table: Sequence[Mapping[str, Any]],
    max_tokens: int,
    max_length: int,
    rank: Rank,
) -> list[tuple[list[int], list[int]]]:
    """A model's own greedy answers y* (prompt ids, completion ids), where they are not the chosen response.

    Theorem 2 says that mass which leaves y_w goes to the most probable output that is not y_w. A collective; all ranks
    get all answers. None with 0 tokens.
    """
    own, valid = rank.share(table)
    if not max_tokens:
        return []
    model.eval()
    size, answers = rows_at_once(max_length + max_tokens), []
    for start in range(0, len(own), size):
        rows = own[start : start + size]
        found = _greedy(model, chat, [row["prompt_ids"] for row in rows], max_tokens, rank)
        for row, counts, tokens in zip(rows, valid[start : start + size], found, strict=True):
            if counts and tokens != list(row["chosen_ids"]):
                answers.append((list(row["prompt_ids"]), tokens))
    return rank.gather(answers)


def _greedy(
    model: nn.Module, chat: ChatTokenizer, prompts: Sequence[Sequence[int]], max_tokens: int, rank: Rank
) -> list[list[int]]:
    """Greedy answers of all ranks at once, each with its end token."""
    generator: Any = model
    width, sharded = max(map(len, prompts)), is_sharded(model.parameters())
    ids = torch.full((len(prompts), width), chat.pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
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
    for tokens in output[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(tokens) if token in chat.stop_ids), len(tokens))
        answers.append(tokens[:end])
    return answers
