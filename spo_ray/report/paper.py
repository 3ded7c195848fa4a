"""Results of finished runs and sweeps in the layout of the paper's accuracy table, table 4 and figures 3, 4 and 5."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from spo_ray.config.sweep import SweepConfig
from spo_ray.errors import UserError
from spo_ray.report.figures import batch_figure, chart, svg
from spo_ray.report.summary import Finished, summarise
from spo_ray.report.sweep_figures import sensitivity_figure
from spo_ray.sweep.results import Row
from spo_ray.sweep.space import sweep_of

MODELS = ("Qwen2.5-0.5B", "LLaMA-3.2-1B")
ACCURACY = {
    "base": ("Base Model", 36.3, 5.1),
    "sft": ("SFT", 44.3, 50.5),
    "dpo": ("SFT + Vanilla DPO", 35.4, 49.6),
    "spo": ("SFT + SPO", 49.3, 54.4),
}
"""The paper's table of accuracies on GSM8K (section 4.2.1): name of the row, and percent for each of ``MODELS``."""
WIN_RATES = {"sft": (44.5, 43.4), "dpo": (50.5, 48.1), "spo": (55.3, 51.0)}
"""The paper's table 4: LLaMA-3.2-3B's win rates on UltraFeedback by the first and the second annotator, percent."""
ABLATION = {"dpo": "DPO", "dpo_nll": "DPO+NLL", "spo": "SPO"}
"""Methods of the paper's figure 3."""
SEARCHED = ("lambda_sft", "gamma")
"""Parameters of the paper's figures 5a and 5b: ends of their keys."""


def write_paper(found: Sequence[Finished], out: Path) -> list[Path]:
    """Write ``NAME-tables.md`` and ``NAME-figure-N.svg`` of each run and sweep into ``out``; return the files.

    Raises:
        UserError: a run has neither graded answers nor AlpacaEval, or a sweep searches neither lambda nor gamma.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for each in found:
        parts = _of_sweep(each.trials.rows, sweep_of(each.run.config)) if each.trials else _of_run(each)
        for name, text in parts:
            files.append(out / f"{each.run.root.name}-{name}")
            files[-1].write_text(text, encoding="utf-8")
    return files


def _of_run(found: Finished) -> Iterator[tuple[str, str]]:
    """Yield names and contents of a run's files."""
    table = summarise(found)["methods"]
    names = {kind: name for name, kind in reversed(_kinds(found).items()) if name in table}
    tables = [_accuracies(found, table, names), _win_rates(found, table, names)]
    if not any(tables):
        raise UserError(f"{found.run.root} has neither graded answers nor suite alpaca_eval: the tables need one")
    yield "tables.md", "\n\n".join(filter(None, tables)) + "\n"
    accuracies = {ABLATION[kind]: table[name]["accuracy_sampled"] for kind, name in names.items() if kind in ABLATION}
    if all(accuracies.values()) and "DPO+NLL" in accuracies:
        yield "figure-3.svg", svg(_ablation(accuracies))
    trained = {ABLATION[k]: found.methods[names[k]].path for k in ("spo", "dpo") if k in names}
    if curves := batch_figure(trained):
        yield "figure-4.svg", svg(curves)


def _kinds(found: Finished) -> dict[str, str]:
    """Return each checkpoint's row in the paper's tables: the types of methods."""
    config = found.run.config
    start = "sft" if config.sft else "base"
    return {"base": "base", config.reference: start} | {name: method.type for name, method in config.methods.items()}


def _what(found: Finished, kind: str) -> list[str]:
    """Return the model and the name of a row; without SFT, methods are not called "SFT + ..."."""
    config, title = found.run.config, ACCURACY[kind][0]
    return [config.model.path, title if config.sft else title.removeprefix("SFT + ")]


def _accuracies(found: Finished, table: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the table of accuracies as Markdown, the paper's numbers beside the run's; empty without any."""
    lines = []
    for kind, (_, *paper) in ACCURACY.items():
        entry = table[names[kind]]["accuracy_sampled"] if kind in names else None
        if entry:
            spread = "" if entry["std"] is None else f" ± {100 * entry['std']:.1f}"
            cells = [*_what(found, kind), f"{100 * entry['value']:.1f}{spread}", *map(str, paper)]
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return ""
    head = (
        f"| Model | Method | Accuracy, % | {' | '.join(f'{model}, paper, not reproduced here' for model in MODELS)} |"
    )
    config = found.run.config.eval
    caption = (
        f"Accuracy at temperature {config.temperature:g}, mean and standard deviation over {len(config.seeds)} seeds."
    )
    return "\n".join([caption, "", head, f"|{' --- |' * (3 + len(MODELS))}", *lines])


def _win_rates(found: Finished, table: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the table of win rates against the baseline's answers as Markdown; empty without AlpacaEval."""
    keys = dict.fromkeys(key for name in names.values() for key in table[name]["scores"])
    judges = [key for key in keys if key.startswith("alpaca_eval/") and key.endswith("/win_rate")]
    if not judges:
        return ""
    own = [f"{key.split('/')[1]} (%)" for key in judges]
    paper = [f"LLaMA-3.2-3B, annotator {i}, paper, not reproduced here" for i in (1, 2)]
    lines = [f"| Model | Method | {' | '.join([*own, *paper])} |", f"|{' --- |' * (4 + len(own))}"]
    for kind, rates in WIN_RATES.items():
        if kind in names:
            values = [f"{table[names[kind]]['scores'][key]['value']:.1f}" for key in judges]
            cells = [*_what(found, kind), *values, *map(str, rates)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ablation(accuracies: Mapping[str, Mapping[str, Any]]) -> Any:
    """Plot bars of accuracies at temperature with their 95% intervals, as the paper's figure 3."""
    base = chart([{"method": name, **entry} for name, entry in accuracies.items()])
    x = alt.X("method:N", title=None, sort=list(ABLATION.values()), axis=alt.Axis(labelAngle=0))
    y = alt.Y("value:Q", title="accuracy, 95% interval", axis=alt.Axis(format="%"))
    bars = base.mark_bar(width=40).encode(x=x, y=y)
    return (bars + base.mark_rule().encode(x=x, y=alt.Y("low:Q"), y2="high:Q")).properties(width=260, height=220)


def _of_sweep(rows: Sequence[Row], sweep: SweepConfig) -> Iterator[tuple[str, str]]:
    """Yield the name and the content of a sweep's figure: the objective against lambda and against gamma."""
    keys = [key for end in SEARCHED for key in sweep.space if key.endswith(end)]
    if not keys:
        raise UserError(f"the sweep searches {', '.join(sweep.space)}: figure 5 is of lambda_sft and gamma")
    yield "figure-5.svg", svg(alt.hconcat(*(sensitivity_figure(rows, key, sweep) for key in keys)))
