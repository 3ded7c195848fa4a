"""The run page: one self-contained HTML file that works offline; and ``summary.json``."""

import json
from collections import Counter
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from spo_ray.core.text_metrics import words_and_marks
from spo_ray.data.filter import Contamination
from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.report import figures, scores
from spo_ray.report.page import Cell, Link, Table, differing, render
from spo_ray.report.summary import summarise
from spo_ray.runtime.artifact import REJECTED, Artifact, RowCounts, write_json
from spo_ray.runtime.console import log, place, show
from spo_ray.runtime.manifest import MANIFEST, manifests
from spo_ray.runtime.run import Run, Stage, Work
from spo_ray.train.alarm import PREFIX, describe
from spo_ray.train.spec import RESULT

SHOWN_PROMPTS = 8
"""Number of held-out prompts whose answers are shown."""
SHOWN_DROPPED = 20
"""Number of dropped rows that the page lists for each stage and reason."""
SHARED_WORDS = 13
"""Number of consecutive words shared with a held-out prompt that count as contamination."""
NOTED = ("requests", "cost", "restarts")
"""Facts of a stage that the table of stages shows."""


def write_report(
    run: Run, methods: dict[str, Artifact], evaluation: Evaluation, pairs: Artifact, held_out: Artifact
) -> None:
    """Write ``report/index.html`` and ``summary.json`` from the finished stages.

    ``pairs`` are the training pairs as text, ``held_out`` the questions or pairs of the evaluation.
    """
    summary = cache(partial(summarise, run, methods, evaluation))

    def build(out: Path, row_counts: RowCounts) -> None:
        row_counts.facts["summary"] = "../summary.json"
        page = render("run.html.j2", **_content(run, summary(), methods, evaluation, pairs, held_out))
        (out / "index.html").write_text(page, encoding="utf-8")

    inputs = {f"method_{k}": v for k, v in methods.items()} | {f"eval_{k}": v for k, v in evaluation.answers.items()}
    inputs |= {"questions": held_out, "scores": evaluation.scores, "comparisons": evaluation.comparisons}
    report = run.execute(Stage("report", build, {}, inputs | {"pairs": pairs}, Work(note="a page")))
    if run.mode == "plan":
        return
    write_json(run.root / "summary.json", summary())
    for line in scores.text_table(summary()["methods"], summary()["comparisons"], run.config.reference):
        show(line)
    log("report", place(report.path / "index.html"))


def _content(
    run: Run,
    summary: dict[str, Any],
    methods: dict[str, Artifact],
    evaluation: Evaluation,
    pairs: Artifact,
    held_out: Artifact,
) -> dict[str, Any]:
    """Return the data of ``run.html.j2``."""
    table, compared, reference = summary["methods"], summary["comparisons"], run.config.reference
    paths = {name: artifact.path for name, artifact in methods.items()}
    lines = scores.results(table, compared, reference)
    cells = [scores.linked(line, run.root, "..", paths.get(line["method"])) for line in lines]
    return {
        "config": run.config,
        "versions": summary["versions"],
        "results": scores.results_table(cells),
        "alarms": _alarms(run, paths),
        "verdict": scores.verdict(compared),
        "comparisons": scores.comparison_tables(compared),
        "smoothing": figures.EMA,
        "figures": {
            "accuracy": figures.accuracy_figure(table) if evaluation.answers else None,
            "logps": figures.log_probability_figure(paths, reference),
            "batch": figures.batch_figure(paths),
            "ratio": figures.ratio_figure(paths),
            "dynamics": figures.dynamics_figure(paths),
            "health": figures.health_figure(paths),
        },
        "suites": scores.other_suites(table, run.root),
        "answers": _answers(_greedy(run, table, evaluation.answers), held_out, reference),
        "reference": reference,
        "pairs": _pairs(run, pairs, held_out),
        "stages": _stages(run),
        "dropped": _dropped(run),
        "settings": json.dumps(run.config.model_dump(mode="json"), indent=2),
    }


def _alarms(run: Run, paths: dict[str, Path]) -> list[str]:
    """Return the messages of the displacement alarm in each method's training."""
    messages = []
    for name, path in paths.items():
        for alarm in json.loads((path / RESULT).read_text()).get("alarms", []):
            record = {"step": alarm["step"], f"{PREFIX}{alarm['alarm']}": alarm["value"]}
            messages += [f"{name}: {text}" for text in describe(record, run.config.preference.alarm)]
    return messages


def _greedy(run: Run, table: dict[str, Any], graded: dict[str, Artifact]) -> dict[str, dict[str, Any]]:
    """Return greedy answers by checkpoint and row: the graded ones, else those that text health was measured on."""
    found: dict[str, dict[str, Any]] = {}
    for name in table:
        artifact = graded.get(name) or Artifact(run.root / f"health_{name}", "")
        rows = [row for row in artifact.rows() if row["seed"] is None and row.get("written_by", name) == name]
        found |= {name: {row["id"]: row for row in rows}} if rows else {}
    return found


def _answers(greedy: dict[str, dict[str, Any]], held_out: Artifact, reference: str) -> dict[str, Any] | None:
    """Return the first prompts on which checkpoints disagree, with all answers to them; None without answers.

    Words that differ from those of the checkpoint ``reference`` are marked.
    """
    if not greedy:
        return None
    first = next(iter(greedy.values()))
    disputed = [i for i in first if len({rows[i].get("correct", rows[i]["response"]) for rows in greedy.values()}) > 1]
    prompts = {row["id"]: row["prompt"] for row in held_out.rows()}
    lines = []
    for row_id in (disputed or list(first))[:SHOWN_PROMPTS]:
        usual = greedy.get(reference, first)[row_id]["response"]
        answers = [
            {"pieces": differing(rows[row_id]["response"], usual), "correct": rows[row_id].get("correct")}
            for rows in greedy.values()
        ]
        lines.append({"prompt": _prompt(prompts[row_id]), "answers": answers})
    return {"checkpoints": list(greedy), "lines": lines, "graded": "correct" in next(iter(first.values()))}


def _prompt(prompt: Any) -> str:
    """Return a question, or a conversation as text."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _stages(run: Run) -> Table:
    """Return rows, noted facts and seconds of each stage in the order of their end, and the totals."""
    lines: list[list[Cell]] = []
    wall_s, totals = 0.0, Counter()
    for folder, manifest in manifests(run.root):
        rows, facts = manifest["rows"], {key: manifest["facts"].get(key) or 0 for key in NOTED}
        dropped = ", ".join(f"{n} {reason}" for reason, n in rows["dropped"].items())
        name = Link(manifest["stage"], f"../{folder.name}/{MANIFEST}")
        seconds = f"{manifest['wall_s']:.1f}"
        lines.append([name, str(rows["read"]), str(rows["kept"]), dropped, _noted(facts), seconds])
        totals.update(facts)
        wall_s += manifest["wall_s"]
    lines.append(["all", "", "", "", _noted(totals), f"{wall_s:.1f}"])
    return Table(["stage", "rows read", "rows written", "dropped", "notes", "seconds"], lines)


def _noted(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in facts.items() if value)


def _pairs(run: Run, pairs: Artifact, held_out: Artifact) -> Table:
    """Return length bias, duplicates and contamination of the training pairs."""
    rows = pairs.rows()
    chosen, rejected = ([len(words_and_marks(row[side])) for row in rows] for side in ("chosen", "rejected"))
    longer = sum(one > other for one, other in zip(chosen, rejected, strict=True)) / len(rows)
    different = Counter((str(row["prompt"]), row["chosen"], row["rejected"]) for row in rows)
    template = getattr(run.config.data, "prompt", "")
    clean = list(Contamination(held_out.rows(), SHARED_WORDS, template).keep_clean(rows, RowCounts()))
    lines = [
        ["pairs", Link(f"{len(rows)}", f"../{pairs.path.name}/")],
        ["mean words, chosen", f"{fmean(chosen):.1f}"],
        ["mean words, rejected", f"{fmean(rejected):.1f}"],
        ["chosen longer than rejected", f"{longer:.1%}"],
        ["different prompts", f"{len({str(row['prompt']) for row in rows})}"],
        ["exact duplicates", f"{len(rows) - len(different)}"],
        [f"sharing {SHARED_WORDS} consecutive words, or all, with a held-out prompt", f"{len(rows) - len(clean)}"],
    ]
    return Table(["", ""], lines)


def _dropped(run: Run) -> list[tuple[str, Table]]:
    """Return a title and the first dropped rows for each stage and reason."""
    found = []
    for file in (folder / REJECTED for folder, _ in manifests(run.root) if (folder / REJECTED).is_file()):
        stage = file.parent.name
        reasons: dict[str, list[list[str]]] = {}
        for row in pq.read_table(file).to_pylist():
            reasons.setdefault(row["reason"], []).append([row["id"], row["excerpt"]])
        for reason, rows in reasons.items():
            shown = rows[:SHOWN_DROPPED]
            more = "" if shown == rows else f"; the first {len(shown)} of them, all in {stage}/{REJECTED}"
            found.append((f"{stage}: {len(rows)} {reason}{more}", Table(["row", "excerpt"], shown)))
    return found
