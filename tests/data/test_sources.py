import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spo_ray.data.sources import load_data
from spo_ray.data_config import Gsm8kData, PreferenceData
from spo_ray.errors import UserError
from spo_ray.run import Run

from ..helpers import small_config

GOOD = {"question": "2 + 2?", "answer": "It is 4.\n#### 4"}


def gsm8k(tmp_path, lines, **options):
    folder = tmp_path / "gsm8k"
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    data = Gsm8kData(path=folder, **options)
    return Run(small_config(tmp_path).model_copy(update={"data": data}))


def test_malformed_rows_are_quarantined_with_their_reasons(in_root, tmp_path):
    lines = [
        json.dumps(GOOD),
        "{not json",
        "[1]",
        json.dumps({"question": "no answer?"}),
        json.dumps({"question": 5, "answer": "#### 1"}),
        "",
        json.dumps({"question": "  ", "answer": "#### 1"}),
        '{"question": "half \\ud83d", "answer": "#### 1"}',
        "[" * 100_000,
        json.dumps(GOOD | {"question": "3 + 3?"}),
    ]
    artifact = load_data(gsm8k(tmp_path, lines), "train")
    assert [row["prompt"] for row in artifact.rows()] == ["2 + 2?", "3 + 3?"]
    reasons = {row["id"]: row["reason"] for row in pq.read_table(artifact.path / "rejected.parquet").to_pylist()}
    assert reasons == {
        "train-000001": "not JSON",
        "train-000002": "not a JSON object",
        "train-000003": "no column 'answer'",
        "train-000004": "'question' is no text",
        "train-000006": "'question' is empty",
        "train-000007": "'question' is not valid Unicode",
        "train-000008": "not JSON",
    }
    assert artifact.manifest["rows"] == {"read": 9, "kept": 2, "dropped": dict(Counter(sorted(reasons.values())))}


def test_questions_without_gold_are_refused_or_quarantined(in_root, tmp_path):
    lines = [json.dumps(GOOD), json.dumps({"question": "why?", "answer": "because"})]
    with pytest.raises(UserError, match=r"1 questions without a gold answer.*train-000001.*skip_missing_gold"):
        load_data(gsm8k(tmp_path, lines), "train")
    artifact = load_data(gsm8k(tmp_path, lines, skip_missing_gold=True), "train")
    assert artifact.manifest["rows"]["dropped"] == {"no gold answer": 1}


@pytest.mark.parametrize(("lines", "message"), [([], "no usable train rows"), (["{"], "no usable train rows")])
def test_empty_data_is_refused(in_root, tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        load_data(gsm8k(tmp_path, lines), "train")


def test_a_missing_file_is_refused(in_root, tmp_path):
    config = small_config(tmp_path).model_copy(update={"data": Gsm8kData(path=tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"no data file .*nowhere.*train\.jsonl"):
        load_data(Run(config), "train")


def test_a_sample_of_questions_depends_on_the_seed(in_root, tmp_path):
    lines = [json.dumps(GOOD | {"question": f"{i}?"}) for i in range(50)]

    def chosen(seed):
        run = gsm8k(tmp_path, lines, train_questions=10)
        return {r["prompt"] for r in load_data(Run(run.config.model_copy(update={"seed": seed})), "train").rows()}

    assert len(chosen(0)) == 10
    assert chosen(0) == chosen(0) != chosen(1)


def test_pairs_are_held_out_of_training(in_root, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(30)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = PreferenceData(path=tmp_path, train_pairs=15, test_pairs=10)
    run = Run(small_config(tmp_path / "out").model_copy(update={"data": data}))
    train, test = ({r["prompt"][0]["content"] for r in load_data(run, split).rows()} for split in ("train", "test"))
    assert (len(train), len(test)) == (15, 10)
    assert not train & test
    small = PreferenceData(path=tmp_path, test_pairs=30)
    with pytest.raises(UserError, match=r"30 pairs, of which data\.test_pairs=30 are held out"):
        load_data(Run(run.config.model_copy(update={"data": small})), "train")


def test_copies_of_held_out_pairs_are_not_trained_on(in_root, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
    rows += [*rows, {"prompt": "p0", "chosen": "better", "rejected": "bad"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = PreferenceData(path=tmp_path, test_pairs=10)
    run = Run(small_config(tmp_path / "out").model_copy(update={"data": data}))
    test, train = load_data(run, "test"), load_data(run, "train")
    content = [
        {(str(row["prompt"]), row["chosen"], row["rejected"]) for row in artifact.rows()} for artifact in (test, train)
    ]
    assert not content[0] & content[1]
    counts = train.manifest["rows"]
    twice = sum(rows.count(row) > 1 and row in rows for row in rows)
    assert twice == 40
    assert counts["kept"] + sum(counts["dropped"].values()) == 31
    assert counts["dropped"].keys() == {"a copy of a held-out pair"}
    assert counts["dropped"]["a copy of a held-out pair"] > 0


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
LINES = st.lists(
    st.one_of(
        st.text().map(lambda t: t.replace("\n", " ").replace("\r", " ")),
        JSON.map(json.dumps),
        st.fixed_dictionaries({"question": JSON, "answer": JSON}).map(json.dumps),
        st.just(json.dumps(GOOD)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES)
def test_nothing_crashes_and_nothing_is_lost(in_root, tmp_path, lines):
    lines = [json.dumps(GOOD), *lines]
    artifact = load_data(gsm8k(tmp_path, lines, skip_missing_gold=True), "train")
    counts = artifact.manifest["rows"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    file = tmp_path / "gsm8k" / "train.jsonl"
    with file.open(encoding="utf-8", errors="replace") as handle:
        assert counts["read"] == sum(bool(line.strip()) for line in handle)
