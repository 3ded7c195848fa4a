"""The headline's wording, from made-up results of every kind; intervals and p-values are those of real tests."""

import pytest

from spo_ray.evaluate.statistics import compare, share
from spo_ray.report.headline import Fact, headline, p_text, pieces, plain


def results(rights, n, **changes):
    """Summary of checkpoints that answer the first so many of ``n`` questions rightly; changes of log pi by name."""
    answers = {name: {str(i): float(i < right) for i in range(n)} for name, right in rights.items()}
    methods = {}
    for name in [*rights, *(name for name in changes if name not in rights)]:
        accuracy = share(rights[name] / n, n) if name in rights else None
        methods[name] = {"accuracy_greedy": accuracy, "delta_logp_chosen": changes.get(name)}
    return methods, compare("accuracy_greedy", answers) if len(rights) > 1 else []


def held_out(**rights):
    """Summary of methods without graded answers, by the held-out pairs (of 100) whose chosen answer gained more."""
    entry = {"accuracy_greedy": None, "delta_logp_chosen": 9.0}
    gains = {"delta_logp_chosen": -0.5}
    return {
        name: entry | {"held_out": gains | {"reward_accuracy": share(n / 100, 100)}} for name, n in rights.items()
    }, []


KINDS = {
    "better, level and worse": (
        results({"base": 10, "sft": 200, "spo": 250, "nll": 251, "tdpo": 202, "dpo": 120}, 320, spo=0.75, dpo=-0.82),
        "nll solves 78.4% of the 320 held-out questions, 15.9 points more than the SFT model (62.5%, p = 5e-15). "
        "spo (78.1%) is better than the SFT model too; it can't be told apart from nll. "
        "tdpo (63.1%) can't be told apart from the SFT model. dpo lost 25.0 points (37.5%, p = 1e-23). "
        "On the training pairs the preferred answers' log-probability fell with dpo (-0.82 nats) and rose with spo "
        "(+0.75 nats).",
    ),
    "one behind another": (
        results({"sft": 100, "a": 200, "b": 198, "c": 150}, 320),
        "a solves 62.5% of the 320 held-out questions, 31.2 points more than the SFT model (31.2%, p = 9e-30). "
        "b (61.9%) and c (46.9%) are better than the SFT model too; "
        "b can't be told apart from a; c (p = 7e-15) is behind a.",
    ),
    "ties": (
        results({"sft": 200, "spo": 201, "dpo": 199}, 320, spo=0.001, dpo=0.3),
        "No method is shown to be better than the SFT model, which solves 62.5% of the 320 held-out questions. "
        "spo (62.8%) and dpo (62.2%) can't be told apart from it. On the training pairs the preferred answers' "
        "log-probability rose with dpo (+0.30 nats) and did not change with spo.",
    ),
    "alike": (
        results({"sft": 200, "spo": 201, "dpo_nll": 201}, 320),
        "No method is shown to be better than the SFT model, which solves 62.5% of the 320 held-out questions. "
        "spo (62.8%) and dpo_nll (62.8%) can't be told apart from it. "
        "The very same questions are solved by spo/dpo_nll.",
    ),
    "one method": (
        results({"sft": 200, "spo": 250}, 320, spo=1.0),
        "spo solves 78.1% of the 320 held-out questions, 15.6 points more than the SFT model (62.5%, p = 2e-15). "
        "On the training pairs the preferred answers' log-probability rose with spo (+1.00 nats).",
    ),
    "one method, no better": (
        results({"sft": 200, "spo": 200}, 320),
        "spo is not shown to be better than the SFT model, which solves 62.5% of the 320 held-out questions. "
        "spo (62.5%) can't be told apart from it.",
    ),
    "few items": (
        results({"sft": 6, "dpo": 4, "spo": 9}, 12),
        "No method is shown to be better than the SFT model, which solves 50.0% of the 12 held-out questions. "
        "spo (75.0%) and dpo (33.3%) can't be told apart from it. "
        "With only 12 questions, an accuracy is known to about ±25 points.",
    ),
    "all worse": (
        results({"sft": 200, "dpo": 120, "simpo": 20}, 320, dpo=-1.0, simpo=-7.43),
        "No method is shown to be better than the SFT model, which solves 62.5% of the 320 held-out questions. "
        "dpo lost 25.0 points (37.5%, p = 2e-24) and simpo lost 56.2 points (6.2%, p = 4e-54). On the training pairs "
        "the preferred answers' log-probability fell with dpo (-1.00 nats) and simpo (-7.43 nats).",
    ),
    "many that rise": (
        results({}, 0, a=0.7, b=0.8, c=0.9, d=1.0, e=-1.0),
        "On the training pairs the preferred answers' log-probability fell with e (-1.00 nats) and rose with the other "
        "4 methods (+0.70 to +1.00 nats).",
    ),
    "all rise": (
        results({}, 0, a=0.7, b=0.8, c=0.9, d=1.0),
        "On the training pairs the preferred answers' log-probability rose with all 4 methods (+0.70 to +1.00 nats).",
    ),
    "no accuracy": (
        held_out(dpo=55, spo=62, ipo=30),
        "Of 100 held-out pairs, the preferred answer gained more than the rejected one in 62.0% with spo (95% interval "
        "52 to 71: above chance), 55.0% with dpo (95% interval 45 to 64: no different from chance) and 30.0% with ipo "
        "(95% interval 22 to 40: below chance). On the held-out pairs the preferred answers' log-probability fell with "
        "dpo (-0.50 nats), spo (-0.50 nats) and ipo (-0.50 nats).",
    ),
    "nothing measured": (results({}, 0, spo=None), ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_wording(kind):
    (methods, compared), expected = KINDS[kind]
    assert plain(headline(methods, compared, "sft", "the SFT model")) == expected


def test_every_number_names_its_rows():
    methods, compared = results({"sft": 100, "spo": 200, "dpo": 20}, 320, spo=0.5)
    told = headline(methods, compared, "sft", "it")
    facts = [piece for sentence in told for piece in pieces(sentence) if isinstance(piece, Fact)]
    assert [(fact.stage, fact.name) for fact in facts] == [
        *(("eval", "spo"), ("eval", "sft"), ("comparisons", "spo")),
        *(("eval", "dpo"), ("comparisons", "dpo"), ("method", "spo")),
    ]


def test_p_values_are_readable():
    assert [p_text(p) for p in (1.0, 0.0312, 0.0012, 2.2e-5, 3e-12)] == ["1", "0.031", "0.0012", "2e-5", "3e-12"]
