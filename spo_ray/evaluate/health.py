"""Suite ``health``: signs of degenerate text, and the probability moved between the reference and a checkpoint."""

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from spo_ray.config.evaluate import EvalConfig
from spo_ray.config.schema import Config
from spo_ray.core.text_metrics import distinct, longest_run, repetition, words_and_marks
from spo_ray.evaluate.actors import Pass
from spo_ray.evaluate.statistics import mean_interval, wilson
from spo_ray.evaluate.suite import Metric, Results, Suite, SuiteContext
from spo_ray.model.completion import Skipped
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, require_rows, write_rows
from spo_ray.runtime.map_rows import Row
from spo_ray.runtime.run import Stage

SAMPLED = 0
"""Seed of the samples at temperature 1."""


def is_compared(config: Config, name: str) -> bool:
    """Return True if a checkpoint's probabilities are compared with the reference model's."""
    return name not in ("base", config.reference)


def measure(context: SuiteContext, name: str, checkpoint: Artifact) -> Artifact:
    """Answer prompts greedily and at temperature 1, and score the reference's samples (:class:`schema.HealthRow`)."""
    config = context.run.config
    settings = config.eval.model_dump(include={"max_tokens", "batch_size"}) | {"prompts": config.eval.health_prompts}

    def build(out: Path, counts: RowCounts) -> None:
        table = context.data.rows()
        drawn = random.Random(config.seed).sample(table, min(config.eval.health_prompts, len(table)))
        passes = [Pass(None, 0.0), Pass(SAMPLED, 1.0)]
        counts.facts |= context.provenance(checkpoint, settings | {"temperatures": [0.0, 1.0]})
        kept: list[Row] = []
        for seed, row, answers in context.answer(checkpoint, drawn, passes, config.eval.max_tokens):
            if isinstance(answers, Skipped):
                if seed is None:  # a prompt is skipped in every pass
                    counts.reject(row["id"], answers.reason, row["prompt"])
                continue
            (answer,) = answers.completions
            key = {"id": row["id"], "checkpoint": name, "written_by": name, "seed": seed}
            text = {"response": answer.text, "finished": answer.finished}
            logps = {"logp": answer.logp, "logp_author": answer.logp}
            kept.append(key | text | logps | {"prompt_ids": answers.prompt_ids, "ids": list(answer.ids)})
        counts.read, counts.kept = len(drawn), len(drawn) - len(counts.rejected)
        require_rows(counts.kept, f"prompts for health_{name} that the engine can take", counts)
        if context.reference:
            samples = [row for row in context.reference.rows() if row["seed"] == SAMPLED]
            logps = _logps(context, checkpoint, samples)
            kept += [row | {"checkpoint": name, "logp": logp} for row, logp in zip(samples, logps, strict=True)]
        write_rows(out / "part-0.parquet", kept, schema.HealthRow)

    inputs = {"model": checkpoint, "questions": context.data}
    inputs |= {config.reference: context.reference} if context.reference else {}
    prompts = min(config.eval.health_prompts, context.data.max_rows or config.eval.health_prompts)
    texts = prompts * (3 if context.reference else 2)
    note = f"texts of up to {config.eval.max_tokens} tokens, and their log-probabilities"
    work = context.work(note, rows=prompts, out=texts, tokens=texts * config.eval.max_tokens)
    return context.run.execute(Stage(f"health_{name}", build, {**context.identity, **settings}, inputs, work))


def _logps(context: SuiteContext, checkpoint: Artifact, samples: list[Row]) -> list[float]:
    """Return the samples' log-probabilities under a checkpoint (nats)."""
    texts = [(row["prompt_ids"], row["ids"]) for row in samples]
    return [likelihood.logp for likelihood in context.evaluator.score(checkpoint.path, texts)]


def second_pass(context: SuiteContext, checkpoints: Results, measured: Results) -> dict[str, list[Artifact]]:
    """Score the other checkpoints' samples with the reference model (:class:`schema.ShiftRow`)."""
    config = context.run.config
    reference = checkpoints.get(config.reference)
    found: dict[str, list[Artifact]] = {}
    for name in checkpoints:
        if reference is None or not is_compared(config, name):
            continue

        def build(out: Path, counts: RowCounts, name: str = name, reference: Artifact = reference) -> None:
            own = [r for r in measured[name].rows() if r["seed"] == SAMPLED and r["written_by"] == name]
            table = [
                {"id": row["id"], "checkpoint": name, "logp": row["logp"], "logp_sft": logp}
                for row, logp in zip(own, _logps(context, reference, own), strict=True)
            ]
            counts.read = counts.kept = len(table)
            write_rows(out / "part-0.parquet", table, schema.ShiftRow)

        inputs = {"health": measured[name], config.reference: reference}
        prompts = config.eval.health_prompts
        tokens = prompts * config.eval.max_tokens
        work = context.work(
            "log-probabilities of its texts under the reference model", rows=prompts, tokens=tokens, generates=False
        )
        found[name] = [context.run.execute(Stage(f"shift_{name}", build, context.identity, inputs, work))]
    return found


def metrics(config: EvalConfig, measured: Artifact, shifted: Sequence[Artifact]) -> list[Metric]:
    """Return text figures of greedy answers and of samples, the entropy, and the shift against the reference model.

    Entropy and divergences (nats per response) are Monte-Carlo estimates over samples at temperature 1: the mean of
    ``-log pi(y)``, and of ``log pi_a(y) - log pi_b(y)`` over a's samples for KL(a || b).
    """
    table = measured.rows()
    own = [row for row in table if row["written_by"] == row["checkpoint"]]
    samples = [row for row in own if row["seed"] == SAMPLED]
    found = [
        *_text("greedy", [row for row in own if row["seed"] is None]),
        *_text("sampled", samples),
        _mean("entropy", [-row["logp"] for row in samples]),
        _mean("entropy_per_token", [-row["logp"] / len(row["ids"]) for row in samples]),
    ]
    for shift in shifted:
        others, back = [row for row in table if row["written_by"] != row["checkpoint"]], shift.rows()
        reference = others[0]["written_by"]
        found += [
            _mean(f"logp_of_{reference}_samples", [row["logp"] for row in others]),
            _mean(f"kl_{reference}_to_checkpoint", [row["logp_author"] - row["logp"] for row in others]),
            _mean(f"logp_{reference}_of_samples", [row["logp_sft"] for row in back]),
            _mean(f"kl_checkpoint_to_{reference}", [row["logp"] - row["logp_sft"] for row in back]),
        ]
    return found


def _text(name: str, table: Sequence[Row]) -> list[Metric]:
    texts, n = [words_and_marks(row["response"]) for row in table], len(table)
    unfinished = sum(not row["finished"] for row in table)
    return [
        _mean(f"{name}/length", [len(row["ids"]) for row in table]),
        Metric(f"{name}/unfinished", unfinished / n, n, *wilson(unfinished, n), "wilson"),
        _mean(f"{name}/repetition_4", [repetition(text, 4) for text in texts], shares=True),
        _mean(f"{name}/longest_run", [longest_run(text) for text in texts]),
        Metric(f"{name}/distinct_1", distinct(texts, 1), n),
        Metric(f"{name}/distinct_2", distinct(texts, 2), n),
    ]


def _mean(metric: str, values: Sequence[float], *, shares: bool = False) -> Metric:
    return Metric(metric, fmean(values), len(values), *mean_interval(values, "prompts", shares=shares))


SUITE = Suite(measure, metrics, second_pass)
