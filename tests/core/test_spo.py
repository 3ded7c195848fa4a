from functools import partial

import pytest
import torch

from spo_ray.core.losses import dpo, nll
from spo_ray.core.spo import spo_gradients

from .tiny import objective_gradient, relative_error, swapped, tiny_batch, tiny_model

DEFAULTS = {
    "base": "dpo",
    "beta": 0.5,
    "lambda_sft": 0.0,
    "gamma": 0.0,
    "inner_steps": 0,
    "eta": 1e-3,
    "sft_reduction": "sum",
    "norm_scope": "all",
    "hinge": "batch",
    "margin": 0.0,
}
EXACT = [
    {},
    {"base": "simpo", "beta": 2.0, "margin": 1.0},
    {"lambda_sft": 2.0},
    {"lambda_sft": 1.0, "inner_steps": 1},
    {"lambda_sft": 1.0, "inner_steps": 1, "sft_reduction": "token_mean"},
    {"lambda_sft": 2.0, "inner_steps": 3, "base": "simpo", "beta": 2.0},
]
HINGED = [
    {"gamma": 0.5},
    {"gamma": 0.5, "norm_scope": "backbone"},
    {"gamma": 0.5, "norm_scope": "adapters"},
    {"gamma": 0.5, "hinge": "pair"},
    {"gamma": 0.5, "hinge": "pair", "norm_scope": "adapters", "lambda_sft": 1.0, "inner_steps": 1},
]


def run(batch, tiny=None, **options):
    model, backbone, adapters = tiny or tiny_model()
    grads, metrics = spo_gradients(model, batch, backbone=backbone, adapters=adapters, **options)
    assert list(grads) == [*backbone, *adapters]
    return list(grads.values()), metrics, len(backbone)


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_exact_terms_match_the_oracle(case, pairs):
    options, batch = DEFAULTS | case, tiny_batch(pairs)
    model, backbone, adapters = tiny_model()
    truth, _ = objective_gradient(model, batch, backbone, adapters, **options)
    found, _, n = run(batch, inner_mode="literal", **options)
    assert relative_error(found[:n], truth[:n]) < 1e-10
    assert relative_error(found[n:], truth[n:]) < 1e-10


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("case", HINGED, ids=str)
def test_hinge_matches_double_backward_and_sleeps_when_inactive(case, pairs):
    options, active = DEFAULTS | case, []
    for batch in (tiny_batch(pairs), swapped(tiny_batch(pairs))):
        model, backbone, adapters = tiny_model()
        truth, value = objective_gradient(model, batch, backbone, adapters, **options)
        found, metrics, n = run(batch, inner_mode="literal", **options)
        assert metrics["spo/R"] == pytest.approx(value, rel=1e-9)
        assert relative_error(found[:n], truth[:n]) < 1e-5
        assert relative_error(found[n:], truth[n:]) < 1e-5
        active.append(metrics["spo/hinge_active"])
    assert max(active) > 0


def test_rescaled_value_term_points_like_the_literal_one():
    options = DEFAULTS | {"lambda_sft": 1.0, "inner_steps": 1, "eta": 1e-9}
    batch = tiny_batch()
    plain, _, n = run(batch, **DEFAULTS)
    terms = {}
    for mode in ("literal", "rescaled"):
        grads, metrics, _ = run(batch, inner_mode=mode, **options)
        terms[mode] = torch.cat([(a - b).flatten() for a, b in zip(grads[n:], plain[n:], strict=True)])
    assert metrics["spo/inner_scale"] > 100
    assert torch.cosine_similarity(terms["literal"], terms["rescaled"], dim=0) > 0.98
    assert terms["literal"].norm() == pytest.approx(terms["rescaled"].norm().item(), rel=0.01)


def test_without_lower_level_and_hinge_it_is_the_base_loss_plus_nll_on_theta():
    batch = tiny_batch()
    plain, _, n = run(batch, **DEFAULTS)
    nll, _, _ = run(batch, **DEFAULTS | {"base": "nll"})
    mixed, _, _ = run(batch, **DEFAULTS | {"lambda_sft": 0.7})
    expected = [a + 0.7 * b for a, b in zip(plain[:n], nll[:n], strict=True)] + plain[n:]
    assert relative_error(mixed, expected) < 1e-12


def test_parameters_gradients_flags_and_modes_come_back_bit_for_bit():
    model, backbone, adapters = tiny_model(dtype=torch.float32)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 == 0 else None
    model.train()
    next(iter(model.children())).eval()

    def state():
        return (
            [p.detach().clone() for p in model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()],
        )

    before = state()
    options = DEFAULTS | {"lambda_sft": 1.0, "inner_steps": 2, "gamma": 1.0, "eta": 0.1}
    for batch in (tiny_batch(), swapped(tiny_batch())):
        spo_gradients(model, batch, backbone=backbone, adapters=adapters, **options)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2:] == after[2:]


def test_state_comes_back_when_the_loss_fails():
    model, backbone, adapters = tiny_model()
    model.train()

    def broken(chosen, rejected, ref_chosen, ref_rejected):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        spo_gradients(model, tiny_batch(), backbone=backbone, adapters=adapters, **DEFAULTS | {"base": broken})
    assert all(m.training for m in model.modules())


def test_the_base_may_be_a_callable_of_log_probabilities():
    batch = tiny_batch()
    by_name, _, _ = run(batch, **DEFAULTS)
    per_pair, _, _ = run(
        batch,
        **DEFAULTS | {"base": lambda a, b, c, d: -torch.nn.functional.logsigmoid(0.5 * ((a - c) - (b - d)))},
    )
    assert relative_error(by_name, per_pair) < 1e-14
    function, _, _ = run(batch, **DEFAULTS | {"base": dpo})
    assert relative_error(by_name, function) == 0


@pytest.mark.parametrize(
    "case",
    [
        {"gamma": 0.3},
        {"gamma": 0.3, "hinge": "pair"},
        {"sft_reduction": "token_mean"},
        {"base": partial(nll, sft_reduction="token_mean"), "lambda_sft": 0.0},
    ],
)
def test_ranks_add_up_to_the_whole_batch(case):
    """Two ranks with two and one pairs, stepped in lockstep by threads, against one process with all three."""
    import threading

    options = DEFAULTS | {"lambda_sft": 1.0, "inner_steps": 1} | case
    batch = swapped(tiny_batch())
    whole, metrics, _ = run(batch, **options)
    models = [tiny_model() for _ in range(2)]
    barrier, slots, results = threading.Barrier(2), [None, None], [None, None]

    def rank(index):
        def all_reduce(tensors):
            slots[index] = [t.clone() for t in tensors]
            barrier.wait()
            total = [a + b for a, b in zip(*slots, strict=True)]
            barrier.wait()
            for tensor, value in zip(tensors, total, strict=True):
                tensor.copy_(value)

        part = {key: value[index::2] for key, value in batch.items()}
        results[index] = run(part, models[index], all_reduce=all_reduce, **options)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        assert relative_error(found[0], whole) < 1e-6
        for key in metrics:
            if key.startswith("spo/"):
                assert found[1][key] == pytest.approx(metrics[key], rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"base": "dpoo"}, {"inner_steps": -1}, {"hinge": "row"}, {"norm_scope": "theta"}, {"sft_reduction": "mean"}],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong.values())) if "base" in wrong else next(iter(wrong))):
        run(tiny_batch(), **DEFAULTS | wrong)


def test_unknown_parameter_names_are_refused():
    model, backbone, adapters = tiny_model()
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        spo_gradients(model, tiny_batch(), backbone=[*backbone, "nothing"], adapters=adapters, **DEFAULTS)


def gradient_of(model, names, batch, **options):
    grads, metrics = spo_gradients(model, batch, backbone=names[0], adapters=names[1], **options)
    return [g.double() for g in grads.values()], metrics


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 0.02), (True, 0.02)])
def test_hinge_in_single_precision_and_under_autocast(autocast, tolerance):
    """What gamma adds, against float64: under bfloat16 autocast the hinge's passes must leave autocast."""
    double, *names = tiny_model()
    single = tiny_model()[0].float()
    added = {}
    for batch in (tiny_batch(), swapped(tiny_batch())):
        for gamma in (0.0, 1.0):
            exact, metrics = gradient_of(double, names, batch, **DEFAULTS | {"gamma": gamma})
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                found, _ = gradient_of(single, names, batch, **DEFAULTS | {"gamma": gamma})
            added[gamma] = (found, exact)
        if metrics["spo/hinge_active"]:
            break
    found, exact = ([a - b for a, b in zip(added[1.0][i], added[0.0][i], strict=True)] for i in (0, 1))
    assert relative_error(found, exact) < tolerance


@pytest.mark.parametrize(("autocast", "cosine"), [(False, 0.999), (True, 0.9)])
def test_value_term_at_the_papers_step_size(autocast, cosine):
    """Term (b) at eta 2e-5 in float32 and under bfloat16 autocast, against float64's literal difference."""
    double, *names = tiny_model()
    single = tiny_model()[0].float()
    options = DEFAULTS | {"sft_reduction": "token_mean", "eta": 2e-5, "lambda_sft": 1.0, "inner_steps": 1}
    options["base"] = lambda a, b, c, d: (a * 0).sum()  # so that phi's gradient is (b) alone
    n = len(names[0])
    terms = []
    for model, mode, use in ((double, "literal", False), (single, "rescaled", autocast)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use):
            grads, _ = gradient_of(model, names, tiny_batch(), **options, inner_mode=mode)
        terms.append(torch.cat([g.flatten() for g in grads[n:]]))
    assert torch.cosine_similarity(*terms, dim=0) > cosine
    assert terms[1].norm() == pytest.approx(terms[0].norm().item(), rel=0.1)
