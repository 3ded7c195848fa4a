import shutil

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig

from spo_ray.config.model import ModelConfig
from spo_ray.core import spo_gradients
from spo_ray.errors import UserError
from spo_ray.model import load
from spo_ray.model.collate import collate_pairs
from spo_ray.model.load import build_policy, load_model, parameter_groups

THETAS = {
    "all": {"type": "all"},
    "last_layers": {"type": "last_layers", "count": 2},
    "adapter": {"type": "adapter", "rank": 4, "alpha": 12},
}
IDS = torch.arange(20, 44).reshape(2, 12)


@pytest.fixture
def build(toy_base):
    def build(theta="all", with_phi=True, seed=0, path=toy_base, **options):
        fields = {key: options.pop(key) for key in ("lora_targets", "attention") if key in options}
        config = ModelConfig(path="elsewhere", theta=theta if isinstance(theta, dict) else THETAS[theta], **fields)
        return build_policy(path, config, seed, with_phi=with_phi, **options)

    return build


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def shake(model, names, scale=0.1):
    torch.manual_seed(7)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            named[name].add_(torch.randn_like(named[name]) * scale)


@pytest.mark.parametrize("with_phi", [True, False], ids=["phi", "sft"])
@pytest.mark.parametrize("theta", THETAS)
def test_a_policy_starts_as_its_backbone(build, toy_base, theta, with_phi):
    assert torch.equal(logits(build(theta, with_phi)), logits(load_model(toy_base)))


@pytest.mark.parametrize("with_phi", [True, False], ids=["phi", "sft"])
@pytest.mark.parametrize("theta", THETAS)
def test_what_is_trained(build, toy_base, theta, with_phi):
    model = build(theta, with_phi)
    names, phi = parameter_groups(model)
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in names}
    backbone = [n for n, _ in load_model(toy_base).named_parameters()]
    linear = [n for n in backbone if n.endswith("_proj.weight")]
    assert len(linear) == 3 * 7
    expected = {
        "all": set(backbone),
        "last_layers": {n for n in backbone if n.startswith(("model.layers.1.", "model.layers.2."))},
        "adapter": {n.replace("weight", f"lora_{part}.theta.weight") for n in linear for part in "AB"},
    }
    assert plain == expected[theta]
    adapters = {n.replace("weight", f"lora_{part}.default.weight") for n in linear for part in "AB"}
    assert {n.removeprefix("base_model.model.") for n in phi} == (adapters if with_phi else set())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {*names, *phi}


@pytest.mark.parametrize("theta", THETAS)
def test_two_seeds_give_two_adapters(build, theta):
    def weights(seed):
        model = build(theta, seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if ".lora_A.default" in n]).detach()

    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), state)
    model = build("all", seed=1)
    phi = torch.cat([p.flatten() for n, p in model.named_parameters() if ".lora_A." in n])
    assert torch.equal(weights(1), phi)  # whatever theta is


def test_both_adapters_count_and_can_be_merged(build, toy_base):
    model = build("adapter", dtype="float64")
    theta, phi = parameter_groups(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    seen = [logits(model)]
    for names in (theta, phi):
        shake(model, names)
        seen.append(logits(model))
        assert (seen[-1] - seen[-2]).abs().max() > 0.1
    with torch.no_grad():
        assert torch.equal(model.train()(IDS).logits, seen[-1])  # no dropout
    named = dict(model.named_parameters())
    weights = load_model(toy_base, "float64").state_dict()
    base = "base_model.model."
    for name, value in weights.items():  # W + alpha / r * B A, for both
        stem = base + name.removesuffix("weight")
        if stem + "base_layer.weight" in named:
            for adapter, scale in (("theta", 12 / 4), ("default", 16 / 8)):
                a, b = (named[f"{stem}lora_{part}.{adapter}.weight"].detach() for part in "AB")
                value += scale * b @ a
    by_hand = load_model(toy_base, "float64")
    by_hand.load_state_dict(weights)
    assert torch.allclose(logits(by_hand), seen[-1], atol=1e-5)  # norms compute in float32
    assert torch.allclose(logits(model.merge_and_unload()), seen[-1], atol=1e-5)


@pytest.mark.parametrize("with_phi", [True, False], ids=["phi", "sft"])
@pytest.mark.parametrize("theta", THETAS)
def test_the_empty_structure_is_the_same(build, theta, with_phi):
    model, empty = build(theta, with_phi, dtype="float64"), build(theta, with_phi, dtype="float64", device="meta")

    def structure(m):
        base = m.get_base_model() if with_phi or theta == "adapter" else m
        return (
            [(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()],
            [(n, v.shape, v.dtype) for n, v in m.state_dict().items()],
            [(n, b.shape) for n, b in m.named_buffers()],
            base.get_input_embeddings().weight is base.get_output_embeddings().weight,
            base.config._attn_implementation,
            base.generation_config.to_dict(),
            base.name_or_path,
        )

    assert structure(model) == structure(empty)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    shake(model, [n for n, p in model.named_parameters() if p.requires_grad])
    filled = build(theta, with_phi, seed=9, dtype="float64")
    filled.load_state_dict(model.state_dict())
    assert torch.equal(logits(filled), logits(model))


def test_frozen_parameters_change_nothing_for_the_others(build):
    """Gradients of the same policy, whatever of it is trained."""
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [20, 30, 1], "rejected_ids": [21, 1]}
    batch = collate_pairs([row | {"ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0}], 0)
    options = {"beta": 0.1, "lambda_sft": 1.0, "gamma": 0.0, "inner_steps": 0, "eta": 1e-3}
    grads, models = {}, {}
    for theta in THETAS:
        models[theta] = model = build(theta, dtype="float64")
        names, phi = parameter_groups(model)
        shake(model, phi)
        before = [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
        grads[theta], _ = spo_gradients(model, batch, backbone=names, adapters=phi, **options)
        for p, (required, grad, value) in zip(model.parameters(), before, strict=True):
            assert p.requires_grad == required and p.grad is grad and torch.equal(p, value)
        assert list(grads[theta]) == [*names, *phi]
    for theta in ("last_layers", "adapter"):
        common = grads[theta].keys() & grads["all"].keys()
        assert len(common) == len(parameter_groups(models[theta])[1]) + (24 if theta == "last_layers" else 0)
        for name in common:
            assert torch.allclose(grads[theta][name], grads["all"][name], rtol=1e-9, atol=1e-12)
    assert all(grads["adapter"][n].norm() > 0 for n in grads["adapter"] if "lora_B.theta" in n)


def test_what_can_not_be_trained_is_refused(build):
    with pytest.raises(UserError, match=r"theta\.count=4, but the model has 3 layers"):
        build({"type": "last_layers", "count": 4})
    for targets in (["nothing_proj"], "nothing"):
        with pytest.raises(UserError, match=r"lora_targets=.*nothing"):
            build(lora_targets=targets)
    for targets in (["q_proj", "lm_head"], ["q_proj", "embed_tokens"]):
        with pytest.raises(UserError, match="embedding that is tied"):
            build(lora_targets=targets)


@pytest.fixture
def capped(tmp_path):
    """Gemma 2, whose attention scores have a soft cap."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=64, num_hidden_layers=1, head_dim=16, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_attention_by_what_is_there(toy_base, capped, monkeypatch):
    def asked(path, *args, **options):
        seen = []

        def stub(*_, attn_implementation, **__):
            seen.append(attn_implementation)
            model = type("Model", (), {"generation_config": None})()
            return model, dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())

        with monkeypatch.context() as patch:
            patch.setattr(load.AutoModelForCausalLM, "from_pretrained", stub)
            load_model(path, *args, **options)
        return seen[0]

    assert load_model(toy_base).config._attn_implementation == "sdpa"
    assert load_model(toy_base, attention="eager").config._attn_implementation == "eager"
    assert load_model(capped).config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"soft cap of gemma2's .* auto or eager"):
        load_model(capped, attention="sdpa")
    with pytest.raises(UserError, match=r"flash_attention_2 needs the package flash-attn and a GPU"):
        load_model(toy_base, "bfloat16", "flash_attention_2")
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: True)
    for path, otherwise in ((toy_base, None), (capped, "eager")):
        assert asked(path, "bfloat16") == "flash_attention_2"
        assert asked(path, compute="bfloat16") == "flash_attention_2"
        assert asked(path) == otherwise
        assert asked(path, "bfloat16", compute="float32") == otherwise
        assert asked(path, "bfloat16", "flash_attention_2") == "flash_attention_2"
    with pytest.raises(UserError, match="bfloat16 only, not in float32"):
        load_model(toy_base, attention="flash_attention_2")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_contradictory_generation_settings_do_not_stop_an_export(toy_base, build, device, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(toy_base, path)
    settings = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}'
    (path / "generation_config.json").write_text(settings)
    model = build(path=path, with_phi=False, device=device)
    model.generation_config.save_pretrained(tmp_path)  # raises where settings contradict each other
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.temperature, saved.top_p, saved.eos_token_id) == (0.6, 0.9, 1)
