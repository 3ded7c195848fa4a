"""One trial's own steps without Ray: ``tune`` and the training are stand-ins, the folder and its files are real."""

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from spo_ray.config.load import load
from spo_ray.config.train import AlarmConfig
from spo_ray.errors import EvaluatorLostError, UserError
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.run import Run
from spo_ray.sweep import trial as module
from spo_ray.sweep import tuner
from spo_ray.sweep.space import start_key
from spo_ray.sweep.trial import FAILED, SCORES, Context, Trial, percent, steps_of
from spo_ray.sweep.tuner import _scheduler
from spo_ray.train import launch
from spo_ray.train.alarm import Alarm
from spo_ray.train.score_gate import StoppedError, decide, decision, rung_folder, wait_for_decision

from .driver import prepare, prepared, small_run
from .test_space import LAMBDA, TOY

POINT = {"number": 0, "values": {LAMBDA: 2.0}, "seed": 0}


class Pairs(Artifact):
    count = 24  # 6 steps an epoch, 12 in all: scores behind 3, 6 and 12


class OneRank:
    index = 0

    def gather(self, items):
        return list(items)


@pytest.fixture
def stage(tmp_path, monkeypatch, in_root):
    """A trial with a training that a function stands in for; what is reported to Ray Tune is in ``reports``."""
    run: Run = small_run(tmp_path)
    artifact = Artifact(tmp_path, "digest")
    shared = prepared(run, Pairs(tmp_path, "pairs"), artifact)
    context = Context(run, prepare, tmp_path / "trials", "sweep", {start_key({}): shared}, [None], "none")
    found = SimpleNamespace(reports=[], fits=0, falls=Counter(), context=context, scored=[], keys=[])

    def train(run, jobs, names, group, **options):
        found.fits += 1
        (job,) = jobs
        found.keys.append(job.key)
        for step in job.score_at[:-1]:
            try:
                wait_for_decision(job.out, step, OneRank(), lambda folder: folder.mkdir(parents=True))
            except StoppedError:
                return
        (Path(job.out) / "result.json").write_text("{}")

    def score(out, step):
        found.scored.append(step)
        return {key: {"value": -found.falls[step]} for key in ("delta_logp_chosen", "delta_logp_chosen_per_token")}

    monkeypatch.setattr(launch, "fit", train)
    monkeypatch.setattr(module, "score_log", score)
    texts = {"accuracy_greedy": {"value": 0.5}, "accuracy_sampled": {"value": 0.5}}
    monkeypatch.setattr(module, "require_alive", lambda actor: None)
    monkeypatch.setattr(module, "score_texts", lambda *given: texts)
    monkeypatch.setattr(module.tune, "report", lambda metrics: found.reports.append(metrics))
    monkeypatch.setattr(module.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "id"))
    return found


def test_a_trial_reports_behind_every_share_and_is_done_at_its_end(stage):
    Trial(POINT, stage.context, "00000").run()
    assert [report["step"] for report in stage.reports] == [3, 6, 12]
    assert [report["progress"] for report in stage.reports] == [25.0, 50.0, 100.0]
    assert [report["done"] for report in stage.reports] == [False, False, True]


def test_where_shares_fall_on_one_step_the_last_counts(stage, monkeypatch):
    monkeypatch.setattr(Pairs, "count", 8)  # 4 steps
    stage.context.run.config.sweep.__dict__["score_at"] = [0.25, 0.5, 0.9, 1.0]
    Trial(POINT, stage.context, "00000").run()
    records = [json.loads(line) for line in (stage.context.folder / "00000" / SCORES).read_text().splitlines()]
    assert [(record["step"], record["share"]) for record in records] == [(1, 0.25), (2, 0.5), (4, 1.0)]
    assert [(report["progress"], report["done"]) for report in stage.reports] == [
        (25.0, False),
        (50.0, False),
        (100.0, True),
    ]
    assert steps_of(stage.context.run.config.sweep, 1) == {1: 1.0}


def test_nothing_is_trained_that_could_not_be_scored(stage, monkeypatch):
    def lost(actor):
        raise EvaluatorLostError("the evaluation actor is lost")

    monkeypatch.setattr(module, "require_alive", lost)
    with pytest.raises(EvaluatorLostError):
        Trial(POINT, stage.context, "00000").run()
    assert stage.fits == 0


def test_schedulers_compare_at_what_is_reported():
    sweep = load(TOY, ["sweep.score_at=[0.07, 1.0]"]).sweep
    assert 100 * 0.07 > percent(0.07) == 7.0
    assert _scheduler(sweep)._brackets[0]._rungs[-1][0] == 7.0


def test_trackers_tell_a_changed_sweep_of_the_same_name_apart(stage):
    for number, digest in enumerate(["a" * 64, "b" * 64]):
        Trial(POINT, replace(stage.context, digest=digest, folder=stage.context.folder / str(number)), "00000").run()
    assert stage.keys == ["trial_00000_aaaaaaaaaaaa", "trial_00000_bbbbbbbbbbbb"]


def test_the_room_of_the_first_start_is_kept_and_less_is_refused(stage, monkeypatch, tmp_path):
    config, begun = stage.context.run.config, []
    monkeypatch.setattr(tuner.tune.Tuner, "can_restore", lambda path: bool(begun))
    with_room = lambda cpus, room: tuner._room_of_start(config, tmp_path, [{"CPU": float(cpus)}], room)  # noqa: E731
    assert with_room(3, 2) == 2
    assert with_room(5, 3) == 3  # killed before Ray Tune had noted anything
    begun.append(True)
    assert with_room(9, 8) == 3
    assert with_room(4, 1) == 3  # max_concurrent was lowered
    with pytest.raises(UserError, match=r"with 3 trials at a time, .*has room for 2: bring nodes back, raise ray.num_"):
        with_room(3, 2)


def test_what_was_finished_is_reported_once_more_and_not_done_again(stage):
    """The driver was killed when the trial had ended and Ray Tune had noted its first score alone: without the last
    report it would keep that one.
    """
    Trial(POINT, stage.context, "00000").run()
    before = list(stage.reports)
    stage.falls.update({3: 9.0, 6: 9.0, 12: 9.0})
    stage.reports.clear()
    Trial(POINT, stage.context, "00000").run()
    assert stage.fits == 1
    assert stage.scored == [3, 6, 12]
    assert stage.reports == before


def test_a_killed_trial_goes_on_with_the_scores_that_it_has(stage):
    Trial(POINT, stage.context, "00000").run()
    folder = stage.context.folder / "00000"
    lines = (folder / SCORES).read_text().splitlines(keepends=True)
    (folder / SCORES).write_text(lines[0])
    (folder / "training" / "result.json").unlink()
    decide(folder / "training", 6, go_on=False)  # it was being stopped
    stage.reports.clear()
    Trial(POINT, stage.context, "00000").run()
    assert [report["step"] for report in stage.reports] == [3, 6, 12]
    assert stage.scored == [3, 6, 12, 6, 12]
    assert stage.fits == 2


def test_a_collapse_ends_the_training_before_it_is_reported(stage):
    stage.falls[6] = 3.5
    stage.context.run.config.sweep.__dict__["max_fall"] = 3.0
    Trial(POINT, stage.context, "00000").run()
    assert [report["done"] for report in stage.reports] == [False, True]
    record = json.loads((stage.context.folder / "00000" / SCORES).read_text().splitlines()[-1])
    assert record["stopped"] == "collapse: log pi(y_w) fell by 3.50 nats per token, more than sweep.max_fall=3"
    assert not (stage.context.folder / "00000" / "training" / "result.json").exists()


def test_a_fall_counts_per_token_as_the_alarm_counts_it(tmp_path):
    line = {"step": 0, "probe/delta_logp_chosen": -5.0, "probe/delta_logp_chosen_per_token": -0.1}
    line["probe/delta_logp_rejected"] = -1.0
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    fall = -module.score_log(tmp_path, 0)["delta_logp_chosen_per_token"]["value"]
    assert Alarm(AlarmConfig(max_fall=0.09)).check(line) == {"alarm/chosen": fall}
    assert Alarm(AlarmConfig(max_fall=fall)).check(line) == {}


def test_an_error_of_the_training_is_the_trials_own_and_stays(stage, monkeypatch):
    from spo_ray.errors import TrainingError

    def fail(*given, **options):
        stage.fits += 1
        raise TrainingError("the gradient is not finite")

    monkeypatch.setattr(launch, "fit", fail)
    with pytest.raises(TrainingError, match="not finite"):
        Trial(POINT, stage.context, "00000").run()
    assert "not finite" in json.loads((stage.context.folder / "00000" / FAILED).read_text())["error"]
    with pytest.raises(RuntimeError, match="not finite"):
        Trial(POINT, stage.context, "00000").run()
    assert stage.fits == 1


def test_an_objective_that_nothing_measures_is_refused(stage):
    stage.context.run.config.sweep.__dict__["objectives"] = ["pass@7"]
    with pytest.raises(Exception, match=r"there is no score pass@7; there are accuracy_greedy"):
        Trial(POINT, stage.context, "00000").run()


def test_training_waits_at_a_rung_for_the_decision(tmp_path):
    exported, passed = [], threading.Event()

    def export(folder):
        folder.mkdir(parents=True)
        exported.append(folder)

    def train():
        wait_for_decision(str(tmp_path), 4, OneRank(), export)
        passed.set()

    threading.Thread(target=train, daemon=True).start()
    while not rung_folder(tmp_path, 4).exists():
        time.sleep(0.01)
    assert not passed.wait(0.3)
    decide(tmp_path, 4, go_on=True)
    assert passed.wait(5)
    assert decision(tmp_path, 4) is True
    wait_for_decision(str(tmp_path), 4, OneRank(), export)  # after a restart: decided already
    assert len(exported) == 1
    decide(tmp_path, 8, go_on=False)
    with pytest.raises(StoppedError):
        wait_for_decision(str(tmp_path), 8, OneRank(), export)
