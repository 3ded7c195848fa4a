"""Lines about trainings in the driver, from step logs written by hand."""

import json
from pathlib import Path

from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.run import Run
from spo_ray.runtime.tracking import Trackers
from spo_ray.train import log_follower
from spo_ray.train.log_follower import Follower, JobView
from spo_ray.train.spec import CONTROLLER, TrainJob, failures_of, record_failure, text_of

from ..helpers import small_config


def job(tmp_path, name, method="dpo"):
    out = tmp_path / name
    out.mkdir(exist_ok=True)
    config = small_config(tmp_path, "preference.theta.max_grad_norm=2.0")
    return TrainJob(config=config, model="m", rows=Artifact(out, "rows"), out=str(out), key=name, method=method)


def write(one, steps, total=4):
    lines = [{"step": 0, "total_steps": total}]
    for step in steps:
        record = {"step": step, "total_steps": total, "loss": 0.5, "learning_rate": 2e-4, "grad_norm/phi": 0.5}
        record |= {"grad_norm/theta": step, "logps/chosen": -100.0, "logps/chosen_change": 0.5}
        lines.append(record | {"logps/rejected_change": -1.25, "rewards/margins": 0.175, "rewards/accuracies": 0.75})
    with (Path(one.out) / "log.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_step_says_what_changed_and_how_long_it_takes(in_root, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "spo_ray")
    now = [100.0]
    monkeypatch.setattr(log_follower.time, "monotonic", lambda: now[0])
    one, texts = job(tmp_path, "one"), []
    view = JobView(one, "method_dpo", Trackers(Run(one.config)))
    for now[0], steps in ((100.0, [1]), (110.0, [1, 2, 3]), (116.0, [1, 2, 3, 4])):
        write(one, steps)
        view.look(lambda step, total, text: texts.append(text))
    changes = "loss 0.5000, chosen +0.50, rejected -1.25, margin +0.17, accuracy 75%, lr 2.0e-04"
    assert texts == [
        f"step 1/4, {changes}, 0% clipped",
        f"step 2/4, {changes}, 10 s/step, 0% clipped",
        f"step 3/4, {changes}, 5 s/step, 33% clipped",
        f"step 4/4, {changes}, 5.3 s/step, 50% clipped",
    ]
    assert caplog.messages == texts[-1:]  # the last step is always told


def test_a_step_is_missed_from_the_start_of_its_training_on(in_root, tmp_path, monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(log_follower.time, "monotonic", lambda: now[0])
    one = job(tmp_path, "one")
    view = JobView(one, "method_dpo", Trackers(Run(one.config)))
    for now[0] in (1000.0, 1050.0, 1100.0):  # others were trained before it
        view.look(lambda step, total, text: None)
    assert caplog.messages == ["no step for 100 s"]


def test_a_training_is_told_when_it_starts_and_when_it_ends(in_root, tmp_path, caplog):
    caplog.set_level("INFO", "spo_ray")
    jobs = [job(tmp_path, name) for name in ("a", "b", "c")]
    for one, seconds in zip(jobs[:2], (1.5, 2.5), strict=True):
        (tmp_path / one.key / "result.json").write_text(json.dumps({"wall_s": seconds}))
    write(jobs[1], [1])  # by an earlier driver
    follower = Follower(jobs, ["method_a", "method_b", "method_c"], Trackers(Run(jobs[0].config)))
    follower.finished.set()  # the group failed before its third training
    with follower:
        pass
    told = [(record.stage, record.getMessage()) for record in caplog.records]
    assert told == [
        ("method_a", "started"),
        ("method_a", "done; its steps took 1.5 s"),
        ("method_b", "resumed"),
        ("method_b", "done; its steps took 2.5 s"),
    ]


def test_what_failed_is_told(in_root, tmp_path, caplog):
    one = job(tmp_path, "one")
    view = JobView(one, "method_dpo", Trackers(Run(one.config)))
    for failed, restart in ((1, True), (CONTROLLER, True), ("checkpoint one_step_9", False)):
        record_failure([one.out], {failed: text_of(OSError("gone"))}, restart=restart)
    view.look(lambda step, total, text: None)
    assert caplog.messages == [
        "worker 1 failed (OSError: gone): resuming from the newest checkpoint",
        "the controller failed (OSError: gone): resuming from the newest checkpoint",
        "the checkpoint one_step_9 failed (OSError: gone)",
    ]
    assert [failure["restart"] for failure in failures_of(tmp_path / "one")] == [True, True, False]
