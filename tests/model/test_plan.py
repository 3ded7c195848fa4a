"""The plan against real models: counts, saved tensors, optimizer states, and peaks of memory while a step runs."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from spo_ray.config import load
from spo_ray.core.logps import completion_logps
from spo_ray.core.spo import spo_gradients
from spo_ray.model.fsdp import shard
from spo_ray.model.load import build_policy, parameter_groups
from spo_ray.model.plan import memory_plan
from spo_ray.train.methods import Method

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
QWEN_HALF_B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
BASE = [
    "train.checkpoint.every=null",
    "train.max_length=64",
    "train.pairs_per_backward=4",
    "preference.dynamics_every=null",
    "preference.batch_size=4",
    "methods.spo.gamma=0",
]
HINGE = "methods.spo.gamma=0.01"
ADAPTER = "model.theta={type: adapter, rank: 4, alpha: 8}"
LAST = "model.theta={type: last_layers, count: 1}"
ADAPTER_7B = [
    "model.theta={type: adapter}",
    "train.precision=bfloat16",
    "train.optimizer=adamw_8bit",
    "train.gradient_checkpointing=true",
]


def tiny(kind=LlamaConfig, *, tied=False, vocabulary=96, hidden=64, layers=3):
    return kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )


def plan_of(model_config, *overrides, method="dpo", device="cpu"):
    config = load(QUICKSTART, [*BASE, *overrides])
    stage = method or "sft"
    return memory_plan(config, model_config, stage, config.methods[method] if method else None, device)


def real_policy(model_config, config, path, *, method="dpo"):
    """The model as a worker builds it, with weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model_config).save_pretrained(path)
    model = build_policy(path, config.model, 0, with_phi=method is not None)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, config.train.precision))
    if config.train.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batch_of(model_config, pairs, length):
    """Rows of the full length but for one, so that there is padding; the rejected side has a short completion."""
    batch = {}
    for side, start in (("chosen", length // 4), ("rejected", length * 7 // 8)):
        ids = torch.randint(1, model_config.vocab_size, (pairs, length))
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, :start] = -100
        labels[1:, -1:], mask[1:, -1:] = -100, 0
        batch |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_attention_mask": mask}
        batch[f"ref_{side}_logps"] = torch.full((pairs,), -50.0, dtype=torch.float64)
    return batch


@pytest.mark.parametrize(
    ("model_config", "published"),
    [(QWEN_HALF_B, 494_032_768), (LLAMA_8B, 8_030_261_248), (QWEN_7B, 7_615_616_512)],
    ids=["Qwen2.5-0.5B", "Llama-3.1-8B", "Qwen2.5-7B"],
)
def test_published_sizes(model_config, published):
    assert plan_of(model_config, method=None).parameters == {
        "theta": published,
        "phi": 0,
        "frozen": 0,
        "total": published,
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_counts_are_those_of_a_real_model_with_real_adapters(kind, tied):
    model_config = tiny(kind, tied=tied)
    model = AutoModelForCausalLM.from_config(model_config)
    backbone = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[-1].parameters())
    attention = ["q_proj", "v_proj"]

    def lora(rank, targets="all-linear"):
        fresh = AutoModelForCausalLM.from_config(model_config)
        wrapped = get_peft_model(fresh, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
        return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)

    def counts(*overrides, method="dpo"):
        found = plan_of(model_config, *overrides, method=method).parameters
        assert found["total"] == found["theta"] + found["phi"] + found["frozen"]
        return found["theta"], found["phi"], found["frozen"]

    assert counts() == (backbone, lora(8), 0)
    assert counts("model.lora_rank=3") == (backbone, lora(3), 0)
    assert counts("model.lora_targets=[q_proj, v_proj]") == (backbone, lora(8, attention), 0)
    assert counts(LAST) == (layer, lora(8), backbone - layer)
    assert counts(LAST, method=None) == (layer, 0, backbone - layer)
    assert counts(ADAPTER) == (lora(4), lora(8), backbone)
    assert counts(ADAPTER, method=None) == (lora(4), 0, backbone)


def saved_bytes(model, batch, autocast):
    """What two forward passes keep for their backward, parameters and their copies left out; each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.ndim == 2}
    kept, sizes = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not (autocast and tensor.shape in shapes):
            kept.append(tensor)  # or its memory would be another tensor's later
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        for side in ("chosen", "rejected"):
            inputs = (batch[f"{side}_{key}"] for key in ("input_ids", "labels", "attention_mask"))
            kept.append(completion_logps(model, *inputs)[0])
    return sum(sizes.values())


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(
    ("kind", "theta", "attention"),
    [
        (LlamaConfig, "model.theta={type: all}", "sdpa"),
        (Qwen2Config, "model.theta={type: all}", "sdpa"),
        (LlamaConfig, ADAPTER, "sdpa"),
        (LlamaConfig, LAST, "sdpa"),
        (LlamaConfig, "model.theta={type: all}", "eager"),
    ],
)
def test_activations_are_what_a_real_forward_saves(tmp_path, kind, theta, mode, attention):
    model_config = tiny(kind)
    precision = "float32" if mode == "float32" else "bfloat16"
    overrides = [theta, f"train.precision={precision}", f"model.attention={attention}"]
    if mode == "bfloat16":  # without autocast: sharded
        overrides += ["train.num_workers=2", "preference.batch_size=8"]
    config = load(QUICKSTART, [*BASE, *overrides])
    model = real_policy(model_config, config, tmp_path).eval()
    model.get_base_model().set_attn_implementation(attention)
    model = model.to(torch.bfloat16) if mode == "bfloat16" else model
    saved = saved_bytes(model, batch_of(model_config, 4, 64), mode == "autocast")
    found = plan_of(model_config, *overrides).items["activations"]
    assert found / saved == pytest.approx(1.0, abs=0.08)


def test_adamw_states_are_those_of_the_real_optimizer():
    model_config = tiny()
    params = list(AutoModelForCausalLM.from_config(model_config).parameters())
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert plan_of(model_config, method=None).items["optimizer states"] == sum(value.nbytes for value in states)


def test_8bit_states_are_those_of_the_real_optimizer():
    optim = pytest.importorskip("torchao.optim")
    model_config = tiny(hidden=128, vocabulary=100)
    params = list(AutoModelForCausalLM.from_config(model_config).parameters())
    optimizer = optim.AdamW8bit(params)
    for p in params:
        optimizer.state[p] = {
            "exp_avg": optimizer._new_buffer(p, True),
            "exp_avg_sq": optimizer._new_buffer(p, False),
        }
    total = 0
    for state in optimizer.state.values():
        for value in state.values():
            parts = [getattr(value, name) for name in getattr(value, "tensor_attrs", [])] or [value]
            total += sum(part.nbytes for part in parts)
    found = plan_of(model_config, "train.optimizer=adamw_8bit", method=None).items["optimizer states"]
    assert found == total
    assert found < plan_of(model_config, method=None).items["optimizer states"] / 3


def peak_bytes(function):
    """The rise of PyTorch's memory at its highest while a function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def peak_of_step(model, config, method, batch):
    """Bytes at the highest point of a step that starts with parameters and optimizer states."""
    backbone, adapters = parameter_groups(model)
    named = dict(model.named_parameters())
    params = [named[name] for name in (*backbone, *adapters)]
    optimizer = torch.optim.AdamW(params, 1e-5)
    arguments = Method(config.methods[method]).arguments
    autocast = config.train.precision == "bfloat16" and not hasattr(model, "compute_dtype")
    seen = {}

    def run():
        model.train()
        before = [p.detach().clone() for p in params] if config.preference.dynamics_every else []
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            grads, metrics = spo_gradients(
                model,
                batch,
                backbone=backbone,
                adapters=adapters,
                share_prompt=False,
                pairs_per_backward=config.train.pairs_per_backward,
                side_gradients={} if before else None,
                **arguments,
            )
        seen.update(metrics)
        for p, grad in zip(params, grads.values(), strict=True):
            p.grad = grad
        optimizer.step()
        optimizer.zero_grad()

    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    there = sum(getattr(t, "_local_tensor", t).untyped_storage().nbytes() for t in tensors)
    peak = there + peak_bytes(run)
    assert seen.get("spo/hinge_active", 1.0) == 1.0
    return peak


SHORT = ["train.max_length=16", "train.pairs_per_backward=1"]
STEPS = {
    "dpo": ("dpo", []),
    "dpo-short": ("dpo", SHORT),
    "dpo-recomputed": ("dpo", ["train.gradient_checkpointing=true"]),
    "dpo-eager": ("dpo", ["model.attention=eager"]),
    "dpo-adapter": ("dpo", [ADAPTER]),
    "dpo-last": ("dpo", [LAST]),
    "dpo-watched": ("dpo", [*SHORT, "preference.dynamics_every=1"]),
    "spo": ("spo", []),
    "spo-short": ("spo", SHORT),
    "spo-2-inner-steps": ("spo", [*SHORT, "methods.spo.inner.steps=2"]),
    "spo-3-inner-steps-central": ("spo", [*SHORT, "methods.spo.inner.steps=3", "methods.spo.difference=central"]),
    "hinge": ("spo", [*SHORT, HINGE]),
    "hinge-central": ("spo", [*SHORT, HINGE, "methods.spo.difference=central"]),
    "hinge-of-adapters": ("spo", [*SHORT, HINGE, "methods.spo.norm_scope=adapters"]),
    "hinge-per-pair": ("spo", [*SHORT, HINGE, "methods.spo.hinge=pair"]),
    "hinge-adapter-recomputed": ("spo", [HINGE, ADAPTER, "train.gradient_checkpointing=true"]),
}


IN_HALF = ("dpo", "dpo-adapter", "spo-short", "hinge", "hinge-per-pair", "hinge-adapter-recomputed")


@pytest.mark.parametrize(
    ("name", "precision"), [(name, "float32") for name in STEPS] + [(name, "bfloat16") for name in IN_HALF]
)
def test_a_real_step_stays_just_below_its_plan(tmp_path, name, precision):
    method, overrides = STEPS[name]
    overrides = [*overrides, f"train.precision={precision}"]
    model_config = tiny(vocabulary=256, hidden=96)
    config = load(QUICKSTART, [*BASE, *overrides])
    model = real_policy(model_config, config, tmp_path)
    model.get_base_model().set_attn_implementation("eager" if config.model.attention == "eager" else "sdpa")
    plan = plan_of(model_config, *overrides, method=method)
    peak = peak_of_step(model, config, method, batch_of(model_config, 4, config.train.max_length))
    assert 0.97 < plan.total / peak < 1.3


@pytest.fixture
def eight_ranks():
    """A process group in which this process is one of eight, and whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield dist.device_mesh.init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "precision"), [("dpo-short", "float32"), ("dpo-recomputed", "float32"), ("spo-short", "bfloat16")]
)
def test_a_real_sharded_step_stays_just_below_its_plan(tmp_path, eight_ranks, name, precision):
    method, overrides = STEPS[name]
    overrides = [*overrides, f"train.precision={precision}", "train.num_workers=8", "preference.batch_size=8"]
    overrides += ["train.pairs_per_backward=1"]  # of one pair a worker
    model_config = tiny(vocabulary=256, hidden=96, layers=10)
    config = load(QUICKSTART, [*BASE, *overrides])
    model = real_policy(model_config, config, tmp_path)
    shard(model, eight_ranks, getattr(torch, precision))
    plan = plan_of(model_config, *overrides, method=method)
    peak = peak_of_step(model, config, method, batch_of(model_config, 1, config.train.max_length))
    assert 0.97 < plan.total / peak < 1.4
