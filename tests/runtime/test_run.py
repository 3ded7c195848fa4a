import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spo_ray.errors import UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import (
    RowCounts,
    external,
    recorded_files,
    write_answer,
    write_json,
    write_rows,
    write_text,
)
from spo_ray.runtime.finished_run import FinishedRun
from spo_ray.runtime.run import PlannedRun, Run, Stage, never_built
from spo_ray.runtime.status import STATUS, TRACEBACK, recorded

from ..helpers import small_config


@pytest.fixture
def run(in_root, tmp_path):
    return Run(small_config(tmp_path))


def counting(calls, rejected=0):
    def build(out, counts):
        calls.append(out)
        counts.read, counts.kept = 2 + rejected, 2
        for i in range(rejected):
            counts.reject(f"bad-{i}", "malformed", {"x": i})
        write_rows(out / "part-0.parquet", [{"id": i, "prompt": "p", "gold": "g"} for i in "ba"], schema.Prompt)

    return build


def test_a_finished_stage_is_reused_until_something_it_depends_on_changes(run, tmp_path):
    calls = []
    data = tmp_path / "data.txt"
    data.write_text("one")
    for config in ({"k": 1}, {"k": 1}, {"k": 2}, {"k": 2}):
        run.execute(Stage("s", counting(calls), config=config, inputs={"data": external(data)}))
    assert len(calls) == 2
    data.write_text("two")
    artifact = run.execute(Stage("s", counting(calls), config={"k": 2}, inputs={"data": external(data)}))
    assert len(calls) == 3
    run.execute(Stage("next", counting(calls), config={}, inputs={"s": artifact}))
    run.execute(Stage("next", counting(calls), config={}, inputs={"s": artifact}))
    assert len(calls) == 4
    assert [row["id"] for row in artifact.rows()] == ["a", "b"]


def test_a_run_that_is_at_work_can_be_sent_to_other_processes(run):
    run.root.mkdir(parents=True)
    with recorded(run):
        run.open(Stage("s", never_built, config={}, inputs={}))
        sent = pickle.loads(pickle.dumps(run))
        assert (sent.root, sent.config, sent.names) == (run.root, run.config, run.names)
        before = (run.root / STATUS).read_text()
        sent.open(Stage("of another process", never_built))
        assert (run.root / STATUS).read_text() == before
    assert json.loads((run.root / STATUS).read_text())["state"] == "finished"


def test_a_run_in_another_folder_shares_names_and_what_is_under_way(run):
    other = run.at(run.root / "shared" / "tag")
    first = other.execute(Stage("first", counting([])))
    assert (first.path, run.names[first.digest]) == (run.root / "shared" / "tag" / "first", "first")
    other.open(Stage("second", never_built))
    assert run.under_way == ["second"]


def test_a_stage_that_is_tried_again_after_a_failure_is_under_way_once(run):
    def broken(out, counts):
        raise OSError

    with pytest.raises(OSError):
        run.execute(Stage("s", broken))
    assert run.under_way == ["s"]
    run.execute(Stage("s", counting([])))
    assert run.under_way == []


def test_a_failed_stage_leaves_the_finished_one_alone(run):
    calls = []
    first = run.execute(Stage("s", counting(calls), config={"k": 1}, inputs={}))

    def broken(out, counts):
        counting(calls)(out, counts)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.execute(Stage("s", broken, config={"k": 2}, inputs={}))
    assert run.execute(Stage("s", counting(calls), config={"k": 1}, inputs={})) == first
    assert len(calls) == 2


def test_a_stage_that_was_cut_off_on_the_way_to_its_place_is_finished(run, monkeypatch):
    """Between the manifest and the renaming: nothing is built again, and no rejected row is lost."""
    calls = []

    def build(out, counts):
        counting(calls, rejected=1)(out, counts)
        write_rows(out / "rejected-00000.parquet", counts.rejected, schema.Rejected)

    def cut_off(self, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_put", cut_off)
        run.execute(Stage("s", build, config={}, inputs={}, resumable=True))
    artifact = run.execute(Stage("s", build, config={}, inputs={}, resumable=True))
    assert len(calls) == 1
    assert artifact.path == run.root / "s"
    assert sorted(file.name for file in artifact.path.iterdir()) == [
        "manifest.json",
        "part-0.parquet",
        "rejected.parquet",
    ]
    assert artifact.manifest["rows"]["dropped"] == {"malformed": 1}
    assert run.execute(Stage("s", build, config={}, inputs={})) == artifact


def test_manifest_and_rejected_rows(run):
    artifact = run.execute(Stage("s", counting([], rejected=3), config={"k": 1}, inputs={}))
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest["rows"] == {"read": 5, "kept": 2, "dropped": {"malformed": 3}}
    assert manifest["config"] == {"k": 1}
    assert manifest["versions"]["torch"].startswith("2.")
    rejected = pq.read_table(artifact.path / "rejected.parquet").to_pylist()
    assert rejected[0] == {"id": "bad-0", "reason": "malformed", "excerpt": "{'x': 0}", "stage": "s"}


def stage_of_files(out, counts):
    counting([])(out, counts)
    (out / "log.jsonl").write_text("{}\n{}\n")
    (out / "deep").mkdir()
    (out / "deep" / "model.safetensors").write_bytes(b"weights")


CHANGES = {
    "deleted": (lambda f: (f / "part-0.parquet").unlink(), "s/part-0.parquet is missing"),
    "emptied": (lambda f: (f / "deep/model.safetensors").write_text(""), "s/deep/model.safetensors has 0 bytes, not 7"),
    "rows": (lambda f: (f / "log.jsonl").write_text("{} {} "), "s/log.jsonl has 0 rows, not 2"),
    "added": (lambda f: (f / "part-1.parquet").touch(), "s/part-1.parquet is none of its files"),
    "manifest": (
        lambda f: (f / "manifest.json").write_text(""),
        "s/manifest.json can't be read (Invalid JSON: EOF while parsing a value at line 1 column 0)",
    ),
    "foreign": (
        lambda f: (f / "manifest.json").write_text('{"digest": 3}'),
        "s/manifest.json can't be read (digest: Input should be a valid string)",
    ),
    "manifest's folder": (
        lambda f: (f / "manifest.json").rename(f / "moved") and (f / "manifest.json").mkdir(),
        "s/manifest.json can't be read (Is a directory)",
    ),
    "both": (
        lambda f: shutil.rmtree(f / "deep") or (f / "log.jsonl").unlink(),
        "s/deep/model.safetensors is missing, s/log.jsonl is missing",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stage_whose_files_are_not_its_own_any_more_is_made_again(run, change, caplog):
    """The plan, the run and the reading of a finished run say the same."""
    caplog.set_level("INFO", logger="spo_ray")
    stage = Stage("s", stage_of_files, config={"k": 1})
    folder = run.execute(stage).path
    before = recorded_files(folder)
    damage, why = CHANGES[change]
    damage(folder)
    plan = PlannedRun(run.config)
    plan.execute(stage)
    assert [(one.state, one.why) for one in plan.planned] == [("build", why)]
    with pytest.raises(UserError, match=rf"not finished, {re.escape(why)}: run it again"):
        FinishedRun(run.config, run.root).open(stage)
    run.execute(stage)
    assert f"built again: {why}" in caplog.messages
    assert recorded_files(folder) == before
    assert run.find("s", *run.identify(stage)).state == "reused"


def test_contents_are_compared_where_that_is_asked_for(run):
    stage = Stage("s", stage_of_files)
    file = run.execute(stage).path / "deep" / "model.safetensors"
    file.write_text("weightS")
    for kind in (Run, PlannedRun):
        assert kind(run.config).find("s", *run.identify(stage)).state == "reused"
        found = kind(run.config, verify=True).find("s", *run.identify(stage))
        assert found == ("build", "s/deep/model.safetensors has another content", None)
    FinishedRun(run.config, run.root).open(stage)
    with pytest.raises(UserError, match=r"not finished, s/deep/model\.safetensors has another content"):
        FinishedRun(run.config, run.root, verify=True).open(stage)


def test_a_manifest_lists_its_files_and_without_the_list_the_stage_is_made_again(run):
    stage = Stage("s", stage_of_files)
    file = run.execute(stage).path / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["files"]["part-0.parquet"]["rows"] == 2
    assert manifest["files"]["deep/model.safetensors"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert list(manifest["files"]) == ["deep/model.safetensors", "log.jsonl", "part-0.parquet"]
    del manifest["files"]
    file.write_text(json.dumps(manifest))
    found = run.find("s", *run.identify(stage))
    assert (found.state, found.why) == ("build", "s/manifest.json can't be read (files: Field required)")


def test_files_and_folders_in_the_way_are_moved_aside(run, caplog):
    run.root.mkdir(parents=True)
    for name in ("s", ".unfinished"):
        (run.root / name).write_text(name)
    for name in (".lock", STATUS, TRACEBACK):
        (run.root / name).mkdir()
    (run.root / ".beats").symlink_to(run.root / "nowhere")
    plan = PlannedRun(run.config)
    plan.execute(Stage("s", stage_of_files))
    assert [(one.state, one.why) for one in plan.planned] == [("build", "s/manifest.json is missing")]
    with run.locked(), recorded(run):
        run.execute(Stage("s", stage_of_files))
    told = {
        "s": "no folder",
        ".unfinished": "no folder",
        STATUS: "a folder",
        TRACEBACK: "a folder",
        ".beats": "no folder",
        ".lock": "a folder, not the lock of a run",
    }
    for name, what in told.items():
        assert f"{run.root / name} is {what}: it is now {name}.broken-1" in caplog.messages
    assert (run.root / "s.broken-1").read_text() == "s"
    assert json.loads((run.root / STATUS).read_text())["state"] == "finished"


@pytest.mark.parametrize("link", ["s", ".unfinished", ".unfinished/s", ".unfinished/s.old"])
def test_a_link_in_the_place_of_a_folder_is_moved_aside(run, link, tmp_path):
    """To nowhere; in the places of folders that are deleted, to a folder that is not deleted."""
    (run.root / link).parent.mkdir(parents=True)
    (tmp_path / "else").mkdir()
    (run.root / link).symlink_to(tmp_path / ("else" if "/s" in link else "nowhere"))
    assert run.execute(Stage("s", stage_of_files)).count == 2
    assert (run.root / f"{link}.broken-1").is_symlink()
    assert (tmp_path / "else").exists()


@pytest.mark.parametrize("wrong", [{"stages": 5}, {"process_started": 10**400}, {"pid": -(10**30)}, {"host": {}}])
def test_a_status_that_no_run_wrote_stops_none(run, wrong):
    run.root.mkdir(parents=True)
    status = {"state": "running", "pid": os.getpid(), "process_started": 0, "host": socket.gethostname()}
    (run.root / STATUS).write_text(json.dumps(status | wrong))
    with run.locked(), recorded(run):
        pass
    assert json.loads((run.root / STATUS).read_text())["state"] == "finished"


def test_an_unfinished_stage_whose_record_is_broken_begins_again(run):
    run.open(Stage("s", never_built, resumable=True))
    (run.root / ".unfinished" / "s" / "started.json").write_text("{")
    found = run.find("s", *run.identify(Stage("s", never_built)))
    assert found == (
        "build",
        "s/started.json can't be read (Invalid JSON: EOF while parsing an object at line 1 column 1)",
        None,
    )


def test_a_file_with_the_name_of_the_run_is_not_touched(run):
    run.root.parent.mkdir(exist_ok=True)
    run.root.write_text("mine")
    with pytest.raises(UserError, match=r"quickstart: File exists; a run needs a folder that it can"), run.locked():
        pass
    assert run.root.read_text() == "mine"


def test_a_folder_that_cant_be_written_is_the_users_error():
    run = Run(small_config("/proc"))
    with (
        pytest.raises(UserError, match=r"^/proc/quickstart: .+; a run .*: set another name= or output=$"),
        run.locked(),
    ):
        pass


def test_two_processes_never_share_a_run(run):
    code = "import sys; from spo_ray.pipeline.cli import guarded; from spo_ray.runtime.run import Run\n"
    code += "from tests.helpers import small_config\n"
    code += "def work():\n    with Run(small_config(sys.argv[1])).locked(): print('inside')\nsys.exit(guarded(work))"
    command = [sys.executable, "-c", code, str(run.config.output)]
    with run.locked():
        other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 2
    assert "another process is working in" in other.stderr
    assert subprocess.run(command, capture_output=True, text=True).stdout == "inside\n"


def test_the_lock_of_a_killed_process_is_free_again(run):
    code = "import sys, time; from spo_ray.runtime.run import Run; from tests.helpers import small_config\n"
    code += "with Run(small_config(sys.argv[1])).locked(): print('inside', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(run.config.output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "inside\n"
        with pytest.raises(UserError, match="another process is working in"), run.locked():
            pass
        process.kill()
    with run.locked(), pytest.raises(UserError), Run(run.config).locked():
        pass


def test_schemas_keep_their_types_without_rows(tmp_path):
    for kind in (schema.Prompt, schema.Samples, schema.Scored, schema.ReferencedPair, schema.EvalRow):
        write_rows(tmp_path / "empty.parquet", [], kind)
        assert pq.read_schema(tmp_path / "empty.parquet").equals(schema.arrow_schema(kind))
    assert schema.arrow_schema(schema.Scored).field("extracted").type == pa.list_(pa.string())
    assert schema.arrow_schema(schema.EvalRow).field("seed").type == pa.int64()


def test_identity_of_external_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = external(folder).digest
    assert external(folder).digest == first
    (folder / "b").write_text("2")
    assert external(folder).digest != first
    assert external("organisation/name").digest != external("organisation/other").digest


def test_no_rows_is_an_error_that_points_at_the_manifests():
    from spo_ray.runtime.artifact import require_rows

    with pytest.raises(UserError, match=r"no pairs: see the drop reasons"):
        require_rows([], "pairs")
    counts = RowCounts()
    for i, reason in enumerate(["a", "b", "b", "c", "d"]):
        counts.reject(str(i), reason, f"row {i}")
    told = r"no pairs: 5 dropped: 2 b \(first: row 1\); 1 a \(first: row 0\); 1 c \(first: row 3\)$"
    with pytest.raises(UserError, match=told):
        require_rows(0, "pairs", counts)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x", "\ud800")
    with pytest.raises(UserError, match=r"/x{300} can't be written: File name too long$"):
        write_answer(tmp_path / ("x" * 300), "")
    assert not list(tmp_path.iterdir())


def test_threads_write_the_same_file_one_after_the_other(tmp_path):
    """As stages do that run side by side: every write leaves a whole file, and none fails."""
    errors = []

    def work(number):
        try:
            for i in range(50):
                write_json(tmp_path / "status.json", {"number": number, "i": i, "text": "x" * 1000})
                json.loads((tmp_path / "status.json").read_text())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
