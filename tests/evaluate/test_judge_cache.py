"""The cache of judges' replies, when a reply or its file is not what it should be."""

import math
import sqlite3
from contextlib import closing

import pytest

from spo_ray.evaluate.judge import Cache, Reply

from .test_judge import Judge, annotator, judged


@pytest.mark.parametrize("broken", ["no database", "folder", "other columns", "cut"])
def test_a_broken_cache_is_moved_aside(in_root, tmp_path, broken, caplog):
    file = tmp_path / "cache.sqlite"
    if broken == "folder":
        file.mkdir()
    elif broken == "other columns":
        with closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE said (question TEXT)")
    else:
        cache = Cache(file)
        cache.database.execute("BEGIN")
        for i in range(999):
            cache.put(f"{i}", Reply("m" * 99, None))
        cache.database.execute("COMMIT")
        cache.close()
        content = file.read_bytes()
        file.write_bytes(b"x" * 5000 if broken == "no database" else content[:20_000] + bytes(len(content) - 20_000))
    cache = Cache(file)
    assert cache.get("1") is None
    cache.put("1", Reply("M", (-0.1, -math.inf), (3, 1)))
    cache.close()
    again = Cache(file)
    assert again.get("1") == Reply("M", (-0.1, -math.inf), (3, 1))
    again.close()
    assert caplog.messages == [f"{file} is no cache of judgements, or is damaged: it is now cache.sqlite.broken-1"]
    assert file.with_name("cache.sqlite.broken-1").exists()


@pytest.mark.parametrize("value", ['["m", [NaN, -1], [1, 1]]', '["\\ud800", null, [1, 1]]', "[", '{"text": "m"}', "[]"])
def test_what_is_no_reply_in_the_cache_is_asked_for_again(tmp_path, value):
    cache = Cache(tmp_path / "cache.sqlite")
    cache.database.execute("INSERT INTO said VALUES ('1', ?)", (value,))
    assert cache.get("1") is None
    cache.close()


def test_text_that_no_file_can_hold_is_mended_before_it_is_kept(in_root, tmp_path):
    with Judge(logprobs=False) as judge:
        judge.trouble = {"3": ["because \ud800\nM"]}
        for _ in range(2):  # the second time from the cache
            artifact = judged(tmp_path, annotator(judge.url, verdict="discrete", max_tokens=9), max_unjudged=0.2)
            rows = {row["id"]: row for row in artifact.rows()}
            assert rows["003"]["verdicts"] == ["because \ufffd\nM"]
            (tmp_path / "runs" / "quickstart" / "judged_spo@j" / "manifest.json").unlink()
