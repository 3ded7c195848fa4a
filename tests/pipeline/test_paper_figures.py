"""The paper's probing experiments on the toy task, for real and small; choosing responses on made-up samples."""

import json
import math
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import paper_figures
from pipelines.paper_figures import GROUP, mass_shift_command, probe_config, ranked, response_groups
from spo_ray.config.methods import Ipo
from spo_ray.errors import UserError
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.run import Run, Stage

from ..conftest import ROOT
from ..helpers import SMALL, small_config
from .test_job import run

PROBE = ["pipelines/paper_figures.py"]


def test_responses_are_ranked_by_probability_and_taken_once():
    row = {
        "samples": ["a", " a ", "b", "c", "", "d"],
        "sample_logps": [-3.0, -3.0, -1.0, -2.0, -0.1, None],
        "correct": [True, True, True, False, True, True],
        "finished": [True, True, True, True, True, True],
    }
    assert [(r.text, r.logp, r.place) for r in ranked(row, True)] == [("b", -1.0, 2), ("a", -3.0, 0)]
    assert [r.text for r in ranked(row, False)] == ["c"]
    assert ranked(row | {"finished": [False] * 6}, True) == []


def test_a_probe_needs_dpo_or_spo(in_root, tmp_path):
    config = small_config(tmp_path)
    found = probe_config(config, dynamics_every=1)
    assert set(found.methods) == {"dpo", "spo"}
    assert (found.preference.probe_every, found.preference.dynamics_every) == (1, 1)
    alone = config.model_copy(update={"methods": {"ipo": Ipo(type="ipo")}})
    with pytest.raises(UserError, match="add methods of type dpo and spo"):
        probe_config(alone)


def test_mass_shift_needs_samples_that_are_graded(in_root, capsys):
    assert mass_shift_command(config=ROOT / "configs" / "preferences.yaml") == 2
    assert "take data of questions" in capsys.readouterr().err


@pytest.mark.parametrize("usable", [2, 9])
def test_mass_shift_tries_other_questions_with_more_samples(in_root, tmp_path, monkeypatch, usable):
    """With a stand-in for the engine, which would sample for minutes: the question of this number is usable."""
    run, asked = Run(small_config(tmp_path)), []
    rows = [{"id": f"q{i}", "prompt": f"p{i}", "gold": "g", "correct": [True, False]} for i in range(12)]

    def scores(out, counts):
        pq.write_table(pa.Table.from_pylist(rows), out / "part-0.parquet")

    def sample(run, name, source, questions):
        asked.append((source.sampling.samples, [row["id"] for row in questions.rows()]))
        return questions

    def grade(run, name, questions):
        def build(out, counts):
            table = []
            for row in questions.rows():
                right = GROUP if row["id"] == f"q{usable}" else 1
                correct = [True] * right + [False] * (GROUP + 1)
                texts = [f"answer {i}" for i in range(len(correct))]
                logps = [-9.0] * right + [-1.0] * (GROUP + 1)
                own = {"samples": texts, "sample_logps": logps, "correct": correct, "finished": [True] * len(correct)}
                table.append(row | own)
            pq.write_table(pa.Table.from_pylist(table), out / "part-0.parquet")

        return run.execute(Stage(name, build, {}, {"questions": questions}))

    run.execute(Stage("sft_scores", scores, {}, {}))
    monkeypatch.setattr(paper_figures, "sample", sample)
    monkeypatch.setattr(paper_figures, "grade_samples", grade)
    job = SimpleNamespace(policy=Artifact(tmp_path, "policy"))
    order = sorted(row["id"] for row in rows)
    place = order.index(f"q{usable}") // paper_figures.CANDIDATES
    pairs = response_groups(run, job, 100)
    assert {row["source_id"] for row in pairs.rows()} == {f"q{usable}"}
    assert asked == [(100 * 2**i, order[4 * i : 4 * i + 4]) for i in range(place + 1)]
    monkeypatch.setattr(paper_figures, "GROUP", 99)  # no question has so many responses
    with pytest.raises(UserError, match="no more questions that the SFT model answers correctly sometimes"):
        response_groups(run, job, 100)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Both probes on one run."""
    output = tmp_path_factory.mktemp("runs")
    fast = ["preference.epochs=2", "preference.theta.lr=1e-3", "preference.phi.lr=1e-3", "sampling.max_tokens=48"]
    arguments = ["--config", "configs/quickstart.yaml", f"output={output}", *SMALL, *fast]
    run([sys.executable, *PROBE, "mass-shift", *arguments, "--samples", "400"])
    run([sys.executable, *PROBE, "dynamics", *arguments])
    return output / "quickstart"


def read(root, name):
    return json.loads((root / name / "series.json").read_text())


@pytest.mark.slow
def test_dynamics_follow_every_step(probed):
    series = read(probed, "probe_dynamics")
    assert set(series) >= {"dpo", "spo"}
    for name, curves in series.items():
        log = [json.loads(line) for line in (probed / f"method_{name}_probe" / "log.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in log]
        assert [step for step, _ in curves["log pi(y_w)"]] == steps
        assert [step for step, _ in curves["||g_w||^2 - <g_w,g_l>"]] == steps[1:]
        first, last = log[0], log[-1]
        gain = {side: last[f"probe/logps/{side}"] - first[f"probe/logps/{side}"] for side in ("chosen", "rejected")}
        assert curves["log ratio"][0][1] == 0.0
        assert curves["log ratio"][-1][1] == pytest.approx(gain["chosen"] - gain["rejected"])
    assert "<svg" in (probed / "probe_dynamics" / "figure.svg").read_text()
    summary = json.loads((probed / "probe_dynamics" / "manifest.json").read_text())["facts"]["summary"]
    assert summary["dpo"]["log ratio"] > 0  # what DPO is for
    assert 0.5 < summary["dpo"]["forecast sign right, rejected"] <= 1.0


@pytest.mark.slow
def test_mass_shift_follows_three_groups_that_share_nothing(probed):
    pairs = Artifact(probed / "probe_mass_pairs", "").rows()
    facts = json.loads((probed / "probe_mass_pairs" / "manifest.json").read_text())["facts"]
    (graded,) = (r for r in Artifact(probed / "probe_mass_scores", "").rows() if r["id"] == pairs[0]["source_id"])
    texts = {text.strip(): ok for text, ok in zip(graded["samples"], graded["correct"], strict=True)}
    chosen, rejected = ({pair[side] for pair in pairs} for side in ("chosen", "rejected"))
    assert len(pairs) == GROUP * GROUP
    assert len(chosen) == len(rejected) == GROUP
    assert all(texts[text] for text in chosen)
    assert not any(texts[text] for text in rejected)
    assert facts["y*"] not in chosen | rejected
    assert texts[facts["y*"]] is False
    assert facts["y*_logp"] == max(logp for logp in graded["sample_logps"] if logp is not None)
    for curves in read(probed, "probe_mass_shift").values():
        assert math.exp(curves["y*"][0][1]) <= 1.0
        assert curves["y*"][0][1] == pytest.approx(facts["y*_logp"], abs=0.05)  # vLLM's, and the trainer's
        assert curves["dispreferred"][-1][1] < curves["dispreferred"][0][1]
    assert "<svg" in (probed / "probe_mass_shift" / "figure.svg").read_text()
