"""The paper's figures and tables on a run's own model and data.

    python pipelines/paper_figures.py dynamics --config configs/quickstart.yaml [key=value ...]
    python pipelines/paper_figures.py mass-shift --config configs/quickstart.yaml [key=value ...]
    python pipelines/paper_figures.py results runs/quickstart runs/sweep-toy

``dynamics`` (figure 1) and ``mass-shift`` (figure 2) are the probing experiments. They reuse the run's finished
stages, train the methods of type ``dpo`` and ``spo`` once more from the SFT checkpoint, and measure at every step. The
results are stages of the run, ``probe_dynamics`` and ``probe_mass_shift``, each with ``series.json`` and
``figure.svg``. ``results`` reads finished runs and sweeps only, see :mod:`spo_ray.report.paper`.
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
from spo_ray.errors import UserError
from spo_ray.pipeline import Part
from spo_ray.pipeline.cli import ConfigPath, Overrides, guarded, supervised
from spo_ray.pipeline.finished import read_finished
from spo_ray.pipeline.job import Job, referenced, run_job
from spo_ray.report.paper import write_paper
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import STEP_LOG, Artifact, RowCounts, read_lines, require_rows, write_json, write_rows
from spo_ray.runtime.console import log, place, set_verbosity
from spo_ray.runtime.run import Run, Stage
from spo_ray.runtime.status import recorded
from spo_ray.train.launch import train_methods
from spo_ray.train.spec import Start

CURVES = {
    "log pi(y_w)": "probe/logps/chosen",
    "log pi(y_l)": "probe/logps/rejected",
    "log pi(y*)": "probe/logps/top",
    "||g_w||^2 - <g_w,g_l>": "dynamics/chosen_term",
    "<g_w,g_l> - ||g_l||^2": "dynamics/rejected_term",
}
"""Columns of the step log by the name of their curve in figure 1."""
GROUPS = {"preferred": "probe/logps/chosen", "dispreferred": "probe/logps/rejected", "y*": "probe/logps/top"}
"""Columns of the step log by the name of their curve in figure 2."""
RATIO = "log ratio"
"""Curve of log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l), in nats."""
LOGPS = "mean log-probability, nats"
PANELS = {LOGPS: list(CURVES)[:3], "gradient terms": list(CURVES)[3:], "log-ratio, nats": [RATIO]}
"""Curves of each panel of figure 1."""
GROUP = 5
"""Preferred responses of figure 2, and dispreferred ones."""
CANDIDATES, ATTEMPTS = 4, 4
"""Questions that are tried at once for figure 2, and how often other ones are tried, with twice the samples."""


def probe_config(config: Config, **preference: Any) -> Config:
    """Return the configuration with methods of type ``dpo`` and ``spo`` only, which measures at every step.

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


def dynamics(run: Run, job: Job) -> dict[str, Any]:
    """Make figure 1: log-probabilities, gradient terms of Theorem 1 and log-ratios by step; return its summary.

    ``job`` must be finished up to the reference log-probabilities, with a configuration from :func:`probe_config`.
    """
    start = Start(job.policy, job.reference)
    trained = train_methods(run, dict.fromkeys(run.config.methods, start), suffix="_probe")
    series = {name: _series(artifact, CURVES) for name, artifact in trained.items()}
    for curves in series.values():
        sides = zip(curves["log pi(y_w)"], curves["log pi(y_l)"], strict=True)
        ratios = [[step, chosen - rejected] for (step, chosen), (_, rejected) in sides]
        curves[RATIO] = [[step, value - ratios[0][1]] for step, value in ratios]
    summary = {name: _moves(curves) | _forecasts(trained[name]) for name, curves in series.items()}
    _write(run, "probe_dynamics", trained, series, summary, PANELS)
    return summary


def mass_shift(run: Run, job: Job, samples: int) -> dict[str, Any]:
    """Make figure 2: log-probabilities of five preferred and five dispreferred responses and of y*; return its summary.

    Theorem 2 says that probability which leaves the preferred responses goes to y*, the most probable other output.
    So the question is one whose most probable response is wrong. That response is y*; no pair contains it.
    ``job`` must be finished up to the pairs.

    Raises:
        UserError: none of the questions that were tried has such samples.
    """
    groups = response_groups(run, job, samples)
    pairs = referenced(run, job.policy, groups, "probe_mass_tokens", "probe_mass_reference")
    trained = train_methods(run, dict.fromkeys(run.config.methods, Start(job.policy, pairs)), suffix="_probe_mass")
    series = {name: _series(artifact, GROUPS) for name, artifact in trained.items()}
    if not all(curves["y*"] for curves in series.values()):
        raise UserError(
            "the model's greedy answer is one of the preferred ones: ask for more --samples, or set another seed="
        )
    summary = {name: _moves(curves) for name, curves in series.items()}
    _write(run, "probe_mass_shift", trained, series, summary, {LOGPS: list(GROUPS)})
    return summary


def response_groups(run: Run, job: Job, samples: int) -> Artifact:
    """Sample responses to questions until one has enough right and wrong ones; return their pairs.

    Raises:
        UserError: none of the questions that were tried has such samples.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return _attempted(run, job, samples * 2**attempt, attempt)
        except UserError as error:
            log("probe", f"{error}. Trying other questions, with twice the samples")
    return _attempted(run, job, samples * 2 ** (ATTEMPTS - 1), ATTEMPTS - 1)


def _attempted(run: Run, job: Job, samples: int, attempt: int) -> Artifact:
    """Sample responses to the next questions; return the pairs of the first with enough of both kinds."""
    scored, suffix = Artifact(run.root / "sft_scores", ""), f"_{attempt + 1}" if attempt else ""
    asked = _questions(run, Artifact(scored.path, scored.manifest["digest"]), attempt, suffix)
    sampling = run.config.sampling.model_copy(update={"samples": samples, "batch_size": 1})
    source = SamplingJob(job.policy, run.config.engine, sampling, run.config.model)
    sampled = sample(run, f"probe_mass_samples{suffix}", source, asked)
    return _groups(run, grade_samples(run, f"probe_mass_scores{suffix}", sampled), suffix)


def _questions(run: Run, scored: Artifact, attempt: int, suffix: str) -> Artifact:
    """Choose the questions that the SFT model answers correctly least often, but not never; others each attempt."""
    first = attempt * CANDIDATES

    def build(out: Path, counts: RowCounts) -> None:
        table = [row for row in scored.rows() if any(row["correct"]) and not all(row["correct"])]
        table.sort(key=lambda row: (fmean(row["correct"]), row["id"]))
        kept = [{key: row[key] for key in ("id", "prompt", "gold")} for row in table[first : first + CANDIDATES]]
        counts.read, counts.kept = scored.count, len(kept)
        require_rows(len(kept), "more questions that the SFT model answers correctly sometimes, but not always")
        write_rows(out / "part-0.parquet", kept, schema.Prompt)

    settings = {"candidates": CANDIDATES, "first": first}
    return run.execute(Stage(f"probe_mass_questions{suffix}", build, settings, {"scored": scored}))


def _groups(run: Run, graded: Artifact, suffix: str) -> Artifact:
    """Pair each preferred response with each dispreferred one: the most probable responses of both kinds except y*."""
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
            "wrong one the most probable (with more --samples, or another seed=, one may)"
        )

    return run.execute(Stage(f"probe_mass_pairs{suffix}", build, {"group": GROUP}, {"graded": graded}))


class Ranked(NamedTuple):
    """One response to a question."""

    text: str
    logp: float
    """Summed log-probability in nats."""
    place: int
    """Index among the samples."""


def ranked(row: Mapping[str, Any], correct: bool) -> list[Ranked]:
    """Return the distinct finished responses of a question that are correct, or wrong; the most probable first."""
    found: dict[str, Ranked] = {}
    columns = zip(row["samples"], row["sample_logps"], row["correct"], row["finished"], strict=True)
    for number, (text, logp, right, ended) in enumerate(columns):
        if right is correct and ended and logp is not None and text.strip():
            found.setdefault(text.strip(), Ranked(text.strip(), logp, number))
    return sorted(found.values(), key=lambda response: -response.logp)


def _series(artifact: Artifact, curves: Mapping[str, str]) -> dict[str, list[list[float]]]:
    """Return (step, value) of some columns of the step log, by the names of their curves."""
    records = read_lines(artifact.path / STEP_LOG)
    return {name: [[r["step"], r[key]] for r in records if r.get(key) is not None] for name, key in curves.items()}


def _moves(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """Return the change of each curve since step 0, in nats."""
    return {name: points[-1][1] - points[0][1] for name, points in curves.items() if points and points[0][0] == 0}


def _forecasts(artifact: Artifact) -> dict[str, float]:
    """Return the share of steps in which the first-order forecast has the sign of the real change, for each side."""
    shares, records = {}, read_lines(artifact.path / STEP_LOG)
    for side in ("chosen", "rejected"):
        both = [(r.get(f"dynamics/forecast_{side}"), r.get(f"dynamics/realised_{side}")) for r in records]
        signs = [(a > 0) == (b > 0) for a, b in both if a is not None and b is not None]
        shares[f"forecast sign right, {side}"] = fmean(signs)
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

    run.execute(Stage(stage, build, inputs=dict(trained)))


def _figure(series: Mapping[str, Mapping[str, Any]], panels: Mapping[str, Sequence[str]]) -> str:
    """Return the figure as SVG: a row for each panel, a column for each method."""
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


Experiment = Callable[[Run, Job], dict[str, Any]]


def _probe(config: Path, overrides: tuple[str, ...], until: Part, work: Experiment, **preference: Any) -> int:
    """Run the job up to a part and then an experiment; print its summary."""

    def follow_probe() -> None:
        set_verbosity(False)
        run = Run(probe_config(load(config, overrides), **preference))
        if until == "pairs" and run.config.data.type == "preference":
            raise UserError("mass-shift follows right and wrong samples: take data of questions, or dynamics")
        with run.locked(), recorded(run):
            found = work(run, run_job(run, until))
        print(json.dumps(found, indent=2))
        log("probe", f"figure and series in {place(run.root)}/probe_*")

    return guarded(follow_probe)


app = App(name="paper_figures", help="The paper's figures and tables, on a run's own model and data.")


@app.command(name="dynamics")
def dynamics_command(*overrides: Overrides, config: ConfigPath) -> int:
    """Make figure 1: log-probabilities, gradient terms and log-ratios at every step of DPO and SPO."""
    return _probe(config, overrides, "reference", dynamics, dynamics_every=1)


@app.command(name="mass-shift")
def mass_shift_command(*overrides: Overrides, config: ConfigPath, samples: int = 500) -> int:
    """Make figure 2: log-probabilities of preferred and dispreferred responses and of y* to one question.

    Parameters
    ----------
    samples
        Responses to sample to the question.
    """
    work = partial(mass_shift, samples=samples)
    return _probe(config, overrides, "pairs", work, probe_pairs=25, dynamics_every=None)


@app.command(name="results")
def results_command(*runs: Path, out: Path = Path("runs/paper")) -> int:
    """Write the paper's tables and figures 3 and 4 of finished runs, and figure 5 of sweeps.

    Parameters
    ----------
    runs
        Folders of finished runs and sweeps.
    out
        Folder of the files.
    """

    def write() -> None:
        if not runs:
            raise UserError("name the folders of finished runs or sweeps, such as runs/quickstart")
        for file in write_paper([read_finished(folder) for folder in runs], out):
            log("paper", place(file))

    return guarded(write)


if __name__ == "__main__":
    sys.exit(supervised(app, sys.argv[1:]))
