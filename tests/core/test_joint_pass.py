"""One backward with two weightings against two backwards, in float64 and to rounding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from spo_ray.core import batch_gradients
from spo_ray.core.gradients import KeepFloat64
from spo_ray.core.joint_pass import seeds
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import LOSSES, PairLogps, bind, sft_loss
from spo_ray.core.spo import spo_gradients

from .tiny import VOCABULARY, objective_gradient, relative_error, tiny_batch, tiny_model

OPTIONS = {"beta": 0.5, "gamma": 0.0, "inner_steps": 0, "eta": 1e-3, "lambda_sft": 0.7, "pairs_per_backward": 2}
ORACLE = {"norm_scope": "all", "hinge": "batch", "margin": 0.0, "sft_reduction": "sum"}


@pytest.fixture(autouse=True)
def padded(monkeypatch):
    """Both sides in one pass, whatever their lengths."""
    monkeypatch.setattr(batch_gradients, "JOINT_PADDING", 2.0)


def found(model, names, batch, **options):
    """Return the gradients and the number of sequences in each forward of the decoder."""
    sizes = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    completion_logps(model, *inputs(batch, "chosen"))  # the head is looked for in the first pass
    sizes.clear()
    grads, _ = spo_gradients(model, batch, backbone=names[0], adapters=names[1], **OPTIONS | options)
    handle.remove()
    return list(grads.values()), sizes


def inputs(batch, side):
    return (batch[f"{side}_{key}"] for key in ("input_ids", "labels", "attention_mask"))


def two_backwards(model, names, batch, base="dpo", lambda_sft=0.7, sft_reduction="sum", **other):
    """The gradient of the base loss, plus for theta that of L_SFT from a backward of its own."""
    every = dict(model.named_parameters())
    params, n = [every[name] for name in (*names[0], *names[1])], len(names[0])
    for p in params:
        p.requires_grad_(True)
    model.eval()
    with KeepFloat64():
        u_w, n_w = completion_logps(model, *inputs(batch, "chosen"))
        u_l, n_l = completion_logps(model, *inputs(batch, "rejected"))
        mean = n_w.double().mean().item()
        others = (batch["ref_chosen_logps"], batch["ref_rejected_logps"], n_w, n_l, mean)
        pairs = PairLogps(u_w, u_l, *others, score_gaps=batch["score_gaps"])
        loss = bind(base, beta=other.get("beta", 0.5), margin=0.0)(pairs)
        loss = (loss[0] if isinstance(loss, tuple) else loss).mean()
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        lower = torch.autograd.grad(sft_loss(u_w, mean, sft_reduction), params[:n])
    return [a + lambda_sft * b for a, b in zip(grads, lower, strict=False)] + list(grads[n:])


@pytest.mark.parametrize("base", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_one_backward_equals_two_and_the_oracle(base, reduction):
    batch, options = tiny_batch(4), {"base": base, "sft_reduction": reduction}
    options |= {"beta": 0.01} if base == "slic" else {}  # its hinge ends at 1
    model, *names = tiny_model()
    oracle, _ = objective_gradient(model, batch, *names, **OPTIONS | ORACLE | options)
    truth, n = two_backwards(model, names, batch, **options), len(names[0])
    for count, expected in ((1, [2] * 4), (2, [4, 4]), (4, [8])):
        grads, sizes = found(model, names, batch, **options, pairs_per_backward=count)
        assert [size for size in sizes if size > count] == expected  # the others are without gradients
        for part in (slice(n), slice(n, None)):
            assert relative_error(grads[part], truth[part]) < 1e-12
            assert relative_error(grads[part], oracle[part]) < 1e-12


def test_padding_rows_have_no_weight():
    batch = tiny_batch(4)
    three = {key: value[:3] for key, value in batch.items()}
    model, *names = tiny_model()
    valid = torch.tensor([True, True, True, False])
    for count in (1, 2, 4):
        grads, _ = found(model, names, batch | {"valid": valid}, pairs_per_backward=count)
        assert relative_error(grads, two_backwards(model, names, three)) < 1e-12


@pytest.mark.parametrize("distance", [0.0, 1e-17, -1e-16, 1e-13, -1e-9])
def test_weights_of_theta_may_pass_through_zero(distance):
    """dL/du_w - lambda / B is 0 or nearly, of either sign."""
    batch, weight = tiny_batch(3), 0.7 * (1 + distance)
    model, *names = tiny_model()

    def base(pairs):
        return weight * pairs.chosen + pairs.rejected**2 / 100

    grads, sizes = found(model, names, batch, base=base)
    assert sizes[-2:] == [4, 2]  # after passes for the weights of a loss that may need the whole batch
    truth, n = two_backwards(model, names, batch, base=base), len(names[0])
    assert relative_error(grads[:n], truth[:n]) < 1e-12
    assert relative_error(grads[n:], truth[n:]) < 1e-12


def test_seeds_are_finite_and_give_back_both_weightings():
    lower = torch.tensor([-1.0, -1.0, -1.0, 0.0, 0.0])
    base = torch.tensor([1.0, 1 + 2**-23, 0.0, 0.0, -3.0])
    weights, ratios = seeds(base, lower)
    assert torch.equal(weights * ratios, base)
    assert torch.allclose(weights, base + lower, atol=2e-7, rtol=0)
    assert ratios[2:].tolist() == [0.0, 0.0, 1.0]


def test_without_adapters_theta_gets_both_losses():
    batch = tiny_batch()
    model, backbone, adapters = tiny_model()
    names = [*backbone, *adapters], []
    grads, sizes = found(model, names, batch)
    assert sizes == [4, 2]
    assert relative_error(grads, two_backwards(model, names, batch)) < 1e-12


def lora_model(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=VOCABULARY, **sizes, num_key_value_heads=1, tie_word_embeddings=False)
    lora = LoraConfig(r=4, **{"target_modules": "all-linear"} | options)
    model = get_peft_model(Qwen2ForCausalLM(config), lora).double()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    names = [name for name, _ in model.named_parameters()]
    return model, [n for n in names if ".lora_" not in n], [n for n in names if ".lora_" in n]


KINDS = {
    "plain": ({}, [4, 2]),
    "bias": ({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, [4, 2]),
    "dora": ({"use_dora": True}, [2, 2, 1, 1]),  # reads the adapters' weights elsewhere: two sums
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, [2, 2, 1, 1]),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, [4, 1, 1]),  # sees tokens without rows: two sums once noticed
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(kind):
    options, expected = KINDS[kind]
    model, *names = lora_model(**options)
    batch = tiny_batch(3)
    grads, sizes = found(model, names, batch)
    assert sizes == expected
    assert relative_error(grads, two_backwards(model, names, batch)) < 1e-12
    assert all("forward" not in vars(module) for module in model.modules())


def test_pairs_of_unequal_lengths_are_not_padded_to_one(monkeypatch):
    """10 and 12 tokens: two forwards, and a backward of each."""
    monkeypatch.setattr(batch_gradients, "JOINT_PADDING", 1.0)
    batch = tiny_batch(3)
    for kind, expected in (("plain", [2, 2, 1, 1]), ("head", [2, 2, 1, 1])):
        model, *names = lora_model(**KINDS[kind][0])
        grads, sizes = found(model, names, batch)
        assert sizes == expected
        assert relative_error(grads, two_backwards(model, names, batch)) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("padding", "expected"), [(2.0, [4, 2]), (1.0, [2, 2, 1, 1])])
def test_checkpointed_layers_scale_their_rows_when_they_are_recomputed(reentrant, padding, expected, monkeypatch):
    monkeypatch.setattr(batch_gradients, "JOINT_PADDING", padding)
    batch, calls = tiny_batch(3), []
    double, *names = tiny_model()
    truth, n = two_backwards(double, names, batch), len(names[0])
    model = tiny_model()[0].float()
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.model.layers[0].mlp.gate_proj.lora_A["default"].register_forward_pre_hook(lambda *args: calls.append(1))
    grads, sizes = found(model.train(), names, batch)
    assert sizes == expected
    assert len(calls) == 2 + 2 * len(sizes)  # two to look for the head
    grads = [g.double() for g in grads]
    assert relative_error(grads[:n], truth[:n]) < 1e-5
    assert relative_error(grads[n:], truth[n:]) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    batch = tiny_batch(3)
    double, *names = tiny_model()
    truth, n = two_backwards(double, names, batch), len(names[0])
    model = tiny_model()[0].to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        grads, sizes = found(model, names, batch)
    assert sizes == [4, 2]
    grads = [g.double() for g in grads]
    assert relative_error(grads[:n], truth[:n]) < 0.05
    assert relative_error(grads[n:], truth[n:]) < 0.05
