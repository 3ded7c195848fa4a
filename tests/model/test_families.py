"""The model families, each as a tiny random model with its own way of turns: what holds for one must hold for all."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from spo_ray.config.data import EngineConfig
from spo_ray.config.model import ModelConfig
from spo_ray.core import spo_gradients
from spo_ray.core.gradients import KeepFloat64
from spo_ray.core.lm_head import find_head
from spo_ray.core.logps import completion_logps
from spo_ray.model.collate import collate, collate_pairs
from spo_ray.model.engines import open_engine
from spo_ray.model.export import Probe, export, read_probe
from spo_ray.model.load import build_policy, load_model, parameter_groups
from spo_ray.model.tokenizer import ChatTokenizer
from tests.core.tiny import swapped

WINDOW = 8
CHATML = SimpleNamespace(
    template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    bos=None,
    eos="<|im_end|>",
    end="<|im_end|>",
    turn="<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>",
)
LLAMA = SimpleNamespace(
    template="{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    special=["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    end="<|eot_id|>",
    turn="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n5<|eot_id|>",
)
MISTRAL = SimpleNamespace(
    template="{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    special=["<s>", "</s>", "[INST]", "[/INST]"],
    bos="<s>",
    eos="</s>",
    end="</s>",
    turn="<s>[INST] How many? [/INST]5</s>",
)
GEMMA = SimpleNamespace(
    template="{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else "
    "m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    special=["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    bos="<bos>",
    eos="<eos>",
    end="<end_of_turn>",
    turn="<bos><start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n5<end_of_turn>",
)
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "qwen2": (Qwen2Config, CHATML, {"tie_word_embeddings": True}),
    "qwen2.5": (Qwen2Config, CHATML, {"tie_word_embeddings": False, "rope_theta": 1e6, "sliding_window": 4}),
    "qwen3": (Qwen3Config, CHATML, {"tie_word_embeddings": True, "head_dim": 32}),
    "llama3": (LlamaConfig, LLAMA, {"tie_word_embeddings": False, "rope_theta": 5e5}),
    "mistral": (MistralConfig, MISTRAL, {"tie_word_embeddings": False, "head_dim": 32, "sliding_window": WINDOW}),
    "gemma2": (
        Gemma2Config,
        GEMMA,
        {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}
        | ALTERNATING,
    ),
    "gemma3": (Gemma3TextConfig, GEMMA, {"head_dim": 32, "query_pre_attn_scalar": 32} | ALTERNATING),
}
ROWS = [([5, 9, 40], [7, 8, 100, 11]), ([33, 12], list(range(50, 74))), ([3, 4, 5, 6, 7], [300])]


def make(name, toy_base, path):
    """A checkpoint of a family: two layers, nothing at its initial value, the toy's tokenizer with other turns."""
    kind, turns, options = FAMILIES[name]
    tokenizer = AutoTokenizer.from_pretrained(toy_base)
    tokenizer.add_special_tokens({"additional_special_tokens": turns.special})
    tokenizer.chat_template, tokenizer.eos_token = turns.template, turns.eos
    if turns.bos:
        tokenizer.bos_token = turns.bos
        special = [(turns.bos, tokenizer.bos_token_id)]
        adds_bos = TemplateProcessing(single=f"{turns.bos} $A", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = adds_bos  # so do Llama's, Mistral's and Gemma's
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = kind(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=256, **sizes, **options)
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, toy_base, tmp_path_factory):
    path = make(request.param, toy_base, tmp_path_factory.mktemp(request.param))
    _, turns, options = FAMILIES[request.param]
    tied = options.get("tie_word_embeddings", True)
    return SimpleNamespace(name=request.param, path=path, turns=turns, tied=tied, chat=ChatTokenizer.load(path))


def policy(family, dtype="float32", device="cpu", **options):
    """With its adapters away from zero."""
    model = build_policy(
        family.path, ModelConfig(path=str(family.path), **options), 3, with_phi=True, dtype=dtype, device=device
    )
    if device != "meta":
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def full_logps(model, ids, labels, mask):
    """Log-softmax of all logits, without the head taken apart."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    values = (logits - logits.exp().sum(-1, keepdim=True).log()).gather(2, ids[:, 1:, None])[..., 0]
    return (values * (labels[:, 1:] != -100)).sum(1)


def ends(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_input_embeddings().weight, base.get_output_embeddings().weight


def test_log_probabilities_are_the_models_own(family):
    """Also beyond the sliding window, of 8 tokens, and whatever padding a row has."""
    model = policy(family, "float64")
    batch = collate(ROWS, family.chat.pad_id)
    with KeepFloat64(), torch.no_grad():
        found, counts = completion_logps(model, **batch)
        assert torch.allclose(found, full_logps(model, *batch.values()), rtol=1e-11)
        alone = [completion_logps(model, **collate([row], family.chat.pad_id))[0].item() for row in ROWS]
    assert found.tolist() == pytest.approx(alone, rel=1e-11)
    assert counts.tolist() == [4, 24, 1]
    head = find_head(model, batch["input_ids"])
    assert head is not None  # or whole batches of logits would be in memory
    assert head.softcap == (4.0 if family.name == "gemma2" else None)


def test_attention_is_the_architectures(family):
    """Against eager attention, which has soft caps and windows written out."""
    batch = collate(ROWS, family.chat.pad_id)
    mask = batch["attention_mask"].bool()
    auto, eager = (load_model(family.path, attention=kind).eval() for kind in ("auto", "eager"))
    assert auto.config._attn_implementation == ("eager" if family.name == "gemma2" else "sdpa")
    with torch.no_grad():
        logits = [m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[mask] for m in (auto, eager)]
        assert torch.allclose(*logits, atol=1e-4)
        ids = torch.arange(10, 34)[None]
        changed = ids.clone()
        changed[0, 0] = 99
        far = (auto(ids).logits - auto(changed).logits)[0, :, :].abs().amax(1)
    reach = 1 + 2 * (WINDOW - 1)  # of the first token through two layers that all have the window
    assert far[:WINDOW].min() > 1e-3
    assert (far[reach:].max() == 0) == (family.name == "mistral")


def test_adapters_are_on_every_linear_layer_but_the_head(family):
    model = policy(family)
    plain = AutoModelForCausalLM.from_pretrained(family.path)
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert adapted == linear
    assert len(linear) == 2 * 7
    theta, phi = parameter_groups(model)
    assert sorted(theta + phi) == sorted(n for n, _ in model.named_parameters())
    assert {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in theta} == {
        n for n, _ in plain.named_parameters()
    }
    assert len(phi) == 2 * len(linear)


def pairs_of(family):
    chosen, rejected = ROWS[1], ([33, 12], [60, 61, 62, 200, 201, 9, 8, 7, 6, 5, 4, 3])
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        dict(zip(keys, (*chosen, rejected[1]), strict=True)),
        dict(zip(keys, ([3, 4], [5, 6], [7, 8]), strict=True)),
    ]
    for row in rows:
        row |= {"ref_chosen_logps": -60.0, "ref_rejected_logps": -61.0}
    return collate_pairs(rows, family.chat.pad_id)


def gradients(model, batch, **options):
    theta, phi = parameter_groups(model)
    settings = {"beta": 0.1, "lambda_sft": 1.0, "gamma": 0.0, "inner_steps": 0, "eta": 1e-3} | options
    return spo_gradients(model, batch, backbone=theta, adapters=phi, **settings)


def test_gradients_reach_theta_and_phi(family):
    model = policy(family, "float64")
    theta, phi = parameter_groups(model)
    active = []
    for batch in (pairs_of(family), swapped(pairs_of(family))):
        grads, metrics = gradients(model, batch, gamma=0.1, inner_steps=1)
        assert list(grads) == [*theta, *phi]
        assert all(torch.isfinite(grad).all() and grad.norm() > 0 for grad in grads.values())
        active.append(metrics["spo/hinge_active"])
    assert sorted(active) == [0.0, 1.0]
    shared, alone = (
        gradients(model, pairs_of(family), lambda_sft=0.0, share_prompt=share)[0] for share in (True, False)
    )
    assert all(torch.allclose(shared[name], alone[name], rtol=1e-8, atol=1e-12) for name in grads)


def test_gradients_are_those_of_the_loss(family):
    """Central differences along one random direction; phi has no share in the SFT term while theta_hat is theta."""
    model, batch = policy(family, "float64"), pairs_of(family)
    grads, _ = gradients(model, batch)
    torch.manual_seed(5)
    way = {name: torch.randn_like(grad) for name, grad in grads.items()}

    def loss(sft):
        sides = [
            full_logps(model, *(batch[f"{side}_{key}"] for key in ("input_ids", "labels", "attention_mask")))
            for side in ("chosen", "rejected")
        ]
        margin = sides[0] - batch["ref_chosen_logps"] - sides[1] + batch["ref_rejected_logps"]
        return -torch.nn.functional.logsigmoid(0.1 * margin).mean() - sft * sides[0].mean()

    def slope(names, sft, step=1e-6):
        named, values = dict(model.named_parameters()), []
        with KeepFloat64(), torch.no_grad():
            for sign in (1, -2, 1):
                for name in names:
                    named[name].add_(way[name], alpha=sign * step)
                values.append(loss(sft).item())
        return (values[0] - values[1]) / (2 * step)

    for names, sft in zip(parameter_groups(model), (1.0, 0.0), strict=True):
        found = sum((grads[name] * way[name]).sum().item() for name in names)
        assert found == pytest.approx(slope(names, sft), rel=1e-6)


@pytest.mark.parametrize("theta", [{"type": "all"}, {"type": "adapter", "rank": 4, "alpha": 8}], ids=["all", "adapter"])
def test_exports_are_the_policy(family, theta, tmp_path):
    """Merged, and as backbone and adapter; from a policy that was built without weights and filled."""
    source = policy(family, theta=theta)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = source(ids).logits
        assert (expected - load_model(family.path).eval()(ids).logits).abs().max() > 1e-2
    model = policy(family, device="meta", theta=theta)
    assert list(model.state_dict()) == list(source.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in source.named_parameters()]
    assert {m.device.type for m in model.parameters()} == {"meta"}
    assert all((ends(m)[0] is ends(m)[1]) == family.tied for m in (source, model))
    model.load_state_dict({key: value.clone() for key, value in source.state_dict().items()}, assign=True)
    export(model, family.chat, tmp_path, Probe([5], [6], -1.0), backbone_and_adapter=True)
    kind = {"attn_implementation": source.config._attn_implementation}  # sdpa, the default, has no soft caps
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **kind).eval()
    apart = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", **kind)
    apart = PeftModel.from_pretrained(apart, tmp_path / "adapter").eval()
    with torch.no_grad():
        for other in (loaded, apart):
            assert (other(ids).logits - expected).abs().max() < 1e-5
            assert (ends(other)[0] is ends(other)[1]) == family.tied
    for folder in (tmp_path, tmp_path / "backbone"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) != family.tied  # noqa: SIM118 (no mapping)


def test_turns_are_the_templates(family):
    """Prompt and completion are together what the template makes of both, with one end of turn and one beginning."""
    chat, turns = family.chat, family.turns
    end = chat.tokenizer.convert_tokens_to_ids(turns.end)
    prompt, completion = chat.prompt_ids("How many?"), chat.completion_ids("5")
    assert chat.tokenizer.decode([*prompt, *completion]) == turns.turn
    assert [*prompt, *completion] == chat.tokenizer(turns.turn, add_special_tokens=False)["input_ids"]
    assert completion[-1] == end and completion.count(end) == 1
    assert chat.stop_ids == sorted({end, chat.tokenizer.eos_token_id})
    if turns.bos:
        bos = chat.tokenizer.bos_token_id
        assert chat.tokenizer("5")["input_ids"][0] == bos  # what must not happen to templates and completions
        assert prompt[0] == bos
        assert [*prompt, *completion].count(bos) == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_gives_exports_the_trainers_log_probabilities(family, tmp_path):
    model = policy(family)
    row = (family.chat.prompt_ids("How many pens do 12 boxes of 7 hold?"), family.chat.completion_ids("12 * 7 = 84"))
    with torch.no_grad():
        logp = completion_logps(model, **collate([row], family.chat.pad_id))[0].item()
    export(model, family.chat, tmp_path, Probe(*row, logp))
    chat = ChatTokenizer.load(tmp_path)
    engine = open_engine("vllm", str(tmp_path), EngineConfig(max_model_len=128), chat)  # raises where they differ
    assert abs(engine.score([row])[0].logp - read_probe(tmp_path)["logp"]) / len(row[1]) < 1e-4
    ((answer,),) = engine.generate([row[0]], n=1, temperature=0.0, max_tokens=16, seeds=[0])
    assert answer.tokens
    engine.close()
