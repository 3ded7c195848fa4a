"""The stages of a job from its configuration alone: at most how many rows and tokens each would have."""

from collections.abc import Generator, Iterator
from math import ceil
from typing import NamedTuple

from spo_ray.config.data import EndpointConfig, EngineConfig, FileData, PreferenceData, TeacherModel, ToyData
from spo_ray.config.evaluate import LM_EVAL, AlpacaConfig
from spo_ray.config.schema import Config
from spo_ray.data.read import raw_rows
from spo_ray.runtime.artifact import on_hub


class Line(NamedTuple):
    """One stage."""

    stage: str
    rows: int | None
    """At most; None: as many as a dataset on the hub has."""
    what: str
    resources: str = "1 CPU a task"
    tokens: int | None = None
    """That a model makes or reads, at most; None: there is no model, or the rows are not known."""
    trains: str | None = None
    """``sft``, or the method that is trained."""


def outline(config: Config) -> Iterator[Line]:
    """All stages, in their order."""
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
    texts, length = _times(chosen, responses), config.train.max_length
    yield Line("sft_tokens", texts, f"token ids, up to {config.train.max_length} a row")
    steps, seen = _steps(texts, config.sft.batch_size, config.sft.epochs), _times(texts, length * config.sft.epochs)
    yield Line("sft", texts, f"{steps} steps", _workers(config), seen, "sft")
    if isinstance(config.data, PreferenceData):
        yield from _referenced(config, "held_out_tokens", "held_out_pairs", test)
    else:
        yield from _pairs(config, chosen, pairs, "sft", "")
    yield from _referenced(config, "pair_tokens", "reference", pairs)
    steps = _steps(pairs, config.preference.batch_size, config.preference.epochs)
    seen = _times(pairs, 2 * length * config.preference.epochs)
    for name, method in config.methods.items():
        yield Line(f"method_{name}", pairs, f"{method.type}, {steps} steps", _workers(config), seen, name)
    for number in range(2, config.rounds + 1):
        for name, method in config.methods.items():
            suffix = f"_{name}_round{number}"
            yield from _pairs(config, chosen, pairs, suffix[1:], suffix)
            yield from _referenced(config, f"pair_tokens{suffix}", f"reference{suffix}", pairs)
            yield Line(f"method{suffix}", pairs, f"{method.type}, {steps} steps", _workers(config), seen, name)
    yield from _evaluations(config, test)
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


def _evaluations(config: Config, test: int | None) -> Iterator[Line]:
    checkpoints, engines, tokens = ("base", "sft", *config.methods), _engines(config.engine), config.eval.max_tokens
    prompts = config.eval.health_prompts if test is None else min(test, config.eval.health_prompts)
    for suite in config.eval.chosen(config.data):
        for name in checkpoints:
            compared = name not in ("base", "sft")
            if suite == "accuracy":
                answers = _times(test, 1 + len(config.eval.seeds))
                what = f"answers, greedy and {len(config.eval.seeds)} seeds"
                yield Line(f"eval_{name}", answers, what, engines, _times(answers, tokens))
            elif suite == "health":
                texts = prompts * (3 if compared else 2)
                what, most = f"texts of up to {tokens} tokens, and their probabilities", texts * tokens
                yield Line(f"health_{name}", texts, what, engines, most)
                if compared:
                    what = "probabilities of its texts under the SFT model"
                    yield Line(f"shift_{name}", prompts, what, engines, prompts * tokens)
            elif suite == "alpaca_eval" and config.eval.alpaca:
                yield from _judged(config.eval.alpaca, name, engines)
            else:
                yield Line(f"lm_eval_{suite.removeprefix(LM_EVAL)}@{name}", None, "the harness's task", engines)
    yield Line("scores", None, "figures with intervals", "driver")
    yield Line("comparisons", None, "paired tests", "driver")


def _judged(config: AlpacaConfig, name: str, engines: str) -> Iterator[Line]:
    limit = config.limit
    most = _times(limit, config.max_tokens)
    yield Line(f"alpaca_{name}", limit, f"answers of up to {config.max_tokens} tokens", engines, most)
    for annotator in config.annotators:
        requests = _times(limit, 2 if annotator.orders == "both" else 1)
        what = f"verdicts of {annotator.model}" + (f" by at most {requests} requests" if requests else "")
        yield Line(f"judged_{name}@{annotator.name}", limit, what, _engines(annotator.engine))


def _sampled(
    name: str, questions: int | None, samples: int, tokens: int, engine: EngineConfig | EndpointConfig, model: str = ""
) -> Iterator[Line]:
    what = f"{samples} samples a question{f' by {model}' if model else ''}"
    count = _times(questions, samples)
    yield Line(f"{name}_samples", count, what, _engines(engine), _times(count, tokens))
    yield Line(f"{name}_scores", _times(questions, samples), "graded samples")


def _pairs(config: Config, chosen: int | None, pairs: int | None, name: str, suffix: str) -> Iterator[Line]:
    yield from _sampled(name, chosen, config.sampling.samples, config.sampling.max_tokens, config.engine)
    yield Line(f"pair_candidates{suffix}", pairs, f"wrong samples by {config.pairs.select}")
    yield Line(f"pairs{suffix}", pairs, f"pairs without duplicates (dedup {config.pairs.dedup})", "driver")


def _referenced(config: Config, tokens: str, name: str, pairs: int | None) -> Iterator[Line]:
    yield Line(tokens, pairs, f"token ids, up to {config.train.max_length} a row")
    seen = _times(pairs, 2 * config.train.max_length)
    yield Line(name, pairs, "reference log-probabilities", _workers(config), seen)


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
