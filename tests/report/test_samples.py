"""Answers side by side: which prompts are shown, and how grades moved."""

from spo_ray.report.samples import MOST_CHARACTERS, SHOWN_CHARACTERS, SHOWN_PROMPTS, shown_samples


def answers(name, text="{name} says {i}", rights=(), n=4):
    return {str(i): {"response": text.format(name=name, i=i), "correct": i in rights} for i in range(n)}


def prompts(n=4):
    return [{"id": str(i), "prompt": f"question {i}", "gold": f"gold {i}"} for i in range(n)]


def test_disputed_prompts_come_first_with_the_moves_of_each_grade():
    greedy = {"base": answers("base"), "sft": answers("sft", rights=[0, 2]), "dpo": answers("dpo", rights=[0, 3])}
    shown = shown_samples(greedy, prompts(), "sft")
    assert [(line["prompt"], line["moves"]) for line in shown["lines"]] == [
        ("question 0", []),
        ("question 2", ["wrong", "wrong:dpo"]),
        ("question 3", ["right", "right:dpo"]),
        ("question 1", []),
    ]
    assert shown["filters"] == {
        "right": "any method: changed from wrong to right",
        "wrong": "any method: changed from right to wrong",
        "right:dpo": "dpo: changed from wrong to right",
        "wrong:dpo": "dpo: changed from right to wrong",
    }
    assert [answer["pieces"] for answer in shown["lines"][1]["answers"]] == [
        [("base", True), (" says 2", False)],
        [("sft says 2", False)],
        [("dpo", True), (" says 2", False)],
    ]


def test_equal_answers_are_not_repeated_and_long_ones_cut():
    long = "x" * (SHOWN_CHARACTERS + 1)
    shown = shown_samples({"sft": answers("", long), "dpo": answers("", long)}, prompts(), "sft")
    first, second = shown["lines"][0]["answers"]
    assert "".join(piece for piece, _ in first["pieces"]) == f"{long[:-1]} …"
    assert (second["same"], second["pieces"]) == (True, [])


def test_pages_stay_small_unless_more_is_asked_for():
    n = 2 * SHOWN_PROMPTS
    short, long = ({"sft": answers("", "x" * size, n=n)} for size in (1, MOST_CHARACTERS // 10))
    long["sft"] = {i: row | {"response": row["response"][:SHOWN_CHARACTERS]} for i, row in long["sft"].items()}
    many = {f"m{i}": long["sft"] for i in range(10)}
    count = lambda greedy, most=None: len(shown_samples(greedy, prompts(n), "sft", most)["lines"])  # noqa: E731
    assert count(short) == SHOWN_PROMPTS
    assert count(many) == MOST_CHARACTERS // (10 * SHOWN_CHARACTERS)
    assert count(many, n) == n
