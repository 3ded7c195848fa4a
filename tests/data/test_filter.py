import pyarrow.parquet as pq
import pytest

from spo_ray.config.methods import Odpo, Rpo, Spo
from spo_ray.data.filter import Contamination, clean_pairs
from spo_ray.errors import UserError
from spo_ray.model.collate import collate_pairs
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, write_rows
from spo_ray.runtime.run import Run

from ..helpers import small_config

LONG = "one two three four five six seven eight nine ten"


def pair(number, prompt, chosen="yes, of course it is", rejected="no, it can not be"):
    key = f"{number:03d}"
    source = {"source_id": key, "chosen_source": "data", "rejected_source": "data"}
    turns = [{"role": "user", "content": prompt}]
    return {"id": key, "prompt": turns, "chosen": chosen, "rejected": rejected} | source


def clean(folder, table, *overrides, **methods):
    source = folder / "in"
    source.mkdir(parents=True, exist_ok=True)
    for part in range(0, len(table), 3):
        write_rows(source / f"part-{part:03d}.parquet", table[part : part + 3], schema.Pair)
    config = small_config(folder, *overrides)
    run = Run(config.model_copy(update={"methods": config.methods | methods}))
    artifact = clean_pairs(run, "pairs", Artifact(source, str(overrides)))
    counts = artifact.manifest["rows"]
    assert counts["read"] == len(table) == counts["kept"] + sum(counts["dropped"].values())
    return [row["id"] for row in artifact.rows()], counts["dropped"]


TABLE = [
    pair(0, "Is it?"),
    pair(1, "is  IT?"),
    pair(2, "Is it?"),
    pair(3, LONG),
    pair(4, f"{LONG} eleven"),
    pair(5, "Is it?", rejected="never"),
]


def test_methods_that_read_scores_need_two_numbers_and_get_their_difference(in_root, tmp_path):
    table = [pair(0, "Is it?"), pair(1, "Was it?") | {"score_gap": 2.5}]
    kept, dropped = clean(tmp_path, table, mine=Rpo(type="rpo"), other=Spo(type="spo", base=Odpo(type="odpo")))
    reason = "no numbers in 'score_chosen' and 'score_rejected', which the loss of mine, other reads"
    assert (kept, dropped) == (["001"], {reason: 1})
    with pytest.raises(UserError, match=reason.replace("mine, other", "mine")):
        clean(tmp_path / "other", table[:1], mine=Rpo(type="rpo"))
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    assert collate_pairs([row | ids for row in table[1:]], 0)["score_gaps"].tolist() == [2.5]
    assert "score_gaps" not in collate_pairs([row | ids for row in table], 0)


@pytest.mark.parametrize(
    ("overrides", "dropped"),
    [
        (["pairs.dedup=none"], {}),
        ([], {"002": "duplicate"}),
        (["pairs.dedup=normalised"], {"001": "duplicate", "002": "duplicate"}),
        (["pairs.dedup=near"], {"001": "near duplicate", "002": "near duplicate"}),
        (
            ["pairs.max_length_ratio=3", "pairs.dedup=none"],
            {"005": "lengths differ by more than pairs.max_length_ratio=3.0"},
        ),
    ],
)
def test_what_is_dropped(in_root, tmp_path, overrides, dropped):
    kept, counts = clean(tmp_path, TABLE, *overrides)
    assert kept == [row["id"] for row in TABLE if row["id"] not in dropped]
    assert counts == {reason: list(dropped.values()).count(reason) for reason in set(dropped.values())}


@pytest.mark.parametrize(
    ("one", "other"), [("x + 3", "x - 3"), ("a < b", "a > b"), ("C", "C++"), ("Is it?", "Is it"), ("कल", "काल")]
)
def test_signs_make_a_difference(in_root, tmp_path, one, other):
    assert clean(tmp_path, [pair(0, one), pair(1, other)], "pairs.dedup=normalised") == (["000", "001"], {})


@pytest.mark.parametrize(
    ("dedup", "firsts"),
    [("normalised", {"001": "000", "002": "000"}), ("near", {"001": "000", "002": "000", "004": "003"})],
)
def test_the_first_of_duplicates_is_named(in_root, tmp_path, monkeypatch, dedup, firsts):
    monkeypatch.setattr("spo_ray.data.filter.NEAR", 0.7)
    clean(tmp_path, TABLE, f"pairs.dedup={dedup}")
    row_counts = pq.read_table(tmp_path / "quickstart" / "pairs" / "rejected.parquet").to_pylist()
    assert {row["id"]: row["excerpt"].partition(":")[0] for row in row_counts} == firsts


def test_nothing_left_is_refused(in_root, tmp_path):
    with pytest.raises(UserError, match=r"no pairs left by .*max_length_ratio"):
        clean(tmp_path, [pair(0, "p", chosen="a" * 99, rejected="b")], "pairs.max_length_ratio=2")


def test_prompts_that_share_words_with_a_test_prompt():
    others = [{"id": "t0", "prompt": "Ada has three red pens, and two blue ones."}, {"id": "t1", "prompt": "Why not?"}]
    table = [
        {"id": "a", "prompt": "If ADA has three red pens and two green ones, how many?"},
        {"id": "b", "prompt": "Ada has four red pens, and two blue ones."},
        {"id": "c", "prompt": [{"role": "user", "content": "Why -- not"}]},
        {"id": "d", "prompt": "Why not go there?"},
        {"id": "e", "prompt": "!!!"},
    ]
    row_counts = RowCounts()
    kept = [row["id"] for row in Contamination(others, 7).keep_clean(table, row_counts)]
    assert kept == ["b", "d", "e"]
    assert [(row["id"], row["excerpt"][:2]) for row in row_counts.rejected] == [("a", "t0"), ("c", "t1")]
    hindi = [{"id": str(i), "prompt": f"वह {word} आया"} for i, word in enumerate(["दिन", "दीन"])]  # another vowel sign
    assert list(Contamination(hindi[:1], 3).keep_clean(hindi[1:], RowCounts())) == hindi[1:]


def test_what_all_prompts_share_is_no_contamination():
    template = "Solve this.\n{question}\nThink step by step and give the answer as a number."
    asked = {key: template.replace("{question}", f"What is {key} and {key}?") for key in ("one", "two")}
    row_counts = RowCounts()
    found = Contamination([{"id": "t", "prompt": asked["one"]}], 5, template)
    assert list(found.keep_clean([{"id": key, "prompt": text} for key, text in asked.items()], row_counts)) == [
        {"id": "two", "prompt": asked["two"]}
    ]
    system = {"role": "system", "content": "You are a helpful assistant who answers all questions briefly."}
    table = [{"id": key, "prompt": [system, {"role": "user", "content": key}]} for key in ("one", "two")]
    found = Contamination(table[:1], 5)
    assert list(found.keep_clean(table[1:], row_counts)) == table[1:]
