"""Preference rows: every format by hand, and rows that are none."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_ray.data.preference_formats import example, preference
from spo_ray.errors import RowRejectedError

ASK = {"role": "user", "content": "2 + 2?"}
SYSTEM = {"role": "system", "content": "Be short."}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
FIRST, MORE = {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}
TURNS = [ASK, FIRST, MORE]
SCORED = [
    {"response": "b", "overall_score": 7.0},
    {"response": "a", "overall_score": 9.5},
    {"response": "c", "overall_score": 2.0},
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, ([ASK], "4", "5")),
        ({"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]}, ([SYSTEM, ASK], "4", "5")),
        ({"prompt": [SYSTEM, ASK], "chosen": "4", "rejected": "5"}, ([SYSTEM, ASK], "4", "5")),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ([ASK], "4", "5")),
        ({"chosen": [ASK, FIRST, MORE, GOOD], "rejected": [ASK, FIRST, MORE, BAD]}, (TURNS, "4", "5")),
        ({"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ([ASK], "4", "5")),
        ({"prompt": [ASK], "chosen": [FIRST, MORE, GOOD], "rejected": [FIRST, MORE, BAD]}, (TURNS, "4", "5")),
        ({"prompt": "2 + 2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score_chosen": 9.0}, ([ASK], "4", "5")),
        ({"chosen": "2 + 2? 4.", "rejected": "2 + 2? 5!"}, ([ASK], "4.", "5!")),
        ({"instruction": "2 + 2?", "completions": SCORED}, ([ASK], "a", "c")),
        ({"prompt": [ASK], "completions": SCORED[:2]}, ([ASK], "a", "b")),
    ],
)  # fmt: skip
def test_formats(row, expected):
    found = preference(row)
    assert found == expected
    assert preference(json.loads(json.dumps(row))) == found


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2 + 2?", "completion": "4"}, ([ASK], "4")),
        ({"prompt": [SYSTEM, ASK], "completion": [GOOD]}, ([SYSTEM, ASK], "4")),
        ({"prompt": [ASK], "completion": [FIRST, MORE, GOOD], "source": "x"}, (TURNS, "4")),
        ({"messages": [SYSTEM, ASK, GOOD]}, ([SYSTEM, ASK], "4")),
        ({"prompt": "2 + 2?"}, "no column 'completion'"),
        ({"completion": "4"}, "no column 'prompt'"),
        ({"prompt": "2 + 2?", "completion": "\n"}, "'completion' is empty"),
        ({"prompt": "2 + 2?", "completion": 4}, "'completion' is no text, and no list of messages"),
        ({"messages": [ASK]}, "'messages' does not end in an assistant's message"),
        ({"messages": "2 + 2? 4"}, "'messages' does not end in an assistant's message"),
        ({"messages": [GOOD]}, "no 'prompt'"),
        ({"messages": []}, "'messages' is no text, and no list of messages"),
    ],
)
def test_sft_rows(row, expected):
    if isinstance(expected, tuple):
        assert example(row) == expected
    else:
        with pytest.raises(RowRejectedError, match=expected):
            example(row)


def test_a_random_completion_that_scores_lower():
    row = {"instruction": "2 + 2?", "completions": [*SCORED, {"response": "as good", "overall_score": 9.5}]}
    lost = [preference(row, rejected="random", seed=str(i)).rejected for i in range(40)]
    assert set(lost) == {"b", "c"}
    assert lost == [preference(row, rejected="random", seed=str(i)).rejected for i in range(40)]
    assert preference(row).chosen == "a"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a"}, "no column 'rejected'"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "not both text"),
        ({"prompt": "p", "chosen": "a", "rejected": [BAD]}, "not both text"),
        ({"chosen": "abc", "rejected": "abd"}, "no common beginning"),
        ({"chosen": "same", "rejected": "same"}, "beginning of the other"),
        ({"chosen": [ASK, GOOD], "rejected": [MORE, BAD]}, "different prompts"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no 'prompt'"),
        ({"prompt": "p", "chosen": [], "rejected": []}, "does not end"),
        ({"chosen": [GOOD, ASK], "rejected": [GOOD, ASK]}, "does not end"),
        ({"chosen": [{"role": "user"}], "rejected": [BAD]}, "'content' is no text"),
        ({"chosen": ["x"], "rejected": [BAD]}, "without a role"),
        ({"prompt": "p", "completions": [{"response": "a"}]}, "no 'overall_score'"),
        ({"prompt": "p", "completions": SCORED[:1]}, "no completion is scored lower"),
        ({"prompt": "p", "completions": None}, "no completion is scored lower"),
        ({"prompt": "p", "completions": [{"response": "a", "overall_score": float("nan")}]}, "no 'overall_score'"),
    ],
)
def test_rows_that_are_no_pair(row, reason):
    with pytest.raises(RowRejectedError, match=reason):
        preference(row)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["user", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=12,
)
KEYS = st.sampled_from(["prompt", "chosen", "rejected", "completions", "instruction"])


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(KEYS, JSON | st.lists(st.sampled_from([ASK, GOOD, BAD, *SCORED]), max_size=4)))
def test_anything_is_a_pair_or_has_a_reason(row):
    try:
        prompt, chosen, rejected = preference(row)
    except RowRejectedError as error:
        assert str(error)
        return
    assert chosen.strip()
    assert rejected.strip()
    assert prompt
    assert all(turn["content"].strip() for turn in prompt)
