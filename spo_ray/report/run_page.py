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
from spo_ray.report.headline import Sentence, headline, plain
from spo_ray.report.page import Cell, Link, Table, render
from spo_ray.report.samples import shown_samples
from spo_ray.report.summary import summarise
from spo_ray.runtime.artifact import REJECTED, Artifact, RowCounts, write_json
from spo_ray.runtime.console import log, place, show
from spo_ray.runtime.manifest import MANIFEST, manifests
from spo_ray.runtime.run import Run, Stage, Work
from spo_ray.train.alarm import PREFIX, describe
from spo_ray.train.spec import RESULT

SHOWN_DROPPED = 20
"""Number of dropped rows that the page lists for each stage and reason."""
SHARED_WORDS = 13
"""Number of consecutive words shared with a held-out prompt that count as contamination."""
BATCH = f"The pairs of each step, before the step. Moving average with weight {figures.EMA} on the past."
DYNAMICS = (
    "Under the preference loss alone, the green term gives the change of the chosen log-probability and the pink term "
    "that of the rejected one. Where the green term is negative, the step lowers the log-probability of the chosen "
    "answers, unless another term of the loss prevents it. Computed from batch-mean gradients."
)
CHES = (
    "Each point is a training pair. Across: its CHES score under the reference model, before training. Up: what "
    "training did to the log-probability of its chosen answer. A score that tells which pairs displace has a rank "
    "correlation near -1; near 0, dropping the pairs with the highest scores (pairs.max_ches_quantile) helps no more "
    "than dropping any others."
)
HEALTH = "Answers sampled at temperature 1, to the prompts of some of the probe pairs."
NOTED = ("requests", "cost", "restarts")
"""Facts of a stage that the table of stages shows."""


def write_report(
    run: Run,
    methods: dict[str, Artifact],
    evaluation: Evaluation,
    pairs: Artifact,
    held_out: Artifact,
    samples: int | None = None,
) -> None:
    """Write ``report/index.html`` and ``summary.json`` from the finished stages.

    ``pairs`` are the training pairs as text, ``held_out`` the questions or pairs of the evaluation,
    ``samples`` the number of held-out prompts with answers.
    """
    summary = cache(partial(summarise, run, methods, evaluation))

    def build(out: Path, row_counts: RowCounts) -> None:
        row_counts.facts["summary"] = "../summary.json"
        page = render("run.html.j2", **_content(run, summary(), methods, evaluation, pairs, held_out, samples))
        (out / "index.html").write_text(page, encoding="utf-8")

    inputs = {f"method_{k}": v for k, v in methods.items()} | {f"eval_{k}": v for k, v in evaluation.answers.items()}
    inputs |= {"questions": held_out, "scores": evaluation.scores, "comparisons": evaluation.comparisons}
    report = run.execute(Stage("report", build, {}, inputs | {"pairs": pairs}, Work(note="a page")))
    if run.mode == "plan":
        return
    write_json(run.root / "summary.json", summary())
    print(plain(run_headline(run, summary())))
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
    samples: int | None,
) -> dict[str, Any]:
    """Return the data of ``run.html.j2``."""
    table, compared, reference = summary["methods"], summary["comparisons"], run.config.reference
    paths = {name: artifact.path for name, artifact in methods.items()}
    lines = scores.results(table, compared, reference)
    cells = [scores.linked(line, run.root, "..", paths.get(line["method"])) for line in lines]
    alarms = _alarms(run, paths)
    return {
        "config": run.config,
        "versions": summary["versions"],
        "methods": {name: str(type(run.config.methods[name]).__doc__).splitlines()[0] for name in methods},
        "headline": scores.linked_sentences(run_headline(run, summary), run.root, paths),
        "results": scores.results_table(cells),
        "alarms": _alarm_table(alarms),
        "matrix": scores.matrix(compared),
        "comparisons": scores.comparison_tables(compared),
        "figures": {
            "accuracy": figures.accuracy_figure(table, reference) if evaluation.answers else None,
            "displacement": figures.displacement_figure(table),
            "logps": figures.log_probability_figure(paths, alarms),
        },
        "curves": [
            ("Each step's own pairs", figures.batch_figure(paths), BATCH),
            ("Gradient terms (Theorem 1)", figures.dynamics_figure(paths), DYNAMICS),
            ("CHES scores of the training pairs", figures.ches_figure(paths, run.config.pairs.ches), CHES),
            ("Text health of samples during training", figures.health_figure(paths), HEALTH),
        ],
        "suites": scores.other_suites(table, run.root),
        "health": scores.health_strip(table, reference),
        "samples": shown_samples(_greedy(run, table, evaluation.answers), held_out.rows(), reference, samples),
        "reference": reference,
        "pairs": _pairs(run, pairs, held_out),
        "stages": _stages(run),
        "dropped": _dropped(run),
        "settings": json.dumps(run.config.model_dump(mode="json"), indent=2),
    }


def run_headline(run: Run, summary: dict[str, Any]) -> list[Sentence]:
    """Return the results of a run in sentences."""
    words = "the SFT model" if run.config.sft else "the reference model"
    return headline(summary["methods"], summary["comparisons"], run.config.reference, words)


def _alarms(run: Run, paths: dict[str, Path]) -> list[dict[str, Any]]:
    """Return method, step, text and advice of each alarm in the methods' trainings."""
    found = []
    for name, path in paths.items():
        for alarm in json.loads((path / RESULT).read_text()).get("alarms", []):
            record = {"step": alarm["step"], f"{PREFIX}{alarm['alarm']}": alarm["value"]}
            told = describe(record, run.config.preference.alarm)
            found += [{"method": name, "step": alarm["step"], "text": text, "advice": advice} for text, advice in told]
    return found


def _alarm_table(alarms: list[dict[str, Any]]) -> Table:
    """Return a line for each method and kind of alarm: its steps, the text of the first, and what to do."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for alarm in alarms:
        kinds.setdefault((alarm["method"], alarm["advice"]), []).append(alarm)
    lines = [
        [method, ", ".join(str(alarm["step"]) for alarm in found), found[0]["text"], advice]
        for (method, advice), found in kinds.items()
    ]
    return Table(["method", "steps", "what happened first", "what to do"], lines)


def _greedy(run: Run, table: dict[str, Any], graded: dict[str, Artifact]) -> dict[str, dict[str, Any]]:
    """Return greedy answers by checkpoint and row: the graded ones, else those that text health was measured on."""
    found: dict[str, dict[str, Any]] = {}
    for name in table:
        artifact = graded.get(name) or Artifact(run.root / f"health_{name}", "")
        rows = [row for row in artifact.rows() if row["seed"] is None and row.get("written_by", name) == name]
        found |= {name: {row["id"]: row for row in rows}} if rows else {}
    return found


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
