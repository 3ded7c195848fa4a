"""What methods do to SmolLM2-135M-Instruct at several learning rates: the tables of docs/results.md.

    python -m benchmarks.real_weights search
    python -m benchmarks.real_weights run [--tasks word_problems ultrafeedback gsm8k] [--seeds 0 1 2] [--blocks tuned]
    python -m benchmarks.real_weights tables

``search`` and ``run`` need ``make models/smollm2-135m``, and two tasks SPO_SHARED_DATA with ultrafeedback/train.jsonl
and gsm8k. ``search`` is the sweep of configs/sweeps/smollm2.yaml; ``real_search.csv`` keeps its results. In ``run``
each task and seed is one run of the pipeline, in ``runs``: all take the first block of methods, then all the next,
from the same SFT checkpoint and pairs; after each block the checkpoints' rows stand in ``real_weights.jsonl``.
``tables`` writes the tables from these files. Seeds change the training data, the samples and the order; the held-out
questions are the same.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks import common
from spo_ray.config.methods import MethodConfig, Spo
from spo_ray.evaluate.statistics import compare, holm, mean_interval
from spo_ray.pipeline.finished import read_finished
from spo_ray.report.headline import p_text
from spo_ray.report.summary import summarise

ROOT = Path(__file__).parents[1]
ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = ROOT / "docs" / "results.md"
START, END = "<!-- made by: python -m benchmarks.real_weights tables -->", "<!-- end of the made part -->"
RATES = (1e-5, 5e-5)
"""Peak learning rates of theta and phi; the first is that of configs/smollm2."""
FIRST = {kind: {"type": kind} for kind in ("nll", "dpo", "dpo_nll", "simpo", "spo")}
"""The methods of word_problems.yaml, with their defaults."""
MORE = {kind: {"type": kind} for kind in ("dpop", "ipo")} | {
    "dpo_nll_01": {"type": "dpo_nll", "mu": 0.1},
    "spo_01": {"type": "spo", "lambda_sft": 0.1},
}
AROUND = {
    "alpha_dpo": {"type": "alpha_dpo"},
    "spo_simpo": {"type": "spo", "base": {"type": "simpo"}},
    "spo_alpha_dpo": {"type": "spo", "base": {"type": "alpha_dpo"}},
    "spo_region": {"type": "spo", "safe_region": {}},
}
"""SPO around the other base losses, one of them alone, and SPO with a safe region."""
SEARCH = ROOT / "configs" / "sweeps" / "smollm2.yaml"
SEARCHED = Path(__file__).with_name("real_search.csv")
KEPT = ("pairs", "steps", "delta_logp_chosen", "delta_logp_rejected", "held_out", "accuracy_greedy", "accuracy_sampled")
WEIGHTS = ("mu", "lambda_sft")
"""Fields with the weight of the SFT loss."""
STARTS = ("sft", "reference")
"""Checkpoints that methods start from, with SFT and without."""
GSM8K_QUESTIONS = 1319
"""All of GSM8K's test split."""
Row = dict[str, Any]


class Task(NamedTuple):
    """One of the configurations in configs/smollm2, and what the study changes of it."""

    title: str
    overrides: tuple[str, ...]


TASKS = {
    "word_problems": Task("Word problems", ()),
    "ultrafeedback": Task(
        "UltraFeedback",
        (
            f"data.path={common.DATA / 'ultrafeedback' / 'train.jsonl'}",
            "data.train_split=train",
            "data.train_pairs=256",
            "data.test_pairs=300",
            "train.max_length=256",
            "eval.health_prompts=16",
            "eval.max_tokens=96",
        ),
    ),
    "gsm8k": Task(
        "GSM8K, all test questions, sampled in bfloat16",
        (
            f"data.path={common.DATA / 'gsm8k'}",
            "data.subset=null",
            f"data.test_questions={GSM8K_QUESTIONS}",
            "engine.dtype=bfloat16",
        ),
    ),
}


def search(output: Path) -> None:
    """Run the sweep over methods and rates, and keep its results.

    Raises:
        subprocess.CalledProcessError: the sweep fails; the same command resumes.
    """
    _spo_ray("sweep", str(SEARCH), f"output={output}")
    shutil.copy(output / "sweep-smollm2" / "results.csv", SEARCHED)


def searched() -> dict[str, dict[float, float]]:
    """Return each method's mean of greedy and sampled accuracy on the validation questions, by learning rate.

    A trial that failed has no score and is left out.
    """
    found: dict[str, dict[float, float]] = {}
    lines = SEARCHED.read_text("utf-8").splitlines() if SEARCHED.exists() else []
    scored = [row for row in csv.DictReader(lines) if row["accuracy_greedy"]]
    for row in scored:
        score = (float(row["accuracy_greedy"]) + float(row["accuracy_sampled"])) / 2
        found.setdefault(row["methods.tried.type"], {})[float(row["methods.tried.lr"])] = score
    return found


def best_rates() -> dict[str, float]:
    """Return the learning rate with which each method solves most of the validation questions."""
    return {kind: max(scores, key=scores.__getitem__) for kind, scores in searched().items()}


def blocks() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the blocks of methods by name; after a search the last has what is best at another rate than the first."""
    found = {"first": FIRST, "more": MORE, "around": AROUND}
    found["high"] = {f"{name}_5e05": method | {"lr": RATES[1]} for name, method in (FIRST | MORE).items()}
    other = {kind: lr for kind, lr in best_rates().items() if lr != RATES[0]}
    tuned = {f"{kind}_tuned": {"type": kind, "lr": lr} for kind, lr in other.items()}
    return found | ({"tuned": tuned} if tuned else {})


def _spo_ray(command: str, config: str, *overrides: str) -> None:
    subprocess.run([sys.executable, "-m", "spo_ray", command, "--config", config, *overrides], cwd=ROOT, check=True)


def run(task: str, seed: int, block: str, output: Path) -> None:
    """Run a task with a seed and the methods of a block, and write its rows.

    Raises:
        subprocess.CalledProcessError: the run fails; the same command resumes.
    """
    _spo_ray("run", f"configs/smollm2/{task}.yaml", *overrides_of(task, seed, block, output))
    add_rows(task, output / _name(task, seed))


def overrides_of(task: str, seed: int, block: str, output: Path) -> list[str]:
    """Return what a run changes of the task's configuration."""
    methods = blocks()[block]
    settings = (f"name={_name(task, seed)}", f"seed={seed}", f"output={output}")
    return [*TASKS[task].overrides, *settings, f"methods={json.dumps(methods)}"]


def _name(task: str, seed: int) -> str:
    return f"real-{task}-seed{seed}"


def add_rows(task: str, folder: Path) -> None:
    """Add a finished run's rows to the file, in the place of earlier rows of the same trainings.

    Raises:
        SystemExit: its methods started from another checkpoint than those of the file.
    """
    new = list(rows_of(task, folder))
    old = {_training(row): row for row in read_rows()}
    for row in new:
        known = old.get(_training(row), row)
        if row["method"] in STARTS and row.get("right") != known.get("right"):
            told = f"{folder}: {row['method']} gives other answers than in {ROWS}, which is from another machine"
            raise SystemExit(f"{told} or other versions: move that file away, and run all blocks")
    rows = (old | {_training(row): row for row in new}).values()
    ROWS.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _training(row: Row) -> tuple:
    return tuple(row.get(key) for key in ("task", "seed", "method", "lr", "weight"))


def read_rows() -> list[Row]:
    """Return all rows, in the order of tasks and seeds."""
    rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()] if ROWS.exists() else []
    return sorted(rows, key=lambda row: (list(TASKS).index(row["task"]), row["seed"]))


def rows_of(task: str, folder: Path) -> Iterator[Row]:
    """Yield a row for each checkpoint of a finished run; ``right`` has a digit for each question, in order of ids."""
    found = read_finished(folder)
    assert found.evaluation
    config, answers = found.run.config, found.evaluation.answers
    for name, entry in summarise(found)["methods"].items():
        method = config.methods.get(name)
        row: Row = {"task": task, "seed": config.seed, "method": _kind(method) if method else name}
        if method:
            row |= {"lr": method.lr or config.preference.theta.lr}
            weights = [weight for key, weight in method if key in WEIGHTS and weight != 1]
            row |= {"weight": weights[0]} if weights else {}
            row |= {"seconds": found.methods[name].present().manifest["wall_s"]}
        row |= {key: entry[key] for key in KEPT if entry.get(key) is not None}
        row["health"] = {
            key.removeprefix("health/"): score["value"]
            for key, score in entry["scores"].items()
            if key.startswith("health/")
        }
        if name in answers:
            greedy = sorted((a["id"], a["correct"]) for a in answers[name].rows() if a["seed"] is None)
            row["right"] = "".join(str(int(correct)) for _, correct in greedy)
        yield row


def _kind(method: MethodConfig) -> str:
    """Return a method's type; of SPO also its base loss unless that is DPO, and its safe region."""
    if not isinstance(method, Spo):
        return method.type
    around = "" if method.base.type == "dpo" else f" around {method.base.type}"
    return f"spo{around}{', safe region' if method.safe_region else ''}"


def tables(rows: Sequence[Row]) -> str:
    """Return the made part of the page."""
    parts: list[str] = []
    for task, (title, _) in TASKS.items():
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            if row["task"] == task:
                groups.setdefault((row.get("lr", 0), row["method"], row.get("weight")), []).append(row)
        if not groups:
            continue
        ordered = [groups[key] for key in sorted(groups, key=lambda key: key[0])]
        trained = max((group for group in ordered if "pairs" in group[0]), key=len)
        pairs, steps = (", ".join(str(row[key]) for row in trained) for key in ("pairs", "steps"))
        lines = [cells(group) for group in ordered]
        told = {key for line in lines for key, text in line.items() if text}
        seeds = ", ".join(str(row["seed"]) for row in trained)
        parts += [f"**{title}**, seed{'s' * (len(trained) > 1)} {seeds}: {pairs} pairs; {steps} steps."]
        parts += [common.table([{key: line[key] for key in lines[0] if key in told} for line in lines])]
        tests = list(paired_tests(ordered))
        if tests:
            parts += ["Paired tests of greedy answers:", common.table(tests)]
    lines = [{"method": kind} | {f"{lr:g}": 100 * scores[lr] for lr in scores} for kind, scores in searched().items()]
    told = "**The search** on word problems, by learning rate: % of the validation questions."
    parts += [told, common.table(lines)] if lines else []
    return "\n\n".join(parts)


def cells(group: Sequence[Row]) -> dict[str, str]:
    """Return one line of a table, from a method's rows of all seeds; a cell without a measurement is empty."""

    def each(value: Callable[[Row], float | None], form: str = "{:+.2f}") -> str:
        found = [value(row) for row in group]
        told = [form.format(number) for number in found if number is not None]
        return " / ".join(told) if len(told) == len(found) else ""

    def held_out(key: str, factor: float = 1) -> Callable[[Row], float | None]:
        return lambda row: None if key not in row.get("held_out", {}) else factor * _value(row["held_out"][key])

    def health(key: str, factor: float = 1) -> Callable[[Row], float | None]:
        return lambda row: next((factor * row["health"][k] for k in row["health"] if k in _starts(key)), None)

    first = group[0]
    right = common.question_means(row.get("right", "") for row in group)
    interval = mean_interval(right, "questions", shares=True) if right else None
    return {
        "method": _label(first),
        "learning rate": f"{first['lr']:g}" if "lr" in first else "",
        "greedy %": f"{100 * fmean(right):.1f}{_ends(interval.low, interval.high)}" if interval else "",
        "by seed": each(lambda row: 100 * _value(row["accuracy_greedy"]), "{:.0f}") if right else "",
        "T 0.7 %": each(lambda row: 100 * _value(row["accuracy_sampled"]), "{:.0f}") if right else "",
        **{f"Δ log π {side}": each(lambda row, side=side: row.get(f"delta_logp_{side}")) for side in common.SIDES},
        **{f"held out: {side}": each(held_out(f"delta_logp_{side}")) for side in common.SIDES},
        "held out: in order %": each(held_out("reward_accuracy", 100), "{:.0f}"),
        "KL from the start": each(health("kl_START_to_checkpoint"), "{:.1f}"),
        "KL to the start": each(health("kl_checkpoint_to_START"), "{:.1f}"),
        "tokens an answer": each(health("greedy/length"), "{:.0f}"),
        "repeated 4-grams %": each(health("greedy/repetition_4", 100), "{:.1f}"),
    }


def _starts(key: str) -> list[str]:
    return [key.replace("START", start) for start in STARTS]


def paired_tests(groups: Sequence[Sequence[Row]]) -> Iterator[dict[str, str]]:
    """Yield SPO against each other method with its rate or both with their best ones, each against its start, and SPO
    around another loss against that loss.

    A question's value is its mean over the seeds that both have; with one seed the test is McNemar's, else a
    permutation of signs. The p-values of one task are adjusted together, by Holm's method.
    """
    graded = [group for group in groups if "right" in group[0]]
    start = [group for group in graded if group[0]["method"] in STARTS]
    trained = [group for group in graded if "lr" in group[0]]
    best = best_rates()
    found = [(group, base) for group in trained for base in start]
    found += [
        (spo, group) for spo in trained if _label(spo[0]) == "spo" for group in trained if _rival(spo, group, best)
    ]
    found += [
        (spo, group)
        for spo, group in product(trained, trained)
        if spo[0]["method"] == f"spo around {_label(group[0])}" and group[0]["lr"] == spo[0]["lr"]
    ]
    compared = [_compared(*pair) for pair in found]
    adjusted = holm([test["p_value"] for _, test in compared])
    for (first, second), (seeds, test), p_value in zip(found, compared, adjusted, strict=True):
        rates = dict.fromkeys(f"{group[0]['lr']:g}" for group in (first, second) if "lr" in group[0])
        yield {
            "compared": f"{_label(first[0])} − {_label(second[0])}",
            "learning rate": ", ".join(rates),
            "seeds": seeds,
            "difference": f"{round(100 * test['difference'], 1) + 0.0:+.1f}{_ends(test['low'], test['high'], ' to ')}",
            "adjusted p": p_text(p_value),
        }


def _rival(spo: Sequence[Row], group: Sequence[Row], best: Mapping[str, float]) -> bool:
    tuned = all(best.get(_label(row)) == row["lr"] and row["task"] == "word_problems" for row in (spo[0], group[0]))
    return group is not spo and (group[0]["lr"] == spo[0]["lr"] or tuned)


def _compared(first: Sequence[Row], second: Sequence[Row]) -> tuple[str, dict[str, Any]]:
    shared = sorted({row["seed"] for row in first} & {row["seed"] for row in second})
    items = {}
    for name, group in (("first", first), ("second", second)):
        means = common.question_means(row["right"] for row in group if row["seed"] in shared)
        items[name] = {str(i): mean for i, mean in enumerate(means)}
    return ", ".join(map(str, shared)), compare("accuracy_greedy", items)[0]


def _label(row: Row) -> str:
    return f"{row['method']}, weight {row['weight']:g}" if "weight" in row else row["method"]


def _value(found: Any) -> float:
    return found["value"] if isinstance(found, dict) else found


def _ends(low: float | None, high: float | None, to: str = "–") -> str:
    return "" if low is None or high is None else f" ({100 * low:.1f}{to}{100 * high:.1f})"


def written(page: str, rows: Sequence[Row]) -> str:
    """Return the page with its made part written anew."""
    return common.with_made_part(page, START, END, tables(rows))


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the search or the study, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "run", "tables"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--blocks", nargs="+", choices=blocks(), default=list(blocks()))
    parser.add_argument("--output", type=Path, default=ROOT / "runs")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.what == "search":
        search(options.output)
    if options.what == "run":
        for block, task, seed in product(options.blocks, options.tasks, options.seeds):
            run(task, seed, block, options.output)
    PAGE.write_text(written(PAGE.read_text("utf-8"), read_rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
