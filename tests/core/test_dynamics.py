import copy
import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spo_ray.core import dynamics
from spo_ray.core.dynamics import GradientTerms, forecast
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import PairLogps, dpo

from .theory import (
    corollary1_bounds,
    dpo_weight,
    first_order_mass,
    gap_term,
    log_gap_change,
    probability_gap_change,
    sequence_logps,
    sgd_forecast,
)
from .tiny import KeepFloat64, tiny_batch, tiny_model

BETA = 0.5
PROMPT = [1, 2]


class Recurrent(nn.Module):
    """A causal language model in float64 throughout."""

    def __init__(self, vocabulary=4, seed=0, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)
        self.double()
        for p in self.parameters():
            p.data.mul_(2.0)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.mix(self.embed(input_ids))[0]))


def logp(model, output, prompt=PROMPT):
    """Token by token, each in a forward pass of its own."""
    total = 0.0
    for i, token in enumerate(output):
        context = torch.tensor([[*prompt, *output[:i]]])
        total = total + torch.log(torch.softmax(model(context).logits[0, -1], dim=-1)[token])
    return total


def small_pair(chosen=(0, 3, 1), rejected=(0, 2, 2), seed=0):
    model = Recurrent(seed=seed)
    return model, list(model.parameters()), lambda: (logp(model, chosen), logp(model, rejected)), (-4.0, -3.5)


def qwen_pair():
    model, backbone, adapters = tiny_model()
    model.eval()
    batch, named = tiny_batch(1), dict(model.named_parameters())

    def logps():
        with KeepFloat64():
            sides = [[batch[f"{s}_{k}"] for k in ("input_ids", "labels", "attention_mask")] for s in SIDES]
            return tuple(completion_logps(model, *side)[0][0] for side in sides)

    reference = tuple(batch[f"ref_{s}_logps"].item() for s in SIDES)
    return model, [named[name] for name in (*backbone, *adapters)], logps, reference


SIDES = ("chosen", "rejected")
PAIRS = {"recurrent": small_pair, "qwen2": qwen_pair}


def grads(value, params):
    return list(torch.autograd.grad(value, params, retain_graph=True, allow_unused=True, materialize_grads=True))


def dpo_loss(values, reference):
    columns = [v.reshape(1) for v in (*values, *(torch.tensor(r, dtype=torch.float64) for r in reference))]
    lengths = torch.ones(1), torch.ones(1)
    return dpo(PairLogps(*columns, *lengths, 1.0), beta=BETA)[0]


def weight_of(values, reference):
    return dpo_weight(BETA, (values[0] - reference[0] - values[1] + reference[1]).item())


def terms_of(values, params):
    return GradientTerms.of(*(grads(v, params) for v in values))


def after_sgd(logps, groups):
    """Values after a real SGD step with (parameters, gradients, rate) groups; the parameters are put back."""
    params = [p for group in groups for p in group[0]]
    saved = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD([{"params": list(p), "lr": rate} for p, _, rate in groups])
    for p, g in zip(params, [g for group in groups for g in group[1]], strict=True):
        p.grad = g.clone()
    optimizer.step()
    with torch.no_grad():
        values = logps()
        for p, value in zip(params, saved, strict=True):
            p.copy_(value)
    return values


def assert_linear(rates, errors):
    """Errors of a first-order forecast shrink with the step."""
    for (rate, error), (next_rate, next_error) in itertools.pairwise(zip(rates, errors, strict=True)):
        assert 0.85 < (error / next_error) / (rate / next_rate) < 1.15, (rates, errors)


# Gradient terms


def exact(left, right):
    return sum(Fraction(a) * Fraction(b) for a, b in zip(left.tolist(), right.tolist(), strict=True))


def random_pairs(count=1000):
    """Vectors of several dimensions, scales and angles: parallel, opposite, equal and vanishing ones among them."""
    rng = torch.Generator().manual_seed(3)
    for i in range(count):
        dim = int(torch.randint(1, 40, (), generator=rng))
        a, b = torch.randn(2, dim, generator=rng, dtype=torch.float64)
        mix = [1.0, -1.0, 0.999999, 0.0, float(torch.rand((), generator=rng)) * 2 - 1][i % 5]
        b = mix * a + math.sqrt(1 - mix * mix) * b
        scales = 10.0 ** (torch.rand(2, generator=rng, dtype=torch.float64) * 12 - 6)
        if i % 7 == 0:
            scales[1] = scales[0]
        if i % 97 == 0:
            b = b * 0.0
        logps = -torch.rand(2, generator=rng, dtype=torch.float64) * (10.0 if i % 3 else 0.1)
        yield a * scales[0], b * scales[1], logps.tolist()


def test_terms_match_exact_rational_arithmetic():
    for g_w, g_l, _ in random_pairs(200):
        terms = GradientTerms.of([g_w[:1], g_w[1:]], [g_l[:1], g_l[1:]])
        ww, ll, wl = exact(g_w, g_w), exact(g_l, g_l), exact(g_w, g_l)
        unit = 1e-14 * (math.sqrt(ww) + math.sqrt(ll))
        assert abs(terms.chosen_term - float(ww - wl)) <= unit * math.sqrt(ww)
        assert abs(terms.rejected_term - float(wl - ll)) <= unit * math.sqrt(ll)
        assert abs(gap_term(terms) - float(ww + ll - 2 * wl)) <= unit * (math.sqrt(ww) + math.sqrt(ll))
        assert terms.norm_chosen == pytest.approx(math.sqrt(ww), rel=1e-14)
        if wl:
            assert terms.cosine == pytest.approx(float(wl) / math.sqrt(ww) / math.sqrt(ll), rel=1e-12, abs=1e-12)
            assert abs(terms.cosine) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_terms_of_narrow_types_are_summed_in_float64(dtype, monkeypatch):
    tenth, big = torch.full((300_001,), 0.1, dtype=dtype), torch.full((5, 7), 300.0, dtype=dtype)
    squares = 300_001 * Fraction(tenth[0].item()) ** 2 + 35 * Fraction(big[0, 0].item()) ** 2
    for chunk in (dynamics.CHUNK, 1000):
        monkeypatch.setattr(dynamics, "CHUNK", chunk)
        terms = GradientTerms.of([tenth, big], [-tenth, big])
        assert terms.norm_chosen**2 == pytest.approx(float(squares), rel=1e-13)
        assert terms.dot == pytest.approx(float(squares - 600_002 * Fraction(tenth[0].item()) ** 2), rel=1e-13)


def test_metrics_of_a_right_angled_example():
    terms = GradientTerms.of([torch.tensor([6.0]), torch.tensor([[8.0]])], [torch.tensor([0.0]), torch.tensor([[5.0]])])
    assert terms.metrics() == {
        "dynamics/chosen_term": 60.0,
        "dynamics/rejected_term": 15.0,
        "dynamics/cosine": 0.8,
        "dynamics/norm_chosen": 10.0,
        "dynamics/norm_rejected": 5.0,
        "dynamics/R": 5.0,
    }
    assert gap_term(terms) == 45.0
    assert GradientTerms(5.0, 10.0, 40.0).excess == 0.0
    assert GradientTerms(0.0, 2.0, 0.0).cosine == 0.0


def test_a_broken_gradient_shows_in_every_metric():
    broken = GradientTerms.of([torch.tensor([1.0, math.nan])], [torch.tensor([1.0, 2.0])])
    shown = {k for k, v in broken.metrics().items() if math.isnan(v)}
    assert shown == set(broken.metrics()) - {"dynamics/norm_rejected"}


def test_shards_of_gradients_add_up():
    g_w, g_l = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = torch.stack([g_w[4:] @ g_w[4:], g_l[4:] @ g_l[4:], g_w[4:] @ g_l[4:]])
    shard = GradientTerms.of([g_w[:4]], [g_l[:4]], all_reduce=lambda tensors: tensors[0].add_(there))
    whole = GradientTerms.of([g_w], [g_l])
    assert shard.metrics() == pytest.approx(whole.metrics(), rel=1e-12)


@pytest.mark.parametrize("other", [[], [torch.ones(3)], [torch.ones(2), torch.ones(2)]])
def test_lists_that_do_not_fit_are_refused(other):
    for call in (GradientTerms.of, forecast):
        with pytest.raises(ValueError, match="same shapes"):
            call([torch.ones(2)], other)
    with pytest.raises(ValueError, match="one tensor at least"):
        forecast([], [])


# Theorem 1, Corollaries 1 and 2


@pytest.mark.parametrize("margin", [-1e6, -30.0, -1.0, 0.0, 2.5, 40.0, 1e6])
def test_dpo_weight_is_the_slope_of_the_loss(margin):
    value = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    dpo_loss((value, torch.zeros(1)), (0.0, 0.0)).backward()
    assert dpo_weight(BETA, margin) == pytest.approx(-value.grad.item(), rel=1e-14, abs=0.0)


@pytest.mark.parametrize("kind", PAIRS)
def test_theorem_1_forecasts_a_real_sgd_step(kind):
    _, params, logps, reference = PAIRS[kind]()
    before = logps()
    terms, weight = terms_of(before, params), weight_of(before, reference)
    gradient = grads(dpo_loss(before, reference), params)
    start = [v.item() for v in before]
    rates, table = (1e-4, 1e-5, 1e-6) if kind == "qwen2" else (1e-3, 1e-4, 1e-5, 1e-6), []
    print(f"\nTheorem 1 on {kind}: log pi(y_w) {start[0]:.3f}, log pi(y_l) {start[1]:.3f}, {terms}")
    print("rate   d log pi_w     forecast      error    d log pi_l     forecast      error")
    for rate in rates:
        step = sgd_forecast(terms, *start, learning_rate=rate, weight=weight)
        change = [v.item() - s for v, s in zip(after_sgd(logps, [(params, gradient, rate)]), start, strict=True)]
        real = [*change, *(math.exp(s) * math.expm1(c) for s, c in zip(start, change, strict=True))]
        found = [step.dlogp_chosen, step.dlogp_rejected, step.dp_chosen, step.dp_rejected]
        table.append([abs(f / r - 1) for f, r in zip(found, real, strict=True)])
        shown = "  ".join(f"{real[i]:+.6e} {found[i]:+.6e} {table[-1][i]:.1e}" for i in (0, 1))
        print(f"{rate:5.0e}  {shown}")
    for errors in zip(*table, strict=True):
        assert_linear(rates, errors)
    assert max(table[-1]) < 1e-3


def test_corollary_1_bounds_and_corollary_2_in_its_log_form_hold():
    rate, weight, slack = 1e-3, 0.3, []
    for g_w, g_l, logps in random_pairs():
        terms = GradientTerms.of([g_w], [g_l])
        step = sgd_forecast(terms, *logps, learning_rate=rate, weight=weight)
        lower, upper = corollary1_bounds(terms, *logps, learning_rate=rate, weight=weight)
        assert step.dp_chosen >= lower
        assert step.dp_rejected <= upper
        n_w, n_l, scale = g_w.norm().item(), g_l.norm().item(), [rate * weight * math.exp(v) for v in logps]
        directions = (g_w @ (g_w - g_l)).item(), (g_l @ (g_w - g_l)).item()
        rounding = 1e-12 * (n_w + n_l)
        assert step.dp_chosen == pytest.approx(scale[0] * directions[0], abs=scale[0] * n_w * rounding)
        assert step.dp_rejected == pytest.approx(scale[1] * directions[1], abs=scale[1] * n_l * rounding)
        assert lower == pytest.approx(scale[0] * n_w * (n_w - n_l), abs=scale[0] * n_w * rounding)
        assert upper == pytest.approx(scale[1] * n_l * (n_w - n_l), abs=scale[1] * n_l * rounding)
        gap = log_gap_change(terms, learning_rate=rate, weight=weight)
        assert gap >= 0.0
        expected = rate * weight * (g_w - g_l).square().sum().item()
        assert gap == pytest.approx(expected, abs=rate * weight * (n_w + n_l) * rounding)
        if terms.excess == 0.0:
            assert step.dp_rejected <= 0.0
        slack.append(step.dp_chosen > lower)
    assert 0.5 < sum(slack) / len(slack) < 1.0  # the bound is met by parallel gradients, and only by them


def test_printed_corollary_2_fails_for_parallel_gradients():
    g_w = torch.tensor([0.6, -0.8, 2.0], dtype=torch.float64)
    rate, weight, pi_w, pi_l = 0.1, 0.25, 0.9, 0.05
    for a in (0.5, 1.0, 2.0, 10.0, 17.9, 18.1):
        terms = GradientTerms.of([g_w], [a * g_w])
        gap = probability_gap_change(terms, math.log(pi_w), math.log(pi_l), learning_rate=rate, weight=weight)
        assert gap == pytest.approx(rate * weight * 5.0 * (1 - a) * (pi_w - a * pi_l), rel=1e-12, abs=1e-15)
        assert (gap < 0.0) == (a > 1 and pi_w > a * pi_l)
        assert log_gap_change(terms, learning_rate=rate, weight=weight) == pytest.approx(0.125 * (1 - a) ** 2)


def test_printed_corollary_2_fails_in_a_real_step():
    model, params, outputs, logps, jacobian = enumerated(Recurrent(seed=0))
    rate, found = 1e-4, None
    for w, r in itertools.permutations(range(len(outputs)), 2):
        terms = GradientTerms.of([g[w] for g in jacobian], [g[r] for g in jacobian])
        gap = probability_gap_change(terms, logps[w].item(), logps[r].item(), learning_rate=rate, weight=BETA / 2)
        if found is None or gap < found[0]:
            found = (gap, w, r)
    gap, w, r = found
    assert gap < 0.0
    gradient = [-BETA / 2 * (g[w] - g[r]) for g in jacobian]  # the policy is the reference: c = 1/2
    after = after_sgd(lambda: sequence_logps(model, PROMPT, 4, 3)[1], [(params, gradient, rate)])
    real = (after[w].exp() - after[r].exp() - logps[w].exp() + logps[r].exp()).item()
    assert real == pytest.approx(gap, rel=0.05)
    assert (after[w] - after[r]).item() > (logps[w] - logps[r]).item()


@pytest.mark.parametrize("scope", ["one rate", "theta and phi apart"])
def test_spo_forecast_against_real_steps(scope):
    model, params, logps, reference = small_pair()
    weight = weight_of(logps(), reference)
    before, lambda_sft = [v.item() for v in logps()], 2.0
    phi = list(model.head.parameters())
    theta = [p for p in params if all(p is not other for other in phi)]
    parts = [(params, 1.0, lambda_sft)] if scope == "one rate" else [(theta, 1.0, lambda_sft), (phi, 3.0, 0.0)]
    rates, table = (1e-4, 1e-5, 1e-6), []
    for rate in rates:
        found, gap, groups = [0.0, 0.0], 0.0, []
        for part, scale, lam in parts:
            values = logps()
            groups.append((part, grads(dpo_loss(values, reference) - lam * values[0], part), rate * scale))
            options = {"learning_rate": rate * scale, "weight": weight, "lambda_sft": lam}
            terms = terms_of(values, part)
            step = sgd_forecast(terms, *before, **options)
            found = [found[0] + step.dlogp_chosen, found[1] + step.dlogp_rejected]
            gap += log_gap_change(terms, **options)
        real = [v.item() - b for v, b in zip(after_sgd(logps, groups), before, strict=True)]
        real.append(real[0] - real[1])
        table.append([abs(f / r - 1) for f, r in zip([*found, gap], real, strict=True)])
    for errors in zip(*table, strict=True):
        assert_linear(rates, errors)


def test_spo_can_narrow_the_log_gap():
    model, params, _, logps, jacobian = enumerated(Recurrent(seed=0))
    rate, weight, lambda_sft = 1e-5, BETA / 2, 10.0
    terms, w, r = falling_pair(jacobian)
    options = {"learning_rate": rate, "weight": weight}
    assert log_gap_change(terms, **options) > 0.0
    gap = log_gap_change(terms, **options, lambda_sft=lambda_sft)
    assert gap < 0.0
    gradient = [-weight * (g[w] - g[r]) - lambda_sft * g[w] for g in jacobian]
    after = after_sgd(lambda: sequence_logps(model, PROMPT, 4, 3)[1], [(params, gradient, rate)])
    assert (after[w] - after[r] - logps[w] + logps[r]).item() == pytest.approx(gap, rel=0.02)


# Any update


def warm():
    """A model and an AdamW with two groups, three steps old; one parameter never had a gradient."""
    model, params, _, _ = small_pair()
    groups = [{"params": params[:3], "lr": 3e-3}, {"params": params[3:], "lr": 1e-3, "weight_decay": 0.0, "eps": 1e-6}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1, betas=(0.8, 0.95))
    for _ in range(3):
        loss = -logp(model, (0, 3, 1)) + 0.3 * logp(model, (0, 2, 2)) ** 2
        for p, g in zip(params[:-1], grads(loss, params[:-1]), strict=True):
            p.grad = g
        optimizer.step()
    return model, params, optimizer


def test_forecast_matches_a_real_adamw_step():
    scales, table = (1.0, 0.1, 0.01), []
    for scale in scales:
        model, params, optimizer = warm()
        for group in optimizer.param_groups:
            group["lr"] *= 0.01 * scale
        values = logp(model, (0, 3, 1)), logp(model, (0, 2, 2)), logp(model, (3, 3, 3))
        gradients = grads(dpo_loss(values[:2], (-4.0, -3.5)), params)
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()
        update = [p.detach() - b for p, b in zip(params, before, strict=True)]
        model_before, row = copy.deepcopy(model), []
        for p, b in zip(model_before.parameters(), before, strict=True):
            p.data.copy_(b)
        for output, value in zip(((0, 3, 1), (0, 2, 2), (3, 3, 3)), values, strict=True):
            g = grads(logp(model_before, output), list(model_before.parameters()))
            real = logp(model, output).item() - value.item()
            row.append(abs(forecast(g, update) / real - 1))
        table.append(row)
    for errors in zip(*table, strict=True):
        assert_linear(scales, errors)


# Theorem 2


def enumerated(model, length=3):
    params = list(model.parameters())
    outputs, logps = sequence_logps(model, PROMPT, model.head.out_features, length)
    columns = zip(*(grads(value, params) for value in logps), strict=True)
    return model, params, outputs, logps.detach(), [torch.stack(column) for column in columns]


def falling_pair(jacobian):
    """The pair whose chosen output loses most under DPO."""
    count = len(jacobian[0])
    flat = torch.cat([g.reshape(count, -1) for g in jacobian], dim=1)
    gram = flat @ flat.T
    w, r = divmod(int((gram.diagonal()[:, None] - gram).argmin()), count)
    terms = GradientTerms.of([g[w] for g in jacobian], [g[r] for g in jacobian])
    assert terms.chosen_term < 0.0
    return terms, w, r


def test_enumerated_sequences_have_the_probabilities_of_token_by_token_sampling():
    model = Recurrent(vocabulary=5)
    with torch.no_grad():
        outputs, logps = sequence_logps(model, PROMPT, 5, 3)
        assert len(set(outputs)) == 125
        assert logps.exp().sum().item() == pytest.approx(1.0, abs=1e-10)
        for output, value in zip(outputs, logps.tolist(), strict=True):
            assert value == pytest.approx(logp(model, output).item(), abs=1e-12)


def test_first_order_mass_sums_to_zero_and_matches_a_real_step():
    model, params, outputs, logps, jacobian = enumerated(Recurrent(seed=1))
    w, r = outputs.index((0, 3, 1)), outputs.index((0, 2, 2))
    rates, errors = (1e-2, 1e-3, 1e-4), []
    for rate in rates:
        gradient = [-BETA / 2 * (g[w] - g[r]) for g in jacobian]
        mass = first_order_mass(logps, jacobian, [-rate * g for g in gradient])
        assert abs(mass.sum().item()) < 1e-12 * mass.abs().sum().item() + 1e-18
        after = after_sgd(lambda: sequence_logps(model, PROMPT, 4, 3)[1], [(params, gradient, rate)])
        real = after.exp() - logps.exp()
        errors.append(((mass - real).norm() / real.norm()).item())
        pair = sgd_forecast(
            GradientTerms.of([g[w] for g in jacobian], [g[r] for g in jacobian]),
            logps[w].item(),
            logps[r].item(),
            learning_rate=rate,
            weight=BETA / 2,
        )
        assert mass[[w, r]].tolist() == pytest.approx([pair.dp_chosen, pair.dp_rejected], rel=1e-10)
    assert_linear(rates, errors)


def test_when_the_chosen_output_falls_its_mass_goes_elsewhere():
    rate = 1e-3
    for seed in range(20):
        model, params, outputs, logps, jacobian = enumerated(Recurrent(seed=seed))
        _, w, r = falling_pair(jacobian)
        top = sorted(set(range(64)) - {w}, key=lambda i: -logps[i])[0]
        if top != r:
            break
    gradient = [-BETA / 2 * (g[w] - g[r]) for g in jacobian]
    after = after_sgd(lambda: sequence_logps(model, PROMPT, 4, 3)[1], [(params, gradient, rate)])
    change = after.exp() - logps.exp()
    print(f"\nTheorem 2, seed {seed}: y_w {outputs[w]}, y_l {outputs[r]}, y* {outputs[top]}: {change[[w, r, top]]}")
    assert change[w] < 0.0 and change[r] < 0.0
    assert change[top] > 0.0
    assert change.sum().item() == pytest.approx(0.0, abs=1e-14)
