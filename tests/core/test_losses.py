import math
from functools import partial
from typing import NamedTuple

import pytest
import torch

from spo_ray.core.losses import LOSSES, PairLogps, bind, dpo, dpo_nll, nll, pairwise, sft_loss, simpo

W, L = torch.tensor([-3.0, -8.0]).double(), torch.tensor([-4.0, -5.0]).double()
RW, RL = torch.tensor([-3.5, -7.0]).double(), torch.tensor([-4.5, -6.0]).double()
NW, NL = torch.tensor([3, 4]), torch.tensor([2, 5])
GAPS = torch.tensor([0.5, 3.0]).double()
BATCH, SAME = (PairLogps(W, L, *reference, NW, NL, 3.5, score_gaps=GAPS) for reference in ((RW, RL), (W, L)))


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x))


def test_dpo_against_the_formula():
    loss, metrics = dpo(BATCH, beta=0.5)
    margins = [0.5 * ((-3 + 3.5) - (-4 + 4.5)), 0.5 * ((-8 + 7) - (-5 + 6))]
    assert loss.item() == pytest.approx(sum(map(minus_log_sigmoid, margins)) / 2)
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * (0.5 - 1.0) / 2)
    assert metrics["rewards/margins"] == pytest.approx(sum(margins) / 2)
    assert metrics["rewards/accuracies"] == 0.0


def test_dpo_starts_at_ln_2():
    assert dpo(SAME, beta=0.7)[0].item() == pytest.approx(math.log(2))


def test_simpo_against_the_formula_and_without_a_reference():
    loss, metrics = simpo(BATCH, beta=2.0, margin=1.0)
    margins = [2 * (-3 / 3 + 4 / 2), 2 * (-8 / 4 + 5 / 5)]
    assert loss.item() == pytest.approx(sum(minus_log_sigmoid(m - 1.0) for m in margins) / 2)
    assert metrics["rewards/accuracies"] == 0.5
    assert simpo(SAME, beta=2.0, margin=1.0)[0] == loss


def test_sft_reductions_differ_by_the_length():
    assert sft_loss(W, 3.5, "sum").item() == pytest.approx(5.5)
    assert sft_loss(W, 3.5, "token_mean").item() == pytest.approx(11 / 7)
    assert nll(BATCH, sft_reduction="token_mean")[0].item() == pytest.approx(11 / 7)


def test_dpo_nll_is_the_sum_of_both():
    loss, _ = dpo_nll(BATCH, beta=0.5, mu=0.3)
    assert loss.item() == pytest.approx(dpo(BATCH, beta=0.5)[0].item() + 0.3 * 5.5)


def test_bind_fixes_what_a_loss_takes():
    for name in LOSSES:
        assert bind(name, beta=0.5, margin=3.0)(BATCH)[0].isfinite()
    assert bind("dpo", beta=0.5, margin=3.0)(BATCH)[0] == dpo(BATCH, beta=0.5)[0]
    assert bind("simpo", beta=0.5, margin=3.0)(BATCH)[0] == simpo(BATCH, beta=0.5, margin=3.0)[0]
    own = partial(simpo, beta=2.0, margin=1.0)
    assert bind(own, beta=0.5, margin=3.0) is own
    with pytest.raises(ValueError, match="'ppo'; known: dpo"):
        bind("ppo", beta=0.5)


class Pair(NamedTuple):
    u_w: float
    u_l: float
    ref_w: float
    ref_l: float
    n_w: int
    n_l: int
    gap: float = 1.0


PAIRS = [
    Pair(-3.0, -4.0, -3.5, -4.5, 3, 2, 0.25),
    Pair(-8.0, -5.0, -7.0, -6.0, 4, 5),
    Pair(-12.5, -20.25, -13.0, -17.5, 9, 11, 7.5),
    Pair(-2.0, -6.5, -2.75, -6.0, 1, 6),
]
AT_REFERENCE = [p._replace(ref_w=p.u_w, ref_l=p.u_l) for p in PAIRS]
MEAN_LENGTH = (3 + 4 + 9 + 1) / 4  # of the whole batch, also where a part of it is taken


def tensors(pairs, requires_grad=False):
    columns = [torch.tensor(column, dtype=torch.float64) for column in list(zip(*pairs, strict=True))[:4]]
    for column in columns[:2]:
        column.requires_grad_(requires_grad)
    return columns


def evaluate(name, pairs, options, requires_grad=False):
    columns = tensors(pairs, requires_grad)
    lengths = torch.tensor([p.n_w for p in pairs]), torch.tensor([p.n_l for p in pairs])
    gaps = torch.tensor([p.gap for p in pairs], dtype=torch.float64)
    loss, metrics = LOSSES[name](PairLogps(*columns, *lengths, MEAN_LENGTH, score_gaps=gaps), **options)
    return loss, metrics, columns[:2]


def value(name, pairs, **options):
    return evaluate(name, pairs, options)[0].item()


def gradients(name, pairs, **options):
    loss, _, leaves = evaluate(name, pairs, options, requires_grad=True)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [g.tolist() for g in found]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def minus_log(x):
    return -math.log(sigmoid(x))


def log_ratio_gap(p):
    return (p.u_w - p.ref_w) - (p.u_l - p.ref_l)


def mean_gap(p):
    return p.u_w / p.n_w - p.u_l / p.n_l


def dpo_term(p, beta):
    return minus_log(beta * log_ratio_gap(p))


def cdpo_term(p, beta, label_smoothing):
    z, e = beta * log_ratio_gap(p), label_smoothing
    return (1 - e) * minus_log(z) + e * minus_log(-z)


def robust_term(p, beta, label_smoothing):
    z, e = beta * log_ratio_gap(p), label_smoothing
    return ((1 - e) * minus_log(z) - e * minus_log(-z)) / (1 - 2 * e)


def ipo_mean_term(p, beta, ipo_reduction):
    h = (p.u_w - p.ref_w) / p.n_w - (p.u_l - p.ref_l) / p.n_l
    return (h - 1 / (2 * beta)) ** 2


def ipo_sum_term(p, beta, ipo_reduction):
    return (log_ratio_gap(p) - 1 / (2 * beta)) ** 2


def simpo_term(p, beta, margin):
    return minus_log(beta * p.u_w / p.n_w - beta * p.u_l / p.n_l - margin)


def dpop_term(p, beta, penalty):
    return minus_log(beta * (log_ratio_gap(p) - penalty * max(0.0, p.ref_w - p.u_w)))


def nll_term(p, sft_reduction="sum"):
    return -p.u_w if sft_reduction == "sum" else -p.u_w / MEAN_LENGTH


def dpo_nll_term(p, beta, mu=1.0, sft_reduction="sum"):
    return dpo_term(p, beta) + mu * nll_term(p, sft_reduction)


def rewards(p, beta):
    return beta * (p.u_w - p.ref_w), beta * (p.u_l - p.ref_l)


def apo_zero_term(p, beta):
    a, b = rewards(p, beta)
    return 1 - sigmoid(a) + sigmoid(b)


def apo_down_term(p, beta):
    a, b = rewards(p, beta)
    return sigmoid(a) + 1 - sigmoid(a - b)


def nca_term(p, beta):
    a, b = rewards(p, beta)
    return minus_log(a) + (minus_log(-a) + minus_log(-b)) / 2


def exo_pair_term(p, beta, label_smoothing):
    """The KL divergence of the two-point distributions."""
    q, e = sigmoid(beta * log_ratio_gap(p)), label_smoothing
    return sum(a * math.log(a / b) for a, b in ((q, 1 - e), (1 - q, e)))


def slic_term(p, beta):
    return max(0.0, 1 - beta * log_ratio_gap(p))


def dpo_shift_term(p, beta, shift):
    a, b = rewards(p, beta)
    return minus_log(a - shift * b)


def cal_dpo_term(p, beta):
    r_w, r_l = rewards(p, 1.0)
    return minus_log(r_w - r_l) + (r_w - 0.5 / beta) ** 2 + (r_l + 0.5 / beta) ** 2


def odpo_log_term(p, beta, alpha):
    return minus_log(beta * log_ratio_gap(p) - alpha * math.log(p.gap))


def odpo_linear_term(p, beta, alpha, scaling):
    return minus_log(beta * log_ratio_gap(p) - alpha * p.gap)


def rpo_term(p, beta, eta):
    """The KL divergence of the two-point distributions."""
    p_hat, q = sigmoid(beta * log_ratio_gap(p)), sigmoid(eta * p.gap)
    return sum(a * math.log(a / b) for a, b in ((q, p_hat), (1 - q, 1 - p_hat)))


def cpo_term(p, beta, mu, sft_reduction="sum"):
    return minus_log(beta * (p.u_w - p.u_l)) + mu * nll_term(p, sft_reduction)


def orpo_term(p, beta, mu, sft_reduction="sum"):
    """With probabilities and odds, not their logarithms."""
    chosen, rejected = math.exp(p.u_w / p.n_w), math.exp(p.u_l / p.n_l)
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    return beta * minus_log(math.log(ratio)) + mu * nll_term(p, sft_reduction)


PAIRWISE = {
    "apo_zero": ("apo_zero", apo_zero_term, {"beta": 0.5}),
    "apo_down": ("apo_down", apo_down_term, {"beta": 0.5}),
    "nca": ("nca", nca_term, {"beta": 0.5}),
    "exo_pair": ("exo_pair", exo_pair_term, {"beta": 0.5, "label_smoothing": 0.1}),
    "slic": ("slic", slic_term, {"beta": 0.7}),
    "dpo_shift": ("dpo_shift", dpo_shift_term, {"beta": 0.5, "shift": 0.75}),
    "cal_dpo": ("cal_dpo", cal_dpo_term, {"beta": 0.4}),
    "odpo log": ("odpo", odpo_log_term, {"beta": 0.5, "alpha": 0.8}),
    "odpo linear": ("odpo", odpo_linear_term, {"beta": 0.5, "alpha": 0.8, "scaling": "linear"}),
    "rpo": ("rpo", rpo_term, {"beta": 0.5, "eta": 0.4}),
    "cpo sum": ("cpo", cpo_term, {"beta": 0.5, "mu": 0.3, "sft_reduction": "sum"}),
    "cpo token_mean": ("cpo", cpo_term, {"beta": 0.5, "mu": 0.3, "sft_reduction": "token_mean"}),
    "orpo": ("orpo", orpo_term, {"beta": 0.5, "mu": 0.3, "sft_reduction": "token_mean"}),
    "dpo": ("dpo", dpo_term, {"beta": 0.5}),
    "cdpo": ("cdpo", cdpo_term, {"beta": 0.5, "label_smoothing": 0.2}),
    "robust_dpo": ("robust_dpo", robust_term, {"beta": 0.5, "label_smoothing": 0.2}),
    "ipo mean": ("ipo", ipo_mean_term, {"beta": 0.4, "ipo_reduction": "mean"}),
    "ipo sum": ("ipo", ipo_sum_term, {"beta": 0.4, "ipo_reduction": "sum"}),
    "simpo": ("simpo", simpo_term, {"beta": 2.0, "margin": 0.7}),
    "dpop": ("dpop", dpop_term, {"beta": 0.3, "penalty": 5.0}),
    "nll sum": ("nll", nll_term, {}),
    "nll token_mean": ("nll", nll_term, {"sft_reduction": "token_mean"}),
    "dpo_nll sum": ("dpo_nll", dpo_nll_term, {"beta": 0.5, "mu": 0.3}),
    "dpo_nll token_mean": ("dpo_nll", dpo_nll_term, {"beta": 0.5, "mu": 0.3, "sft_reduction": "token_mean"}),
}
every_pairwise_loss = pytest.mark.parametrize(("name", "term", "options"), PAIRWISE.values(), ids=PAIRWISE)
ALPHA = {"beta": 2.0, "margin": 0.7, "alpha": 0.4}


def alpha_dpo_targets(pairs, margin, alpha):
    gaps = [p.u_w / p.n_w - p.u_l / p.n_l - (p.ref_w / p.n_w - p.ref_l / p.n_l) for p in pairs]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps))
    return [margin + alpha * (g - mean) / spread for g in gaps]


def test_every_loss_is_in_this_file():
    assert set(LOSSES) == {name for name, _, _ in PAIRWISE.values()} | {"alpha_dpo"}


@every_pairwise_loss
@pytest.mark.parametrize("pairs", [PAIRS, AT_REFERENCE, PAIRS[1:2]], ids=["batch", "at the reference", "one pair"])
def test_loss_is_the_mean_of_its_formula(name, term, options, pairs):
    expected = sum(term(p, **options) for p in pairs) / len(pairs)
    assert value(name, pairs, **options) == pytest.approx(expected, rel=1e-13)


@every_pairwise_loss
def test_gradient_is_the_slope_of_the_formula(name, term, options):
    found, h = gradients(name, PAIRS, **options), 1e-5
    for side, column in zip(("u_w", "u_l"), found, strict=True):
        for p, slope in zip(PAIRS, column, strict=True):
            ends = [term(p._replace(**{side: getattr(p, side) + step}), **options) for step in (h, -h)]
            assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h) / len(PAIRS), rel=1e-7, abs=1e-9)


@every_pairwise_loss
def test_mean_over_pairs_is_the_mean_over_single_pairs(name, term, options):
    singles = [value(name, [p], **options) for p in PAIRS]
    assert value(name, PAIRS, **options) == pytest.approx(sum(singles) / len(singles), rel=1e-14)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {"beta": 0.7}),
        ("cdpo", {"beta": 0.7, "label_smoothing": 0.3}),
        ("robust_dpo", {"beta": 0.7, "label_smoothing": 0.3}),
        ("dpop", {"beta": 0.7, "penalty": 50.0}),
    ],
)
def test_log_ratio_losses_are_ln_2_at_the_reference(name, options):
    assert value(name, AT_REFERENCE, **options) == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_at_the_reference_is_its_squared_target(beta, reduction):
    assert value("ipo", AT_REFERENCE, beta=beta, ipo_reduction=reduction) == pytest.approx((1 / (2 * beta)) ** 2)


def test_simpo_at_the_reference_follows_from_the_lengths():
    pairs = [Pair(-6.0, -6.0, -6.0, -6.0, 2, 3), Pair(-6.0, -6.0, -6.0, -6.0, 3, 2)]
    expected = (minus_log(-3 + 2 - 0.5) + minus_log(-2 + 3 - 0.5)) / 2
    assert value("simpo", pairs, beta=1.0, margin=0.5) == pytest.approx(expected)


def test_alpha_dpo_against_the_formula():
    targets = alpha_dpo_targets(PAIRS, 0.7, 0.4)
    losses = [minus_log(2 * mean_gap(p) - t) for p, t in zip(PAIRS, targets, strict=True)]
    loss, metrics, _ = evaluate("alpha_dpo", PAIRS, ALPHA)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert metrics["alpha_dpo/margin"] == pytest.approx(sum(targets) / len(targets))


def test_alpha_dpo_does_not_differentiate_its_margin():
    targets = alpha_dpo_targets(PAIRS, 0.7, 0.4)
    found_w, found_l = gradients("alpha_dpo", PAIRS, **ALPHA)
    for p, t, slope_w, slope_l in zip(PAIRS, targets, found_w, found_l, strict=True):
        c = 2.0 * sigmoid(t - 2 * mean_gap(p)) / len(PAIRS)
        assert slope_w == pytest.approx(-c / p.n_w, rel=1e-12)
        assert slope_l == pytest.approx(c / p.n_l, rel=1e-12)


def test_alpha_dpo_at_the_reference_is_simpo():
    expected = sum(minus_log(2 * mean_gap(p) - 0.7) for p in PAIRS) / len(PAIRS)
    assert value("alpha_dpo", AT_REFERENCE, **ALPHA) == pytest.approx(expected, rel=1e-13)


def test_alpha_dpo_without_alpha_and_of_one_pair_is_simpo():
    plain = {"beta": 2.0, "margin": 0.7}
    assert value("alpha_dpo", PAIRS, **plain, alpha=0.0) == value("simpo", PAIRS, **plain)
    assert value("alpha_dpo", PAIRS[:1], **plain, alpha=0.4) == pytest.approx(value("simpo", PAIRS[:1], **plain))


class PublicStatistics:
    """Statistics of AlphaDPO's public trainer: averages of batch mean and batch spread, which start at zero."""

    mean = spread = 0.0

    def update(self, values, all_reduce):
        self.mean = 0.9 * self.mean + 0.1 * values.mean()
        self.spread = 0.9 * self.spread + 0.1 * values.std()

    def zscore(self, values):
        return (values - self.mean) / self.spread


def test_alpha_dpo_with_the_public_trainers_statistics_is_the_public_trainers_loss():
    beta, alpha, gamma_beta_ratio = 2.0, 0.2, 0.35
    moving_mean = moving_std = 0.0
    statistics = PublicStatistics()
    for pairs in (PAIRS, PAIRS[:3], PAIRS[1:]):
        gaps = [mean_gap(p) - (p.ref_w / p.n_w - p.ref_l / p.n_l) for p in pairs]
        mean = sum(gaps) / len(gaps)
        std = math.sqrt(sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1))
        moving_mean, moving_std = 0.9 * moving_mean + 0.1 * mean, 0.9 * moving_std + 0.1 * std
        logits = [
            mean_gap(p) - (alpha * (g - moving_mean) / moving_std + gamma_beta_ratio)
            for p, g in zip(pairs, gaps, strict=True)
        ]
        expected = sum(minus_log(beta * x) for x in logits) / len(logits)
        options = {"beta": beta, "alpha": beta * alpha, "margin": beta * gamma_beta_ratio}
        assert value("alpha_dpo", pairs, **options, statistics=statistics) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust_dpo"])
def test_log_ratio_losses_pull_both_sides_equally(name):
    found_w, found_l = gradients(name, PAIRS, beta=0.5)
    assert found_w == pytest.approx([-g for g in found_l], rel=1e-14)


def test_dpo_gradient_is_its_weight():
    found_w, _ = gradients("dpo", PAIRS, beta=0.5)
    weights = [-0.5 * sigmoid(-0.5 * log_ratio_gap(p)) / len(PAIRS) for p in PAIRS]
    assert found_w == pytest.approx(weights, rel=1e-13)


@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "simpo", "alpha_dpo"])
def test_chosen_is_always_pushed_up_and_rejected_down(name):
    margin = {"margin": 0.2} if name in ("simpo", "alpha_dpo") else {}
    found_w, found_l = gradients(name, PAIRS, beta=0.5, **margin)
    assert max(found_w) < 0 < min(found_l)


def test_simpo_gradients_balance_per_token_and_ignore_the_reference():
    found_w, found_l = gradients("simpo", PAIRS, beta=2.0, margin=0.7)
    assert [g * p.n_w for g, p in zip(found_w, PAIRS, strict=True)] == pytest.approx(
        [-g * p.n_l for g, p in zip(found_l, PAIRS, strict=True)], rel=1e-14
    )
    assert value("simpo", PAIRS, beta=2.0, margin=0.7) == value("simpo", AT_REFERENCE, beta=2.0, margin=0.7)


def test_simpo_margin_is_absolute_not_a_ratio():
    p = Pair(-1.0, -2.0, 0.0, 0.0, 1, 1)
    assert value("simpo", [p], beta=10.0, margin=10.0) == pytest.approx(math.log(2))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ipo_turns_around_where_the_gap_exceeds_its_target(reduction):
    below = gradients("ipo", [Pair(0.4, 0.0, 0.0, 0.0, 1, 1)], beta=1.0, ipo_reduction=reduction)
    above = gradients("ipo", [Pair(0.6, 0.0, 0.0, 0.0, 1, 1)], beta=1.0, ipo_reduction=reduction)
    assert below[0][0] == pytest.approx(-0.2)
    assert above[0][0] == pytest.approx(0.2)


def test_ipo_reductions_agree_for_completions_of_one_token():
    pairs = [p._replace(n_w=1, n_l=1) for p in PAIRS]
    assert value("ipo", pairs, beta=0.4, ipo_reduction="mean") == value("ipo", pairs, beta=0.4, ipo_reduction="sum")


def test_nll_leaves_the_rejected_side_alone():
    found_w, found_l = gradients("nll", PAIRS)
    assert found_w == [-0.25] * 4
    assert found_l == [0.0] * 4
    assert evaluate("nll", PAIRS, {})[1] == {}


def test_dpo_nll_gradient_is_dpos_less_mu_per_pair():
    both, alone = gradients("dpo_nll", PAIRS, beta=0.5, mu=0.3), gradients("dpo", PAIRS, beta=0.5)
    assert both[0] == pytest.approx([g - 0.3 / 4 for g in alone[0]], rel=1e-14)
    assert both[1] == alone[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cdpo", {"label_smoothing": 0.0}),
        ("robust_dpo", {"label_smoothing": 0.0}),
        ("dpop", {"penalty": 0.0}),
        ("dpo_nll", {"mu": 0.0}),
        ("dpo_shift", {"shift": 1.0}),
        ("odpo", {"alpha": 0.0}),
    ],
)
def test_variants_without_their_addition_are_dpo(name, options):
    assert value(name, PAIRS, beta=0.5, **options) == pytest.approx(value("dpo", PAIRS, beta=0.5), rel=1e-15)
    assert gradients(name, PAIRS, beta=0.5, **options) == gradients("dpo", PAIRS, beta=0.5)


def test_cdpo_has_its_minimum_at_the_log_odds_of_a_right_label():
    z = math.log(0.8 / 0.2)
    found = gradients("cdpo", [Pair(z, 0.0, 0.0, 0.0, 1, 1)], beta=1.0, label_smoothing=0.2)
    assert found[0][0] == pytest.approx(0.0, abs=1e-15)


def test_cdpo_with_even_odds_forgets_which_side_is_chosen():
    turned = [Pair(p.u_l, p.u_w, p.ref_l, p.ref_w, p.n_l, p.n_w) for p in PAIRS]
    options = {"beta": 0.5, "label_smoothing": 0.5}
    assert value("cdpo", turned, **options) == pytest.approx(value("cdpo", PAIRS, **options))


def test_robust_dpo_is_dpo_on_average_over_flipped_labels():
    turned = [Pair(p.u_l, p.u_w, p.ref_l, p.ref_w, p.n_l, p.n_w) for p in PAIRS]
    options = {"beta": 0.5, "label_smoothing": 0.2}
    average = 0.8 * value("robust_dpo", PAIRS, **options) + 0.2 * value("robust_dpo", turned, **options)
    assert average == pytest.approx(value("dpo", PAIRS, beta=0.5), rel=1e-13)


def test_dpop_adds_pull_only_where_the_chosen_answer_fell():
    plain, pulled = gradients("dpo", PAIRS, beta=0.3), gradients("dpop", PAIRS, beta=0.3, penalty=5.0)
    fell = [p.u_w < p.ref_w for p in PAIRS]
    assert fell == [False, True, False, False]
    assert [a < b for a, b in zip(pulled[0], plain[0], strict=True)] == fell
    p = PAIRS[1]
    c = 0.3 * sigmoid(-0.3 * (log_ratio_gap(p) - 5.0)) / 4
    assert (pulled[0][1], pulled[1][1]) == pytest.approx((-6 * c, c), rel=1e-13)


def test_rpo_has_its_minimum_where_the_rewards_differ_as_the_scores_do():
    pair = Pair(3.0, 0.0, 0.0, 0.0, 1, 1, 1.5)
    assert value("rpo", [pair], beta=0.5) == pytest.approx(0.0, abs=1e-15)
    assert gradients("rpo", [pair], beta=0.5)[0] == pytest.approx([0.0], abs=1e-15)
    assert gradients("rpo", [pair._replace(u_w=3.1)], beta=0.5)[0][0] > 0


@pytest.mark.parametrize("name", ["odpo", "rpo"])
def test_losses_with_scores_say_that_there_are_none(name):
    with pytest.raises(ValueError, match="needs the pairs' scores: the batch has no 'score_gaps'"):
        LOSSES[name](PairLogps(W, L, RW, RL, NW, NL, 3.5), beta=0.5)


def test_orpo_of_a_certain_answer_stays_finite():
    pairs = PairLogps(*(torch.zeros(1, requires_grad=True) for _ in range(2)), W[:1], L[:1], NW[:1], NL[:1], 3.0)
    loss, _ = LOSSES["orpo"](pairs, beta=0.5)
    assert loss.item() == pytest.approx(0.5 * math.log(2))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [pairs.chosen, pairs.rejected]))


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"nll"}), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_log_probabilities_stay_finite(name, dtype):
    leaves = [torch.tensor([-1e5, -1.0], dtype=dtype, requires_grad=True) for _ in range(2)]
    ref = [torch.tensor([-1.0, -1e5], dtype=dtype), torch.tensor([-1e5, -1.0], dtype=dtype)]
    loss, _ = bind(name, beta=0.5, margin=0.1)(PairLogps(*leaves, *ref, NW, NL, 3.5, score_gaps=GAPS.to(dtype)))
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"nll", "simpo", "alpha_dpo", "cpo", "orpo"}))
def test_rewards_are_beta_times_the_log_ratio(name):
    _, metrics, _ = evaluate(name, PAIRS, {"beta": 0.5})
    chosen = [0.5 * (p.u_w - p.ref_w) for p in PAIRS]
    rejected = [0.5 * (p.u_l - p.ref_l) for p in PAIRS]
    assert metrics["rewards/chosen"] == pytest.approx(sum(chosen) / 4)
    assert metrics["rewards/rejected"] == pytest.approx(sum(rejected) / 4)
    assert metrics["rewards/margins"] == pytest.approx((sum(chosen) - sum(rejected)) / 4)
    assert metrics["rewards/accuracies"] == sum(a > b for a, b in zip(chosen, rejected, strict=True)) / 4
    assert all(type(v) is float for v in metrics.values())


@pytest.mark.parametrize("name", ["simpo", "alpha_dpo", "orpo"])
def test_rewards_of_length_normalised_losses_are_beta_times_the_mean(name):
    _, metrics, _ = evaluate(name, PAIRS, {"beta": 2.0} | ({} if name == "orpo" else {"margin": 0.7}))
    assert metrics["rewards/chosen"] == pytest.approx(sum(2 * p.u_w / p.n_w for p in PAIRS) / 4)
    assert metrics["rewards/rejected"] == pytest.approx(sum(2 * p.u_l / p.n_l for p in PAIRS) / 4)
    assert metrics["rewards/accuracies"] == sum(mean_gap(p) > 0 for p in PAIRS) / 4


def test_pairwise_knows_the_losses_that_need_the_whole_batch():
    assert {name for name, loss in LOSSES.items() if not pairwise(loss)} == {"alpha_dpo"}
    assert pairwise(partial(bind("dpo", beta=0.5)))
    assert not pairwise(partial(bind("alpha_dpo", beta=0.5)))
    assert not pairwise(lambda pairs: pairs.chosen.mean())
