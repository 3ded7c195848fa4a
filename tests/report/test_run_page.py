"""Sections of a run's own page, from made-up stages."""

import json
import re
import shutil

import pytest

from spo_ray import __version__
from spo_ray.config.load import load
from spo_ray.pipeline.finished import read_finished
from spo_ray.report.comparison import rewrite
from spo_ray.report.headline import p_text
from spo_ray.report.run_page import _alarm_table, _alarms, _greedy, _meaning
from spo_ray.report.samples import shown_samples
from spo_ray.report.scores import (
    Rows,
    comparison_tables,
    health_strip,
    health_verdict,
    other_suites,
    results,
    results_table,
)
from spo_ray.report.summary import origin, versions_of
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import write_json, write_rows
from spo_ray.runtime.run import Stage

from .made_up import made_up_run


@pytest.fixture
def run(folder, tmp_path):
    return read_finished(shutil.copytree(folder / "a", tmp_path / "a")).run


def test_alarms_are_told(run):
    alarms = [{"step": 20, "alarm": "chosen", "value": 1.5}, {"step": 40, "alarm": "both_fell", "value": 0.75}]
    alarms.append({"step": 60, "alarm": "chosen", "value": 1.1})
    path = run.root / "method_dpo"
    write_json(path / "result.json", json.loads((path / "result.json").read_text()) | {"alarms": alarms})
    found = _alarms(run, {"dpo": path, "spo": run.root / "method_spo"})
    assert [row[:3] for row in _alarm_table(found).rows] == [
        ["dpo", "20, 60", "preferred answers lost 1.50 nats per token (limit 0.05)"],
        ["dpo", "40", "both log-probabilities fell in 75% of pairs (limit 50%)"],
    ]


def test_a_methods_name_is_explained_with_its_settings(in_root):
    one, other = load(
        "configs/quickstart.yaml",
        ["methods={one: {type: dpo}, other: {type: spo, base: {type: simpo}, lambda_sft: 0.1}}"],
    ).methods.values()
    assert _meaning(one) == "DPO: direct preference optimization. Here with beta 0.5."
    settings = (
        "base.beta 2.0, base.margin 1.0, base.type simpo, lambda_sft 0.1, gamma 0.0, inner.steps 1, inner.eta 2e-05, "
    )
    assert _meaning(other).endswith(f" Here with {settings}inner.every 1.")


def test_ungraded_answers_come_from_text_health(run):
    for name in ("sft", "dpo"):

        def build(out, counts, name=name):
            row = dict.fromkeys(("logp", "logp_author"), -1.0) | {"finished": True, "prompt_ids": [1], "ids": [2]}
            row |= {"id": "q", "checkpoint": name, "seed": None}
            table = [row | {"written_by": name, "response": f"<i>{name}</i> says 5"}]
            table += [row | {"written_by": "sft", "response": "not its own", "seed": 0}] if name == "dpo" else []
            write_rows(out / "part-0.parquet", table, schema.HealthRow)

        run.execute(Stage(f"health_{name}", build, config={}, inputs={}))
    prompts = [{"id": "q", "prompt": [{"role": "user", "content": "How <many>?"}]}]
    greedy = _greedy(run, {"base": {}, "sft": {}, "dpo": {}}, {})
    assert {name: rows["q"]["response"] for name, rows in greedy.items()} == {
        "sft": "<i>sft</i> says 5",
        "dpo": "<i>dpo</i> says 5",
    }
    shown = shown_samples(greedy, prompts, "sft")
    assert (shown["asked"], shown["graded"], shown["filters"]) == (1, False, {})
    (line,) = shown["lines"]
    assert line["prompt"] == "user: How <many>?"
    assert [answer["correct"] for answer in line["answers"]] == [None, None]
    assert [piece for piece, differs in line["answers"][1]["pieces"] if differs] == ["dpo"]


def test_results_have_the_adjusted_p_value_against_sft():
    entry = {"accuracy_greedy": None, "accuracy_sampled": None, "delta_logp_chosen": -1.0, "delta_logp_rejected": None}
    row = {"metric": "accuracy_greedy", "first": "sft", "second": "dpo", "p_adjusted": 0.0312}
    compared = [row, row | {"metric": "accuracy_sampled", "p_adjusted": 0.9}, row | {"first": "spo", "p_adjusted": 0.8}]
    nothing = dict.fromkeys(entry)  # of ready pairs the base model has no figures
    assert results({"base": nothing, "sft": entry, "dpo": entry}, compared, "sft") == [
        {"method": "sft", "Δ log π chosen": "-1.00"},
        {"method": "dpo", "Δ log π chosen": "-1.00", "p against sft": "0.031"},
    ]


def test_without_sft_the_page_and_the_summary_call_it_reference(in_root, tmp_path):
    folder = made_up_run(tmp_path, "a", {"reference": 6, "dpo": 0, "spo": 12}, "sft=null")
    (folder / "old").mkdir()  # of no stage of this run
    (folder / "old" / "manifest.json").write_text("{")
    rewrite(read_finished(folder))
    page = (folder / "report" / "index.html").read_text().partition('<script type="module">')[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["methods"]) == ["reference", "dpo", "spo"]
    (p_value,) = [
        row["p_adjusted"]
        for row in summary["comparisons"]
        if row["metric"] == "accuracy_greedy" and {row["first"], row["second"]} == {"reference", "spo"}
    ]
    (line,) = [x for x in results(summary["methods"], summary["comparisons"], "reference") if x["method"] == "spo"]
    assert line["p against reference"] == p_text(p_value)
    assert "<th>p against reference</th>" in page
    assert "those of reference" in page
    assert "the same reference checkpoint" in " ".join(page.split())
    assert "SFT" not in page.partition("<h2>More about")[0]


def test_with_rounds_the_page_says_where_the_last_one_started(in_root, tmp_path):
    folder = made_up_run(tmp_path, "a", {"base": 2, "sft": 6, "dpo": 0, "spo": 12}, "rounds=2")
    rewrite(read_finished(folder))
    page = " ".join((folder / "report" / "index.html").read_text().partition("<script type=module>")[0].split())
    for text in (
        "in 2 rounds: from the second on each method continues from its own last checkpoint",
        "Training pairs of the first",
    ):
        assert text in page
    assert page.count("from each method&#39;s checkpoint of round 1 to the end of") == 2
    assert "from the SFT checkpoint" not in page
    assert "spo: SPO: a base loss, lambda times the lower level" in page
    assert "../method_spo_round2/result.json" in page


def test_runs_with_different_references_have_a_column_of_p_values_each():
    lines = [{"method": "a", "p against sft": "1", "Δ log π chosen": "x"}]
    lines += [{"method": "b", "greedy, 95%": "y", "p against reference": "2"}]
    table = results_table(lines)
    assert table.header == ["method", "greedy, 95%", "p against sft", "p against reference", "Δ log π chosen"]
    assert table.rows == [["a", "", "1", "", "x"], ["b", "y", "", "2", ""]]


def test_scores_lead_to_the_stage_that_has_their_rows(tmp_path):
    stages = ("health_dpo/part-0.parquet", "shift_dpo/part-0.parquet", "judged_dpo@j/part-0.parquet")
    for file in (*stages, "lm_eval_arc@dpo/results.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    keys = (
        "health/entropy",
        "health/logp_of_reference_samples",
        "health/kl_checkpoint_to_sft",
        "health/logp_reference_of_samples",
        "alpaca_eval/j/win_rate",
        "lm_eval:arc/arc/acc",
        "accuracy/x",
    )
    scores = {key: {"value": 0.25} for key in keys}
    suites = other_suites({"dpo": {"scores": scores}}, Rows(tmp_path))
    assert list(suites) == ["health", "alpaca_eval", "lm_eval:arc"]
    cells = {metric: cell for table in suites.values() for metric, cell in table.rows}
    places = {metric: cell.target.removeprefix("../") for metric, cell in cells.items()}
    assert {cell.text for cell in cells.values()} == {"0.25"}
    assert places == {
        "entropy": "health_dpo/part-0.parquet",
        "logp_of_reference_samples": "health_dpo/part-0.parquet",
        "kl_checkpoint_to_sft": "shift_dpo/part-0.parquet",
        "logp_reference_of_samples": "shift_dpo/part-0.parquet",
        "j/win_rate": "judged_dpo@j/part-0.parquet",
        "arc/acc": "lm_eval_arc@dpo/results.json",
    }


def test_versions_are_those_of_the_stages(run):
    for name, version in (("sft", "1.0"), ("pairs", "2.0")):
        file = run.root / name / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"versions": {"torch": version}}))
    assert set(versions_of(run)["torch"].split(", ")) >= {"1.0", "2.0"}


def test_the_page_says_when_where_and_how_long(run):
    """27 November 2026, 10:00 to 10:05:15 UTC, after an attempt of an hour."""
    assert re.fullmatch(rf"Made with spo_ray {re.escape(__version__)} on .*, \d+ cores.*\.", origin(run))
    status = {"started": 1795773600.0, "updated": 1795773915.0, "state": "finished"}
    write_json(run.root / "status.json", status)
    for stage in ("sft", "pairs"):
        file = run.root / stage / "manifest.json"
        manifest = json.loads(file.read_text()) | {"conditions": {"hardware": f"machine of {stage}"}}
        file.write_text(json.dumps(manifest))
    told = origin(run)
    assert told.startswith(f"Made on 27 November 2026 with spo_ray {__version__} on ")
    assert "machine of sft and machine of pairs" in told
    assert told.endswith("; took 5.2 min.")
    write_json(run.root / "status.json", status | {"earlier_s": 3600.0})
    assert origin(run).endswith("; took 1.1 h in several attempts.")
    write_json(run.root / "status.json", {"started": "yesterday"})
    assert origin(run).startswith("Made with spo_ray")


def test_figures_without_an_interval_are_shown_by_themselves():
    greedy, sampled = {"value": 0.5, "low": 0.4, "high": 0.6}, {"value": 0.5, "std": 0.0}
    changes = dict.fromkeys(("delta_logp_chosen", "delta_logp_rejected"))
    (line,) = results({"dpo": {"accuracy_greedy": greedy, "accuracy_sampled": sampled, **changes}}, [], "sft")
    assert line == {
        "method": "dpo",
        "greedy, 95%": "50.0% (40.0 – 60.0)",
        "sampled, 95%": "50.0% ±\N{NO-BREAK SPACE}0.0%",
    }
    row = {"metric": "m", "first": "a", "second": "b", "difference": 1.0, "low": None, "high": None, "wins": 3}
    row |= {"losses": 0, "n": 3, "p_value": 0.25, "p_adjusted": 0.25, "test": "t"}
    ((title, table),) = comparison_tables([row])
    assert title == "Paired tests of m (1, t)"
    assert table.rows[0][1:4] == ["+1", "", "3 : 0"]


def test_text_health_is_judged_by_the_intervals_of_both():
    """Both half-widths are 1, so that noise is up to the square root of 2; twice that is a clear departure."""

    def entry(length, kl=None, cut=0.0):
        scores = {"sampled/length": {"value": length, "low": length - 1, "high": length + 1}}
        scores |= {f"sampled/{key}": {"value": cut} for key in ("unfinished", "repetition_4", "longest_run")}
        scores |= {"entropy": {"value": 3.0}} | ({"kl_checkpoint_to_sft": {"value": kl}} if kl else {})
        return {"scores": {f"health/{key}": value for key, value in scores.items()}}

    methods = {"sft": entry(20), "nll": entry(21, 0.5), "spo": entry(21.5, 0.7), "dpo": entry(17, 2.0)}
    lengths = health_strip(methods, "sft").rows[0]
    assert [cell if isinstance(cell, str) else (cell.text, cell.level) for cell in lengths] == [
        "tokens per answer",
        ("20.0", 0),
        ("21.0", 0),
        ("21.5 ▲", 1),
        ("17.0 ▼", -2),
    ]
    furthest = "Furthest from sft is dpo: KL 2.00 nats per answer."
    assert health_verdict(methods, "sft") == [
        "Samples longer, more repetitive or more often cut off than sft's, beyond noise: spo (tokens per answer: 21.5 "
        "against 20.0).",
        furthest,
    ]
    methods["spo"] = entry(20.5, 0.7)
    assert health_verdict(methods, "sft") == [
        "No method's samples are longer, more repetitive or more often cut off than sft's, beyond noise.",
        furthest,
    ]
    assert health_verdict({"sft": methods["sft"]}, "sft") == health_verdict({"dpo": methods["dpo"]}, "sft") == []
