"""Suite ``health``: signs of degenerate text, and how much probability moved between the SFT model and a checkpoint."""

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from spo_ray.config.evaluate import EvalConfig
from spo_ray.core.text_metrics import distinct, longest_run, repetition, words
from spo_ray.evaluate.actors import Pass
from spo_ray.evaluate.statistics import mean_interval, wilson
from spo_ray.evaluate.suite import Metric, Results, Suite, SuiteContext
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, require_rows, write_rows
from spo_ray.runtime.map_rows import Row
from spo_ray.runtime.run import Stage

SAMPLED = 0
"""Seed of the samples at temperature 1."""
SFT = "sft"
UNCOMPARED = ("base", SFT)
"""Checkpoints whose probabilities are not compared with the SFT model's."""


def measure(bench: SuiteContext, name: str, checkpoint: Artifact) -> Artifact:
    """Answer prompts greedily and at temperature 1, and score the SFT model's samples (:class:`schema.HealthRow`)."""
    config = bench.run.config
    settings = config.eval.model_dump(include={"max_tokens", "batch_size"}) | {"prompts": config.eval.health_prompts}

    def build(out: Path, counts: RowCounts) -> None:
        table = bench.data.rows()
        drawn = random.Random(config.seed).sample(table, min(config.eval.health_prompts, len(table)))
        passes = [Pass(None, 0.0), Pass(SAMPLED, 1.0)]
        counts.facts |= bench.provenance(checkpoint, settings | {"temperatures": [0.0, 1.0]})
        limits = (config.eval.max_tokens, config.eval.batch_size)
        found = bench.call("answer", str(checkpoint.path), [(r["id"], r["prompt"]) for r in drawn], passes, *limits)
        kept: list[Row] = []
        for (seed, _), texts in zip(passes, found, strict=True):
            for row, text in zip(drawn, texts, strict=True):
                if not isinstance(text, str):
                    (answer,) = text.completions
                    key = {"id": row["id"], "checkpoint": name, "written_by": name, "seed": seed}
                    own = {"response": answer.text, "finished": answer.finished}
                    logps = {"logp": answer.logp, "logp_author": answer.logp}
                    kept.append(key | own | logps | {"prompt_ids": text.prompt_ids, "ids": list(answer.ids)})
                elif seed is None:  # the same in every pass
                    counts.reject(row["id"], text, row["prompt"])
        counts.read, counts.kept = len(drawn), len(drawn) - len(counts.rejected)
        require_rows(counts.kept, f"prompts for health_{name} that the engine can take", counts)
        kept += _likelihoods(bench, name, checkpoint) if bench.sft else []
        write_rows(out / "part-0.parquet", kept, schema.HealthRow)

    inputs = {"model": checkpoint, "questions": bench.data} | ({"sft": bench.sft} if bench.sft else {})
    prompts = min(config.eval.health_prompts, bench.data.max_rows or config.eval.health_prompts)
    texts = prompts * (3 if bench.sft else 2)
    note = f"texts of up to {config.eval.max_tokens} tokens, and their log-probabilities"
    work = bench.work(note, rows=prompts, out=texts, tokens=texts * config.eval.max_tokens)
    return bench.run.execute(Stage(f"health_{name}", build, {**bench.identity, **settings}, inputs, work))


def _likelihoods(bench: SuiteContext, name: str, checkpoint: Artifact) -> list[Row]:
    """The SFT model's samples with their log-probabilities under another checkpoint."""
    assert bench.sft
    texts = [row for row in bench.sft.rows() if row["seed"] == SAMPLED]
    found = bench.call("score", str(checkpoint.path), [(row["prompt_ids"], row["ids"]) for row in texts])
    return [row | {"checkpoint": name, "logp": likelihood.logp} for row, likelihood in zip(texts, found, strict=True)]


def conclude(bench: SuiteContext, checkpoints: Results, measured: Results) -> dict[str, list[Artifact]]:
    """What the SFT model says of the other checkpoints' samples (:class:`schema.ShiftRow`)."""
    judge = checkpoints.get(SFT)
    found: dict[str, list[Artifact]] = {}
    for name in checkpoints:
        if name in UNCOMPARED or judge is None:
            continue

        def build(out: Path, counts: RowCounts, name: str = name, judge: Artifact = judge) -> None:
            own = [r for r in measured[name].rows() if r["seed"] == SAMPLED and r["written_by"] == name]
            scores = bench.call("score", str(judge.path), [(row["prompt_ids"], row["ids"]) for row in own])
            table = [
                {"id": row["id"], "checkpoint": name, "logp": row["logp"], "logp_sft": score.logp}
                for row, score in zip(own, scores, strict=True)
            ]
            counts.read = counts.kept = len(table)
            write_rows(out / "part-0.parquet", table, schema.ShiftRow)

        inputs = {"health": measured[name], "sft": judge}
        prompts = bench.run.config.eval.health_prompts
        tokens = prompts * bench.run.config.eval.max_tokens
        work = bench.work("log-probabilities of its texts under the SFT model", rows=prompts, tokens=tokens)
        found[name] = [bench.run.execute(Stage(f"shift_{name}", build, bench.identity, inputs, work))]
    return found


def estimate(config: EvalConfig, measured: Artifact, shifted: Sequence[Artifact]) -> list[Metric]:
    """Text figures of greedy answers and of samples; entropy; and the shift against the SFT model.

    Entropy and divergences (nats per response) are Monte-Carlo estimates over samples at temperature 1: the mean of
    ``-log pi(y)``, and of ``log pi_a(y) - log pi_b(y)`` over a's samples for KL(a || b).
    """
    table = measured.rows()
    own = [row for row in table if row["written_by"] == row["checkpoint"]]
    found = _text("greedy", [row for row in own if row["seed"] is None])
    samples = [row for row in own if row["seed"] == SAMPLED]
    found += _text("sampled", samples)
    surprisal = [-row["logp"] for row in samples]
    found.append(_mean("entropy", surprisal))
    found.append(_mean("entropy_per_token", [-row["logp"] / len(row["ids"]) for row in samples]))
    for shift in shifted:
        others, back = [row for row in table if row["written_by"] == SFT], shift.rows()
        found.append(_mean("logp_of_sft_samples", [row["logp"] for row in others]))
        found.append(_mean("kl_sft_to_checkpoint", [row["logp_author"] - row["logp"] for row in others]))
        found.append(_mean("logp_sft_of_samples", [row["logp_sft"] for row in back]))
        found.append(_mean("kl_checkpoint_to_sft", [row["logp"] - row["logp_sft"] for row in back]))
    return found


def _text(name: str, table: Sequence[Row]) -> list[Metric]:
    texts = [words(row["response"]) for row in table]
    finished = sum(row["finished"] for row in table)
    n = len(table)
    return [
        _mean(f"{name}/length", [len(row["ids"]) for row in table]),
        Metric(f"{name}/unfinished", 1 - finished / n, n, *wilson(n - finished, n), "wilson"),
        _mean(f"{name}/repetition_4", [repetition(text, 4) for text in texts], shares=True),
        _mean(f"{name}/longest_run", [longest_run(text) for text in texts]),
        Metric(f"{name}/distinct_1", distinct(texts, 1), n),
        Metric(f"{name}/distinct_2", distinct(texts, 2), n),
    ]


def _mean(metric: str, values: Sequence[float], *, shares: bool = False) -> Metric:
    return Metric(metric, fmean(values), len(values), *mean_interval(values, "prompts", shares=shares))


SUITE = Suite(measure, estimate, conclude)
