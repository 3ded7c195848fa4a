import json
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_ray.data.gsm8k import extract, extract_flexible, gold_answer, is_correct
from spo_ray.data.verifiers import load_verifier


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
        ("#### 18. Therefore she earns 18 dollars over 3 days", "18"),
        ("#### 1. Cost\n#### 2. Total", None),
        ("#### 1. Cost\n#### 12", "12"),
        ("no answer 29", None),
        ("#### none", None),
        ("", None),
        ("#### 1 / 2", "1/2"),
        ("#### 1\u00a0234", "1234"),
        ("#### 1\u202f234", "1234"),
        ("#### 1 234", "1234"),
        ("#### 1'234", "1234"),
        ("#### 1_234", "1234"),
        ("#### 1.234.567", "1234567"),
        ("#### 1,00,000", "100000"),
        ("#### 1,2,3", None),
        ("#### 1e3", "1000"),
        ("#### 1e400", None),
        ("#### .5", "0.5"),
        ("#### £45", "45"),
        ("#### +12", "12"),
        ("#### \u201312", "-12"),
        ("#### - 12", "-12"),
        ("#### $−5", "-5"),
        ("#### 4 * 5 = 20", "20"),
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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", "18"),
        ("A: 18", "18"),
        ("The answer is $1,234.50.", "1234.5"),
        (r"so it is \boxed{3/4}", "3/4"),
        (r"\boxed{\frac{6}{8}}", "3/4"),
        (r"$\boxed{1{,}234}$", "1234"),
        (r"\boxed{\text{18 dollars}}", "18"),
        ("That is 25%.", "25"),
        ("It weighs 12 kg in all", "12"),
        ("The answer is -7 degrees.", "-7"),
        ("It is − 3", "-3"),
        ("answer: **42**", "42"),
        ("So 5. The answer is 12. No, the answer is 15, I think; 3 are left", "15"),
        ("#### 7\nThat leaves 2 for each of the 3.", "7"),
        ("A: 18 apples in 3 boxes", "18"),
        ("20 - 5 = 15", "15"),
        ("it costs 20-5", "5"),
        ("1, 2, 3", "3"),
        ("She has $.50", "0.5"),
        ("#### **18**", "18"),
        (r"\boxed{blue}, so 4", "4"),
        ("#### 5/0", None),
        ("9" * 5000, None),
        ("no number", None),
        ("", None),
        ("-$-5", None),
        ("- $-20", "-20"),
        ("#### 1. Cost\nIt is 9.\n#### 2. Total\nThat makes \\boxed{18}", "18"),
        ("So:\n- 18 apples", "18"),
        ("Total cost - $18", "18"),
        ("COVID-19", "19"),
        ("The answer is 20 - 5 = 15.", "15"),
        (r"\boxed{5+3=8}", "8"),
        (r"\boxed{2\frac{1}{2}}", "5/2"),
        (r"\boxed{1\,000}", "1000"),
        (r"The answer is $\frac{3}{4}$.", "3/4"),
        (r"\boxed{18", "18"),
        ("The area is 12 m^2", "12"),
        ("#### 5, which is all", "5"),
        ("#### 18.", "18"),
        ("#### 18. Therefore she earns 18 dollars over 3 days", "18"),
        ("Let\nA: 5\nB: 3\nTogether they have 8.", "8"),
        ("A: 5\nB: 3\nThe answer is 8, of 9", "8"),
        ("The answer is 2*3 = 6 + 1 = 7.", "7"),
        ("The answer is 3/4 + 1/4 = 1.", "1"),
        ("The answer is 6/4 = 3/2 litres of 2", "3/2"),
        (r"\boxed{5 * 2 = 10 = 8 + 2 = 10} of 3", "10"),
        (r"\boxed{\text{a \boxed{3}}}", "3"),
        (r"It is 2 \frac{1}{2}", "5/2"),
        ("Total..........42", "42"),
        ("See p.12", "12"),
        ("It takes 2½ cups", "5/2"),
        ("It takes 3 1/2 hours", "7/2"),
        ("#### 1,2,3", None),
        ("The answer is 1.234,56", None),
        # a mark with a number that can't be read is not passed over for a later number
        ("#### 10-15", None),
        ("#### 10**3", "1000"),
        ("#### 5 000 €", "5000"),
        ("#### **18**\n\nQuestion: Tom has 3 apples.\nAnswer: 3 + 2 = 5\n#### 5", "18"),
        ("#### Restated\nQuestion: How many?\n#### 5", "5"),
        ("#### 5 000 apples", "5"),
        (r"\boxed{3\sqrt{2}}", None),
        (r"\boxed{2\pi}", None),
        (r"\boxed{\frac{\sqrt{2}}{2}}", None),
        (r"\boxed{\sqrt{16} = 4}", "4"),
        ("The answer is not 5 but 6.", "6"),
        ("The answer is 1.5 × 10^3", "1500"),
        ("It is 1.5 × 10³ m²", "1500"),
        (r"\boxed{3 \times 10^5}", "300000"),
        (r"\boxed{\frac{1.5}{3}}", "1/2"),
        (r"\boxed{\frac{10,000}{4}}", "2500"),
        (r"\boxed{- 12}", "-12"),
        (r"\boxed{3+4}", None),
        ("The answer is 4 * 5 = <<4*5=20>>20.", "20"),
        ("The answer is 4 * 5.", None),
        ("The answer is 4 * 5, which is 20.", "20"),
        ("The answer is 3 +4", None),
        ("The answer is 5-6 days", None),
        ("The answer is (3+4)*2 = 14", "14"),
        ("The answer is 20% of 50 = 10", "10"),
        ("The answer is 18 of the 20 apples", "18"),
        ("The answer is the sum of 3 and 4, which is 7.", "7"),
        ("The answer is 18 because 2 * 3 = 6", "18"),
        ("The answer is 18 (9 + 9)", "18"),
        ("A: 3 boxes x 4 pens = 12 pens", "12"),
        ("A: 99 + John's age", "99"),
        ("To get the answer: add 3 and 4. That gives 7.", "7"),
        ("The answer is 12. To check the answer: add 3 and 9.", "12"),
        ("Answer: She has 16 eggs. She sells 9 at $2, which makes 18.", "18"),
        ("<think>... The answer is 10.</think>\nShe has 12.", "12"),
        ("<think>The answer is 10, or", None),
    ],
)
def test_flexible_extraction(text, answer):
    assert extract_flexible(text) == answer


BABBLE = {
    "divisions": r"\boxed{" + "1/" * 4000 + "1}",
    "fractions": "The answer is " + "12/5/" * 4000 + "1",
    "sums": "The answer is " + "2+" * 4000,
    "equations": "The answer is 2+2 = 4" + " + 2 = 6" * 4000,
    "blanks": " " * 20_000,
    "lines": "\n" * 20_000,
    "blanks in a fraction": "1" + " " * 20_000 + r"\frac",
    "digits": "1" * 10_000,
    "said digits": "The answer is " + "1" * 10_000,
    "boxed digits": r"\boxed{" + "1" * 10_000 + "}",
    "boxes": r"\boxed{" * 4000 + "1",
    "boxed again": r"\boxed{1" * 4000,
    "marks": "#### 1. a\n" * 4000,
    "open calculations": r"\boxed{1+" * 4000,
    "answers without a result": "The answer is 1+1 " * 2000,
    "thoughts": "<think>" * 4000,
}


@pytest.mark.parametrize("name", BABBLE)
def test_babble_does_not_hang_the_extraction(name):
    """A decayed model writes such things; seconds would be minutes over a data set.

    The limit is on this process's CPU time, which other work on the machine does not change.
    """

    def stop(signum, frame):
        raise AssertionError(f"{name}: still at it after 5 s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 5.0)
    try:
        for read in (extract, extract_flexible, gold_answer):
            read(3 * BABBLE[name])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def test_fractions_and_decimals_are_equal_as_numbers():
    assert is_correct("3/4", "#### 0.75")
    assert is_correct("0.75", "3/4")
    assert not is_correct("3/4", "no gold")


@given(st.text() | st.text(alphabet="-−$#.,/0123456789^{}= \\boxedfrac"))
def test_no_response_breaks_extraction(text):
    for found in (extract(text), extract_flexible(text)):
        assert found is None or is_correct(found, found)


def test_strict_is_a_part_of_flexible(shared_data):
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()
    for line in lines:
        solution = json.loads(line)["answer"]
        grade = load_verifier("gsm8k").grade(solution, solution)
        assert grade.correct
        assert grade.strict
        bare = solution.split("####")[1]
        assert load_verifier("gsm8k").grade(f"The answer is {bare}.", solution) == (grade.extracted, True, False)
