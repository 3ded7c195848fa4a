"""Answers that the model in training generates: its greedy answers y*, and signs of decay in sampled answers."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from spo_ray.core.losses import Metrics
from spo_ray.core.sharded import is_sharded
from spo_ray.core.text_metrics import distinct, repetition
from spo_ray.model.collate import TokenRow, rows_at_once
from spo_ray.model.generate import generate
from spo_ray.train.logp_eval import Measure


class EntropyRecorder(LogitsProcessor):
    """Logits processor that records the entropy (nats) of each generated token and changes no logits."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.columns.append(torch.distributions.Categorical(logits=scores.float()).entropy())
        return scores

    def means(self, answers: Sequence[Sequence[int]]) -> list[float]:
        """Return the mean entropy over each answer's tokens."""
        table = torch.stack(self.columns, dim=1)
        return [table[i, : len(tokens)].mean().item() for i, tokens in enumerate(answers)]


def other_greedy_answers(measure: Measure, rows: Sequence[Mapping[str, Any]], max_tokens: int) -> list[TokenRow]:
    """Return the model's greedy answers y* (prompt ids, completion ids) that differ from the chosen response.

    Theorem 2 says that the probability which leaves y_w goes to the most probable output that is not y_w. Empty if
    ``max_tokens`` is 0. Collective: call on all ranks; all ranks get all answers.
    """
    if not max_tokens:
        return []
    own, valid = measure.rank.shard_with_padding(rows)
    size, answers = rows_at_once(measure.config.max_length + max_tokens), []
    for start in range(0, len(own), size):
        part = own[start : start + size]
        found = generate_answers(measure, [row["prompt_ids"] for row in part], max_tokens)
        for row, counts, tokens in zip(part, valid[start : start + size], found, strict=True):
            if counts and tokens != list(row["chosen_ids"]):
                answers.append((list(row["prompt_ids"]), tokens))
    return measure.rank.gather(answers)


def text_health(measure: Measure, rows: Sequence[Mapping[str, Any]], max_tokens: int, seed: int) -> Metrics:
    """Return signs of decay in one answer to each row's prompt, sampled at temperature 1.

    ``health/repetition`` is the mean share of 4-grams that occurred before in the same answer, ``health/distinct_2``
    the share of distinct 2-grams among all, ``health/length`` the mean length in tokens, ``health/unfinished`` the
    share of answers without an end token, ``health/entropy`` the mean entropy of a token in nats. The same seed gives
    the same answers; the random state of training does not change.

    Collective: call on all ranks. All ranks sample all answers, so that the number of ranks does not change them.
    """
    rank, entropy = measure.rank, EntropyRecorder()
    with torch.random.fork_rng([rank.device] if rank.device.type == "cuda" else []):
        torch.manual_seed(seed)
        texts = generate_answers(measure, [row["prompt_ids"] for row in rows], max_tokens, entropy)
    metrics = {
        "health/repetition": fmean(map(repetition, texts)),
        "health/distinct_2": distinct(texts, 2),
        "health/length": fmean(map(len, texts)),
        "health/unfinished": fmean(text[-1] not in measure.chat.stop_ids for text in texts),
        "health/entropy": fmean(entropy.means(texts)),
    }
    return rank.gather([metrics])[0]  # ranks may round differently, and must agree on an alarm


@torch.no_grad()
def generate_answers(
    measure: Measure, prompts: Sequence[Sequence[int]], max_tokens: int, entropy: EntropyRecorder | None = None
) -> list[list[int]]:
    """Return an answer to each prompt, with its end token if it has one; greedy, or sampled if ``entropy`` is given.

    Collective for a sharded model: call on all ranks.
    """
    model: Any = measure.model
    sharded, sampling = is_sharded(model.parameters()), {"do_sample": False}
    if entropy is not None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "logits_processor": [entropy]}
    model.eval()
    with measure.autocast():
        answers = generate(
            model,
            measure.chat,
            prompts,
            measure.rank.device,
            max_new_tokens=max_tokens,
            eos_token_id=measure.chat.stop_ids,
            pad_token_id=measure.chat.pad_id,
            synced_gpus=sharded,  # each token is a collective until the last rank has finished
            **sampling,
        )
    if sharded:
        model.reshard()
    return answers
