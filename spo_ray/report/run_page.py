"""The report: one self-contained HTML page that works offline, and ``summary.json``."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from html import escape
from pathlib import Path
from typing import Any

from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.report import figures, html
from spo_ray.report.data_section import ledger_section, pairs_section
from spo_ray.report.scores import (
    CHOSEN_CHANGE,
    COLUMNS,
    REFERENCE,
    comparisons,
    grid,
    linked,
    other_scores,
    results,
    text_table,
    verdicts,
)
from spo_ray.report.summary import summarise
from spo_ray.runtime.artifact import MANIFEST, Artifact, RowCounts, write_json
from spo_ray.runtime.console import log, place
from spo_ray.runtime.run import Run, Stage, Work
from spo_ray.train.alarm import PREFIX, describe
from spo_ray.train.spec import RESULT

SHOWN_QUESTIONS = 8
NOTED = ("requests", "cost", "restarts")


def write_report(
    run: Run, methods: dict[str, Artifact], evaluation: Evaluation, pairs: Artifact, held_out: Artifact
) -> None:
    """Write ``report/index.html`` and ``summary.json`` from the finished stages.

    ``pairs`` are the training pairs as text, ``held_out`` the questions or pairs of the evaluation.
    """
    summary = cache(partial(summarise, run, methods, evaluation))

    def build(out: Path, row_counts: RowCounts) -> None:
        row_counts.facts["summary"] = "../summary.json"
        sections = list(_sections(run, summary(), methods, evaluation, pairs, held_out))
        sections += _record(run)
        footer = " · ".join(f"{k} {v}" for k, v in summary()["versions"].items())
        page = html.page(f"{run.config.name}: spo_ray report", sections, footer)
        (out / "index.html").write_text(page, encoding="utf-8")

    inputs = {f"method_{k}": v for k, v in methods.items()} | {f"eval_{k}": v for k, v in evaluation.answers.items()}
    inputs |= {"questions": held_out, "scores": evaluation.scores, "comparisons": evaluation.comparisons}
    report = run.execute(Stage("report", build, {}, inputs | {"pairs": pairs}, Work(note="a page")))
    if run.mode == "plan":
        return
    write_json(run.root / "summary.json", summary())
    for line in text_table(summary()["methods"], summary()["comparisons"]):
        print(line)
    log("report", place(report.path / "index.html"))


def _sections(
    run: Run,
    summary: dict[str, Any],
    methods: dict[str, Artifact],
    evaluation: Evaluation,
    pairs: Artifact,
    held_out: Artifact,
) -> Iterator[str]:
    table, answers = summary["methods"], evaluation.answers
    yield f"<h1>{escape(run.config.name)}</h1>"
    yield html.note(_describe(run))
    yield "<h2>Results</h2>"
    paths = {name: artifact.path for name, artifact in methods.items()}
    lines = [linked(line, run.root, "..", paths.get(line["method"])) for line in results(table, summary["comparisons"])]
    columns, cells = grid(lines)
    yield html.table(columns, cells, change=CHOSEN_CHANGE)
    yield html.note(
        " ".join([*(note for name, (_, note) in COLUMNS.items() if note and name in columns), "Figures link to rows."])
    )
    yield from _alarms(run, paths)
    if answers:
        yield "<h2>Accuracy</h2>"
        yield html.figure(figures.accuracy_figure(table))
    if summary["comparisons"]:
        yield "<h2>Paired comparisons on the same items</h2>"
        yield from verdicts(summary["comparisons"])
        yield from comparisons(summary["comparisons"])
    yield from _trajectories(run, paths)
    yield from other_scores(table, run.root)
    yield from _text_health(paths)
    shown = _answers(run, table, answers)
    if shown:
        yield "<h2>Answers to held-out prompts</h2>"
        yield from _samples(shown, held_out)
    yield from pairs_section(run, pairs, held_out)


def _record(run: Run) -> Iterator[str]:
    """What was done: stages, dropped rows, settings."""
    yield "<h2>Stages</h2>"
    yield _stages(run)
    yield html.note("Stages run at the same time where they can: their seconds may be more than the run took.")
    yield from ledger_section(run)
    yield "<h2>Configuration</h2>"
    yield html.details("Every key, as it was resolved", f"<pre>{escape(_config(run))}</pre>")


def _alarms(run: Run, paths: dict[str, Path]) -> Iterator[str]:
    """What the displacement alarm said while each method trained."""
    for name, path in paths.items():
        for alarm in json.loads((path / RESULT).read_text()).get("alarms", []):
            record = {"step": alarm["step"], f"{PREFIX}{alarm['alarm']}": alarm["value"]}
            yield from (html.note(f"{name}: {text}") for text in describe(record, run.config.preference.alarm))


def _trajectories(run: Run, paths: dict[str, Path]) -> Iterator[str]:
    settings = run.config.preference
    yield "<h2>Log-probabilities during training</h2>"
    yield html.figure(figures.log_probability_figure(paths))
    yield html.note(
        f"Mean over {settings.probe_pairs} fixed training pairs at most; symmetric logarithmic scale. A falling green "
        "line is the preferred answers losing probability; grey are the SFT model's own greedy answers where they are "
        "not the chosen ones. Click a legend's entry to show it alone."
    )
    yield html.figure(figures.batch_figure(paths))
    yield html.note(f"Each step's own pairs before the step, moving average with weight {figures.EMA} of the past.")
    yield html.figure(figures.ratio_figure(paths))
    yield html.note("How far the chosen answers are above the rejected ones: it can grow while both fall.")
    dynamics = figures.dynamics_figure(paths)
    if dynamics:
        yield "<h2>Gradient terms during training</h2>"
        yield html.figure(dynamics)
        yield html.note(
            "Theorem 1: under the preference loss alone the chosen log-probability moves with the green term, the "
            "rejected one with the red. A negative green term is a step that lowers the preferred answers unless "
            "something else holds them. Of the batch's mean gradients, every "
            f"{settings.dynamics_every} steps; symmetric logarithmic scale."
        )


def _describe(run: Run) -> str:
    config = run.config
    p = config.preference
    return (
        f"{config.data.type} data, model {config.model.path}, seed {config.seed}. Every method: epochs {p.epochs}, "
        f"batch {p.batch_size}, learning rates {p.theta.lr:g} (backbone) and {p.phi.lr:g} (adapters) unless it has its "
        "own, from the same SFT checkpoint."
    )


def _text_health(paths: dict[str, Path]) -> Iterator[str]:
    found = figures.health_figure(paths)
    if found:
        yield html.figure(found)
        yield html.note("Answers sampled at temperature 1 during training, to some of the probe pairs' prompts.")


def _answers(run: Run, table: dict[str, Any], graded: dict[str, Artifact]) -> dict[str, dict[str, Any]]:
    """Greedy answers by checkpoint and row: the graded ones, else those that text health was measured on."""
    found: dict[str, dict[str, Any]] = {}
    for name in table:
        artifact = graded.get(name) or Artifact(run.root / f"health_{name}", "")
        rows = [row for row in artifact.rows() if row["seed"] is None and row.get("written_by", name) == name]
        found |= {name: {row["id"]: row for row in rows}} if rows else {}
    return found


def _samples(greedy: dict[str, dict[str, Any]], held_out: Artifact) -> Iterator[str]:
    """The first prompts on which checkpoints disagree, with what each answers."""
    first = next(iter(greedy.values()))
    differing = [i for i in first if len({rows[i].get("correct", rows[i]["response"]) for rows in greedy.values()}) > 1]
    prompts = {row["id"]: row["prompt"] for row in held_out.rows()}
    head = "".join(html.cell(name, "text", "th") for name in ("prompt", *greedy))
    body = ""
    for row_id in (differing or list(first))[:SHOWN_QUESTIONS]:
        reference = greedy.get(REFERENCE, first)[row_id]["response"]
        cells = "".join(_answer(greedy[name][row_id], reference) for name in greedy)
        body += f"<tr>{html.cell(_prompt(prompts[row_id]), 'text')}{cells}</tr>"
    graded = " Green: right, red: wrong." if "correct" in next(iter(first.values())) else ""
    yield html.note(
        f"Greedy answers to the first prompts on which checkpoints disagree; marked: other than {REFERENCE}'s.{graded}"
    )
    yield f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _prompt(prompt: Any) -> str:
    """A question, or a conversation."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _answer(row: dict[str, Any], reference: str) -> str:
    grade = {True: " right", False: " wrong", None: ""}[row.get("correct")]
    return html.cell(html.marked(row["response"], reference), f"text{grade}")


def _stages(run: Run) -> str:
    table, wall_s, totals = [], 0.0, Counter()
    for path in sorted(run.root.glob(f"*/{MANIFEST}"), key=lambda p: p.stat().st_mtime):
        manifest = Artifact(path.parent, "").manifest
        counts, facts = manifest["rows"], manifest["facts"]
        dropped = ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items())
        counted = {key: facts[key] for key in NOTED if facts.get(key)}
        totals.update(counted)
        wall_s += manifest["wall_s"]
        notes = ", ".join(f"{key} {n:.4g}" for key, n in counted.items())
        name = html.link(manifest["stage"], f"../{path.parent.name}/{MANIFEST}")
        table.append([name, str(counts["read"]), str(counts["kept"]), dropped, notes, f"{manifest['wall_s']:.1f}"])
    table.append(["all", "", "", "", ", ".join(f"{key} {n:.4g}" for key, n in totals.items()), f"{wall_s:.1f}"])
    return html.table(["stage", "rows read", "rows written", "dropped", "notes", "seconds"], table)


def _config(run: Run) -> str:
    return json.dumps(run.config.model_dump(mode="json"), indent=2)
