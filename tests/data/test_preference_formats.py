"""Preference rows: every format by hand, and rows that are none."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_ray.data.messages import example
from spo_ray.data.preference_formats import preference, unread
from spo_ray.errors import RowRejectedError

ASK = {"role": "user", "content": "2 + 2?"}
SYSTEM = {"role": "system", "content": "Be short."}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
FIRST, MORE = {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}
TURNS = [ASK, FIRST, MORE]
TRANSCRIPT = "\n\nHuman: 2 + 2?\n\nAssistant: 4\n\nHuman: And 3 + 3?\n\nAssistant:"
SHAREGPT = [{"from": "system", "value": "Be short."}, {"from": "human", "value": "2 + 2?"}]
EMPTY = {"role": "system", "content": " "}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
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
        ({"instruction": "2 + 2?", "completions": SCORED}, ([ASK], "a", "c")),
        ({"prompt": [ASK], "completions": SCORED[:2]}, ([ASK], "a", "b")),
        ({"prompt": "2 + 2?", "completions": [*SCORED, {"response": "d"}]}, ([ASK], "a", "c")),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "completions": None}, ([ASK], "4", "5")),
        # transcripts, with the prompt in the sides, apart, or in both
        ({"chosen": f"{TRANSCRIPT} 4\n", "rejected": f"{TRANSCRIPT} 5"}, (TURNS, "4", "5")),
        ({"prompt": TRANSCRIPT, "chosen": " 4", "rejected": " 5"}, (TURNS, " 4", " 5")),
        ({"prompt": TRANSCRIPT, "chosen": f"{TRANSCRIPT} 4", "rejected": f"{TRANSCRIPT} 5"}, (TURNS, "4", "5")),
        ({"chosen": "Human: 2 + 2?\nAssistant: 4", "rejected": "Human: 2 + 2?\nAssistant: 5"}, ([ASK], "4", "5")),
        # turns that prompt and sides share
        ({"prompt": [SYSTEM, ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ([SYSTEM, ASK], "4", "5")),
        ({"prompt": TURNS, "chosen": [MORE, GOOD], "rejected": [MORE, BAD]}, (TURNS, "4", "5")),
        ({"prompt": "2 + 2?\n", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
         ([SYSTEM, ASK], "4", "5")),
        ({"prompt": [SYSTEM], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ([SYSTEM, ASK], "4", "5")),
        ({"prompt": [ASK, FIRST], "chosen": [MORE, GOOD], "rejected": [MORE, BAD]}, (TURNS, "4", "5")),
        # a system message in a column, or an empty one
        ({"system": "Be short.", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, ([SYSTEM, ASK], "4", "5")),
        ({"system": "Be short.", "prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]},
         ([SYSTEM, ASK], "4", "5")),
        ({"system": "", "prompt": [EMPTY, ASK], "chosen": "4", "rejected": "5"}, ([ASK], "4", "5")),
        # ShareGPT, LLaMA-Factory, ms-swift, OpenAI
        ({"conversations": SHAREGPT,
          "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
         ([SYSTEM, ASK], "4", "5")),
        ({"chosen": {"conversations": [*SHAREGPT, {"from": "gpt", "value": "4"}]},
          "rejected": {"conversations": [*SHAREGPT, {"from": "gpt", "value": "5"}]}}, ([SYSTEM, ASK], "4", "5")),
        ({"messages": [SYSTEM, ASK], "chosen": GOOD, "rejected": BAD}, ([SYSTEM, ASK], "4", "5")),
        ({"chosen": {"messages": [ASK, GOOD]}, "rejected": {"messages": [ASK, BAD]}}, ([ASK], "4", "5")),
        ({"messages": [SYSTEM, ASK, GOOD], "rejected_response": "5"}, ([SYSTEM, ASK], "4", "5")),
        ({"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"}, ([ASK], "4", "5")),
        ({"instruction": "2 +", "input": "2?", "chosen": "4", "rejected": "5"},
         ([{"role": "user", "content": "2 +\n2?"}], "4", "5")),
        ({"instruction": "And 3 + 3?", "input": None, "history": [["2 + 2?", "4"]], "chosen": "4", "rejected": "5"},
         (TURNS, "4", "5")),
        ({"messages": [SYSTEM, ASK, GOOD], "rejected_messages": [SYSTEM, ASK, BAD]}, ([SYSTEM, ASK], "4", "5")),
        ({"input": {"messages": [SYSTEM, ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
         ([SYSTEM, ASK], "4", "5")),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}],
          "chosen": [GOOD], "rejected": [BAD], "images": []}, ([ASK], "4", "5")),
    ],
)  # fmt: skip
def test_formats(row, expected):
    found = preference(row)
    assert found[:5] == (*expected, None, None)
    assert preference(json.loads(json.dumps(row))) == found


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2 + 2?", "completion": "4"}, ([ASK], "4")),
        ({"prompt": [SYSTEM, ASK], "completion": [GOOD]}, ([SYSTEM, ASK], "4")),
        ({"prompt": [ASK], "completion": [FIRST, MORE, GOOD], "source": "x"}, (TURNS, "4")),
        ({"messages": [SYSTEM, ASK, GOOD]}, ([SYSTEM, ASK], "4")),
        ({"system": "Be short.", "prompt": "2 + 2?", "completion": "4"}, ([SYSTEM, ASK], "4")),
        ({"conversations": [*SHAREGPT, {"from": "gpt", "value": "4"}]}, ([SYSTEM, ASK], "4")),
        ({"prompt": "2 + 2?", "completion": "4", "images": ["a.png"]}, "'images' can't be used"),
        ({"prompt": "2 + 2?"}, "'completion' is no text, and no list of messages"),
        ({"completion": "4"}, "'prompt' is no text, and no list of messages"),
        ({"prompt": "2 + 2?", "completion": "\n"}, "'completion' is empty"),
        ({"messages": [ASK]}, "'messages' does not end in an assistant's message"),
        ({"messages": "2 + 2? 4"}, "'messages' does not end in an assistant's message"),
        ({"messages": [GOOD]}, "no 'prompt'"),
        ({"messages": []}, "'messages' is no text, and no list of messages"),
    ],
)
def test_sft_rows(row, expected):
    if isinstance(expected, tuple):
        prompt, answer = example(row)
        assert (prompt, answer["content"]) == expected
    else:
        with pytest.raises(RowRejectedError, match=expected):
            example(row)


def test_columns_of_other_names():
    row = {"system": "Be short.", "question": "2 + 2?", "good": "4", "bad": "5", "source": "x"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert preference(row, columns=columns)[:3] == ([SYSTEM, ASK], "4", "5")
    assert unread(row, columns) == {"source"}
    others = {"prompt": "2 + 2?", "instruction": "Add.", "input": "x", "chosen": "4", "rejected": "5", "messages": None}
    assert unread(others, {}) == {"instruction"}
    assert unread({"prompt": "2 + 2?", "input": "x"}, {}) == {"input"}
    with pytest.raises(RowRejectedError, match=r"no column 'query', which data\.columns\.prompt names"):
        preference(row, columns=columns | {"prompt": "query"})


CALL = {"name": "add", "arguments": '{"a": 2}'}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps([CALL])},
    ],
)
def test_calls_of_tools_as_others_write_them(message):
    result = {"role": "tool_response", "content": "4"}
    before, answer = example({"messages": [ASK, message, result, message], "tools": [ADD]})
    calls = {"function": {"name": "add", "arguments": {"a": 2}}}
    assert [turn["role"] for turn in before] == ["user", "assistant", "tool"]
    assert json.loads(before[0]["extra"]) == {"tools": [ADD]}
    assert answer["content"] == ""
    for turn in (before[1], answer):
        (found,) = json.loads(turn["extra"])["tool_calls"]
        assert found == calls | ({} if "tool_calls" in message else {"type": "function"})


def test_the_rejected_response_of_ms_swift_follows_the_same_calls():
    call = {"role": "tool_call", "content": json.dumps(CALL)}
    turns = [ASK, call, {"role": "tool_response", "content": "4"}]
    found = preference({"messages": [*turns, GOOD], "rejected_response": "5"})
    assert found == preference({"messages": turns, "chosen": GOOD, "rejected": BAD})
    assert json.loads(found.prompt[1]["extra"])["tool_calls"][0]["function"]["arguments"] == {"a": 2}


def test_roles_and_parts_of_contents_as_others_write_them():
    parts = ["2 + ", {"type": "input_text", "text": "2?"}]
    answer = {"role": None, "from": "GPT", "content": None, "value": "4", "reasoning": "Hm."}
    found = preference({"prompt": [{"role": "User", "content": parts}], "chosen": [answer], "rejected": [BAD]})
    assert found[:3] == ([ASK], "4", "5")
    assert json.loads(found.chosen_extra) == {"reasoning_content": "Hm."}


@pytest.mark.parametrize("arguments", [{"a": 2, "b": None}, '{"a": 2}'])
@pytest.mark.parametrize("tools", [[ADD], [json.dumps(ADD)], json.dumps([ADD["function"]])])
def test_tools_and_their_calls(arguments, tools):
    """Arguments become mappings, without the nulls that Arrow adds; bare functions get their wrapper."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
    result = {"role": "tool", "name": "add", "tool_call_id": None, "content": "4"}
    row = {"tools": tools, "prompt": [ASK, call, result], "chosen": [GOOD], "rejected": [call]}
    found = preference(row)
    calls = {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    extras = [json.loads(turn["extra"]) for turn in found.prompt]
    assert extras == [{"tools": [ADD]}, calls, {"name": "add"}]
    assert [turn["content"] for turn in found.prompt] == ["2 + 2?", "", "4"]
    assert (found.chosen, found.rejected, found.chosen_extra) == ("4", "", None)
    assert json.loads(found.rejected_extra) == calls


@pytest.mark.parametrize(
    ("row", "gap"),
    [
        ({"chosen": "4", "rejected": "5", "score_chosen": 9, "score_rejected": 2.5}, 6.5),
        ({"chosen": "4", "rejected": "5", "chosen-rating": 5, "rejected-rating": 1}, 4.0),
        ({"chosen": "4", "rejected": "5", "chosen_reward": -1.5, "rejected_reward": -2.0}, 0.5),
        ({"chosen": "4", "rejected": "5", "good": 3, "bad": 1}, 2.0),
        ({"completions": SCORED}, 7.5),
        ({"chosen": "4", "rejected": "5", "score_chosen": 9}, None),
        ({"chosen": "4", "rejected": "5", "score_chosen": "9", "score_rejected": "1"}, None),
        ({"chosen": "4", "rejected": "5", "score_chosen": True, "score_rejected": False}, None),
        ({"chosen": "4", "rejected": "5", "score_chosen": float("inf"), "score_rejected": 1}, None),
    ],
)
def test_gaps_of_scores(row, gap):
    columns = {"score_chosen": "good", "score_rejected": "bad"} if "good" in row else {}
    assert preference({"prompt": "2 + 2?", **row}, columns=columns).score_gap == gap


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
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "'rejected' is no text, and no list of messages"),
        ({"prompt": "p", "chosen": "a", "rejected": [BAD]}, "not both text"),
        ({"chosen": "A cherry.", "rejected": "A banana."}, "^no column 'prompt'$"),
        ({"input": "q", "chosen": "A cherry.", "rejected": "A banana."}, "to one of 'input'$"),
        ({"system": "", "question": "q", "id": 7, "chosen": "A cherry.", "rejected": "A banana."},
         "^no column 'prompt': set data.columns.prompt to one of 'question'$"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
          "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: d"}, "differ before their last messages"),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: d"}, "does not end"),
        ({"prompt": [ASK, FIRST, MORE], "chosen": [ASK, BAD, GOOD], "rejected": [ASK, BAD, BAD]}, "not the beginning"),
        ({"prompt": "another", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "'prompt' is not the beginning"),
        ({"system": "Be long.", "prompt": [SYSTEM, ASK], "chosen": "4", "rejected": "5"}, "'system' differs"),
        ({"prompt": "p <image>", "images": ["a.png"], "chosen": "a", "rejected": "b"}, "'images' can't be used"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
         "'prompt' has content of type 'image'"),
        ({"prompt": "p", "chosen": "a", "rejected": "a \n"}, "the same but for white space"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 3.0},
         "by their scores 'chosen' is not better than 'rejected'"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen-rating": 1, "rejected-rating": 5}, "by their scores"),
        ({"prompt": "p", "history": ["ab"], "chosen": "a", "rejected": "b"}, "'history' is no list of pairs"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": "add"}, "'tools' is not JSON"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": {"a": 1}}, "'tools' has a function without a 'name'"),
        ({"prompt": [ASK, {"role": "assistant", "tool_calls": [{"id": 1}]}], "chosen": "a", "rejected": "b"},
         "'tool_calls' has a function without a 'name'"),
        ({"chosen": [ASK, GOOD], "rejected": [MORE, BAD]}, "different prompts"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no 'prompt'"),
        ({"prompt": "p", "chosen": [], "rejected": []}, "no list of messages"),
        ({"chosen": [GOOD, ASK], "rejected": [GOOD, ASK]}, "does not end"),
        ({"chosen": [{"role": "user"}], "rejected": [BAD]}, "'chosen.content' is no text"),
        ({"chosen": ["x"], "rejected": [BAD]}, "'chosen' has a message without a 'role'"),
        ({"prompt": [ASK | {"role": "critic"}], "chosen": [GOOD], "rejected": [BAD]},
         "'prompt' has a message of the role 'critic'; known: system, developer, user"),
        ({"prompt": [ASK, {"from": "tool_call", "value": "add(2)"}], "chosen": [GOOD], "rejected": [BAD]},
         "'prompt' has a call that is not JSON"),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "text": "cat.png"}]}], "chosen": [GOOD],
          "rejected": [BAD]}, "'prompt' has content of type 'image': only text is trained on"),
        ({"prompt": "p", "completions": [{"response": "a"}]}, "none with a 'response' and an 'overall_score'"),
        ({"prompt": "p", "completions": SCORED[:1]}, "no completion is scored lower"),
        ({"prompt": "p", "completions": None}, "no column 'chosen'"),
        ({"prompt": "p", "completions": [{"response": "a", "overall_score": float("nan")}]}, "none with a 'resp"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pair(row, reason):
    with pytest.raises(RowRejectedError, match=reason):
        preference(row)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), inner)
    ),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["prompt", "chosen", "rejected", "completions", "instruction", "system", "tools", "input", "messages", "history"]
)


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(KEYS, JSON | st.lists(st.sampled_from([ASK, GOOD, BAD, *SCORED]), max_size=4)))
def test_anything_is_a_pair_or_has_a_reason(row):
    try:
        found = preference(row)
    except RowRejectedError as error:
        assert str(error)
        return
    assert found.chosen.strip() != found.rejected.strip()
    assert found.chosen.strip()
    assert found.rejected.strip()
    assert found.prompt
    assert all(turn["content"].strip() for turn in found.prompt)
