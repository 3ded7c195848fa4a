"""Term (b) against its definition, the literal difference of two gradients in float64."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from spo_ray.core.directional import DirectionalDerivative, UnsupportedError
from spo_ray.core.gradients import GradientAccumulator, KeepFloat64, deterministic, perturbed
from spo_ray.core.logps import completion_logps
from spo_ray.core.spo import spo_gradients

from .tiny import objective_gradient, relative_error, tensor_float_32, tiny_batch, tiny_model

OPTIONS = {"beta": 0.5, "lambda_sft": 1.0, "gamma": 0.0, "sft_reduction": "sum", "norm_scope": "all", "hinge": "batch"}
STILL = OPTIONS | {"margin": 0.0, "base": lambda pairs: ((pairs.chosen * 0 + pairs.rejected * 0).sum(), {})}
"""A base loss without gradient leaves phi nothing but term (b)."""
TINY, MIDDLE, SMALL, LARGE = 1e-7, 7e-4, 2e-3, 3e-2
"""Step sizes at which the lower level is predicted to take 2e-6, 1%, 3% and 50% of L_SFT."""


def term_b(model, names, **options):
    """Term (b) as one vector in float64, and the metrics."""
    grads, metrics = spo_gradients(model, tiny_batch(), backbone=names[0], adapters=names[1], **STILL | options)
    return torch.cat([grads[name].double().flatten() for name in names[1]]), metrics


def definition(**options):
    model, *names = tiny_model()
    truth, _ = objective_gradient(model, tiny_batch(), *names, **STILL | options)
    return torch.cat([g.flatten() for g in truth[len(names[0]) :]]), names


def distance(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(
    ("moves", "shift", "recompute"),
    [("theta", -0.01, False), ("theta", 0.0, True), ("all", -0.01, True), ("adapters", 0.0, False)],
)
def test_directional_derivatives_match_double_backward(moves, shift, recompute):
    model, *names = tiny_model()
    batch = tiny_batch()
    inputs = [batch[f"chosen_{key}"] for key in ("input_ids", "labels", "attention_mask")]
    weights = torch.tensor([-1.0, 0.5, -0.3], dtype=torch.float64)
    with deterministic(model, [*names[0], *names[1]]) as named:
        every = list(named.values())
        moving = {"theta": every[: len(names[0])], "adapters": every[len(names[0]) :], "all": every}[moves]
        torch.manual_seed(1)
        direction = [torch.randn_like(p) for p in moving]
        with (
            perturbed(moving, [d.clone() for d in direction], shift),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            logits = model(input_ids=inputs[0], attention_mask=inputs[2]).logits[:, :-1]
            picked = logits.log_softmax(-1).gather(2, inputs[0][:, 1:, None])[..., 0] * (inputs[1][:, 1:] != -100)
            grads = torch.autograd.grad((picked.sum(1) * weights).sum(), moving, create_graph=True)
            slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
            truth = torch.autograd.grad(slope, every)
        sink = GradientAccumulator(every)
        derivative = DirectionalDerivative(model, moving, direction, sink, shift=shift, chunk_tokens=5)
        value = derivative.of(*inputs, weights, recompute=recompute)
        assert value == pytest.approx(slope.item(), rel=1e-12)
        assert relative_error(sink.gradients(), truth) < 1e-12


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, "pad_token_id": None}
SIZES |= {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES = [
    GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50),
    Gemma3TextConfig(**SIZES, sliding_window=4),
    LlamaConfig(**SIZES, attention_bias=True),
]


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_architectures_have_exact_derivatives(config, attention):
    """The curvature along a direction, against central differences of the slope."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    params, step, batch = list(model.parameters()), 1e-4, tiny_batch()
    direction = [torch.randn_like(p.data.normal_(std=0.2)) * 0.01 for p in params]

    def slope():
        derivative, weights = DirectionalDerivative(model, params, direction, sink), torch.ones(3, dtype=torch.float64)
        return derivative.of(*(batch[f"chosen_{key}"] for key in ("input_ids", "labels", "attention_mask")), weights)

    slopes, sink = [], GradientAccumulator(params)
    with KeepFloat64():
        for sign in (1, -1):
            with perturbed(params, [d.clone() for d in direction], sign * step):
                slopes.append(slope())
        sink = GradientAccumulator(params)
        slope()
    curvature = sum((g * d).sum().item() for g, d in zip(sink.gradients(), direction, strict=True))
    assert curvature == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("method", "eta", "used", "cosine", "size"),
    [
        ("difference", TINY, 0, 0.999, 0.02),
        ("difference", SMALL, 0, 0.99999, 1e-4),
        ("difference", LARGE, 0, 0.99999, 1e-4),
        ("exact", TINY, 1, 0.99999, 1e-3),
        ("auto", TINY, 0, 0.999, 0.02),
    ],
)
def test_term_b_in_single_precision(method, eta, used, cosine, size, steps):
    check_term_b(tiny_model()[0].float(), method, eta, used, cosine, size, steps)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("precision", ["bfloat16 autocast", "bfloat16 parameters", "float16 autocast"])
@pytest.mark.parametrize(
    ("method", "eta", "used", "cosine", "size"),
    [
        ("difference", TINY, 3, 0.999, 0.02),
        ("difference", LARGE, 0, 0.99, 0.05),
        ("exact", TINY, 1, 0.99, 0.03),
        ("auto", TINY, 1, 0.99, 0.03),
        ("auto", LARGE, 0, 0.99, 0.05),
    ],
)
def test_term_b_in_half_precision(precision, method, eta, used, cosine, size, steps):
    """Where a difference of moved and rounded weights is noise, see test_what_does_not_work_in_half_precision."""
    name, way = precision.split()
    dtype = getattr(torch, name)
    model = tiny_model()[0].to(dtype if way == "parameters" else torch.float32)
    with torch.autocast("cpu", dtype=dtype, enabled=way == "autocast"):
        check_term_b(model, method, eta, used, cosine, size, steps)


def check_term_b(model, method, eta, used, cosine, size, steps):
    truth, names = definition(eta=eta, inner_steps=steps)
    found, metrics = term_b(model, names, eta=eta, inner_steps=steps, inner_method=method)
    assert metrics["spo/inner_method"] == used
    assert torch.cosine_similarity(found, truth, dim=0) > cosine
    assert found.norm() == pytest.approx(truth.norm().item(), rel=size)


def test_the_midpoint_follows_the_curvature():
    """It differs from the definition by third derivatives, the derivative at theta by second ones already."""
    truth, names = definition(eta=MIDDLE, inner_steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, metrics = term_b(tiny_model()[0].float(), names, eta=MIDDLE, inner_steps=1)
        at_theta, _ = term_b(tiny_model()[0].float(), names, eta=TINY, inner_steps=1)
    assert metrics["spo/inner_method"] == 2
    assert distance(found, truth) < 0.05
    assert distance(at_theta * MIDDLE / TINY, truth) > 3 * distance(found, truth)


def test_models_without_exact_derivatives_take_differences_in_float32(monkeypatch):
    def unsupported(self, *inputs, **options):
        raise UnsupportedError("made up")

    monkeypatch.setattr(DirectionalDerivative, "of", unsupported)
    truth, names = definition(eta=TINY, inner_steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, metrics = term_b(tiny_model()[0].float(), names, eta=TINY, inner_steps=1)
        with pytest.raises(ValueError, match="'exact' is impossible for this model: made up"):
            term_b(tiny_model()[0].float(), names, eta=TINY, inner_steps=1, inner_method="exact")
    assert metrics["spo/inner_method"] == 3
    assert distance(found, truth) < 0.03


@pytest.mark.parametrize(("method", "used"), [("auto", 1), ("difference", 3)])
def test_tensor_float_32_counts_as_half_precision(method, used):
    model, *names = tiny_model()
    with tensor_float_32():
        found, metrics = term_b(model.float(), names, eta=TINY, inner_steps=1, inner_method=method)
        assert torch.get_float32_matmul_precision() == "high"
    assert metrics["spo/inner_method"] == used
    assert distance(found, definition(eta=TINY, inner_steps=1)[0]) < 0.03


@pytest.mark.parametrize(("eta", "gap"), [(TINY, 0.02), (SMALL, 1e-7)])
@pytest.mark.parametrize("method", ["difference", "exact"])
def test_the_gap_is_what_the_lower_level_gains(method, eta, gap):
    """With the literal difference the gap is exact; otherwise it is that of a longer step, or at the midpoint."""
    model, *names = tiny_model()
    _, metrics = term_b(model, names, inner_steps=3, eta=eta, inner_method=method)
    model.eval()
    theta = [dict(model.named_parameters())[name] for name in names[0]]
    losses = []
    for _ in range(4):
        inputs = (tiny_batch()[f"chosen_{key}"] for key in ("input_ids", "labels", "attention_mask"))
        loss = -completion_logps(model, *inputs)[0].mean()
        losses.append(loss.item())
        for p, g in zip(theta, torch.autograd.grad(loss, theta), strict=True):
            p.data -= eta * g
    rel = 0.1 if method == "exact" and eta == SMALL else gap
    assert metrics["spo/inner_gap"] == pytest.approx(losses[0] - losses[-1], rel=rel)
    assert metrics["spo/inner_gap_share"] == pytest.approx((losses[0] - losses[-1]) / losses[0], rel=rel)


def test_every_mth_step_has_m_times_the_term():
    model, *names = tiny_model()
    once, metrics = term_b(model, names, inner_steps=1, eta=SMALL)
    three, weighted = term_b(model, names, inner_steps=1, eta=SMALL, term_b_weight=3.0)
    assert distance(three, 3 * once) < 1e-12
    assert weighted["spo/term_b_norm"] == pytest.approx(3 * metrics["spo/term_b_norm"])
