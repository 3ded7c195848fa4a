"""Suite ``accuracy``: answers to held-out questions, graded."""

from collections.abc import Sequence
from typing import Any

from spo_ray.config.evaluate import EvalConfig
from spo_ray.data.grade import pass_at_k
from spo_ray.data.verifiers import Grade, load_verifier, verifier_identity, verifier_of
from spo_ray.evaluate.actors import Pass
from spo_ray.evaluate.statistics import mean_interval, mean_std, wilson
from spo_ray.evaluate.suite import Metric, Suite, SuiteContext
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, write_rows
from spo_ray.runtime.map_rows import Row
from spo_ray.runtime.run import Stage, times

WRONG = Grade(None, correct=False, strict=False)
"""What a question that the engine cannot take counts as."""


def measure(bench: SuiteContext, name: str, checkpoint: Artifact) -> Artifact:
    """Answer every question greedily and once per seed, and grade the answers (:class:`schema.EvalRow`)."""
    config = bench.run.config
    settings = config.eval.model_dump(include={"seeds", "temperature", "max_tokens", "batch_size"})
    verifier = verifier_of(config.data)

    def build(out: Any, row_counts: RowCounts) -> None:
        table = bench.data.rows()
        passes = [Pass(None, 0.0), *(Pass(seed, config.eval.temperature) for seed in config.eval.seeds)]
        asked = [(row["id"], row["prompt"]) for row in table]
        limits = (config.eval.max_tokens, config.eval.batch_size)
        row_counts.facts |= bench.provenance(checkpoint, settings)
        found = bench.call("answer", str(checkpoint.path), asked, passes, *limits)
        grade = load_verifier(verifier).grade
        answers: list[Row] = []
        for (seed, _), texts in zip(passes, found, strict=True):
            for row, text in zip(table, texts, strict=True):
                lacks = isinstance(text, str)
                response = f"[{text}]" if lacks else text.completions[0].text
                graded = WRONG if lacks else grade(response, row["gold"])
                key = {"id": row["id"], "method": name, "seed": seed, "response": response}
                answers.append(key | graded._asdict())
        row_counts.read, row_counts.kept = len(table), len(answers)
        reasons = [text for texts in found for text in texts if isinstance(text, str)]
        row_counts.facts["unanswered_counted_wrong"] = {
            reason: reasons.count(reason) for reason in sorted(set(reasons))
        }
        write_rows(out / "part-0.parquet", answers, schema.EvalRow)

    identity = {**bench.identity, **settings, "verifier": verifier_identity(verifier)}
    inputs = {"model": checkpoint, "questions": bench.data}
    bound, each = bench.data.max_rows, 1 + len(config.eval.seeds)
    note = f"answers, greedy and with {len(config.eval.seeds)} seeds"
    tokens = times(bound, each * config.eval.max_tokens)
    work = bench.work(note, rows=bound, out=times(bound, each), tokens=tokens)
    return bench.run.execute(Stage(f"eval_{name}", build, identity, inputs, work))


def by_seed(answers: list[Row]) -> dict[int | None, dict[str, bool]]:
    """Whether each question was answered correctly, by seed."""
    found: dict[int | None, dict[str, bool]] = {}
    for row in answers:
        found.setdefault(row["seed"], {})[row["id"]] = row["correct"]
    return found


def by_item(answers: list[Row]) -> dict[str, dict[str, float]]:
    """What a paired comparison looks at, by metric and question: the greedy answer, and the mean over seeds."""
    graded = by_seed(answers)
    greedy, seeds = graded.pop(None), list(graded.values())
    means = {i: sum(seed[i] for seed in seeds) / len(seeds) for i in seeds[0]}
    return {"accuracy_greedy": {i: float(right) for i, right in greedy.items()}, "accuracy_sampled": means}


def accuracies(answers: list[Row]) -> dict[str, Any]:
    """``accuracy_greedy`` (Wilson interval), ``accuracy_sampled`` (mean and standard deviation over seeds), and
    ``pass@k`` for k a power of two, and for all seeds together.

    Equal values have no interval, unless they are all 0 or all 1. ``strict`` counts only answers in the form that was
    asked for.
    """
    graded = by_seed(answers)
    greedy = list(graded.pop(None).values())
    strict = [row["strict"] for row in answers if row["seed"] is None]
    low, high = wilson(sum(greedy), len(greedy))
    seeds = sorted(graded, key=str)
    mean, std = mean_std([sum(graded[seed].values()) / len(graded[seed]) for seed in seeds])
    right = [sum(graded[seed][i] for seed in seeds) for i in graded[seeds[0]]]
    share = {"value": sum(greedy) / len(greedy), "strict": sum(strict) / len(strict)}
    sampled = {"value": mean, "std": std} | _bounds([count / len(seeds) for count in right])
    found = {
        "accuracy_greedy": share | {"low": low, "high": high, "n": len(greedy)},
        "accuracy_sampled": sampled | {"seeds": seeds, "n": len(right)},
    }
    for k in sorted({2**i for i in range(1, len(seeds).bit_length())} & set(range(len(seeds) + 1)) | {len(seeds)}):
        if k > 1:
            values = [pass_at_k(len(seeds), count, k) for count in right]
            found[f"pass@{k}"] = {"value": sum(values) / len(values)} | _bounds(values) | {"n": len(values)}
    return found


def _bounds(values: list[float]) -> dict[str, Any]:
    found = mean_interval(values, "questions", shares=True)
    return {} if found.low is None else {"low": found.low, "high": found.high, "interval": found.method}


def estimate(config: EvalConfig, answers: Artifact, concluded: Sequence[Artifact]) -> list[Metric]:
    """The same as a list."""
    table = answers.rows()
    found = accuracies(table)
    seeds = found["accuracy_sampled"]["seeds"]
    greedy = found.pop("accuracy_greedy")
    strict = [row["strict"] for row in table if row["seed"] is None]
    interval = wilson(sum(strict), len(strict))
    every = [
        Metric("accuracy_greedy", greedy["value"], greedy["n"], greedy["low"], greedy["high"], "wilson"),
        Metric("accuracy_greedy_strict", greedy["strict"], greedy["n"], *interval, "wilson"),
    ]
    for metric, entry in found.items():
        bounds = (entry.get("low"), entry.get("high"), entry.get("interval"))
        every.append(Metric(metric, entry["value"], entry["n"], *bounds, entry.get("std"), seeds))
    return every


SUITE = Suite(measure, estimate)
