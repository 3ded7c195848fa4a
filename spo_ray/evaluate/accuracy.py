"""Suite ``accuracy``: grades answers to held-out questions."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from spo_ray.config.evaluate import EvalConfig
from spo_ray.data.grade import pass_at_k
from spo_ray.data.verifiers import Grade, load_verifier, verifier_identity, verifier_of
from spo_ray.evaluate.actors import Pass
from spo_ray.evaluate.statistics import mean_interval, mean_std, wilson
from spo_ray.evaluate.suite import Metric, Suite, SuiteContext
from spo_ray.model.completion import Skipped
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, write_rows
from spo_ray.runtime.map_rows import Row
from spo_ray.runtime.run import Stage, times

WRONG = Grade(None, correct=False, strict=False)
"""Grade of a question that the engine could not answer."""


def measure(context: SuiteContext, name: str, checkpoint: Artifact) -> Artifact:
    """Answer every question greedily and once per seed, and grade the answers (:class:`schema.EvalRow`)."""
    config = context.run.config
    settings = config.eval.model_dump(include={"seeds", "temperature", "max_tokens", "batch_size"})
    verifier = verifier_of(config.data)

    def build(out: Any, row_counts: RowCounts) -> None:
        table, grade = context.data.rows(), load_verifier(verifier).grade
        passes = [Pass(None, 0.0), *(Pass(seed, config.eval.temperature) for seed in config.eval.seeds)]
        row_counts.facts |= context.provenance(checkpoint, settings)
        answers: list[Row] = []
        unanswered: Counter[str] = Counter()
        for seed, row, answer in context.answer(checkpoint, table, passes, config.eval.max_tokens):
            if isinstance(answer, Skipped):
                response, graded = f"[{answer.reason}]", WRONG
                unanswered[answer.reason] += 1
            else:
                response = answer.completions[0].text
                graded = grade(response, row["gold"])
            key = {"id": row["id"], "method": name, "seed": seed, "response": response}
            answers.append(key | graded._asdict())
        row_counts.read, row_counts.kept = len(table), len(answers)
        row_counts.facts["unanswered_counted_wrong"] = dict(sorted(unanswered.items()))
        write_rows(out / "part-0.parquet", answers, schema.EvalRow)

    identity = {**context.identity, **settings, "verifier": verifier_identity(verifier)}
    inputs = {"model": checkpoint, "questions": context.data}
    bound, each = context.data.max_rows, 1 + len(config.eval.seeds)
    note = f"answers, greedy and with {len(config.eval.seeds)} seeds"
    tokens = times(bound, each * config.eval.max_tokens)
    work = context.work(note, rows=bound, out=times(bound, each), tokens=tokens)
    return context.run.execute(Stage(f"eval_{name}", build, identity, inputs, work))


def by_seed(answers: list[Row]) -> dict[int | None, dict[str, bool]]:
    """Return correctness by seed (None: greedy) and question."""
    graded: dict[int | None, dict[str, bool]] = {}
    for row in answers:
        graded.setdefault(row["seed"], {})[row["id"]] = row["correct"]
    return graded


def by_item(answers: list[Row]) -> dict[str, dict[str, float]]:
    """Return values by metric and question for paired comparisons: the greedy answer's, and the mean over seeds."""
    graded = by_seed(answers)
    greedy, seeds = graded.pop(None), list(graded.values())
    means = {i: sum(seed[i] for seed in seeds) / len(seeds) for i in seeds[0]}
    return {"accuracy_greedy": {i: float(right) for i, right in greedy.items()}, "accuracy_sampled": means}


def accuracies(answers: list[Row]) -> dict[str, Any]:
    """Return ``accuracy_greedy`` (Wilson interval), ``accuracy_sampled`` (mean and standard deviation over seeds), and
    ``pass@k`` for each k that is a power of two or the number of seeds.

    Equal values have no interval, unless they are all 0 or all 1. ``strict`` counts only answers in the required form.
    """
    graded = by_seed(answers)
    greedy = list(graded.pop(None).values())
    strict = [row["strict"] for row in answers if row["seed"] is None]
    low, high = wilson(sum(greedy), len(greedy))
    seeds = sorted(graded, key=str)
    n = len(seeds)
    mean, std = mean_std([sum(graded[seed].values()) / len(graded[seed]) for seed in seeds])
    right = [sum(graded[seed][i] for seed in seeds) for i in graded[seeds[0]]]
    share = {"value": sum(greedy) / len(greedy), "strict": sum(strict) / len(strict)}
    sampled = {"value": mean, "std": std} | _bounds([count / n for count in right])
    found = {
        "accuracy_greedy": share | {"low": low, "high": high, "n": len(greedy)},
        "accuracy_sampled": sampled | {"seeds": seeds, "n": len(right)},
    }
    for k in (k for k in range(2, n + 1) if k & (k - 1) == 0 or k == n):
        values = [pass_at_k(n, count, k) for count in right]
        found[f"pass@{k}"] = {"value": sum(values) / len(values)} | _bounds(values) | {"n": len(values)}
    return found


def _bounds(values: list[float]) -> dict[str, Any]:
    interval = mean_interval(values, "questions", shares=True)
    return {} if interval.low is None else {"low": interval.low, "high": interval.high, "interval": interval.method}


def metrics(config: EvalConfig, answers: Artifact, second_pass: Sequence[Artifact]) -> list[Metric]:
    """Return the metrics of one checkpoint."""
    table = answers.rows()
    entries = accuracies(table)
    greedy, seeds = entries.pop("accuracy_greedy"), entries["accuracy_sampled"]["seeds"]
    n, strict = greedy["n"], sum(row["strict"] for row in table if row["seed"] is None)
    return [
        Metric("accuracy_greedy", greedy["value"], n, greedy["low"], greedy["high"], "wilson"),
        Metric("accuracy_greedy_strict", greedy["strict"], n, *wilson(strict, n), "wilson"),
        *(
            Metric(name, e["value"], e["n"], e.get("low"), e.get("high"), e.get("interval"), e.get("std"), seeds)
            for name, e in entries.items()
        ),
    ]


SUITE = Suite(measure, metrics)
