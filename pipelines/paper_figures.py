"""The paper's probing experiments on a run's own model and data: its figures 1 (dynamics) and 2 (mass shift).

    python pipelines/paper_figures.py dynamics --config configs/quickstart.yaml [key=value ...]
    python pipelines/paper_figures.py mass-shift --config configs/quickstart.yaml [key=value ...]

Both start from the run's SFT checkpoint, reuse its finished stages, and train the run's methods of type ``dpo`` and
``spo`` anew, measuring at every step. Results are stages of the run: ``probe_dynamics`` and ``probe_mass_shift``, each
with ``series.json`` and ``figure.svg``.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from cyclopts import App

from spo_ray.config.load import load
from spo_ray.config.schema import Config
from spo_ray.data.grade import grade_samples
from spo_ray.data.sample import SamplingJob, sample
from spo_ray.data.tokenize import tokenise_pairs
from spo_ray.errors import UserError
from spo_ray.pipeline import Part
from spo_ray.pipeline.cli import ConfigPath, Overrides, guarded
from spo_ray.pipeline.job import run_job
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import STEP_LOG, Artifact, RowCounts, read_lines, write_json, write_rows
from spo_ray.runtime.console import log, place, set_verbosity
from spo_ray.runtime.failure import recorded
from spo_ray.runtime.run import Run, Stage
from spo_ray.train.launch import train_methods
from spo_ray.train.reference import reference_logps
from spo_ray.train.spec import Start

CURVES = {
    "log pi(y_w)": "probe/logps/chosen",
    "log pi(y_l)": "probe/logps/rejected",
    "log pi(y*)": "probe/logps/top",
    "||g_w||^2 - <g_w,g_l>": "dynamics/chosen_term",
    "<g_w,g_l> - ||g_l||^2": "dynamics/rejected_term",
}
GROUPS = {"preferred": "probe/logps/chosen", "dispreferred": "probe/logps/rejected", "y*": "probe/logps/top"}
RATIO = "log ratio"
"""log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)."""
PANELS = {
    "mean log-probability, nats": ["log pi(y_w)", "log pi(y_l)", "log pi(y*)"],
    "gradient terms": ["||g_w||^2 - <g_w,g_l>", "<g_w,g_l> - ||g_l||^2"],
    "log-ratio, nats": [RATIO],
}
MASS_PANEL = "mean log-probability, nats"
FORECAST = "forecast sign right"
GROUP = 5
CANDIDATES = 4
SIDES = ("chosen", "rejected")


def probe_config(config: Config, **preference: Any) -> Config:
    """The run's configuration with methods of type ``dpo`` and ``spo`` alone, and everything measured at every step.

    Raises:
        UserError: there is no such method.
    """
    methods = {name: method for name, method in config.methods.items() if method.type in ("dpo", "spo")}
    if not methods:
        raise UserError("a probe compares DPO with SPO: add methods of type dpo and spo")
    every = {"probe_every": 1, "probe_top_tokens": config.sampling.max_tokens, "health_every": None}
    changed = config.preference.model_copy(update=every | preference)
    alone = config.eval.model_copy(update={"while_training": False})
    return config.model_copy(update={"methods": methods, "preference": changed, "eval": alone})


def finished(run: Run, stage: str) -> Artifact:
    """A stage that the run has finished."""
    return Artifact(run.root / stage, Artifact(run.root / stage, "").manifest["digest"])


def dynamics(run: Run) -> dict[str, Any]:
    """Figure 1: log-probabilities, Theorem 1's gradient terms and log-ratios over the steps; gives what it shows.

    The run must be finished up to the reference log-probabilities, and its configuration be :func:`probe_config`'s.
    """
    start = Start(finished(run, "sft"), finished(run, "reference"))
    trained = train_methods(run, dict.fromkeys(run.config.methods, start), suffix="_probe")
    series = {name: _series(artifact, CURVES) for name, artifact in trained.items()}
    for curves in series.values():
        sides = zip(curves["log pi(y_w)"], curves["log pi(y_l)"], strict=True)
        ratios = [[step, chosen - rejected] for (step, chosen), (_, rejected) in sides]
        curves[RATIO] = [[step, value - ratios[0][1]] for step, value in ratios]
    summary = {name: _moves(curves) | _forecasts(trained[name]) for name, curves in series.items()}
    _write(run, "probe_dynamics", trained, series, summary, PANELS)
    return summary


def mass_shift(run: Run, samples: int) -> dict[str, Any]:
    """Figure 2: five preferred and five dispreferred responses to one question, and y*, which no pair contains.

    Theorem 2 says that mass which leaves the preferred responses goes to y*, the most probable other output. So the
    question is one whose most probable response is wrong: that response is y*.

    Raises:
        UserError: none of the questions that were tried has such samples.
    """
    policy = finished(run, "sft")
    asked = _questions(run, finished(run, "sft_scores"))
    sampling = run.config.sampling.model_copy(update={"samples": samples, "batch_size": 1})
    source = SamplingJob(policy, run.config.engine, sampling, run.config.model.chat_template)
    graded = grade_samples(run, "probe_mass_scores", sample(run, "probe_mass_samples", source, asked))
    pairs = reference_logps(
        run, "probe_mass_reference", policy, tokenise_pairs(run, "probe_mass_tokens", _groups(run, graded))
    )
    trained = train_methods(run, dict.fromkeys(run.config.methods, Start(policy, pairs)), suffix="_probe_mass")
    series = {name: _series(artifact, GROUPS) for name, artifact in trained.items()}
    missing = [name for name, curves in series.items() if not curves["y*"]]
    if missing:
        raise UserError(
            "the model's greedy answer is one of the preferred ones: ask for more samples=, or another seed="
        )
    summary = {name: _moves(curves) for name, curves in series.items()}
    _write(run, "probe_mass_shift", trained, series, summary, {MASS_PANEL: list(GROUPS)})
    return summary


def _questions(run: Run, scored: Artifact) -> Artifact:
    """The questions that the SFT model answers rightly least often, but sometimes."""

    def build(out: Path, counts: RowCounts) -> None:
        table = [row for row in scored.rows() if any(row["correct"]) and not all(row["correct"])]
        table.sort(key=lambda row: (fmean(row["correct"]), row["id"]))
        kept = [{key: row[key] for key in ("id", "prompt", "gold")} for row in table[:CANDIDATES]]
        counts.read, counts.kept = scored.count, len(kept)
        write_rows(out / "part-0.parquet", kept, schema.Prompt)

    return run.execute(
        Stage("probe_mass_questions", build, config={"candidates": CANDIDATES}, inputs={"scored": scored})
    )


def _groups(run: Run, graded: Artifact) -> Artifact:
    """Each of the preferred responses against one of the dispreferred: the most probable ones of either kind but y*."""
    stage = graded.path.name

    def build(out: Path, counts: RowCounts) -> None:
        for row in graded.rows():
            counts.read += 1
            right, wrong = (ranked(row, correct) for correct in (True, False))
            if len(right) < GROUP or len(wrong) <= GROUP or right[0].logp > wrong[0].logp:
                reason = f"{len(right)} right and {len(wrong)} wrong responses, or the most probable is right"
                counts.reject(row["id"], reason, row["prompt"])
                continue
            same = {"prompt": [{"role": "user", "content": row["prompt"]}], "source_id": row["id"]}
            kept = [
                same
                | {"id": f"{row['id']}-{better.place}-{worse.place}", "chosen": better.text, "rejected": worse.text}
                | {"chosen_source": f"{stage}:{better.place}", "rejected_source": f"{stage}:{worse.place}"}
                for better, worse in product(right[:GROUP], wrong[1 : GROUP + 1])
            ]
            counts.kept = len(kept)
            counts.facts |= {"question": row["prompt"], "y*": wrong[0].text, "y*_logp": wrong[0].logp}
            write_rows(out / "part-0.parquet", kept, schema.Pair)
            return
        raise UserError(
            f"none of {graded.count} questions has {GROUP} different right and {GROUP + 1} wrong responses, with a "
            "wrong one the most probable: ask for more --samples, or set another seed="
        )

    return run.execute(Stage("probe_mass_pairs", build, config={"group": GROUP}, inputs={"graded": graded}))


class Ranked(NamedTuple):
    """One of a question's responses."""

    text: str
    logp: float
    place: int


def ranked(row: Mapping[str, Any], correct: bool) -> list[Ranked]:
    """Different finished responses of a question that are right, or wrong; the most probable first."""
    found: dict[str, Ranked] = {}
    columns = zip(row["samples"], row["sample_logps"], row["correct"], row["finished"], strict=True)
    for number, (text, logp, right, ended) in enumerate(columns):
        if right is correct and ended and logp is not None and text.strip():
            found.setdefault(text.strip(), Ranked(text.strip(), logp, number))
    return sorted(found.values(), key=lambda response: -response.logp)


def _series(artifact: Artifact, curves: Mapping[str, str]) -> dict[str, list[list[float]]]:
    """[step, value] of some of the step log's columns."""
    records = read_lines(artifact.path / STEP_LOG)
    return {name: [[r["step"], r[key]] for r in records if r.get(key) is not None] for name, key in curves.items()}


def _moves(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """How far each curve of log-probabilities went (nats)."""
    return {name: points[-1][1] - points[0][1] for name, points in curves.items() if points and points[0][0] == 0}


def _forecasts(artifact: Artifact) -> dict[str, float]:
    """Share of steps in which the first-order forecast has the sign of what happened."""
    shares, records = {}, read_lines(artifact.path / STEP_LOG)
    for side in SIDES:
        both = [(r.get(f"dynamics/forecast_{side}"), r.get(f"dynamics/realised_{side}")) for r in records]
        signs = [(a > 0) == (b > 0) for a, b in both if a is not None and b is not None]
        shares[f"{FORECAST}, {side}"] = fmean(signs)
    return shares


def _write(
    run: Run,
    stage: str,
    trained: Mapping[str, Artifact],
    series: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    panels: Mapping[str, Sequence[str]],
) -> None:
    def build(out: Path, counts: RowCounts) -> None:
        counts.facts["summary"] = summary
        write_json(out / "series.json", series)
        (out / "figure.svg").write_text(_figure(series, panels), encoding="utf-8")

    run.execute(Stage(stage, build, config={}, inputs=dict(trained)))


def _figure(series: Mapping[str, Mapping[str, Any]], panels: Mapping[str, Sequence[str]]) -> str:
    """A row for each panel, a column for each method."""
    import altair as alt
    import vl_convert

    charts = []
    for title, names in panels.items():
        values = [
            {"method": method, "curve": name, "step": step, "value": value}
            for method, curves in series.items()
            for name in names
            for step, value in curves[name]
        ]
        base: Any = alt.Chart(alt.Data(values=values), width=260, height=160)
        lines = base.mark_line().encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(type="symlog")),
            color=alt.Color("curve:N", title=None),
        )
        charts.append(lines.facet(column=alt.Column("method:N", title=None)))
    whole = alt.vconcat(*charts).resolve_scale(color="independent").configure(background="white")
    return vl_convert.vegalite_to_svg(whole.to_json())


def _probe(config: Path, overrides: tuple[str, ...], until: Part, work: Callable[[Run], Any], **preference: Any) -> int:
    """Run the job up to a part, then an experiment, and print what it found."""

    def follow_probe() -> None:
        set_verbosity(False)
        run = Run(probe_config(load(config, overrides), **preference))
        if until == "pairs" and run.config.data.type == "preference":
            raise UserError("mass-shift follows right and wrong samples: take data of questions, or dynamics")
        with run.locked(), recorded(run):
            run_job(run, until)
            found = work(run)
        print(json.dumps(found, indent=2))
        log("probe", f"figure and series in {place(run.root)}/probe_*")

    return guarded(follow_probe)


app = App(name="paper_figures", help="The paper's probing experiments, on a run's own model and data.")


@app.command(name="dynamics")
def dynamics_command(*overrides: Overrides, config: ConfigPath) -> int:
    """Figure 1: log-probabilities, gradient terms and log-ratios at every step of DPO and SPO."""
    return _probe(config, overrides, "reference", dynamics, dynamics_every=1)


@app.command(name="mass-shift")
def mass_shift_command(*overrides: Overrides, config: ConfigPath, samples: int = 500) -> int:
    """Figure 2: where the probability goes, by following preferred, dispreferred responses and y* to one question.

    Parameters
    ----------
    samples
        Responses to sample to the question.
    """
    work = partial(mass_shift, samples=samples)
    return _probe(config, overrides, "pairs", work, probe_pairs=25, dynamics_every=None)


if __name__ == "__main__":
    sys.exit(app() or 0)
