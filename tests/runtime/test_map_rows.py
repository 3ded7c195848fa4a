import os
import re
import signal
from functools import partial

import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayError

from spo_ray.errors import UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, write_rows
from spo_ray.runtime.failure import card_of
from spo_ray.runtime.map_rows import Pool, RowRejectedError, each_row, map_shards


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    ids = [f"q{i:03d}" for i in range(100)]
    for part, names in enumerate((ids[:30], ids[30:95], ids[95:])):
        table = [{"id": name, "prompt": "p" * int(name[1:]), "gold": "1"} for name in names]
        write_rows(folder / f"part-{part}.parquet", table, schema.Prompt)
    return Artifact(folder, "")


def lengths(every=7):
    def row(item):
        if len(item["prompt"]) % every == 0:
            raise RowRejectedError(f"multiple of {every}")
        return [item | {"gold": str(len(item["prompt"]))}]

    return each_row(row)


def run(source, tmp_path, mapper, **options):
    out, row_counts = tmp_path / "out", RowCounts()
    out.mkdir()
    map_shards("test", source, out, row_counts, mapper=mapper, kind=schema.Prompt, **options)
    return Artifact(out, ""), row_counts


def test_progress_is_reported_while_shards_come_in(local_ray, source, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("spo_ray.runtime.console.EVERY_S", 0.0)
    with caplog.at_level("INFO", "spo_ray"):
        run(source, tmp_path, lengths, batch_size=25, every=101)
    lines = [record for record in caplog.records if record.name == "spo_ray"]
    assert {record.stage for record in lines} == {"test"}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    counts = [int(n) for n in re.findall(r"(\d+)/100 rows read", caplog.text)]
    assert counts == [25, 50, 75]


@pytest.mark.parametrize("pool", [None, Pool(2, 1)])
def test_every_row_comes_out_once_or_is_quarantined(local_ray, source, tmp_path, pool):
    artifact, row_counts = run(source, tmp_path, lengths, batch_size=16, pool=pool, every=5)
    kept = artifact.rows()
    assert [row["id"] for row in kept] == [f"q{i:03d}" for i in range(100) if i % 5]
    assert all(row["gold"] == str(int(row["id"][1:])) for row in kept)
    assert (row_counts.read, row_counts.kept, len(row_counts.rejected)) == (100, 80, 20)
    assert row_counts.rejected[0]["reason"] == "multiple of 5"
    sizes = [pq.read_metadata(part).num_rows for part in artifact.parts]
    assert len(sizes) == 7
    assert sum(sizes) == 80


class Dying:
    """Kills its process on the first call ever, then works."""

    def __init__(self, flag):
        self.flag = flag

    def __call__(self, batch):
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return batch, []


def test_a_killed_actor_loses_and_repeats_no_row(local_ray, source, tmp_path):
    artifact, row_counts = run(source, tmp_path, partial(Dying, tmp_path / "killed"), batch_size=10, pool=Pool(1, 1))
    assert (tmp_path / "killed").exists()
    assert [row["id"] for row in artifact.rows()] == [f"q{i:03d}" for i in range(100)]
    assert row_counts.read == row_counts.kept == 100


class Deadly:
    """Kills its process at every call, or as it is made."""

    def __init__(self, folder, at_once):
        self.folder = folder
        if at_once:
            self([])

    def __call__(self, batch):
        (self.folder / f"{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "at_once"), [(None, False), (Pool(1, 1), False), (Pool(1, 1), True)])
def test_what_kills_its_process_each_time_ends_after_three_repetitions(local_ray, source, tmp_path, pool, at_once):
    (tmp_path / "killed").mkdir()
    with pytest.raises(RayError) as error:
        run(source, tmp_path, partial(Deadly, tmp_path / "killed", at_once), batch_size=100, pool=pool)
    assert len(list((tmp_path / "killed").iterdir())) == 4
    assert card_of(error.value).advice.startswith("a process was killed, often for its memory: look at the node's ")


def refusing():
    raise UserError("no such model")


def test_what_a_mapper_refuses_is_the_users_error(local_ray, source, tmp_path):
    with pytest.raises(UserError, match=r"^no such model$"):
        run(source, tmp_path, refusing, batch_size=10, pool=Pool(1, 1))


class Counting:
    """Leaves a file per call."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, batch):
        (self.folder / batch[0]["id"]).touch()
        dropped = [{"id": row["id"], "reason": "third", "excerpt": ""} for row in batch[2:3]]
        return [row for row in batch if row["id"] != dropped[0]["id"]], dropped


@pytest.mark.parametrize("pool", [None, Pool(1, 1, most=2)])
def test_a_stage_goes_on_with_the_parts_that_are_missing(local_ray, source, tmp_path, pool):
    calls, out = tmp_path / "calls", tmp_path / "out"
    calls.mkdir()
    out.mkdir()

    def stage():
        row_counts = RowCounts()
        arguments = {"mapper": partial(Counting, calls), "kind": schema.Prompt, "batch_size": 20, "pool": pool}
        map_shards("test", source, out, row_counts, **arguments)
        assert (row_counts.read, row_counts.kept, len(row_counts.rejected)) == (100, 95, 5)
        return Artifact(out, "").rows()

    first = stage()
    assert len(list(calls.iterdir())) == 5
    for file in calls.iterdir():
        file.unlink()
    (out / "part-00001.parquet").unlink()
    (out / "part-00003.parquet").write_bytes(b"cut")
    assert stage() == first
    assert sorted(file.name for file in calls.iterdir()) == ["q020", "q060"]
    assert stage() == first
