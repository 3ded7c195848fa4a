"""Curves of a real training in TensorBoard, Weights & Biases (offline) and MLflow (a local database), read back."""

import json
import struct
import sys
from pathlib import Path

import pytest

from spo_ray.errors import UserError
from spo_ray.pipeline.checks import preflight
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.run import Run
from spo_ray.runtime.tracking import Trackers
from spo_ray.train.log_follower import Follower, JobView
from spo_ray.train.spec import TrainJob

from ..helpers import SMALL, small_config
from ..train.processes import log_of, train

CURVES = ("loss", "grad_norm", "logps/chosen", "rewards/margins")


@pytest.fixture(scope="module")
def trained(referenced, tmp_path_factory):
    """The folder of a finished training."""
    out = tmp_path_factory.mktemp("trained")
    train(1, referenced.path, out, [*SMALL, "preference.alarm.max_both_fell=null"], "dpo")
    return out


def followed(trained, tmp_path, *overrides):
    run = Run(small_config(tmp_path, *overrides))
    rows, key = Artifact(trained, "rows"), "method_dpo_123456"
    job = TrainJob(config=run.config, model="model", rows=rows, out=str(trained), key=key, method="dpo")
    with Follower([job], ["method_dpo"], Trackers(run)):
        pass
    return run, job


def expected(trained):
    return {name: {r["step"]: r[name] for r in log_of(trained) if r.get(name) is not None} for name in CURVES}


def test_tensorboard(in_root, trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = followed(trained, tmp_path, "tracking=[tensorboard]")
    followed(trained, tmp_path, "tracking=[tensorboard]")  # the driver was started again
    events = EventAccumulator(str(run.root / "tensorboard" / "method_dpo"), purge_orphaned_data=True).Reload()
    for name, curve in expected(trained).items():
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(curve)
        assert len(events.Scalars(name)) == len(curve)
    assert sorted(p.name for p in run.root.iterdir()) == ["tensorboard"]  # and nothing for the others


def test_mlflow(in_root, trained, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    for _ in range(2):  # the second time it goes on, and has nothing to add
        followed(trained, tmp_path, "tracking=[mlflow]", "methods.dpo.beta=0.25")
    client = MlflowClient(uri)
    (made,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert made.info.status == "FINISHED"
    assert made.info.run_name == "quickstart/method_dpo"
    assert made.data.params["method.beta"] == "0.25"
    for name, curve in expected(trained).items():
        history = client.get_metric_history(made.info.run_id, name)
        assert len(history) == len(curve)
        assert {m.step: m.value for m in history} == pytest.approx(curve)


def wandb_records(file):
    """What an offline run holds: LevelDB's log format (blocks of 32 KiB, records cut at their ends) behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_offline(in_root, trained, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run, _ = followed(trained, tmp_path, "tracking=[wandb]")
    wandb.teardown()  # finish() may return before wandb's own process has written the last of it
    (file,) = run.root.glob("wandb/offline-run-*/*.wandb")
    found, heads = {name: {} for name in CURVES}, []
    for record in wandb_records(file):
        if record.run.run_id:
            heads.append(record.run)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if name in found:
                found[name][record.history.step.num] = json.loads(item.value_json)
    assert heads[0].project == "mine"
    assert heads[0].display_name == "quickstart/method_dpo"
    for name, curve in expected(trained).items():
        assert found[name] == pytest.approx(curve)


def test_a_tracker_that_fails_does_not_end_the_training(in_root, trained, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    (tmp_path / "file").write_text("")
    followed(trained, tmp_path, "tracking=[mlflow, tensorboard]")
    assert caplog.text.count("the tracker mlflow is off from here on: ") == 1
    assert list(Path(tmp_path).glob("quickstart/tensorboard/method_dpo/events*"))


def test_a_missing_library_is_one_clear_error(in_root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"tracking=\['wandb'\] needs wandb.*pip install 'spo-ray\[tracking\]'"):
        preflight(small_config(tmp_path, "tracking=[wandb]"))
    preflight(small_config(tmp_path))


def test_alarms_and_repeated_steps(in_root, trained, tmp_path, caplog):
    """A log that is cut back, as after the loss of a worker, is told and tracked once."""
    run = Run(small_config(tmp_path, "tracking=[tensorboard]"))
    out = tmp_path / "out"
    out.mkdir()
    lines = (trained / "log.jsonl").read_text().splitlines(keepends=True)
    lines[3] = json.dumps(json.loads(lines[3]) | {"alarm/chosen": 1.5, "alarm/stop": 1.0}) + "\n"
    rows = Artifact(trained, "rows")
    job = TrainJob(config=run.config, model="model", rows=rows, out=str(out), key="key", method="dpo")
    view, told = JobView(job, "method_dpo", Trackers(run)), []
    for end in (4, 2, 6):
        (out / "log.jsonl").write_text("".join(lines[:end]) + '{"step": 9')  # a line that is being written
        view.look(lambda *progress: told.append(progress[0]))
    view.close()
    assert told == [1, 2, 3, 4, 5]
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    start = messages.index("ALARM at step 3: preferred answers lost 1.50 nats per token (limit 0.05).")
    assert messages[start + 1 :] == [
        "Lower the learning rate; an SFT term helps too (spo). See docs/failures.md.",
        "Training ends at step 3, because on_alarm is stop.",
    ]
    assert all(len(f"[12:00:00] method_dpo: {message}") <= 100 for message in messages)
