"""Where the study's trainings start: a model after SFT, its preference pairs, and questions that are held out."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spo_ray.config.load import load
from spo_ray.config.schema import Config
from spo_ray.core.logps import completion_logps
from spo_ray.data.toy import Problem, problems, render
from spo_ray.data.verifiers import load_verifier
from spo_ray.model.collate import TokenRow, collate
from spo_ray.model.displacement import ches_scores
from spo_ray.model.generate import generate
from spo_ray.model.load import build_policy, load_model
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.runtime.schema import SIDES

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
TRAIN, VALIDATION, HELD_OUT, TEST = 500, 200, 150, 320
"""Questions to train on, to choose settings by, for held-out pairs, and for the final measurement."""
SAMPLES, TEMPERATURE, MAX_TOKENS = 8, 0.7, 64
ROWS = 512
"""Sequences that are generated or scored at once."""
Pair = dict[str, Any]
"""``prompt_ids``, ``chosen_ids``, ``rejected_ids``, the reference's logps under the pipeline's names, a sample of the
reference's (``own_ids``), and the CHES score."""


@cache
def settings() -> Config:
    """Return the quickstart's configuration, whose optimizers, schedules and adapters the study takes."""
    return load(str(CONFIG), [])


@dataclass(frozen=True)
class Start:
    """What a world is made from."""

    seed: int = 0
    """Seed of questions, samples, order and adapters; the test questions are always the same."""
    regime: str = "gold"
    """Name of a regime in :data:`REGIMES`."""
    sft_epochs: int = 3
    """Epochs of SFT; 0: none, the base model is the reference."""
    model: str = "assets/toy_base"
    """Folder of the base model, from the repository's root."""


@dataclass
class World:
    """The reference model with everything that trainings and measurements need."""

    start: Start
    reference: nn.Module
    chat: ChatTokenizer
    pairs: list[Pair]
    held_out: list[Pair]
    validation: list[Problem]
    test: list[Problem]
    own: list[TokenRow] = field(default_factory=list)
    """The reference's samples at temperature 1 for the test questions."""

    def policy(self, seed: int) -> nn.Module:
        """Return the reference with new adapters, everything trainable."""
        model = build_policy(ROOT / self.start.model, settings().model, seed, with_phi=True)
        weights = self.reference.state_dict()
        base: Any = model
        for name, parameter in base.get_base_model().named_parameters():
            if ".lora_" not in name:
                parameter.data.copy_(weights[name.replace(".base_layer", "")])
        return model


def make(start: Start) -> World:
    """Sample, run SFT, sample again and build the pairs; deterministic for one number of threads."""
    chat = ChatTokenizer.load(ROOT / start.model)
    stream = problems("train", start.seed)
    train, validation, held_out = (list(islice(stream, n)) for n in (TRAIN, VALIDATION, HELD_OUT))
    torch.manual_seed(start.seed)
    reference = load_model(ROOT / start.model)
    if start.sft_epochs:
        sft(reference, chat, sft_rows(reference, chat, train, start.seed), start)
    build, rng = REGIMES[start.regime], random.Random(f"pairs-{start.seed}")
    found = []
    for questions in (train, held_out):
        answers = sample(reference, chat, questions, SAMPLES, TEMPERATURE)
        texts = [t for q, a in zip(questions, answers, strict=True) if (t := build(q, a, rng))]
        found.append([_tokenised(chat, *text) for text in texts])
    pairs = select(start, reference, chat, found[0], rng)
    for group in (pairs, found[1]):
        for side in SIDES:
            logps = score(reference, chat, [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in group])
            for pair, value in zip(group, logps, strict=True):
                pair[f"ref_{side}_logps"] = value
    world = World(start, reference, chat, pairs, found[1], validation, list(islice(problems("test", 0), TEST)))
    world.own = own_rows(reference, chat, [chat.prompt_ids(q.question) for q in world.test])
    answers = own_rows(reference, chat, [pair["prompt_ids"] for pair in pairs])
    scores = ches_scores(reference, pairs, chat.pad_id, ROWS)
    for pair, (_, ids), found_score in zip(pairs, answers, scores, strict=True):
        pair |= {"own_ids": ids, "ches": found_score.ches}
    return world


def sft_rows(model: nn.Module, chat: ChatTokenizer, train: Sequence[Problem], seed: int) -> list[TokenRow]:
    """Return up to two right answers, its own first, to questions that the model solves at most half of the time."""
    rows = []
    for question, answers in zip(train, sample(model, chat, train, SAMPLES, TEMPERATURE), strict=True):
        right = [text for text in answers if is_right(text, question)]
        if len(right) <= SAMPLES / 2:
            texts = list(dict.fromkeys([*right, question.solution]))[:2]
            rows += [(chat.prompt_ids(question.question), chat.completion_ids(text)) for text in texts]
    random.Random(f"sft-{seed}").shuffle(rows)
    return rows


def sft(model: nn.Module, chat: ChatTokenizer, rows: Sequence[TokenRow], start: Start) -> None:
    """Train all weights on the rows, with the quickstart's batch size and rate, and a linear decay without warm-up."""
    config = settings().sft
    assert config
    size = config.batch_size
    steps = start.sft_epochs * (len(rows) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        first = step % (len(rows) // size) * size
        logps, tokens = completion_logps(model, **collate(rows[first : first + size], chat.pad_id))
        optimizer.zero_grad()
        (-logps.sum() / tokens.sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def is_right(text: str, question: Problem) -> bool:
    """Return True if an answer ends in the question's number."""
    return load_verifier("gsm8k").grade(text, question.solution.rpartition("#### ")[2]).correct


def sample(
    model: nn.Module, chat: ChatTokenizer, questions: Sequence[Problem], count: int, temperature: float
) -> list[list[str]]:
    """Return ``count`` answers to each question; temperature 0 is greedy."""
    prompts = [chat.prompt_ids(question.question) for question in questions for _ in range(count)]
    texts = [chat.decode(ids) for ids in sampled_ids(model, chat, prompts, temperature)]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def sampled_ids(
    model: nn.Module, chat: ChatTokenizer, prompts: Sequence[list[int]], temperature: float
) -> list[list[int]]:
    """Return the token ids of one answer to each prompt."""
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    options = how | {"max_new_tokens": MAX_TOKENS, "eos_token_id": chat.stop_ids, "pad_token_id": chat.pad_id}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), ROWS):
        indices = order[start : start + ROWS]
        found |= zip(indices, generate(model, chat, [prompts[i] for i in indices], "cpu", **options), strict=True)
    return [found[i] for i in range(len(prompts))]


def own_rows(model: nn.Module, chat: ChatTokenizer, prompts: Sequence[list[int]]) -> list[TokenRow]:
    """Return each prompt with an answer of the model's at temperature 1."""
    return list(zip(prompts, sampled_ids(model, chat, prompts, 1.0), strict=True))


@torch.inference_mode()
def score(model: nn.Module, chat: ChatTokenizer, rows: Sequence[TokenRow]) -> list[float]:
    """Return the log-probability of each row's completion, summed over its tokens, in nats."""
    found: list[float] = []
    for start in range(0, len(rows), ROWS):
        found += completion_logps(model, **collate(rows[start : start + ROWS], chat.pad_id))[0].tolist()
    return found


Build = Callable[[Problem, list[str], random.Random], tuple[str, str, str] | None]
"""Makes (question, chosen, rejected) from a problem and the reference's answers, or None."""


def gold(question: Problem, answers: list[str], rng: random.Random) -> tuple[str, str, str] | None:
    """The reference solution against a wrong answer of the model's own: the paper's pairs."""
    wrong = [text for text in answers if text.strip() and not is_right(text, question)]
    return (question.question, question.solution, rng.choice(wrong)) if wrong else None


def own(question: Problem, answers: list[str], rng: random.Random) -> tuple[str, str, str] | None:
    """A right answer of the model's own against a wrong one of its own."""
    right = [text for text in answers if is_right(text, question)]
    pair = gold(question, answers, rng)
    return (pair[0], rng.choice(right), pair[2]) if pair and right else None


def weaker(question: Problem, answers: list[str], rng: random.Random) -> tuple[str, str, str] | None:
    """The right steps with a slip of arithmetic against wrong steps: the better one is wrong too."""
    slip = (rng.randrange(len(question.steps)), rng.choice((-2, -1, 1, 2)))
    return question.question, render(question.steps, slip), render(rng.choice(question.mistakes))


def brief(question: Problem, answers: list[str], rng: random.Random) -> tuple[str, str, str] | None:
    """A preference for a form: the model's own answer without "First" and "Then" against the answer itself."""
    text = rng.choice(answers)
    short = text.replace("First, ", "").replace("Then, ", "")
    return (question.question, short, text) if short != text else None


REGIMES: dict[str, Build] = {"gold": gold, "own": own, "weaker": weaker, "brief": brief}
REGIMES |= {f"flipped {share}%": gold for share in (10, 20, 30)} | {"similar": gold, "dissimilar": gold}


def select(
    start: Start, reference: nn.Module, chat: ChatTokenizer, pairs: list[Pair], rng: random.Random
) -> list[Pair]:
    """Return the pairs of a regime: with labels flipped, or the half with the higher or the lower CHES scores."""
    kind, _, share = start.regime.partition(" ")
    if kind == "flipped":
        for pair in rng.sample(pairs, round(len(pairs) * int(share.removesuffix("%")) / 100)):
            pair["chosen_ids"], pair["rejected_ids"] = pair["rejected_ids"], pair["chosen_ids"]
            pair["flipped"] = True
    if kind in ("similar", "dissimilar"):
        scores = [found.ches for found in ches_scores(reference, pairs, chat.pad_id, ROWS)]
        order = sorted(range(len(pairs)), key=scores.__getitem__)
        half = order[len(order) // 2 :] if kind == "similar" else order[: len(order) // 2]
        return [pairs[i] for i in sorted(half)]
    return pairs


def batches(pairs: Sequence[Pair], size: int, epochs: int, seed: int) -> Iterator[list[Pair]]:
    """Yield shuffled batches of one size; an epoch's rest is left out."""
    rng = random.Random(f"order-{seed}")
    for _ in range(epochs):
        order = rng.sample(range(len(pairs)), len(pairs))
        yield from ([pairs[i] for i in order[k : k + size]] for k in range(0, len(pairs) - size + 1, size))


def _tokenised(chat: ChatTokenizer, prompt: str, chosen: str, rejected: str) -> Pair:
    ids = {f"{side}_ids": chat.completion_ids(text) for side, text in zip(SIDES, (chosen, rejected), strict=True)}
    return {"prompt_ids": chat.prompt_ids(prompt), **ids}
