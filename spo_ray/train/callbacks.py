"""What hangs on a preference method's training: learning dynamics, fixed probe pairs, sampled text, and the alarm."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from spo_ray.core.dynamics import forecast
from spo_ray.core.gradients import Gradients
from spo_ray.core.losses import Metrics
from spo_ray.core.sharded import is_sharded
from spo_ray.core.text_metrics import distinct, repetition
from spo_ray.model.collate import rows_at_once
from spo_ray.model.generate import generate
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.train.alarm import LAMBDA, RULES, Alarm
from spo_ray.train.data_loader import RowTable
from spo_ray.train.distributed import Distributed
from spo_ray.train.logp_eval import Measure, compute_type
from spo_ray.train.loop import Callback
from spo_ray.train.method_state import Method
from spo_ray.train.spec import Job

SIDES = ("chosen", "rejected")


class DynamicsCallback(Callback):
    """Theorem 1 on real steps: what the optimizer's update should change to first order, and what it did.

    Every ``every`` steps it keeps a copy of the parameters and the gradients of both mean log-probabilities, for which
    plain SGD's forecast would be ``-alpha * <g, grad F>``; the optimizer's own is ``<g, update>``.
    """

    def __init__(self, params: Sequence[Tensor], every: int | None, measure: Measure, table: RowTable) -> None:
        self.params, self.every, self.measure, self.table = params, every, measure, table
        self.gradients: dict[str, Gradients] = {}
        self.before: list[Tensor] = []

    def start(self, step: int) -> dict[str, Any]:
        """Before a step: arguments for ``spo_gradients`` where this step is watched."""
        self.gradients, self.before = {}, []
        if not self.every or (step - 1) % self.every:
            return {}
        self.before = [p.detach().clone() for p in self.params]
        return {"side_gradients": self.gradients}

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """Behind a watched step, from the batch's mean log-probabilities before and after it."""
        if not self.before:
            return {}
        after = self.measure.pair_means(self.table, indices)
        update = [p.detach() - start for p, start in zip(self.params, self.before, strict=True)]
        metrics = {}
        for side in SIDES:
            metrics[f"dynamics/forecast_{side}"] = forecast(self.gradients[side], update)
            metrics[f"dynamics/realised_{side}"] = after[f"logps/{side}"] - record[f"logps/{side}"]
        self.gradients, self.before = {}, []
        return metrics


class ProbePairsCallback(Callback):
    """Log-probabilities of some fixed pairs, of y* where it is followed, and of the held-out pairs at scores."""

    def __init__(self, job: Job, measure: Measure, table: RowTable, held_out: RowTable | None) -> None:
        self.measure, self.table, self.held_out, self.score_at = measure, table, held_out, job.score_at
        settings = job.config.preference
        self.every, self.pairs = settings.probe_every, range(min(len(table), settings.probe_pairs))
        self.tops = top_answers(measure, table.rows(self.pairs), settings.probe_top_tokens)

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """``probe/*``, and ``held_out/*``."""
        step, metrics = record["step"], {}
        if step % self.every == 0 or step == record["total_steps"] or step in self.score_at:
            means = self.measure.pair_means(self.table, self.pairs)
            metrics = {f"probe/{key}": value for key, value in means.items()}
            if self.tops:
                metrics["probe/logps/top"] = self.measure.mean_logp(self.tops)
        if step in self.score_at and self.held_out is not None:
            means = self.measure.pair_means(self.held_out, range(len(self.held_out)))
            metrics |= {f"held_out/{key}": value for key, value in means.items()}
        return metrics


HEALTH_PROMPTS, HEALTH_TOKENS = 8, 64
"""Prompts that are answered, and the longest answer in tokens: enough to see repetition, at little cost."""


class TextHealthCallback(Callback):
    """Sampled answers to the first prompts, see :func:`text_health`."""

    def __init__(self, job: Job, measure: Measure, table: RowTable) -> None:
        self.measure, self.settings, self.seed = measure, job.config.preference, job.config.seed
        self.asked = table.rows(range(min(len(table), HEALTH_PROMPTS)))

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """``health/*``."""
        every, step, m = self.settings.health_every, record["step"], self.measure
        if not every or (step % every and step != record["total_steps"]):
            return {}
        with compute_type(m.model, m.config, m.rank):
            found = text_health(m.model, m.chat, self.asked, HEALTH_TOKENS, m.rank, self.seed)
        return m.rank.gather([found])[0]  # ranks may round differently, and must agree on an alarm


class AlarmCallback(Callback):
    """Looks whether what the callbacks before it measured sets off the alarm, and does what is configured for it."""

    def __init__(self, alarm: Alarm, method: Method) -> None:
        self.alarm, self.method = alarm, method

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """``alarm/*``."""
        found, config = self.alarm.check(record), self.alarm.config
        beyond = any(RULES[name].metric in record for name in self.alarm.sounding)
        if beyond and config.on_alarm == "increase_lambda":
            raised = self.method.raise_lambda(config.lambda_factor, config.max_lambda)
            found |= {LAMBDA: raised} if raised is not None else {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """The alarm's."""
        return {"alarm": self.alarm.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Alarm.load_state_dict`."""
        self.alarm.load_state_dict(state["alarm"])


@torch.no_grad()
def top_answers(
    measure: Measure, table: Sequence[Mapping[str, Any]], max_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """A model's own greedy answers y* (prompt ids, completion ids), where they are not the chosen response.

    Theorem 2 says that mass which leaves y_w goes to the most probable output that is not y_w. A collective; all ranks
    get all answers. None with 0 tokens.
    """
    if not max_tokens:
        return []
    model, chat, rank = measure.model, measure.chat, measure.rank
    own, valid = rank.shard_with_padding(table)
    model.eval()
    size, answers = rows_at_once(measure.config.max_length + max_tokens), []
    for start in range(0, len(own), size):
        rows = own[start : start + size]
        with compute_type(model, measure.config, rank):
            found = _generate(model, chat, [row["prompt_ids"] for row in rows], max_tokens, rank)
        for row, counts, tokens in zip(rows, valid[start : start + size], found, strict=True):
            if counts and tokens != list(row["chosen_ids"]):
                answers.append((list(row["prompt_ids"]), tokens))
    return rank.gather(answers)


class _Entropy(LogitsProcessor):
    """Sees the distribution of every token that is generated."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.columns.append(torch.distributions.Categorical(logits=scores.float()).entropy())
        return scores

    def means(self, answers: Sequence[Sequence[int]]) -> list[float]:
        """Of each answer's tokens."""
        table = torch.stack(self.columns, dim=1)
        return [table[i, : len(tokens)].mean().item() for i, tokens in enumerate(answers)]


@torch.no_grad()
def text_health(
    model: nn.Module,
    chat: ChatTokenizer,
    table: Sequence[Mapping[str, Any]],
    max_tokens: int,
    rank: Distributed,
    seed: int,
) -> Metrics:
    """Signs of decay in an answer to each row's prompt, sampled at temperature 1; a collective, in which
    every rank does the same: which rank has which row must not change the answers.

    ``health/repetition`` is the mean share of 4-grams that were there before in an answer, ``health/distinct_2`` the
    share of different ones among all 2-grams, ``health/length`` in tokens, ``health/unfinished`` the share without an
    end token, ``health/entropy`` the mean entropy of a token (nats). The same seed gives the same answers, and the
    training's random numbers are left alone.
    """
    model.eval()
    entropy, devices = _Entropy(), [rank.device] if rank.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        texts = _generate(model, chat, [row["prompt_ids"] for row in table], max_tokens, rank, entropy)
    return {
        "health/repetition": fmean(map(repetition, texts)),
        "health/distinct_2": distinct(texts, 2),
        "health/length": fmean(map(len, texts)),
        "health/unfinished": fmean(text[-1] not in chat.stop_ids for text in texts),
        "health/entropy": fmean(entropy.means(texts)),
    }


def _generate(
    model: nn.Module,
    chat: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    rank: Distributed,
    entropy: _Entropy | None = None,
) -> list[list[int]]:
    """Answers of all ranks at once, each with its end token: greedy, or sampled under the eyes of ``entropy``."""
    generator: Any = model
    sharded, sampling = is_sharded(model.parameters()), {"do_sample": False}
    if entropy is not None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "logits_processor": [entropy]}
    answers = generate(
        model,
        chat,
        prompts,
        rank.device,
        max_new_tokens=max_tokens,
        eos_token_id=chat.stop_ids,
        pad_token_id=chat.pad_id,
        synced_gpus=sharded,  # every token is a collective, until the last rank has ended
        **sampling,
    )
    if sharded:
        generator.reshard()
    return answers
