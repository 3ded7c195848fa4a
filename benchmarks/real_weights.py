"""What methods do to SmolLM2-135M-Instruct at two learning rates: the tables of docs/results.md.

    python -m benchmarks.real_weights run [--tasks word_problems ultrafeedback] [--seeds 0 1 2]
    python -m benchmarks.real_weights tables

``run`` needs ``make models/smollm2-135m``, and for UltraFeedback SPO_SHARED_DATA with ultrafeedback/train.jsonl. Each
task and seed is one run of the pipeline, in ``runs``. It takes its methods in blocks, and resumes like any run; after
each block the finished checkpoints' rows stand in ``real_weights.jsonl``. ``tables`` writes the tables from these rows.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from spo_ray.evaluate.statistics import compare, holm, share
from spo_ray.pipeline.finished import read_finished
from spo_ray.report.headline import p_text
from spo_ray.report.summary import summarise

ROOT = Path(__file__).parents[1]
ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = ROOT / "docs" / "results.md"
START, END = "<!-- made by: python -m benchmarks.real_weights tables -->", "<!-- end of the made part -->"
RATES = (5e-5, 1e-5)
"""Peak learning rates of theta and phi; the first is that of configs/smollm2."""
BLOCKS = (("nll", "dpo", "dpo_nll", "simpo", "spo"), ("dpop", "ipo"))
"""Types of methods, with their defaults; the first block is that of word_problems.yaml."""
KEPT = ("pairs", "steps", "delta_logp_chosen", "delta_logp_rejected", "held_out", "accuracy_greedy", "accuracy_sampled")
STARTS = ("sft", "reference")
"""Checkpoints that methods start from, with SFT and without."""
Row = dict[str, Any]


class Task(NamedTuple):
    """One of the configurations in configs/smollm2, and what the study changes of it."""

    title: str
    overrides: tuple[str, ...]


TASKS = {
    "word_problems": Task("Word problems", ("eval.suites=[accuracy]",)),
    "ultrafeedback": Task(
        "UltraFeedback",
        (
            f"data.path={common.DATA / 'ultrafeedback' / 'train.jsonl'}",
            "data.train_split=train",
            "data.train_pairs=256",
            "data.test_pairs=200",
            "train.max_length=256",
            "eval.health_prompts=16",
            "eval.max_tokens=96",
        ),
    ),
}


def run(task: str, seed: int, output: Path) -> None:
    """Run a task with a seed, block after block, and write its rows after each.

    Raises:
        subprocess.CalledProcessError: a run fails; the same command resumes.
    """
    for overrides in blocks(task, seed, output):
        command = [sys.executable, "-m", "spo_ray", "run", "--config", f"configs/smollm2/{task}.yaml", *overrides]
        subprocess.run(command, cwd=ROOT, check=True)
        add_rows(task, output / _name(task, seed))


def blocks(task: str, seed: int, output: Path) -> Iterator[list[str]]:
    """Yield the overrides of each block's run; a block has the methods of those before it, which are reused."""
    methods: dict[str, Any] = {}
    for rate in RATES:
        own = {} if rate == RATES[0] else {"lr": rate}
        for block in BLOCKS:
            methods |= {f"{kind}_{rate:g}".replace("-", "") if own else kind: {"type": kind} | own for kind in block}
            settings = (f"name={_name(task, seed)}", f"seed={seed}", f"output={output}")
            yield [*TASKS[task].overrides, *settings, f"methods={json.dumps(methods)}"]


def _name(task: str, seed: int) -> str:
    return f"real-{task}-seed{seed}"


def add_rows(task: str, folder: Path) -> None:
    """Replace a finished run's rows in the file."""
    new = list(rows_of(task, folder))
    left = [row for row in read_rows() if (row["task"], row["seed"]) != (task, new[0]["seed"])]
    ROWS.write_text("".join(f"{json.dumps(row)}\n" for row in [*left, *new]), encoding="utf-8")


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
        row: Row = {"task": task, "seed": config.seed, "method": method.type if method else name}
        if method:
            row |= {"lr": method.lr or config.preference.theta.lr}
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


def tables(rows: Sequence[Row]) -> str:
    """Return the made part of the page."""
    parts: list[str] = []
    for task, (title, _) in TASKS.items():
        own = [row for row in rows if row["task"] == task]
        for seed in dict.fromkeys(row["seed"] for row in own):
            these = [row for row in own if row["seed"] == seed]
            one = next(row for row in these if "pairs" in row)
            head = f"**{title}, seed {seed}**: {one['pairs']} pairs, {one['steps']} steps."
            lines = [cells(row) for row in these]
            told = {key for line in lines for key, text in line.items() if text}
            parts += [head, common.table([{k: text for k, text in line.items() if k in told} for line in lines])]
            tests = list(paired_tests(these))
            if tests:
                parts += [f"Paired tests of greedy answers, seed {seed}:", common.table(tests)]
    return "\n\n".join(parts)


def cells(row: Row) -> dict[str, str]:
    """Return one line of a table; a cell without a measurement is empty."""
    held_out, health = row.get("held_out", {}), row["health"]
    found = {"method": row["method"], "learning rate": f"{row['lr']:g}" if "lr" in row else ""}
    if "accuracy_greedy" in row:
        found |= {"greedy %": _share(row["accuracy_greedy"]), "T 0.7 %": f"{row['accuracy_sampled']['value']:.1%}"[:-1]}
    found |= {f"Δ log π {side}": _signed(row.get(f"delta_logp_{side}")) for side in common.SIDES}
    if health:
        found |= {f"held out: {side}": _signed(held_out.get(f"delta_logp_{side}")) for side in common.SIDES}
        accuracy = held_out.get("reward_accuracy")
        found["held out: in order %"] = _share(accuracy) if accuracy else ""
        kl = health.get("kl_checkpoint_to_reference")
        found["KL to the reference"] = "" if kl is None else f"{kl:.1f}"
        found["tokens an answer"] = f"{health['greedy/length']:.0f}"
        found["repeated 4-grams %"] = f"{health['greedy/repetition_4']:.1%}"[:-1]
    return found


def paired_tests(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """Yield SPO against each other method with its rate, and each method against the checkpoint that it starts from.

    The p-values of one task and seed are adjusted together, by Holm's method.
    """
    graded = [row for row in rows if "right" in row]
    start = [row for row in graded if row["method"] in STARTS]
    trained = [row for row in graded if "lr" in row]
    found = [(row, base) for row in trained for base in start]
    found += [(spo, row) for spo in trained if spo["method"] == "spo" for row in trained if _rival(spo, row)]
    compared = [_compared(*pair) for pair in found]
    adjusted = holm([test["p_value"] for test in compared])
    for (first, second), test, p_value in zip(found, compared, adjusted, strict=True):
        ends = "" if test["low"] is None else f" ({100 * test['low']:.1f} to {100 * test['high']:.1f})"
        yield {
            "compared": f"{first['method']} − {second['method']}",
            "learning rate": f"{first['lr']:g}",
            "difference": f"{100 * test['difference']:+.1f}{ends}",
            "adjusted p": p_text(p_value),
        }


def _rival(spo: Row, row: Row) -> bool:
    return row["lr"] == spo["lr"] and row is not spo


def _compared(first: Row, second: Row) -> dict[str, Any]:
    items = {name: _items(row["right"]) for name, row in (("first", first), ("second", second))}
    return compare("accuracy_greedy", items)[0]


def _items(right: str) -> dict[str, float]:
    return {str(number): float(digit) for number, digit in enumerate(right)}


def _share(found: dict[str, float]) -> str:
    given = found if "low" in found else share(found["value"], int(found["n"]))
    return f"{100 * found['value']:.1f} ({100 * given['low']:.1f}–{100 * given['high']:.1f})"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def written(page: str, rows: Sequence[Row]) -> str:
    """Return the page with its made part written anew."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n\n{tables(rows)}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the study, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.what == "run":
        for seed in options.seeds:
            for task in options.tasks:
                run(task, seed, options.output)
    PAGE.write_text(written(PAGE.read_text("utf-8"), read_rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
