"""Rows from files and from the hub."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from spo_ray.config.data import PreferenceData, QuestionData
from spo_ray.data.read import inputs, raw_rows
from spo_ray.data.sources import load_data
from spo_ray.errors import UserError
from spo_ray.runtime.artifact import on_hub
from spo_ray.runtime.run import Run

from ..helpers import small_config

ROWS = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(5)]


def read(path, split="train", **options):
    return [(raw.number, raw.row) for raw in raw_rows(PreferenceData(path=path, **options), split)]


def test_every_layout_gives_the_same_rows(tmp_path):
    expected = list(enumerate(ROWS))
    table = pa.Table.from_pylist(ROWS)
    lines = "\n".join(map(json.dumps, ROWS))
    layouts = {
        "lines/train.jsonl": lambda file: file.write_text(lines),
        "parquet/train.parquet": lambda file: pq.write_table(table, file),
        "array/train.json": lambda file: file.write_text(json.dumps(ROWS, indent=1)),
        "no_array/train.json": lambda file: file.write_text(lines),
        "gzip/train.jsonl.gz": lambda file: file.write_bytes(gzip.compress(lines.encode())),
        "zstd/train.json.zst": lambda file: file.write_bytes(
            pa.compress(json.dumps(ROWS).encode(), "zstd", asbytes=True)
        ),
        "shards/train-00001-of-00002.jsonl": lambda file: file.write_text("\n".join(map(json.dumps, ROWS[:2]))),
        "shards/train-00002-of-00002.jsonl": lambda file: file.write_text("\n".join(map(json.dumps, ROWS[2:]))),
        "both/train.jsonl": lambda file: file.write_text("\n".join(map(json.dumps, ROWS[2:]))),
        "both/train-00001.jsonl.gz": lambda file: file.write_bytes(
            gzip.compress("\n".join(map(json.dumps, ROWS[:2])).encode())
        ),
        "hub/data/train-00000-of-00002.parquet": lambda file: pq.write_table(table.slice(0, 2), file),
        "hub/data/train-00001-of-00002.parquet": lambda file: pq.write_table(table.slice(2), file),
    }
    for name, write in layouts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name)
    assert {name: read(tmp_path / name.split("/")[0]) == expected for name in layouts} == dict.fromkeys(layouts, True)
    assert read(tmp_path / "lines" / "train.jsonl", split="anything") == expected
    before = inputs(PreferenceData(path=tmp_path / "hub"), "train")
    assert len(before) == 2
    pq.write_table(table.slice(3), tmp_path / "hub" / "data" / "train-00001-of-00002.parquet")
    assert inputs(PreferenceData(path=tmp_path / "hub"), "train") != before


def test_excerpts_name_file_and_line(tmp_path):
    lines = [json.dumps(ROWS[0]), "", "no json", json.dumps(ROWS[1])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    excerpts = [raw.excerpt for raw in raw_rows(PreferenceData(path=tmp_path), "train")]
    assert excerpts == [f"train.jsonl:{line}: {lines[line - 1]}" for line in (1, 3, 4)]


def test_a_byte_order_mark_costs_no_row(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig")
    assert read(tmp_path) == list(enumerate(ROWS))


def test_a_line_that_would_fill_the_memory_is_quarantined(tmp_path, monkeypatch):
    """Whole files of a megabyte can unfold to gigabytes: a line is never read further than this."""
    monkeypatch.setattr("spo_ray.data.read.LONGEST_LINE", 1000)
    lines = [json.dumps(ROWS[0]), " " * 500_000 + "{}", json.dumps(ROWS[1]), "x" * 1000, json.dumps(ROWS[2])]
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    found = list(raw_rows(PreferenceData(path=tmp_path), "train"))
    assert [raw.row for raw in found if raw.defect is None] == ROWS[:3]
    assert [raw.defect for raw in found if raw.defect] == ["longer than 1,000 characters"] * 2
    monkeypatch.setattr("spo_ray.data.read.LONGEST_JSON", 1000)
    (tmp_path / "more.json").write_text("[" + ", ".join(lines) + "]")
    with pytest.raises(UserError, match=r"more\.json has 1,000 characters or more: convert it to JSON Lines$"):
        list(raw_rows(PreferenceData(path=tmp_path / "more.json"), "train"))


def test_lines_in_another_encoding_are_quarantined(tmp_path):
    lines = [json.dumps(row | {"chosen": chosen}, ensure_ascii=False) for row, chosen in zip(ROWS, "aéb", strict=False)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="cp1252")
    found = list(raw_rows(PreferenceData(path=tmp_path), "train"))
    assert [raw.defect for raw in found] == [None, "not UTF-8, which JSON is written in", None]
    assert found[1].excerpt == f"train.jsonl:2: {lines[1]}".replace("é", "\ufffd")
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [raw.defect for raw in raw_rows(PreferenceData(path=tmp_path), "train")] == [None] * 3


@pytest.mark.parametrize("other", ["data/train-0.parquet", "train.json", "train.jsonl.gz", "data/train-0.jsonl"])
def test_files_that_may_hold_the_same_rows_are_refused(tmp_path, other):
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", other):
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match=r"train.* and .*train.* may hold the same rows: name one"):
        read(tmp_path)


def test_what_stands_in_an_array_but_is_no_row_is_quarantined(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([ROWS[0], "text", ROWS[1]]))
    found = list(raw_rows(PreferenceData(path=tmp_path), "train"))
    assert [raw.defect for raw in found] == [None, "not a JSON object", None]
    assert found[1].excerpt == "train.json:2: text"


@pytest.mark.parametrize(
    ("bad", "defect"),
    [
        (pa.array([0, 2**30], pa.date32()), "days=1073741824; must have magnitude <= 999999999)"),
        (pa.array([0, 2**62], pa.timestamp("us")), "date value out of range"),
        (pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers()), "'utf-8' codec can't decode"),
    ],
    ids=["date", "time", "text"],
)
def test_rows_of_parquet_that_python_cannot_hold_are_quarantined(tmp_path, bad, defect):
    pq.write_table(pa.table({"x": bad}), tmp_path / "train.parquet")
    fine, broken = raw_rows(PreferenceData(path=tmp_path), "train")
    assert (fine.number, fine.defect, broken.number, broken.row) == (0, None, 1, {})
    assert str(broken.defect).startswith(f"can't be read ({defect}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.parquet", b"no parquet", "can't be read as Parquet"),
        ("rows.csv", b"a,b", "is no data file"),
        ("rows.json", b'[{"prompt": 1},', "can't be read as JSON"),
        ("rows.jsonl.gz", b"no gzip", "can't be read"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_dataset_on_the_hub_that_cannot_be_had(in_root):
    """The network is off in tests."""
    data = PreferenceData(path="organisation-that-is-not-here/data")
    assert on_hub(data.path)
    assert not on_hub(in_root / "configs")
    with pytest.raises(UserError, match=r"organisation-that-is-not-here/data.*can't be loaded.*HF_HOME"):
        list(raw_rows(data, "train"))


def test_a_dataset_on_the_hub(monkeypatch):
    """A stand-in for the hub, which tests can't reach: what is asked of the library."""
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return iter(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = PreferenceData(path="organisation/data", subset="main", revision="abc", train_split="train_prefs")
    assert [raw.row for raw in raw_rows(data, "train_prefs")] == ROWS
    assert asked == [(("organisation/data", "main"), {"split": "train_prefs", "revision": "abc"})]
    assert inputs(data, "train") != inputs(data.model_copy(update={"revision": "abd"}), "train")


def test_splits_columns_and_contamination(in_root, tmp_path):
    rows = [{"q": f"Is {i} even, and if so, by what is it divided?", "a": i} for i in range(4)]
    (tmp_path / "learn.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"q": "Why?", "a": 3}])))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"q": "is 2 even and if so, by what is it...", "a": 1}))
    data = QuestionData(
        type="questions",
        verifier="gsm8k",
        path=tmp_path,
        train_split="learn",
        test_split="exam",
        question_column="q",
        answer_column="a",
        contamination_words=9,
    )
    run = Run(small_config(tmp_path).model_copy(update={"data": data}))
    test = load_data(run, "test")
    train = load_data(run, "train", against=test)
    assert [row["prompt"] for row in train.rows()] == [rows[0]["q"], rows[1]["q"], rows[3]["q"], "Why?"]
    assert [row["gold"] for row in train.rows()] == ["0", "1", "3", "3"]
    assert train.manifest["rows"]["dropped"] == {"shares 9 words in a row with a test prompt": 1}


def test_pairs_from_a_split_of_their_own(in_root, tmp_path):
    for split, rows in (("train", ROWS), ("eval", [row | {"prompt": "other"} for row in ROWS])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = PreferenceData(path=tmp_path, test_split="eval", held_out="test_split", train_pairs=3, test_pairs=2)
    run = Run(small_config(tmp_path).model_copy(update={"data": data}))
    train, test = load_data(run, "train"), load_data(run, "test")
    assert (train.count, test.count) == (3, 2)
    assert {row["prompt"][0]["content"] for row in test.rows()} == {"other"}
    assert all(row["source_id"] == row["id"] and row["chosen_source"] == "data" for row in train.rows())


def test_one_file_has_no_test_split(in_root, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "q", "answer": 1}))
    data = QuestionData(type="questions", verifier="gsm8k", path=tmp_path / "rows.jsonl")
    run = Run(small_config(tmp_path).model_copy(update={"data": data}))
    with pytest.raises(UserError, match=r"rows\.jsonl is one file.*name a folder"):
        load_data(run, "test")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    pairs = PreferenceData(path=tmp_path / "pairs.jsonl", test_pairs=2)
    run = Run(small_config(tmp_path).model_copy(update={"data": pairs}))
    train, test = (load_data(run, split) for split in ("train", "test"))
    assert (train.count, test.count) == (3, 2)
    assert not {row["id"] for row in train.rows()} & {row["id"] for row in test.rows()}


def test_rows_are_drawn_from_those_without_contamination(in_root, tmp_path):
    questions = [{"question": f"number {i}, is it even or is it odd?", "answer": i} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, questions[:15])))
    options = {
        "path": tmp_path,
        "contamination_words": 9,
        "train_questions": 5,
        "prompt": "Think well. {question} Go on.",
    }
    data = QuestionData(type="questions", verifier="gsm8k", **options)
    run = Run(small_config(tmp_path).model_copy(update={"data": data}))
    train = load_data(run, "train", against=load_data(run, "test"))
    assert sorted(row["gold"] for row in train.rows()) == ["15", "16", "17", "18", "19"]
    assert train.manifest["facts"]["not_drawn"] == 0
    assert train.rows()[0]["prompt"].startswith("Think well. number")


def test_sources_are_mixed_by_their_weights(in_root, tmp_path):
    """As many pairs as the smallest source allows: 20 of 20 and 3 times as many of the other."""
    first = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(100)]
    second = [{"q": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
    for name, rows in (("first.jsonl", first), ("second.jsonl", [*second, {"q": "", "chosen": "a", "rejected": "b"}])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))

    def pairs(weights):
        source = {"path": tmp_path / "second.jsonl", "columns": {"prompt": "q"}, "weight": weights[1]}
        data = PreferenceData(path=tmp_path / "first.jsonl", weight=weights[0], more=[source], test_pairs=5)
        run = Run(small_config(tmp_path).model_copy(update={"data": data}))
        train, test = (load_data(run, split) for split in ("train", "test"))
        assert train.manifest["rows"]["dropped"] == {"'prompt' is empty": 1}
        assert len(train.manifest["inputs"]) == 2
        rows = [*train.rows(), *test.rows()]
        assert len({row["id"] for row in rows}) == len(rows)
        assert {row["id"] for row in rows if row["prompt"][0]["content"] == "q0"} == {"pair-000100"}
        return Counter(row["prompt"][0]["content"][0] for row in rows), train.manifest["facts"]["left_out_by_weight"]

    assert pairs((3.0, 1.0)) == ({"p": 60, "q": 20}, 40)
    assert pairs((None, None)) == ({"p": 100, "q": 20}, 0)
    with pytest.raises(ValidationError, match="weight is relative"):
        pairs((1.0, None))
