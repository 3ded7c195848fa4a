"""From samples to SFT responses and pairs, on rows made by hand; every pair can be traced."""

from math import comb

import pytest

from spo_ray.data.grade import grade_samples
from spo_ray.data.pairs import pair_samples
from spo_ray.data.sft_set import collect_responses
from spo_ray.errors import UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, write_rows
from spo_ray.runtime.run import Run

from ..helpers import small_config

QUESTIONS = [{"id": f"q{i}", "prompt": f"{i} + 1?", "gold": f"So <<{i}+1>>{i + 1}.\n#### {i + 1}"} for i in range(4)]


def sampled(folder, questions, samples, name="base_samples", **columns):
    """An artifact as :func:`spo_ray.data.sample.sample` leaves it; ``samples`` are the same for all, or by question."""
    table = []
    for i, question in enumerate(questions):
        texts = samples[i] if isinstance(samples[0], list) else samples
        n = len(texts)
        made = {"seed": i, "prompt_ids": [1], "samples": texts, "sample_logps": [-1.0 - j for j in range(n)]}
        given = {"responses": [], "response_sources": [], "sample_tokens": [3] * n, "finished": [True] * n}
        table.append(given | question | made | {key: value[i] for key, value in columns.items()})
    (folder / name).mkdir()
    write_rows(folder / name / "part-0.parquet", table, schema.Samples)
    return Artifact(folder / name, name)


SAMPLES = [
    ["#### 1", "#### 2", "It is 1.", "#### 1"],
    ["#### 2", "The answer is 2.", "#### 7", "#### 2"],
    ["#### 8", "#### 9", "#### 8", "no"],
    ["#### 4", "#### 4", "#### 4", "#### 4"],
]


@pytest.fixture
def run(tmp_path, in_root, local_ray):
    return lambda *overrides: Run(small_config(tmp_path, *overrides))


def test_grades_and_pass_at_k(run, tmp_path):
    scored = grade_samples(run(), "base_scores", sampled(tmp_path, QUESTIONS, SAMPLES))
    table = scored.rows()
    assert [sum(row["correct"]) for row in table] == [3, 3, 0, 4]
    assert [sum(row["strict"]) for row in table] == [2, 2, 0, 4]
    assert table[0]["extracted"] == ["1", "2", "1", "1"]
    for k in (1, 2, 4):
        expected = sum(1 - comb(4 - c, k) / comb(4, k) for c in (3, 3, 0, 4)) / 4
        assert scored.manifest["facts"][f"pass@{k}"] == pytest.approx(expected)
    assert "pass@8" not in scored.manifest["facts"]


@pytest.mark.parametrize(
    ("overrides", "chosen", "reason"),
    [
        (["sft_data.max_pass=0.8"], ["q0", "q1", "q2"], "pass@1 above 0.8"),
        (["sft_data.max_pass=0"], ["q2"], "pass@1 above 0"),
        (["sft_data.max_pass=null", "sft_data.quantile=0.25"], ["q2"], "pass@1 above 0"),
        (["sft_data.max_pass=null", "sft_data.quantile=0.5"], ["q0", "q1", "q2"], "pass@1 above 0.75"),
        (["sft_data.max_pass=0.75"], ["q0", "q1", "q2"], "pass@1 above 0.75"),
        (["sft_data.pass_k=2", "sft_data.max_pass=0.99"], ["q2"], "pass@2 above 0.99"),
    ],
)
def test_low_pass_questions(run, tmp_path, overrides, chosen, reason):
    mine = run(*overrides)
    scored = grade_samples(mine, "base_scores", sampled(tmp_path, QUESTIONS, SAMPLES))
    questions = collect_responses(mine, "sft_questions", scored, ["gold"], choose=True, last=True)
    assert [row["id"] for row in questions.rows()] == chosen
    counts = questions.manifest["rows"]
    assert counts["dropped"] == {reason: 4 - len(chosen)}
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())


def test_responses_come_from_teachers_in_order_and_are_stripped(run, tmp_path):
    mine = run("sft_data.max_pass=0.8", r"sft_data.strip=['^.*?</think>\s*', '<<[^>]*>>']")
    scored = grade_samples(mine, "base_scores", sampled(tmp_path, QUESTIONS, SAMPLES))
    first = collect_responses(mine, "sft_questions", scored, ["samples"], choose=True, last=False)
    assert [row["response_sources"] for row in first.rows()] == [
        ["base_samples:0", "base_samples:2"],
        ["base_samples:0", "base_samples:1"],
        [],
    ]
    answers = [["unused"], ["unused"], ["<think>2 + 1\nis 4?</think>\n2 + 1 = 3", "<think>It is 4</think>4"]]
    taught = grade_samples(mine, "teacher1_scores", sampled(tmp_path, first.rows(), answers, "teacher1_samples"))
    last = collect_responses(mine, "teacher1_responses", taught, ["samples", "gold"], last=True).rows()
    assert last[2]["responses"] == ["2 + 1 = 3", "So 3.\n#### 3"]
    assert last[2]["response_sources"] == ["teacher1_samples:0", "gold"]
    assert last[0]["response_sources"] == ["base_samples:0", "base_samples:2"]


def test_no_response_is_a_reason(run, tmp_path):
    scored = grade_samples(run("sft_data.max_pass=0"), "base_scores", sampled(tmp_path, QUESTIONS, SAMPLES))
    with pytest.raises(UserError, match="no questions for the SFT set"):
        collect_responses(run("sft_data.max_pass=0"), "sft_questions", scored, ["samples"], choose=True, last=True)


def test_pairs_can_be_traced(run, tmp_path):
    responses = [["a", "b"], ["c"], ["d"], ["e"]]
    sources = [["gold", "t:1"], ["gold"], ["gold"], ["gold"]]
    table = sampled(tmp_path, QUESTIONS, SAMPLES, "sft_samples", responses=responses, response_sources=sources)
    mine = run("pairs.select=hardest", "pairs.per_question=2")
    pairs = pair_samples(mine, "pair_candidates", grade_samples(mine, "sft_scores", table))
    found = [
        tuple(row[key] for key in ("id", "chosen", "rejected", "chosen_source", "rejected_source"))
        for row in pairs.rows()
    ]
    assert found == [
        ("q0-0", "a", "#### 2", "gold", "sft_samples:1"),
        ("q1-0", "c", "#### 7", "gold", "sft_samples:2"),
        ("q2-0", "d", "#### 8", "gold", "sft_samples:0"),
        ("q2-1", "d", "#### 9", "gold", "sft_samples:1"),
    ]
    assert pairs.rows()[0]["prompt"] == [{"role": "user", "content": "0 + 1?", "extra": None}]
    assert pairs.manifest["rows"]["dropped"] == {"no wrong sample with an end token": 1}
    for row in pairs.rows():
        stage, index = row["rejected_source"].split(":")
        origin = next(r for r in Artifact(tmp_path / stage, "").rows() if r["id"] == row["source_id"])
        assert origin["samples"][int(index)] == row["rejected"]
