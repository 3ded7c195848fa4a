import json

import pytest

from spo_ray.core.scoring import extract, gold_answer, is_correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("20 + 9 = 29.\n#### 29", "29"),
        ("#### 1,234", "1234"),
        ("#### $1,234.50", "1234.5"),
        ("#### -7", "-7"),
        ("#### -$3", "-3"),
        ("#### 18.0", "18"),
        ("#### 5\n#### 6", "6"),
        ("####12 apples", "12"),
        ("#### 100", "100"),
        ("no answer 29", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_extract(text, answer):
    assert extract(text) == answer


def test_gold_is_a_solution_or_a_bare_number():
    assert gold_answer("two and two\n#### 4") == "4"
    assert gold_answer(" 1,000 ") == "1000"
    assert gold_answer("4 apples") is None


def test_equality_is_of_numbers():
    assert is_correct("18", "so\n#### 18.00")
    assert not is_correct("17", "#### 18")
    assert not is_correct(None, "#### 18")


def test_every_real_gold_answer_extracts(shared_data):
    count = 0
    for split in ("train", "test"):
        for line in (shared_data / "gsm8k" / f"{split}.jsonl").read_text().splitlines():
            solution = json.loads(line)["answer"]
            expected = float(solution.split("####")[1].replace(",", ""))
            assert float(gold_answer(solution)) == expected
            count += 1
    assert count == 8792
