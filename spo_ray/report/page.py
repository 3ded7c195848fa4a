"""The report: one self-contained HTML page that works offline, and ``summary.json``."""

import os
from html import escape
from pathlib import Path
from typing import Any

from spo_ray.report.figures import accuracy_figure, dynamics_figure, log_probability_figure
from spo_ray.report.summary import summarise
from spo_ray.run import MANIFEST, Artifact, Ledger, Run, say, write_json

SHOWN_QUESTIONS = 8
CHOSEN_CHANGE = "Δ log π chosen"
STYLE = """
:root{--ink:#1c2430;--paper:#fff;--faint:#66707f;--line:#d8dde5;--panel:#f6f7f9}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem}
body{margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}
h2{font-size:1.15rem;margin-top:2.2rem}
p.note{color:var(--faint);font-size:.9rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{text-align:right;padding:.3rem .7rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
td.text,th.text{text-align:left;vertical-align:top;min-width:9rem;font-size:.85rem;white-space:pre-wrap}
.right{color:#1b7837}
.wrong{color:#b2182b}
.fell{color:#b2182b;font-weight:600}
.rose{color:#1b7837}
svg{max-width:100%;height:auto;background:#fff;border-radius:6px}
footer{margin-top:3rem;color:var(--faint);font-size:.85rem}
"""


def write_report(run: Run, methods: dict[str, Artifact], answers: dict[str, Artifact], questions: Artifact) -> None:
    """Write ``report/index.html`` and ``summary.json`` from the finished stages."""
    summary = summarise(run, methods, answers)

    def build(out: Path, ledger: Ledger) -> None:
        ledger.facts["summary"] = "../summary.json"
        (out / "index.html").write_text(_page(run, summary, methods, answers, questions), encoding="utf-8")

    inputs = {f"method_{k}": v for k, v in methods.items()} | {f"eval_{k}": v for k, v in answers.items()}
    inputs["questions"] = questions
    report = run.stage("report", build, config={}, inputs=inputs)
    write_json(run.root / "summary.json", summary)
    for line in _text_table(summary["methods"]):
        print(line)
    say("report", os.path.relpath(report.path / "index.html"))


def _page(
    run: Run, summary: dict[str, Any], methods: dict[str, Artifact], answers: dict[str, Artifact], questions: Artifact
) -> str:
    table = summary["methods"]
    sections = [
        f"<h1>{escape(run.config.name)}</h1>",
        f"<p class=note>{escape(_describe(run))}</p>",
        "<h2>Results</h2>",
        _html_table(_header(table), _lines(table)),
        "<p class=note>Greedy: Wilson interval. Sampled: mean ± standard deviation over seeds; interval over the "
        "questions. Δ log π: mean change on the training pairs, in nats, from the SFT checkpoint to the end of the "
        "method's training; red: chosen answers lose probability.</p>",
    ]
    if answers:
        sections += ["<h2>Accuracy</h2>", accuracy_figure(table)]
    sections += [
        "<h2>Log-probabilities during training</h2>",
        log_probability_figure({name: artifact.path for name, artifact in methods.items()}),
        f"<p class=note>Mean over {run.config.preference.probe_pairs} fixed training pairs at most; symmetric "
        "logarithmic scale. A falling green line is the preferred answers losing probability; grey are the SFT model's "
        "own greedy answers where they are not the chosen ones.</p>",
    ]
    dynamics = dynamics_figure({name: artifact.path for name, artifact in methods.items()})
    if dynamics:
        sections += [
            "<h2>Gradient terms during training</h2>",
            dynamics,
            "<p class=note>Theorem 1: under the preference loss alone the chosen log-probability moves with the green "
            "term, the rejected one with the red. A negative green term is a step that lowers the preferred answers "
            "unless something else holds them. Of the batch's mean gradients, every "
            f"{run.config.preference.dynamics_every} steps; symmetric logarithmic scale.</p>",
        ]
    if answers:
        sections += ["<h2>Answers to held-out questions</h2>", _samples(answers, questions)]
    sections += ["<h2>Stages</h2>", _stages(run)]
    body = "\n".join(sections)
    versions = " · ".join(f"{k} {v}" for k, v in summary["versions"].items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.config.name)}: spo_ray report</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n<footer>{escape(versions)}</footer></body></html>\n"
    )


def _describe(run: Run) -> str:
    config = run.config
    p = config.preference
    return (
        f"{config.data.type} data, model {config.model.path}, seed {config.seed}. Every method: {p.epochs} epochs, "
        f"batch {p.batch_size}, learning rates {p.theta.lr:g} (backbone) and {p.phi.lr:g} (adapters) unless it has its "
        "own, from the same SFT checkpoint."
    )


def _header(table: dict[str, Any]) -> list[str]:
    columns = ["method"]
    if table["base"]["accuracy_greedy"]:
        columns += ["greedy", "95% interval", "sampled", "95% interval"]
    columns += [CHOSEN_CHANGE, "Δ log π rejected"]
    return [*columns, "held-out reward accuracy"] if any("held_out" in entry for entry in table.values()) else columns


def _lines(table: dict[str, Any]) -> list[list[str]]:
    width = len(_header(table))
    lines = []
    for name, entry in table.items():
        line = [name]
        if greedy := entry["accuracy_greedy"]:
            sampled = entry["accuracy_sampled"]
            line += [
                f"{greedy['value']:.1%}",
                f"{greedy['low']:.1%} – {greedy['high']:.1%}",
                f"{sampled['value']:.1%} ± {sampled['std']:.1%}",
                f"{sampled['low']:.1%} – {sampled['high']:.1%}",
            ]
        line += ["" if entry[k] is None else f"{entry[k]:+.2f}" for k in ("delta_logp_chosen", "delta_logp_rejected")]
        if reward := entry.get("held_out", {}).get("reward_accuracy"):
            line.append(f"{reward['value']:.1%} ({reward['low']:.1%} – {reward['high']:.1%})")
        lines.append(line + [""] * (width - len(line)))
    return lines


def _html_table(header: list[str], lines: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    marked = {i for i, name in enumerate(header) if name == CHOSEN_CHANGE}
    body = "".join(f"<tr>{''.join(_cell(cell, i in marked) for i, cell in enumerate(line))}</tr>" for line in lines)
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _cell(text: str, marked: bool) -> str:
    change = {"-": "fell", "+": "rose"}.get(text[:1], "") if marked else ""
    return f'<td class="{change}">{escape(text)}</td>' if change else f"<td>{escape(text)}</td>"


def _text_table(table: dict[str, Any]) -> list[str]:
    rows = [_header(table), *_lines(table)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _samples(answers: dict[str, Artifact], questions: Artifact) -> str:
    greedy = {
        name: {row["id"]: row for row in artifact.rows() if row["seed"] is None} for name, artifact in answers.items()
    }
    first = next(iter(greedy.values()))
    differing = [i for i in first if len({rows[i]["correct"] for rows in greedy.values()}) > 1]
    prompts = {row["id"]: row["prompt"] for row in questions.rows()}
    head = "".join(f"<th class=text>{escape(name)}</th>" for name in greedy)
    body = ""
    for question in (differing or list(first))[:SHOWN_QUESTIONS]:
        cells = (greedy[name][question] for name in greedy)
        body += f"<tr><td class=text>{escape(prompts[question])}</td>{''.join(_answer(row) for row in cells)}</tr>"
    return (
        "<p class=note>Greedy answers to the first questions on which the methods disagree.</p>"
        f"<div class=scroll><table><tr><th class=text>question</th>{head}</tr>{body}</table></div>"
    )


def _answer(row: dict[str, Any]) -> str:
    return f'<td class="text {"right" if row["correct"] else "wrong"}">{escape(row["response"])}</td>'


def _stages(run: Run) -> str:
    lines = []
    for path in sorted(run.root.glob(f"*/{MANIFEST}"), key=lambda p: p.stat().st_mtime):
        manifest = Artifact(path.parent, "").manifest
        counts = manifest["rows"]
        dropped = ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items())
        lines.append(
            [manifest["stage"], str(counts["read"]), str(counts["kept"]), dropped, f"{manifest['wall_s']:.1f}"]
        )
    return _html_table(["stage", "rows read", "rows written", "dropped", "seconds"], lines)
