"""The run page: one self-contained HTML file that works offline; and ``summary.json``."""

import json
from collections import Counter
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from spo_ray.config.keys import leaves
from spo_ray.core.text_metrics import words_and_marks
from spo_ray.data.filter import Contamination
from spo_ray.report import figures, scores
from spo_ray.report.headline import headline, pieces, plain
from spo_ray.report.page import Cell, Link, Table, render
from spo_ray.report.samples import shown_samples
from spo_ray.report.summary import Finished, origin, summarise
from spo_ray.runtime.artifact import REJECTED, Artifact, RowCounts, write_json
from spo_ray.runtime.console import log, place, show
from spo_ray.runtime.manifest import MANIFEST, manifests
from spo_ray.runtime.run import Run, Stage, Work
from spo_ray.runtime.status import STATUS, read_status
from spo_ray.train.alarm import PREFIX, describe
from spo_ray.train.spec import RESULT

SHOWN_DROPPED = 20
"""Number of dropped rows that the page lists for each stage and reason."""
SHARED_WORDS = 13
"""Number of consecutive words shared with a held-out prompt that count as contamination."""
NOTED = ("requests", "cost", "restarts")
"""Facts of a stage that the table of stages shows."""


def write_report(found: Finished, samples: int | None = None) -> None:
    """Write ``report/index.html`` and ``summary.json``; ``samples``: number of held-out prompts with answers."""
    run, evaluation, summary = found.run, found.evaluation, cache(partial(summarise, found))

    def build(out: Path, row_counts: RowCounts) -> None:
        row_counts.facts["summary"] = "../summary.json"
        page = render("run.html.j2", **_content(found, summary(), samples))
        (out / "index.html").write_text(page, encoding="utf-8")

    inputs = {f"method_{k}": v for k, v in found.methods.items()}
    inputs |= {f"eval_{k}": v for k, v in evaluation.answers.items()}
    inputs |= {"questions": found.held_out, "scores": evaluation.scores, "comparisons": evaluation.comparisons}
    report = run.execute(Stage("report", build, {}, inputs | {"pairs": found.pairs}, Work(note="a page")))
    if run.mode == "plan":
        return
    write_json(run.root / "summary.json", summary())
    print(plain(run_headline(run, summary())))
    for line in scores.text_table(summary()["methods"], summary()["comparisons"], run.config.reference):
        show(line)
    log("report", place(report.path / "index.html"))


def _content(found: Finished, summary: dict[str, Any], samples: int | None) -> dict[str, Any]:
    """Return the data of ``run.html.j2``."""
    run, graded, reference = found.run, found.evaluation.answers, found.run.config.reference
    table, compared = summary["methods"], summary["comparisons"]
    paths = {name: artifact.path for name, artifact in found.methods.items()}
    rows, alarms = scores.Rows(run.root, "..", found.methods), _alarms(run, paths)
    return {
        "config": run.config,
        "origin": origin(run),
        "versions": summary["versions"],
        "command": read_status(run.root / STATUS).get("command", ""),
        "trained_on": next((table[name] for name in paths if name in table), {}),
        "methods": {name: _meaning(run.config.methods[name]) for name in paths},
        "own_rates": any(run.config.methods[name].lr for name in paths),
        "headline": [
            [piece if isinstance(piece, str) else rows.of(*piece) for piece in pieces(sentence)]
            for sentence in run_headline(run, summary)
        ],
        "results": scores.results_table(scores.results(table, compared, reference, rows)),
        "alarms": _alarm_table(alarms),
        "matrix": scores.matrix(compared),
        "comparisons": scores.comparison_tables(compared),
        "figures": {
            "accuracy": figures.accuracy_figure(table, reference) if graded else None,
            "displacement": figures.displacement_figure(table),
            "logps": figures.log_probability_figure(paths, alarms),
            "batch": figures.batch_figure(paths),
            "dynamics": figures.dynamics_figure(paths),
            "ches": figures.ches_figure(paths, run.config.pairs.ches),
            "health": figures.health_figure(paths),
        },
        "smoothing": figures.EMA,
        "suites": scores.other_suites(table, rows),
        "health": scores.health_strip(table, reference),
        "health_verdict": " ".join(scores.health_verdict(table, reference)),
        "samples": shown_samples(_greedy(run, table, graded), found.held_out.rows(), reference, samples),
        "reference": reference,
        "pairs": _pairs(found),
        "stages": _stages(run),
        "dropped": _dropped(run),
        "settings": json.dumps(run.config.model_dump(mode="json"), indent=2),
    }


def _meaning(method: Any) -> str:
    """Return what a method is, with its base loss and its numbers."""
    own = leaves(method.model_dump(mode="json", exclude_none=True, exclude={"type"}))
    told = [f"{key} {value}" for key, value in own if key == "base.type" or not isinstance(value, str | bool)]
    return str(type(method).__doc__).splitlines()[0] + (f" Here with {', '.join(told)}." if told else "")


def run_headline(run: Run, summary: dict[str, Any]) -> list[str]:
    """Return the results of a run in sentences."""
    words = "the SFT model" if run.config.sft else "the reference model"
    return headline(summary["methods"], summary["comparisons"], run.config.reference, words)


def _alarms(run: Run, paths: dict[str, Path]) -> list[dict[str, Any]]:
    """Return method, step, text and advice of each alarm in the methods' trainings."""
    found = []
    for name, path in paths.items():
        for alarm in json.loads((path / RESULT).read_text()).get("alarms", []):
            told = describe({f"{PREFIX}{alarm['alarm']}": alarm["value"]}, run.config.preference.alarm)
            found += [{"method": name, "step": alarm["step"], **each._asdict()} for each in told]
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
    return Table(["method", "at steps", "first message", "what to do"], lines)


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
    totals: Counter[str] = Counter()
    for folder, manifest in manifests(run.root):
        rows, facts = manifest["rows"], {key: manifest["facts"].get(key) or 0 for key in NOTED}
        facts["seconds"] = manifest["wall_s"]
        totals.update(facts)
        dropped = ", ".join(f"{n} {reason}" for reason, n in rows["dropped"].items())
        name = Link(manifest["stage"], f"../{folder.name}/{MANIFEST}")
        lines.append([name, str(rows["read"]), str(rows["kept"]), dropped, *_noted(facts)])
    lines.append(["all", "", "", "", *_noted(totals)])
    return Table(["stage", "rows read", "rows written", "dropped", "notes", "seconds"], lines)


def _noted(facts: dict[str, Any]) -> list[str]:
    return [", ".join(f"{key} {facts[key]:.4g}" for key in NOTED if facts[key]), f"{facts['seconds']:.1f}"]


def _pairs(found: Finished) -> Table:
    """Return length bias, duplicates and contamination of the training pairs."""
    rows, template = found.pairs.rows(), getattr(found.run.config.data, "prompt", "")
    chosen, rejected = ([len(words_and_marks(row[side])) for row in rows] for side in ("chosen", "rejected"))
    longer = sum(one > other for one, other in zip(chosen, rejected, strict=True)) / len(rows)
    different = {(str(row["prompt"]), row["chosen"], row["rejected"]) for row in rows}
    clean = list(Contamination(found.held_out.rows(), SHARED_WORDS, template).keep_clean(rows, RowCounts()))
    lines = [
        ["pairs", Link(f"{len(rows)}", f"../{found.pairs.path.name}/")],
        ["mean words, chosen", f"{fmean(chosen):.1f}"],
        ["mean words, rejected", f"{fmean(rejected):.1f}"],
        ["chosen longer than rejected", f"{longer:.1%}"],
        ["different prompts", f"{len({prompt for prompt, *_ in different})}"],
        ["exact duplicates", f"{len(rows) - len(different)}"],
        [
            f"share {SHARED_WORDS} words in a row, or the whole prompt, with a held-out prompt",
            f"{len(rows) - len(clean)}",
        ],
    ]
    return Table(["", ""], lines)


def _dropped(run: Run) -> list[tuple[str, Table]]:
    """Return a title and the first dropped rows for each stage and reason."""
    found = []
    for file in (folder / REJECTED for folder, _ in manifests(run.root) if (folder / REJECTED).is_file()):
        reasons: dict[str, list[list[str]]] = {}
        for row in pq.read_table(file).to_pylist():
            reasons.setdefault(row["reason"], []).append([row["id"], row["excerpt"]])
        for reason, rows in reasons.items():
            more = f"; the first {SHOWN_DROPPED} of them, all in {file.parent.name}/{REJECTED}"
            title = f"{file.parent.name}: {len(rows)} {reason}{more if len(rows) > SHOWN_DROPPED else ''}"
            found.append((title, Table(["row", "excerpt"], rows[:SHOWN_DROPPED])))
    return found
