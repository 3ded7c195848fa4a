import math

import pytest
import torch

from spo_ray.core.losses import bind, dpo, dpo_nll, nll, sft_loss, simpo

W, L = torch.tensor([-3.0, -8.0]).double(), torch.tensor([-4.0, -5.0]).double()
RW, RL = torch.tensor([-3.5, -7.0]).double(), torch.tensor([-4.5, -6.0]).double()
NW, NL = torch.tensor([3, 4]), torch.tensor([2, 5])


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x))


def test_dpo_against_the_formula():
    loss, metrics = dpo(W, L, RW, RL, beta=0.5)
    margins = [0.5 * ((-3 + 3.5) - (-4 + 4.5)), 0.5 * ((-8 + 7) - (-5 + 6))]
    assert loss.item() == pytest.approx(sum(map(minus_log_sigmoid, margins)) / 2)
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * (0.5 - 1.0) / 2)
    assert metrics["rewards/margins"] == pytest.approx(sum(margins) / 2)
    assert metrics["rewards/accuracies"] == 0.0


def test_dpo_starts_at_ln_2():
    assert dpo(W, L, W, L, beta=0.7)[0].item() == pytest.approx(math.log(2))


def test_simpo_against_the_formula_and_without_a_reference():
    loss, metrics = simpo(W, L, RW, RL, beta=2.0, margin=1.0, chosen_lengths=NW, rejected_lengths=NL)
    margins = [2 * (-3 / 3 + 4 / 2), 2 * (-8 / 4 + 5 / 5)]
    assert loss.item() == pytest.approx(sum(minus_log_sigmoid(m - 1.0) for m in margins) / 2)
    assert metrics["rewards/accuracies"] == 0.5
    assert simpo(W, L, W, L, beta=2.0, margin=1.0, chosen_lengths=NW, rejected_lengths=NL)[0] == loss


def test_sft_reductions_differ_by_the_length():
    assert sft_loss(W, 3.5, "sum").item() == pytest.approx(5.5)
    assert sft_loss(W, 3.5, "token_mean").item() == pytest.approx(11 / 7)
    assert nll(W, L, RW, RL, mean_chosen_length=3.5, sft_reduction="token_mean")[0].item() == pytest.approx(11 / 7)


def test_dpo_nll_is_the_sum_of_both():
    loss, _ = dpo_nll(W, L, RW, RL, beta=0.5, mu=0.3, mean_chosen_length=3.5)
    assert loss.item() == pytest.approx(dpo(W, L, RW, RL, beta=0.5)[0].item() + 0.3 * 5.5)


def test_bind_passes_what_the_signature_takes():
    assert bind("dpo", beta=0.5, margin=3.0)(W, L, RW, RL)[0] == dpo(W, L, RW, RL, beta=0.5)[0]
    with pytest.raises(ValueError, match="'ppo'; known: dpo"):
        bind("ppo")
