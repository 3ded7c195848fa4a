from hypothesis import given
from hypothesis import strategies as st

from spo_ray.core.text_metrics import distinct, longest_run, repetition, words_and_marks


def test_words_are_words_numbers_and_marks():
    assert words_and_marks("It's 3.5, no?\n#### 7") == [
        "It",
        "'",
        "s",
        "3",
        ".",
        "5",
        ",",
        "no",
        "?",
        "#",
        "#",
        "#",
        "#",
        "7",
    ]


def test_repetition_against_hand_counts():
    assert repetition("abcabcabc", 3) == 1 - 3 / 7  # abc bca cab abc bca cab abc
    assert repetition("aaaaaa", 4) == 1 - 1 / 3
    assert repetition("abcdef", 4) == 0.0
    assert repetition("abc", 4) == 0.0


def test_the_longest_run_of_a_repeated_block():
    assert longest_run("xababab") == 6
    assert longest_run("aaaa.bb") == 4
    assert longest_run("abcdef") == 0
    assert longest_run("abcabcxyz") == 6
    assert longest_run("abcabcxyz", longest_period=2) == 0


def test_distinct_n_counts_over_all_texts():
    assert distinct([["a", "b"], ["a", "b", "c"]], 2) == 2 / 3
    assert distinct([["a"], []], 2) == 0.0


@given(st.lists(st.integers(0, 2), max_size=24))
def test_the_longest_run_against_a_search_by_hand(tokens):
    best = 0
    for period in range(1, len(tokens) // 2 + 1):
        for start in range(len(tokens)):
            for end in range(start + 2 * period, len(tokens) + 1):
                part = tokens[start:end]
                if all(part[i] == part[i - period] for i in range(period, len(part))):
                    best = max(best, len(part))
    assert longest_run(tokens) == best
