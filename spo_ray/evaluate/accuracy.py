"""Accuracy on held-out questions by generation, with evaluation actors that serve one checkpoint after another."""

import queue
from functools import partial
from pathlib import Path
from typing import Any

import ray

from spo_ray import rows
from spo_ray.cluster import engine_gpus
from spo_ray.config import Config
from spo_ray.core.stats import mean_interval, mean_std, wilson
from spo_ray.data.sample import TOO_LONG, choose, fits, row_seed
from spo_ray.parallel import run_parallel
from spo_ray.run import Artifact, Ledger, Run, write_rows
from spo_ray.shards import Row
from spo_ray.verifiers import Verifier, load_verifier, verifier_identity, verifier_of

NO_ANSWER = f"[{TOO_LONG}]"
"""Stands for the answer to a question that the engine cannot take; counted as wrong."""


def evaluate(run: Run, checkpoints: dict[str, Artifact], questions: Artifact) -> dict[str, Artifact]:
    """Answer every question greedily and once per seed with each checkpoint (:class:`rows.EvalRow`)."""
    config = run.config
    kind, why = choose(config.engine)
    table = questions.rows()
    actors: queue.SimpleQueue[Any] = queue.SimpleQueue()
    remote: Any = ray.remote(num_cpus=config.engine.cpus, num_gpus=engine_gpus(config.engine))(Evaluator)
    started: list[Any] = []

    def build(out: Path, ledger: Ledger, method: str, checkpoint: Artifact) -> None:
        try:
            actor = actors.get_nowait()
        except queue.Empty:
            actor = remote.remote(kind, config)
            started.append(actor)
        answers = ray.get(actor.answer.remote(method, str(checkpoint.path), table))
        actors.put(actor)  # not after a failure: that ends the evaluation
        ledger.read, ledger.kept = len(table), len(answers)
        ledger.facts["too_long_counted_wrong"] = sum(row["response"] == NO_ANSWER for row in answers)
        ledger.facts["engine"] = f"{kind} ({why})"
        write_rows(out / "part-0.parquet", answers, rows.EvalRow)

    def stage(method: str, checkpoint: Artifact) -> Artifact:
        return run.stage(
            f"eval_{method}",
            lambda out, ledger: build(out, ledger, method, checkpoint),
            config={
                "engine": kind,
                "dtype": config.engine.dtype,
                "max_model_len": config.engine.max_model_len,
                "arguments": config.engine.arguments,
                "chat_template": config.model.chat_template,
                "verifier": verifier_identity(verifier_of(config.data)),
                **config.eval.model_dump(),
            },
            inputs={"model": checkpoint, "questions": questions},
        )

    try:
        calls = {name: partial(stage, name, checkpoint) for name, checkpoint in checkpoints.items()}
        return run_parallel(calls, config.engine.replicas)
    finally:
        for actor in started:
            ray.kill(actor)


class Evaluator:
    """One engine process."""

    def __init__(self, kind: str, config: Config) -> None:
        self.kind, self.config = kind, config

    def answer(self, method: str, model: str, questions: list[Row]) -> list[Row]:
        """Greedy answers (seed None) and one sampled answer per seed, graded."""
        from spo_ray.data.engines import open_engine
        from spo_ray.model.tokenise import ChatTokenizer

        settings = self.config.eval
        chat = ChatTokenizer.load(model, self.config.model.chat_template)
        engine = open_engine(self.kind, model, self.config.engine, chat)
        every = [(row, chat.prompt_ids(row["prompt"])) for row in questions]
        fitting = [(row, ids) for row, ids in every if fits(ids, self.config.engine)]
        too_long = [row for row, ids in every if not fits(ids, self.config.engine)]
        grade = partial(_graded, load_verifier(verifier_of(self.config.data)), method)
        found: list[Row] = []
        for seed in (None, *settings.seeds):
            found += [grade(seed, row, NO_ANSWER) for row in too_long]
            for start in range(0, len(fitting), settings.batch_size):
                part = fitting[start : start + settings.batch_size]
                answers = engine.generate(
                    [ids for _, ids in part],
                    n=1,
                    temperature=0.0 if seed is None else settings.temperature,
                    max_tokens=settings.max_tokens,
                    seeds=[row_seed("eval", seed, row["id"]) for row, _ in part],
                )
                found += [grade(seed, row, texts[0].text) for (row, _), texts in zip(part, answers, strict=True)]
        engine.close()
        return found


def _graded(verifier: Verifier, method: str, seed: int | None, question: Row, response: str) -> Row:
    key = {"id": question["id"], "method": method, "seed": seed, "response": response}
    return key | verifier.grade(response, question["gold"])._asdict()


def accuracies(answers: list[Row]) -> dict[str, Any]:
    """``accuracy_greedy`` (Wilson interval) and ``accuracy_sampled`` (mean and standard deviation over seeds).

    ``strict`` counts only answers in the form that was asked for.
    """
    greedy = [row["correct"] for row in answers if row["seed"] is None]
    strict = [row["strict"] for row in answers if row["seed"] is None]
    low, high = wilson(sum(greedy), len(greedy))
    seeds = sorted({row["seed"] for row in answers} - {None})
    sampled = {seed: {row["id"]: row["correct"] for row in answers if row["seed"] == seed} for seed in seeds}
    mean, std = mean_std([sum(graded.values()) / len(graded) for graded in sampled.values()])
    by_question = [sum(graded[i] for graded in sampled.values()) / len(seeds) for i in sampled[seeds[0]]]
    sampled_low, sampled_high = mean_interval(by_question)
    share = {"value": sum(greedy) / len(greedy), "strict": sum(strict) / len(strict)}
    return {
        "accuracy_greedy": share | {"low": low, "high": high, "n": len(greedy)},
        "accuracy_sampled": {
            "value": mean,
            "std": std,
            "low": max(0.0, sampled_low),
            "high": min(1.0, sampled_high),
            "seeds": seeds,
            "n": len(by_question),
        },
    }
