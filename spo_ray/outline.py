"""``--dry-run``: the stages of a job, what is there already, and at most how many rows each would have."""

import json
from collections.abc import Generator, Iterator
from math import ceil
from typing import NamedTuple

from spo_ray.config import Config
from spo_ray.data.read import on_hub, raw_rows
from spo_ray.data_config import EndpointConfig, EngineConfig, FileData, PreferenceData, TeacherModel, ToyData
from spo_ray.run import MANIFEST, Run


class Line(NamedTuple):
    """One stage."""

    stage: str
    rows: int | None
    """At most; None: as many as a dataset on the hub has."""
    what: str
    resources: str = "1 CPU a task"


def outline(run: Run) -> str:
    """The table for a terminal, below the resolved configuration."""
    text = json.dumps(run.config.model_dump(mode="json"), indent=2)
    every = list(_lines(run.config))
    width = max(len(line.stage) for line in every)
    lines = [f"{'stage':<{width}} {'':<6} {'rows, at most':>13}  what"]
    for line in every:
        there = "there" if (run.root / line.stage / MANIFEST).exists() else "to do"
        rows = "all" if line.rows is None else f"{line.rows:,}"
        lines.append(f"{line.stage:<{width}} {there:<6} {rows:>13}  {line.what} ({line.resources})")
    end = "Stages that are there are reused where neither their settings nor their inputs have changed."
    return "\n".join([text, "", *lines, "", end])


def _lines(config: Config) -> Iterator[Line]:
    train, test = _count(config, "train"), _count(config, "test")
    yield Line("data_test", test, "rows for evaluation", "driver")
    yield Line("data_train", train, "rows for training", "driver")
    if isinstance(config.data, PreferenceData):
        yield Line("pairs", train, f"pairs without duplicates (dedup {config.pairs.dedup})", "driver")
        chosen, pairs = train, train
    else:
        chosen = yield from _sft_set(config, train)
        pairs = _times(chosen, config.pairs.per_question)
    responses = 1 if isinstance(config.data, PreferenceData) else config.sft_data.responses_per_question
    texts = _times(chosen, responses)
    yield Line("sft_tokens", texts, f"token ids, up to {config.train.max_length} a row")
    yield Line("sft", texts, f"{_steps(texts, config.sft.batch_size, config.sft.epochs)} steps", _workers(config))
    if isinstance(config.data, PreferenceData):
        yield from _referenced(config, "held_out_tokens", "held_out_pairs", test)
    else:
        yield from _pairs(config, chosen, pairs, "sft", "")
    yield from _referenced(config, "pair_tokens", "reference", pairs)
    steps = _steps(pairs, config.preference.batch_size, config.preference.epochs)
    for name, method in config.methods.items():
        yield Line(f"method_{name}", pairs, f"{method.type}, {steps} steps", _workers(config))
    for number in range(2, config.rounds + 1):
        for name, method in config.methods.items():
            suffix = f"_{name}_round{number}"
            yield from _pairs(config, chosen, pairs, suffix[1:], suffix)
            yield from _referenced(config, f"pair_tokens{suffix}", f"reference{suffix}", pairs)
            yield Line(f"method{suffix}", pairs, f"{method.type}, {steps} steps", _workers(config))
    if not isinstance(config.data, PreferenceData):
        for name in ("base", "sft", *config.methods):
            answers = _times(test, 1 + len(config.eval.seeds))
            yield Line(
                f"eval_{name}", answers, f"answers, greedy and {len(config.eval.seeds)} seeds", _engines(config.engine)
            )

    yield Line("report", 1, "a page", "driver")


def _sft_set(config: Config, train: int | None) -> Generator[Line, None, int | None]:
    yield from _sampled("base", train, config.sampling.samples, config.sampling.max_tokens, config.engine)
    share = config.sft_data.quantile
    chosen = train  # with quantile, equals of the last are kept too: no bound but this
    rule = f"pass@{config.sft_data.pass_k} of at most {config.sft_data.max_pass}"
    yield Line("sft_questions", chosen, rule if share is None else f"the lowest {share:.0%} by pass@k")
    teachers = [teacher for teacher in config.sft_data.teachers if isinstance(teacher, TeacherModel)]
    for number, teacher in enumerate(teachers, 1):
        sampling = teacher.sampling
        yield from _sampled(
            f"teacher{number}", chosen, sampling.samples, sampling.max_tokens, teacher.engine, teacher.model
        )
        yield Line(f"teacher{number}_responses", chosen, "correct responses added")
    return chosen


def _sampled(
    name: str, questions: int | None, samples: int, tokens: int, engine: EngineConfig | EndpointConfig, model: str = ""
) -> Iterator[Line]:
    most = "" if questions is None else f", at most {questions * samples * tokens / 1e6:.1f}M tokens"
    by = f" by {model}" if model else ""
    yield Line(
        f"{name}_samples", _times(questions, samples), f"{samples} samples a question{by}{most}", _engines(engine)
    )
    yield Line(f"{name}_scores", _times(questions, samples), "graded samples")


def _pairs(config: Config, chosen: int | None, pairs: int | None, name: str, suffix: str) -> Iterator[Line]:
    yield from _sampled(name, chosen, config.sampling.samples, config.sampling.max_tokens, config.engine)
    yield Line(f"pair_candidates{suffix}", pairs, f"wrong samples by {config.pairs.select}")
    yield Line(f"pairs{suffix}", pairs, f"pairs without duplicates (dedup {config.pairs.dedup})", "driver")


def _referenced(config: Config, tokens: str, name: str, pairs: int | None) -> Iterator[Line]:
    yield Line(tokens, pairs, f"token ids, up to {config.train.max_length} a row")
    yield Line(name, pairs, "reference log-probabilities", _workers(config))


def _engines(engine: EngineConfig | EndpointConfig) -> str:
    if isinstance(engine, EndpointConfig):
        return f"{engine.concurrency} requests at a time to {engine.url}"
    gpus = "a GPU where there is one" if engine.gpus is None else f"{engine.gpus:g} GPUs"
    return f"{engine.replicas} engines x {engine.cpus:g} CPUs, {gpus}"


def _workers(config: Config) -> str:
    train = config.train
    gpus = {True: ", 1 GPU", False: "", None: ", a GPU where there is one"}[train.use_gpu]
    return f"{train.num_workers} workers x {train.cpus_per_worker:g} CPUs{gpus}"


def _times(count: int | None, factor: int) -> int | None:
    return None if count is None else count * factor


def _steps(rows: int | None, batch: int, epochs: int) -> str:
    return f"{epochs} epochs of {batch} a step:" if rows is None else f"at most {ceil(rows / batch) * epochs:,}"


def _count(config: Config, split: str) -> int | None:
    data = config.data
    if isinstance(data, ToyData):
        return data.train_questions if split == "train" else data.test_questions
    assert isinstance(data, FileData)
    kind = "pairs" if isinstance(data, PreferenceData) else "questions"
    limit: int | None = getattr(data, f"{split}_{kind}")
    if on_hub(data.path):
        return limit
    if isinstance(data, PreferenceData) and data.held_out == "from_train":
        there = sum(1 for _ in raw_rows(data, data.train_split)) - (data.test_pairs if split == "train" else 0)
    else:
        there = sum(1 for _ in raw_rows(data, data.train_split if split == "train" else data.test_split))
    return there if limit is None else min(limit, there)
