"""The study of SPO's worth: its pairs, its variants of the step, its fronts, and the page from the committed rows."""

import json
import random
from itertools import islice, product

import pytest
import torch
from pydantic import TypeAdapter

from benchmarks.study import run, training
from benchmarks.study import world as worlds
from benchmarks.study.figures import front_points
from benchmarks.study.jobs import DIAL, METHODS, PARTS, SEARCHED, best, candidates, jobs, spo
from benchmarks.study.page import PAGE, PairedTest, area, decoupled, dial, search_lines, untuned, verdicts, written
from benchmarks.study.training import Recipe, dialled, gradients, hinged, interpolated, train
from benchmarks.study.world import REGIMES, ROOT, Start, is_right
from spo_ray.config.methods import MethodConfig
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import PairLogps
from spo_ray.data.toy import problems
from spo_ray.model.collate import collate
from spo_ray.model.load import load_model, parameter_groups
from spo_ray.train.method_state import Method

SIZES = {"TRAIN": 24, "VALIDATION": 4, "HELD_OUT": 6, "TEST": 4, "SAMPLES": 4}


@pytest.fixture(scope="module")
def made():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SIZES.items():
            patch.setattr(worlds, name, value)
        yield worlds.make(Start(seed=3, regime="flipped 30%", sft_epochs=1))


@pytest.fixture(scope="module")
def trained(made):
    return train(made, Recipe(spo(lr=1e-3), epochs=1), 3)


@pytest.mark.parametrize("name", ["gold", "own", "weaker", "brief"])
def test_the_sides_of_a_regimes_pairs(name):
    rng, sides = random.Random(0), []
    for question in islice(problems("train", 0), 60):
        answers = ["3 * 5 = 15.\n#### 1500000", "First, 2 + 2 = 4.\n#### 1500000", question.solution]
        if found := REGIMES[name](question, answers, rng):
            assert found[0] == question.question
            sides.append([is_right(text, question) for text in found[1:]])
            assert found[1] != found[2]
            assert name != "brief" or found[1] == found[2].replace("First, ", "").replace("Then, ", "")
    expected = {"gold": [[True, False]], "own": [[True, False]], "weaker": [[False, False]]}.get(name)
    assert len(sides) > 20
    assert expected is None or all(pair in expected for pair in sides)


def test_so_many_labels_are_flipped_and_references_belong_to_the_sides(made):
    flipped = [pair for pair in made.pairs if "flipped" in pair]
    assert len(flipped) == round(0.3 * len(made.pairs))
    for pair in made.pairs:
        right = made.chat.decode(pair["rejected_ids" if pair in flipped else "chosen_ids"])
        assert any(right == question.solution for question in islice(problems("train", 3), 24))
        for side in ("chosen", "rejected"):
            ids = collate([(pair["prompt_ids"], pair[f"{side}_ids"])], made.chat.pad_id)
            logp = completion_logps(made.reference, **ids)[0].item()
            assert pair[f"ref_{side}_logps"] == pytest.approx(logp, rel=1e-4)


def test_without_the_highest_scores(made):
    left = training.kept(made, 0.25)
    assert len(left) == round(0.75 * len(made.pairs))
    assert max(pair["ches"] for pair in left) <= min(pair["ches"] for pair in made.pairs if pair not in left)


@pytest.mark.parametrize("change", [{"theta": "sft"}, {"anchor": "own"}, {"anchor": "both"}])
def test_what_a_variant_changes_of_thetas_gradient_and_nothing_else(made, trained, change):
    policy, rows = trained.policy, made.pairs[:4]
    groups = parameter_groups(policy)
    named = dict(policy.named_parameters())
    inner = {"steps": 0}
    arguments = Method(TypeAdapter(MethodConfig).validate_python(spo(lambda_sft=0.7, inner=inner))).arguments
    found, _ = gradients(policy, made, rows, arguments, groups, Recipe({}, **change))
    plain, _ = gradients(policy, made, rows, arguments | {"lambda_sft": 0.0}, groups, Recipe({}))
    shares = {"chosen_ids": 0.5, "own_ids": 0.5} if change == {"anchor": "both"} else {}
    shares = shares or {"own_ids" if "anchor" in change else "chosen_ids": 1.0}
    loss = 0.0
    for row, (side, share) in product(rows, shares.items()):
        ids = collate([(row["prompt_ids"], row[side])], made.chat.pad_id)
        loss = loss - share * completion_logps(policy, **ids)[0] / 4
    sft = torch.autograd.grad(0.7 * loss, [named[name] for name in groups[0]])
    for name, grad in zip(groups[0], sft, strict=True):
        expected = grad + plain[name] if "anchor" in change else grad
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)
    for name in groups[1]:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-3, atol=1e-5)


def test_the_hinge_counts_the_fall_of_fallen_pairs_alone():
    lengths = torch.tensor([3, 3])
    start = torch.tensor([-5.0, -5.0])
    pairs = PairLogps(torch.tensor([-7.0, -4.0]), start, start, start, lengths, lengths, 3.0)
    plain, _ = hinged(pairs, beta=0.5, weight=0.0)
    loss, metrics = hinged(pairs, beta=0.5, weight=3.0, slack=0.5)
    assert (loss - plain).item() == pytest.approx(3.0 * (2.0 - 0.5) / 2)
    assert metrics["hinged/active"] == 0.5


def test_the_dial_and_the_way_between_end_at_the_models_that_they_join(made, trained):
    rows = collate([(p["prompt_ids"], p["chosen_ids"]) for p in made.pairs[:3]], made.chat.pad_id)

    def logps(model):
        return completion_logps(model, **rows)[0].detach()

    policy, start = logps(trained.policy), logps(made.reference)
    assert (policy - start).abs().min() > 1e-2
    torch.testing.assert_close(logps(made.policy(0)), start, rtol=1e-4, atol=1e-4)
    assert (logps(load_model(ROOT / made.start.model)) - start).abs().max() > 0.1  # SFT has moved the reference
    torch.testing.assert_close(logps(interpolated(made, trained.policy, 0.0)), start, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logps(interpolated(made, trained.policy, 1.0)), policy, rtol=1e-4, atol=1e-4)
    with trained.policy.disable_adapter():
        backbone = logps(trained.policy)
    with dialled(trained.policy, 0.0):
        torch.testing.assert_close(logps(trained.policy), backbone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps(trained.policy), policy, rtol=1e-5, atol=1e-5)


def test_the_area_under_a_front_is_the_mean_of_the_best_so_far():
    points = [{"held_out/chosen": x, "greedy": y} for x, y in ((0.5, 0.2), (-2.0, 0.6), (-4.0, 0.1), (-20.0, 0.9))]
    # 0.2 from 0 to -2, 0.6 from there to -8; what lies beyond -8 has no width
    assert area(points, "held_out/chosen", "greedy") == pytest.approx((2 * 0.2 + 6 * 0.6) / 8)
    divergences = [{"kl": 2.0, "greedy": 0.6}]
    assert area(divergences, "kl", "greedy") == pytest.approx(6 * 0.6 / 8)


def test_every_method_has_eight_valid_settings_and_every_training_a_key_of_its_own():
    check = TypeAdapter(MethodConfig).validate_python
    for name in ("nll", *METHODS):
        settings = [check(recipe.method) for recipe in candidates(name)]
        assert len(settings) == 8 and len({method.model_dump_json() for method in settings}) == 8
    keys = [json.dumps(job.key, sort_keys=True) for part in PARTS for job in jobs(part, ["gold", "weaker"], [])]
    assert len(keys) == len(set(keys)) > 8 * (1 + len(METHODS) + len(SEARCHED))


def test_the_best_settings_are_those_with_the_highest_mean_accuracy():
    def row(name, rate, greedy, sampled):
        method = {"method": {"type": name, "lr": rate}}
        measured = {"greedy": greedy, "sampled": sampled}
        return {"part": "tune", "start": {"regime": "gold"}, "name": name, "recipe": method, "measured": measured}

    rows = [row("dpo", 1e-4, 0.6, 0.5), row("dpo", 3e-4, 0.5, 0.7), row("nll", 1e-4, 0.1, 0.1)]
    failed = row("nll", 3e-4, 0.0, 0.0)
    del failed["measured"]
    rows.append(failed | {"error": "loss: nan"})
    assert {name: recipe["method"]["lr"] for name, recipe in best("gold", rows).items()} == {"dpo": 3e-4, "nll": 1e-4}
    assert best("own", rows) == {}


def test_a_fronts_points_are_means_over_seeds_by_weight():
    def row(part, name, order, **more):
        own = {"held_out/chosen": -1.0, "held_out/in_order": order, "kl_policy_to_reference": 1.0, "greedy": order}
        return {"part": part, "name": name, "start": {"regime": "gold"}, "measured": own} | more

    rows = [row("fronts", "spo, lambda_sft 0.3", 0.5), row("fronts", "spo, lambda_sft 0.3", 0.7)]
    rows += [row("dial", "dpo_nll, mu 10", 0.9), row("tune", "dpo, beta 1", 0.1)]
    scaled = {"scales": {str(scale): row("", "", scale / 2)["measured"] for scale in DIAL}}
    rows += [row("dial", "spo", 0.8, **scaled), row("dial", "spo, theta by SFT alone", 0.1, **scaled)]
    found = [(p["method"], p["weight"], round(p["greedy"], 3)) for p in front_points(rows)]
    assert found == [
        ("dpo_nll", 10.0, 0.9),
        ("spo", 0.3, 0.6),
        *(("spo, phi scaled", scale, scale / 2) for scale in DIAL),
    ]


def test_a_dialled_front_is_compared_on_the_seeds_that_all_trainings_have():
    def row(part, name, seed, depth, order, **more):
        own = {"held_out/chosen": -depth, "held_out/in_order": order, "kl_policy_to_reference": depth, "greedy": 0.9}
        start = {"regime": "gold", "seed": seed}
        return {"part": part, "name": name, "start": start, "measured": own | ({} if depth else {"greedy": 0.5})} | more

    scaled = {"scales": {str(scale): row("", "", 0, 2.0, 1.0)["measured"] for scale in DIAL}}
    rows = [row("dial", "spo", seed, 2.0, 1.0, **scaled) for seed in range(4)]
    rows += [row("dial", "dpo_nll, mu 1", seed, 4.0, 1.0, shares={}) for seed in range(3)]
    rows += [row("final", "reference", seed, 0.0, 0.0) for seed in range(4)]
    # in order: 6/8 - 4/8; accuracy, with the reference's 0.5 before: (2 * 0.5 + 6 * 0.9) / 8 - (4 * 0.5 + 4 * 0.9) / 8
    found = [(round(test.difference, 6), test.seeds) for test in dial(rows)]
    assert found == [(25.0, 3), (10.0, 3)] * 2


def test_without_a_search_both_anchors_meet_each_methods_best_weight():
    def row(part, name, seed, right):
        return {"part": part, "name": name, "start": {"regime": "weaker", "seed": seed}, "measured": right}

    def greedy(digits):
        return {"greedy": digits.count("1") / 4, "right": digits}

    rows = [row("anchor", "both", seed, greedy("1111")) for seed in range(3)]
    rows += [
        row("fronts", f"spo, lambda_sft {w}", seed, greedy(d))
        for seed in range(3)
        for w, d in ((1, "1100"), (3, "1110"))
    ]
    assert [(test.what, test.difference) for test in untuned(rows)] == [
        ("weaker: both anchors − spo, lambda_sft 3", 25.0)
    ]


def test_theta_by_sft_alone_meets_the_papers_theta_and_the_largest_weight():
    right = {"spo": "1100", "spo, theta by SFT alone": "1110", "dpo_nll, mu 10": "1111", "dpo_nll, mu 1": "0000"}
    rows = [
        {"part": "dial", "name": name, "start": {"regime": "gold", "seed": seed}, "measured": {"right": digits}}
        for seed in range(3)
        for name, digits in right.items()
    ]
    assert [(test.what, test.difference) for test in decoupled(rows)] == [
        ("gold: spo, theta by SFT alone − spo", 25.0),
        ("gold: spo, theta by SFT alone − dpo_nll, mu 10", -25.0),
    ]


def test_the_search_is_told_from_best_to_worst():
    scores = {"dpo": [(0.5, 0.4), (0.1, 0.0), (0.3, 0.3)], "nll": [(0.6, 0.6)]}
    found = {
        name: [{"measured": {"greedy": greedy, "sampled": sampled}} for greedy, sampled in values]
        for name, values in scores.items()
    }
    told = [list(line.values()) for line in search_lines("gold", found)]
    assert told == [["gold", "nll", "1", "60.0", "60.0", "60.0"], ["gold", "dpo", "3", "45.0", "30.0", "5.0"]]


def test_other_starts_take_the_settings_that_were_chosen_on_gold_pairs():
    start, measured = {"regime": "gold"}, {"greedy": 0.5, "sampled": 0.5}
    recipe = {"method": {"type": "dpo", "lr": 1e-4}, "theta": "all", "anchor": "chosen", "drop": 0.0, "epochs": 3}
    row = {"part": "tune", "start": start, "name": "dpo", "recipe": recipe, "measured": measured}
    found = jobs("starts", ["gold"], [row, row | {"name": "ipo"}])  # ipo is none of the main methods
    assert len(found) == 5 * 5 * 2
    assert {job.recipe.method["lr"] for job in found if job.recipe} == {1e-4}
    assert len({(job.start.model, job.start.sft_epochs) for job in found}) == 5
    assert jobs("tune", ["similar"], []) == []
    found = jobs("final", ["similar", "flipped 10%"], [row, row | {"name": "ipo"}])
    assert [(job.name, job.start.regime) for job in found if job.recipe] == [("dpo", "similar")] * 5


def test_a_verdict_needs_the_adjusted_p_value():
    tests = [PairedTest("H", "a", 5.0, 1.0, 9.0, 0.02, 5), PairedTest("H", "b", -5.0, -9.0, -1.0, 0.03, 5)]
    assert [line["verdict"] for line in verdicts(tests)] == ["better", "worse"]
    assert [line["verdict"] for line in verdicts([*tests, tests[0]._replace(p_value=0.9)])] == ["not shown"] * 3


def test_the_page_is_that_of_the_committed_rows():
    page = PAGE.read_text("utf-8")
    assert written(page, run.read_rows()) == page
