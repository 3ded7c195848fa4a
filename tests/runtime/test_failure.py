"""What a failure says, in tasks and workers of a real cluster; and ``status.json``."""

import json
import os
import sys

import pytest
import ray

from spo_ray.config.base import is_secret
from spo_ray.errors import UserError
from spo_ray.pipeline.cli import guarded
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import write_rows
from spo_ray.runtime.console import redact
from spo_ray.runtime.failure import card_of, command_line
from spo_ray.runtime.map_rows import each_row, map_shards
from spo_ray.runtime.run import Run, Stage
from spo_ray.runtime.status import STATUS, TRACEBACK, recorded

from ..helpers import small_config


@pytest.fixture
def run(in_root, tmp_path):
    return Run(small_config(tmp_path))


def status_of(run):
    return json.loads((run.root / STATUS).read_text())


def attempt(run, work):
    def job():
        with run.locked(), recorded(run):
            work()

    return guarded(job)


def stumble(row):
    if row["id"] == "q-3":
        raise ZeroDivisionError(f"cannot grade with {os.environ.get('SPO_TEST_TOKEN', 'the key hunter2secret')}")
    return [row]


def stumbling():
    return each_row(stumble)


def failing_stage(run):
    def prompts(out, counts):
        table = [{"id": f"q-{i}", "prompt": "p", "gold": "g"} for i in range(5)]
        write_rows(out / "part-0.parquet", table, schema.Prompt)

    source = run.execute(Stage("source", prompts, config={}, inputs={}))

    def build(out, counts):
        map_shards("grading", source, out, counts, mapper=stumbling, kind=schema.Prompt, batch_size=4)

    run.execute(Stage("grading", build, config={}, inputs={"rows": source}))


def test_a_failure_in_a_task_names_stage_row_code_and_what_to_do(local_ray, run, capsys, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hunter2secret")
    monkeypatch.setattr(sys, "argv", ["/somewhere/spo-ray", "run", "--config", "my file.yaml", "note=hunter2secret"])
    assert attempt(run, lambda: failing_stage(run)) == 1
    text = capsys.readouterr().err  # a cluster that has just started may say so first
    assert "\nerror: ZeroDivisionError: cannot grade with the key [MY_API_KEY]\n" in f"\n{text}", text
    assert "  stage   grading\n" in text
    assert "  where   row q-3; shard 00000, rows q-0 to q-3\n" in text
    assert "tests/runtime/test_failure.py" in text
    assert "in stumble: raise ZeroDivisionError" in text
    assert "spo-ray run --config 'my file.yaml' note=[MY_API_KEY]" in text
    assert "Traceback" not in text
    status = status_of(run)
    assert (status["state"], status["exit_code"], status["stages"]) == ("failed", 1, ["grading"])
    assert status["error"]["where"] == ["row q-3", "shard 00000, rows q-0 to q-3"]
    trace = (run.root / TRACEBACK).read_text()
    assert "ZeroDivisionError" in trace
    assert "hunter2secret" not in trace + json.dumps(status) + text


def test_a_killed_actor_shows_what_it_last_wrote_and_advice(local_ray):
    @ray.remote(max_restarts=0)
    class Doomed:
        def die(self):
            print("allocating the last gigabyte", file=sys.stderr, flush=True)
            os._exit(1)

        def pid(self):
            return os.getpid()

    actor = Doomed.remote()
    ray.get(actor.pid.remote())
    with pytest.raises(ray.exceptions.RayActorError) as caught:
        ray.get(actor.die.remote())
    card = card_of(caught.value)
    assert "allocating the last gigabyte" in card.log
    assert "engine.memory_gib" in card.advice


def test_ray_datas_empty_cause_hides_no_error():
    from ray.data.exceptions import SystemException

    error = ray.exceptions.ObjectStoreFullError("no room")
    error.__cause__ = SystemException()
    card = card_of(error)
    assert card.error.startswith("ObjectStoreFullError: no room")
    assert card.advice == "start Ray with more --object-store-memory"


def test_a_machine_that_is_too_busy_gets_advice():
    card = card_of(Exception("The current node timed out during startup. This could happen because"))
    assert "run the same command when it is quieter" in card.text()


def test_the_next_command_can_be_typed_where_the_environment_is_not_active(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(sys, "argv", ["pipelines/full.py", "--config", "a b.yaml"])
    assert command_line() == ".venv/bin/python pipelines/full.py --config 'a b.yaml'"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv" / "bin" / "spo-ray"), "run"])
    assert command_line() == ".venv/bin/spo-ray run"
    monkeypatch.setattr(sys, "argv", ["/opt/bin/spo-ray", "run"])
    assert command_line() == "spo-ray run"


def test_a_failed_training_worker_is_named_by_its_rank():
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    trace = 'Traceback\n  File "/home/me/spo_ray/train/worker.py", line 7, in run_sft\n    step()\n'
    inner = UserExceptionWithTraceback(ValueError("lengths differ"), trace)
    error = RuntimeError("training worker 2 failed: lengths differ")
    error.__cause__ = WorkerGroupError("wrapped", {2: inner, 5: inner})
    card = card_of(error, ["sft"])
    assert card.error == "ValueError: lengths differ"
    assert card.where == ["training worker 2 (rank)"]
    assert card.code == ["spo_ray/train/worker.py:7 in run_sft: step()"]


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (None, "finished", 0),
        (UserError("set x"), "refused", 2),
        (KeyboardInterrupt(), "stopped", 130),
        (SystemExit(15), "stopped", 130),
    ],
)
def test_status_of_runs_that_do_not_fail(run, capsys, error, state, code):
    seen = []

    def work():
        seen.append(status_of(run)["state"])
        run.execute(Stage("s", lambda out, counts: seen.append(status_of(run)["stages"]), config={}, inputs={}))
        if error:
            raise error

    assert attempt(run, work) == code
    assert seen == ["running", ["s"]]
    status = status_of(run)
    assert (status["state"], status["exit_code"], status["stages"], status["pid"]) == (state, code, [], os.getpid())
    assert not (run.root / TRACEBACK).exists()
    assert (status.get("error") or {}).get("error") == ("set x" if code == 2 else None)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://user:pass@host/bucket", "s3://[secret]@host/bucket"),
        ("redis://:pa/ss@host, http://host:80/a@b", "redis://[secret]@host, http://host:80/a@b"),
        ("sent hf_abcdefghijklmnop on", "sent [secret] on"),
        ("token=tiny", "token=tiny"),
        ("a longertokenvalue b", "a [MY_TOKEN] b"),
    ],
)
def test_secrets_are_struck_out(monkeypatch, text, clean):
    monkeypatch.setenv("MY_TOKEN", "longertokenvalue")
    monkeypatch.setenv("OTHER_TOKEN", "tiny")
    assert redact(text) == clean


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("OPENAI_API_KEY_TEAM", "DB_PASS", "MYTOKEN")),
        *((name, False) for name in ("HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "BYPASS", "HTTP_PROXY")),
    ],
)
def test_names_of_secrets(name, secret):
    assert is_secret(name) == secret
