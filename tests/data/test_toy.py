from itertools import islice

from spo_ray.data.gsm8k import extract
from spo_ray.data.toy import KINDS, PREVIOUS, noisy_solutions, problems, render


def test_splits_never_meet_whatever_the_seeds():
    train = {p.question for seed in range(3) for p in islice(problems("train", seed), 1500)}
    test = {p.question for seed in range(3) for p in islice(problems("test", seed), 500)}
    corpus = {question for question, _ in islice(noisy_solutions(0), 5000)}
    assert not train & test
    assert not corpus & test


def test_solutions_are_arithmetically_right_and_cover_every_kind():
    kinds = set()
    for problem in islice(problems("train", 1), 800):
        for sentence in problem.solution.split("\n")[0].removesuffix(".").split(". "):
            left, right = sentence.removeprefix("First, ").removeprefix("Then, ").split(" = ")
            a, operator, b = left.split()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator] == int(right)
        assert extract(problem.solution) == problem.solution.split()[-1]
        assert int(problem.solution.split()[-1]) >= 0
        kinds.add(problem.kind)
    assert len(kinds) == len(KINDS) == 11


def test_slips_carry_on():
    steps = [("+", 20, 9), ("+", 20, PREVIOUS)]
    assert render(steps) == "First, 20 + 9 = 29. Then, 20 + 29 = 49.\n#### 49"
    assert render(steps, slip=(0, 1)) == "First, 20 + 9 = 30. Then, 20 + 30 = 50.\n#### 50"


def test_the_same_seed_gives_the_same_problems():
    first = [p.question for p in islice(problems("train", 5), 50)]
    assert first == [p.question for p in islice(problems("train", 5), 50)]
    assert first != [p.question for p in islice(problems("train", 6), 50)]
