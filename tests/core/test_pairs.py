from spo_ray.core.pairs import correct_responses, wrong_against_sft


def test_teachers_in_order_without_repeats():
    samples, correct, ended = ["b", "wrong", "c ", "cut"], [True, False, True, True], [True, True, True, False]
    assert correct_responses("gold", samples, correct, ended, teachers=["samples", "gold"], limit=9) == [
        "b",
        "c",
        "gold",
    ]
    assert correct_responses("gold", samples, correct, ended, teachers=["gold", "samples"], limit=2) == ["gold", "b"]
    assert correct_responses("gold", samples, [False] * 4, ended, teachers=["samples", "gold"], limit=2) == ["gold"]
    assert correct_responses("gold", samples, [False] * 4, ended, teachers=["samples"], limit=2) == []


def test_wrong_samples_are_finished_distinct_and_not_empty():
    samples = ["right", "wrong", "wrong ", "cut", " ", "other"]
    correct = [True, False, False, False, False, False]
    finished = [True, True, True, False, True, True]
    pairs = wrong_against_sft(["s1", "s2"], samples, correct, finished, per_question=9, seed="x")
    assert sorted(rejected for _, rejected in pairs) == ["other", "wrong"]
    assert [chosen for chosen, _ in pairs] == ["s1", "s2"]


def test_the_draw_depends_on_the_seed_alone():
    samples = [str(i) for i in range(30)]
    flags = ([False] * 30, [True] * 30)
    draws = {wrong_against_sft(["s"], samples, *flags, per_question=1, seed=str(i))[0] for i in range(20)}
    assert len(draws) > 5
    again = wrong_against_sft(["s"], samples, *flags, per_question=1, seed="3")
    assert again == wrong_against_sft(["s"], samples, *flags, per_question=1, seed="3")
