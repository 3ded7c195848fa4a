import random

import pytest

from spo_ray.data.grade import Sample
from spo_ray.data.pairs import SELECTIONS, wrong_against_sft
from spo_ray.data.sft_set import correct_responses


def samples(*texts, correct=(), cut=(), logps=None):
    found = []
    for i, text in enumerate(texts):
        logp = -float(i) if logps is None else logps[i]
        found.append(Sample(i, text, logp, text in correct, text not in cut))
    return found


def test_teachers_in_order_without_repeats():
    mine = samples("b", "wrong", "c ", "cut", correct=("b", "c ", "cut"), cut=("cut",))
    own = [("b", "s:0"), ("c", "s:2")]

    def found(teachers, limit=9, before=(), given=mine):
        return correct_responses(before, "gold", given, stage="s", teachers=teachers, limit=limit)

    assert found(["samples", "gold"]) == [*own, ("gold", "gold")]
    assert found(["gold", "samples"], limit=2) == [("gold", "gold"), own[0]]
    assert found(["samples", "gold"], given=samples("x", "y")) == [("gold", "gold")]
    assert found(["samples"], given=samples("x", "y")) == []
    assert found(["samples"], before=[("a", "t:1"), ("c", "t:2")]) == [("a", "t:1"), ("c", "t:2"), own[0]]
    assert found([], before=[("a", "t:1")], limit=1) == [("a", "t:1")]


def test_wrong_samples_are_finished_distinct_and_not_empty():
    mine = samples("right", "wrong", "wrong ", "cut", " ", "other", correct=("right",), cut=("cut",))
    pairs = wrong_against_sft(["s1", "s2"], mine, select="random", per_question=9, seed="x")
    assert sorted(sample.text for _, sample in pairs) == ["other", "wrong"]
    assert [turn for turn, _ in pairs] == [0, 1]
    assert wrong_against_sft([], mine, select="random", per_question=9, seed="x") == []


def test_the_draw_depends_on_the_seed_alone():
    mine = samples(*map(str, range(30)))

    def draw(seed):
        return wrong_against_sft(["s"], mine, select="random", per_question=1, seed=seed)[0][1].index

    assert len({draw(str(i)) for i in range(20)}) > 5
    assert draw("3") == draw("3")


CHOSEN = "She has 3 pens and buys 2 more. 3 + 2 = 5.\n#### 5"
WRONG = {
    "other": "It is 9.\n#### 9",
    "early": "She has 4 pens and buys 2 more. 4 + 2 = 6.\n#### 6",
    "late": "She has 3 pens and buys 2 more. 3 + 2 = 6.\nI am quite sure that nobody knows better than I.\n#### 6",
}


@pytest.mark.parametrize(
    ("select", "order"),
    [
        ("hardest", ["early", "other", "late"]),
        ("nearest", ["early", "late", "other"]),
        ("longest_common_prefix", ["late", "early", "other"]),
    ],
)
def test_selections_on_a_case_by_hand(select, order):
    mine = samples(*WRONG.values(), logps=[-20.0, -3.0, None])
    pairs = wrong_against_sft([CHOSEN], mine, select=select, per_question=3, seed="")
    assert [sample.text for _, sample in pairs] == [WRONG[name] for name in order]


def test_each_response_takes_the_best_that_is_left_for_it():
    mine = samples("xx 1", "yy 1", "yy 2")
    pairs = wrong_against_sft(["yy 0", "xx 0"], mine, select="longest_common_prefix", per_question=3, seed="")
    assert [(turn, sample.text) for turn, sample in pairs] == [(0, "yy 1"), (1, "xx 1"), (0, "yy 2")]


def test_every_selection_ranks_anything():
    rng = random.Random(0)
    for key in SELECTIONS.values():
        assert isinstance(float(key("", Sample(0, "", None, False, True), rng)), float)
