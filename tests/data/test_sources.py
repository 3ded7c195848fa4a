import json
import os
import random
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spo_ray.config.base import RowSource
from spo_ray.config.data import Gsm8kData, PreferenceData
from spo_ray.data.sources import load_data, load_examples
from spo_ray.errors import UserError
from spo_ray.runtime.console import installed
from spo_ray.runtime.run import Run

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
        json.dumps({"answer": "#### 1"}),
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
        "train-000003": "no column 'question'",
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


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "why?", "answer": None}, "no gold answer"),
        ({"question": "why?", "answer": ""}, "no gold answer"),
        ({"question": "why?"}, "no column 'answer'"),
    ],
)
def test_no_answer_is_an_empty_answer(in_root, tmp_path, row, reason):
    lines = [json.dumps(GOOD), json.dumps(row)]
    with pytest.raises(UserError, match=r"1 questions without a gold answer.*train-000001.*skip_missing_gold"):
        load_data(gsm8k(tmp_path, lines), "train")
    artifact = load_data(gsm8k(tmp_path, lines, skip_missing_gold=True), "train")
    assert artifact.manifest["rows"]["dropped"] == {reason: 1}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no usable train rows in the gsm8k data: see the drop reasons"),
        (
            ["{", "[1]", "{x"],
            r"rows.*: 3 dropped: 2 not JSON \(first: train\.jsonl:1: \{\); 1 not a JSON object \(first: train\.jsonl:2",
        ),
    ],
)
def test_empty_data_is_refused(in_root, tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        load_data(gsm8k(tmp_path, lines), "train")


def test_a_missing_file_is_refused(in_root, tmp_path):
    config = small_config(tmp_path).model_copy(update={"data": Gsm8kData(path=tmp_path / "nowhere")})
    (tmp_path / "nowhere").mkdir()
    os.mkfifo(tmp_path / "nowhere" / "train.jsonl")  # which nobody writes to: reading it would wait for ever
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
    with pytest.raises(UserError, match=r"30 pairs, of which data\.test_pairs=30 are held out$"):
        load_data(Run(run.config.model_copy(update={"data": small})), "train")
    (tmp_path / "train.jsonl").write_text('{"prompt": "p"}\nno json')
    with pytest.raises(
        UserError, match=r"0 pairs, .* held out; 2 dropped: 1 no column 'chosen' \(first: train\.jsonl:1: "
    ):
        load_data(Run(run.config.model_copy(update={"data": small})), "train")


def test_every_row_of_a_shared_split_is_counted_once_whatever_is_in_it(in_root, tmp_path):
    rows = [json.dumps({"prompt": f"p{i}", "chosen": "good", "rejected": "bad"}) for i in range(30)]
    scores = [{"response": "x", "overall_score": 10**400}, {"response": "y", "overall_score": 1}]
    rows += ["no json", json.dumps({"prompt": "p", "completions": scores})]
    rows.append(json.dumps({"prompt": "p", "chosen": "same", "rejected": "same"}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    data = PreferenceData(path=tmp_path, test_pairs=10)
    run = Run(small_config(tmp_path / "out").model_copy(update={"data": data}))
    found, reasons = Counter(), {}
    parts = [load_data(run, split) for split in ("test", "train")]
    for part in parts:
        found.update(part.column("id"))
        if (part.path / "rejected.parquet").exists():
            rejected = pq.read_table(part.path / "rejected.parquet").to_pylist()
            reasons |= {row["id"]: row["reason"] for row in rejected}
            found.update(row["id"] for row in rejected)
    assert found == Counter(f"pair-{i:06d}" for i in range(33))
    assert [part.manifest["rows"]["read"] for part in parts] == [10, 23]
    assert reasons == {
        "pair-000030": "not JSON",
        "pair-000031": "can't be read (OverflowError)",
        "pair-000032": "'chosen' and 'rejected' are the same but for white space",
    }


def held_out(tmp_path, sizes, test_pairs):
    """How many pairs each prompt has in training and in the test, of prompts with so many pairs each."""
    rows = [
        {"prompt": f"p{i}", "chosen": f"good {j}", "rejected": "bad"}
        for i, size in enumerate(sizes)
        for j in range(size)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = PreferenceData(path=tmp_path, test_pairs=test_pairs)
    run = Run(small_config(tmp_path / "out").model_copy(update={"data": data}))
    found = [Counter(r["prompt"][0]["content"] for r in load_data(run, split).rows()) for split in ("train", "test")]
    assert sum(found, Counter()) == Counter(row["prompt"] for row in rows)
    assert not found[0] & found[1]
    return found


def test_all_pairs_of_a_prompt_are_on_one_side(in_root, tmp_path):
    for sizes, test_pairs, expected in (
        ([2] * 10, 6, 6),
        ([2] * 10, 7, 6),
        ([1, 1, 1] + [2] * 9, 7, 7),
        ([5] * 4, 1, 5),  # at least one prompt
        ([5] * 4, 9, 10),  # a little more is nearer
        ([5] * 2, 9, 5),  # one must be left
    ):
        _, test = held_out(tmp_path, sizes, test_pairs)
        assert test.total() == expected, (sizes, test_pairs)
    with pytest.raises(UserError, match="all 5 pairs have the same prompt"):
        held_out(tmp_path, [5], 2)


def test_prompts_that_occur_once_are_held_out_as_they_were_shuffled(in_root, tmp_path):
    _, test = held_out(tmp_path, [1] * 30, 5)
    order = list(range(30))
    random.Random(small_config(tmp_path).seed).shuffle(order)
    assert test.keys() == {f"p{i}" for i in order[:5]}


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


def test_sft_rows_that_share_words_with_a_test_prompt_are_quarantined(in_root, tmp_path):
    pairs = [{"prompt": f"What is the number behind {i}?", "chosen": "good", "rejected": "bad"} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    lines = [{"prompt": row["prompt"], "completion": "It is good."} for row in pairs] + [{"messages": "none"}]
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = PreferenceData(path=tmp_path, test_pairs=2, contamination_words=6)
    run = Run(small_config(tmp_path / "out").model_copy(update={"data": data}))
    test = load_data(run, "test")
    found = load_examples(run, RowSource(path=tmp_path / "sft.jsonl"), test)
    assert [row["responses"] for row in found.rows()] == [["It is good."]] * 7
    assert not {str(row["prompt"]) for row in found.rows()} & {str(row["prompt"]) for row in test.rows()}
    reasons = {"'messages' does not end in an assistant's message": 1, "shares 6 words in a row with a test prompt": 2}
    assert found.manifest["rows"] == {"read": 10, "kept": 7, "dropped": reasons}


@pytest.mark.parametrize(
    ("test_pairs", "there", "expected"),
    [
        (None, 150, 15),
        (None, 5, 1),
        (None, 61_000, 100),
        (None, None, 100),
        (0.2, 150, 30),
        (0.2, None, None),
        (40, 150, 40),
    ],
)
def test_without_a_number_a_tenth_is_held_out(test_pairs, there, expected):
    assert PreferenceData(path="pairs.jsonl", test_pairs=test_pairs).held_out_of(there) == expected


def test_what_is_held_out_is_told(in_root, tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(small_config(tmp_path).model_copy(update={"data": PreferenceData(path=tmp_path)}))
    with installed():
        assert [load_data(run, split).count for split in ("test", "train")] == [3, 27]
    assert "data_train: 27 pairs to train on; 3 are held out (data.test_pairs)\n" in capsys.readouterr().out
