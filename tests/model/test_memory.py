"""The estimate against real models: counts, saved tensors, optimizer states, and peaks of memory while a step runs."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from spo_ray.config.load import load
from spo_ray.core.logps import completion_logps
from spo_ray.core.spo import spo_gradients
from spo_ray.errors import UserError
from spo_ray.model.fsdp import shard
from spo_ray.model.load import build_policy, parameter_groups
from spo_ray.model.memory import GIB, check_memory, estimate_memory
from spo_ray.train.method_state import Method

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


def estimate_of(model_config, *overrides, method="dpo", device="cpu"):
    config = load(QUICKSTART, [*BASE, *overrides])
    stage = method or "sft"
    return estimate_memory(config, model_config, stage, config.methods[method] if method else None, device)


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
    assert estimate_of(model_config, method=None).parameters == {
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
        found = estimate_of(model_config, *overrides, method=method).parameters
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
    """Return the bytes that two forward passes keep for their backward, without parameters and their copies."""
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
    found = estimate_of(model_config, *overrides).items["activations"]
    assert found / saved == pytest.approx(1.0, abs=0.08)


SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    "model_config",
    [
        Qwen3Config(**SMALL, **HEADS),
        Gemma2Config(**SMALL, **HEADS),
        Gemma3TextConfig(**SMALL, **HEADS),
        GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0),
    ],
    ids=["Qwen3", "Gemma2", "Gemma3", "GPT2"],
)
def test_other_blocks_are_near(tmp_path, model_config):
    model = real_policy(model_config, load(QUICKSTART, BASE), tmp_path).eval()
    estimate = estimate_of(model_config)
    assert estimate.parameters["total"] == sum(p.numel() for p in model.parameters())
    saved = saved_bytes(model, batch_of(model_config, 4, 64), False)
    assert estimate.items["activations"] / saved == pytest.approx(1.0, abs=0.15)


def test_adamw_states_are_those_of_the_real_optimizer():
    model_config = tiny()
    params = list(AutoModelForCausalLM.from_config(model_config).parameters())
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert estimate_of(model_config, method=None).items["optimizer states"] == sum(value.nbytes for value in states)


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
    found = estimate_of(model_config, "train.optimizer=adamw_8bit", method=None).items["optimizer states"]
    assert found == total
    assert found < estimate_of(model_config, method=None).items["optimizer states"] / 3


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
    run, there, seen = step_of(model, config, method, batch)
    peak = there + peak_bytes(run)
    assert seen.get("spo/hinge_active", 1.0) == 1.0
    return peak


def step_of(model, config, method, batch):
    """A step as a function, the bytes of parameters and optimizer states before it, and where its metrics will be."""
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
    return run, there, seen


SHORT = ["train.max_length=16", "train.pairs_per_backward=1"]
STEPS = {
    "dpo": ("dpo", []),
    "dpo-short": ("dpo", SHORT),
    "dpo-recomputed": ("dpo", ["train.gradient_checkpointing=true"]),
    "dpo-adapter": ("dpo", [ADAPTER]),
    "dpo-last": ("dpo", [LAST]),
    "dpo-watched": ("dpo", [*SHORT, "preference.dynamics_every=1"]),
    "spo": ("spo", []),
    "spo-short": ("spo", SHORT),
    "spo-3-inner-steps": ("spo", [*SHORT, "methods.spo.inner.steps=3"]),
    "spo-exact": ("spo", [*SHORT, "methods.spo.inner={method: exact, eta: 1e-2}"]),
    "hinge": ("spo", [*SHORT, HINGE]),
    "hinge-per-pair": ("spo", [*SHORT, HINGE, "methods.spo.hinge=pair"]),
    "hinge-adapter-recomputed": ("spo", [HINGE, ADAPTER, "train.gradient_checkpointing=true"]),
}


IN_HALF = ("dpo-adapter", "spo-short", "hinge", "hinge-per-pair")


@pytest.mark.parametrize(
    ("name", "precision"), [(name, "float32") for name in STEPS] + [(name, "bfloat16") for name in IN_HALF]
)
def test_a_real_step_stays_just_below_its_estimate(tmp_path, name, precision):
    method, overrides = STEPS[name]
    overrides = [*overrides, f"train.precision={precision}"]
    model_config = tiny(vocabulary=256, hidden=96)
    config = load(QUICKSTART, [*BASE, *overrides])
    model = real_policy(model_config, config, tmp_path)
    estimate = estimate_of(model_config, *overrides, method=method)
    peak = peak_of_step(model, config, method, batch_of(model_config, 4, config.train.max_length))
    assert 0.97 < estimate.total / peak < 1.3


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
def test_a_real_sharded_step_stays_just_below_its_estimate(tmp_path, eight_ranks, name, precision):
    method, overrides = STEPS[name]
    overrides = [*overrides, f"train.precision={precision}", "train.num_workers=8", "preference.batch_size=8"]
    overrides += ["train.pairs_per_backward=1"]  # of one pair a worker
    model_config = tiny(vocabulary=256, hidden=96, layers=10)
    config = load(QUICKSTART, [*BASE, *overrides])
    model = real_policy(model_config, config, tmp_path)
    shard(model, eight_ranks, getattr(torch, precision))
    estimate = estimate_of(model_config, *overrides, method=method)
    peak = peak_of_step(model, config, method, batch_of(model_config, 1, config.train.max_length))
    assert 0.97 < estimate.total / peak < 1.4


def test_7b_with_adapters_alone_fits_80_gb_and_all_its_parameters_do_not():
    method = "spo"
    small = estimate_of(QWEN_7B, *ADAPTER_7B, "train.max_length=1024", method=method, device="cuda")
    check_memory(small, 80 * 10**9, "method_spo")
    assert 7_615_616_512 * 2 < small.total < 7_615_616_512 * 4  # bfloat16 weights, and no float32 copies of them
    whole = estimate_of(QWEN_7B, "train.precision=bfloat16", method=method, device="cuda")
    assert whole.total > 7_615_616_512 * (4 + 4 + 8 + 4)  # with L_SFT's gradient
    with pytest.raises(UserError, match=r"method_spo needs [12]\d\d\.\d GiB .* there are 74\.5 GiB"):
        check_memory(whole, 80 * 10**9, "method_spo")


def advice(estimate, available):
    """(overrides, printed GiB) of each line of a refusal's advice."""
    with pytest.raises(UserError) as refusal:
        check_memory(estimate, available, "sft")
    lines = re.findall(r"^  (.+): ([\d.]+) GiB$", str(refusal.value), re.MULTILINE)
    keys = r" (?=train\.|model\.|preference\.)"  # values have spaces too
    return [(re.split(keys, text), float(size)) for text, size in lines], str(refusal.value)


@pytest.mark.parametrize(
    ("available", "kinds"),
    [
        (430, {"gradient_checkpointing", "pairs_per_backward", "num_workers", "dynamics_every"}),
        (200, {"num_workers", "cpu_offload", "theta"}),
        (100, {"num_workers"}),
    ],
)
def test_each_advice_really_fits(available, kinds):
    overrides = [
        "train.max_length=1024",
        "train.pairs_per_backward=null",
        "preference.batch_size=64",
        "preference.dynamics_every=10",
        "train.precision=bfloat16",
        HINGE,
    ]
    estimate = estimate_of(QWEN_7B, *overrides, method="spo", device="cuda")
    found, text = advice(estimate, available * GIB)
    assert estimate.table() in text
    for changes, size in found:
        again = estimate_of(QWEN_7B, *overrides, *changes, method="spo", device="cuda")
        assert again.total <= available * GIB
        assert round(again.total / GIB, 1) == size
    named = {change.partition("=")[0].rpartition(".")[2] for changes, _ in found for change in changes}
    assert kinds <= named
    workers = next(int(change.partition("=")[2]) for changes, _ in found for change in changes if "num_w" in change)
    fewer = estimate_of(QWEN_7B, *overrides, f"train.num_workers={workers - 1}", method="spo", device="cuda")
    assert fewer.total > available * GIB


def test_advice_combines_changes_where_no_single_one_is_enough():
    overrides = ["train.precision=bfloat16", "train.max_length=4096", "train.pairs_per_backward=null"]
    estimate = estimate_of(QWEN_7B, *overrides, method="spo", device="cuda")
    found, _ = advice(estimate, 12 * GIB)
    ((changes, size),) = found
    assert len(changes) > 1
    again = estimate_of(QWEN_7B, *overrides, *changes, method="spo", device="cuda")
    assert again.total / GIB == pytest.approx(size, abs=0.05)
    assert again.total <= 12 * GIB


def test_shorter_rows_are_advised_where_they_help():
    overrides = ["train.max_length=16384", "train.pairs_per_backward=1"]
    estimate = estimate_of(QWEN_HALF_B, *overrides, device="cuda")
    found, _ = advice(estimate, estimate.total // 2)
    lengths = {changes[0]: size for changes, size in found if "max_length" in changes[0]}
    assert len(lengths) == 1
    ((change, size),) = lengths.items()
    assert 128 <= int(change.partition("=")[2]) < 16384
    again = estimate_of(QWEN_HALF_B, *overrides, change, device="cuda")
    assert again.total / GIB == pytest.approx(size, abs=0.05)
    assert again.total <= estimate.total // 2


def test_advice_may_be_none():
    found, text = advice(estimate_of(QWEN_7B, method=None, device="cuda"), GIB)
    assert not found
    assert "no setting that was tried makes it fit" in text
    assert "train.memory_check=false" in text


def test_advice_has_no_setting_that_the_method_refuses():
    pair = ["methods.spo.hinge=pair", HINGE]
    with pytest.raises(UserError, match="hinge=pair"):
        estimate_of(tiny(), *pair, "train.num_workers=2", method="spo")
    found, _ = advice(estimate_of(QWEN_HALF_B, *pair, method="spo", device="cuda"), 16 * GIB)
    assert found
    assert not [change for changes, _ in found for change in changes if "num_workers" in change]


SHARDED = ["train.num_workers=2", "train.sharding=full"]
SUMS = "SPO's sums and moves"
WHOLE = 64 * 96 * 2 + 3 * (64 * (64 + 32 + 32 + 64 + 3 * 192) + 2 * 64) + 64
"""Parameters of the tiny Llama."""
LORA = 3 * 8 * (64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 192))
TRAINED = WHOLE + LORA
HALF = "train.precision=bfloat16"


@pytest.mark.parametrize(
    ("method", "item", "settings", "expected"),
    [
        ("dpo", "parameters", [], 4 * TRAINED),
        ("dpo", "gradients", [], 4 * TRAINED),
        ("dpo", "parameters", ["train.precision=float64"], 8 * TRAINED),
        ("dpo", "parameters", [HALF], 4 * TRAINED),
        ("dpo", "parameters", [HALF, ADAPTER], 2 * WHOLE + 4 * LORA * 3 // 2),
        ("dpo", "gradients", [ADAPTER], 4 * LORA * 3 // 2),
        ("dpo", "gradients", ["model.lora_rank=16"], 4 * (WHOLE + 2 * LORA)),
        ("dpo", "parameters", SHARDED, 2 * TRAINED),
        ("dpo", "optimizer states", SHARDED, 4 * TRAINED),
        ("dpo", "parameters", ["train.num_workers=2", "train.sharding=none"], 4 * TRAINED),
        ("dpo", "learning dynamics", ["preference.dynamics_every=5"], 3 * 4 * TRAINED),
        ("dpo", "checkpoint under way", ["train.checkpoint.every=5"], 3 * 4 * TRAINED),
        ("dpo", "checkpoint under way", ["train.checkpoint={every: 5, asynchronous: false}"], 0),
        ("spo", SUMS, [], 4 * (TRAINED + 2 * LORA)),
        ("spo", SUMS, ["methods.spo.lambda_sft=0"], 0),
        ("spo", SUMS, ["methods.spo.lambda_sft=0", "methods.spo.safe_region={}"], 4 * (TRAINED + 2 * LORA)),
    ],
)
def test_items_by_arithmetic(method, item, settings, expected):
    assert estimate_of(tiny(), *settings, method=method).items.get(item, 0) == expected


def test_activations_follow_the_settings_of_a_backward():
    def activations(*overrides, method="dpo"):
        return estimate_of(tiny(), *overrides, method=method).items["activations"]

    base, several = activations(), ["train.pairs_per_backward=null", "preference.batch_size=16"]
    assert activations("train.pairs_per_backward=2") == base / 2
    assert activations("preference.batch_size=2") == base / 2
    assert activations(*several) == base  # 256 tokens on a CPU: four rows of 64
    assert activations(*several, "train.num_workers=8") == base / 2  # two pairs a worker
    flash = "model.attention=flash_attention_2"
    assert activations(flash, "train.max_length=32") == activations(flash) / 2
    assert activations(flash) < base  # keys and values are not repeated, and there is no mask
    assert activations("train.gradient_checkpointing=true") < base / 2
    exact = "train.precision=float64"  # in which the step keeps its activations
    assert activations(exact, "train.gradient_checkpointing=true") == activations(exact) > 1.9 * base
    tokens, sides, layers = 4 * 64, 2, 3
    assert activations("model.attention=eager") - base == sides * layers * tokens * (4 - 1) * 64 * 4  # heads, mask
    assert activations("model.lora_rank=16") - base == sides * layers * tokens * 7 * 8 * 4
    assert activations(HALF) < base
    cast = activations(HALF, "train.num_workers=2", "train.sharding=none", "preference.batch_size=8")
    assert activations(HALF, *SHARDED, "preference.batch_size=8") < cast == activations(HALF)
    single = activations("methods.spo.hinge=pair", HINGE, "train.pairs_per_backward=4", method="spo")
    assert single < activations(method="spo")


def test_a_gpu_takes_more_tokens_to_a_backward():
    base = ["train.pairs_per_backward=null", "preference.batch_size=128", "train.max_length=256"]
    on_cpu, on_gpu = (estimate_of(tiny(), *base, device=device).items for device in ("cpu", "cuda"))
    assert on_gpu["activations"] == 32 * on_cpu["activations"]
    assert "CUDA and its libraries" in on_gpu
    assert "CUDA and its libraries" not in on_cpu


def test_spo_takes_what_its_terms_take():
    def sums(*overrides):
        return estimate_of(tiny(), *SHORT, *overrides, method="spo").items[SUMS] / (4 * TRAINED)

    assert sums() == pytest.approx(1 + 2 * LORA / TRAINED)  # L_SFT's gradient, and phi's here and at theta_hat
    assert sums(HINGE) == 7  # and both sides', the move, R's, and two at the moved parameters
    assert sums(HINGE, HALF) == 5  # exact: R's and a side's
    assert sums(HINGE, "methods.spo.norm_scope=adapters") == pytest.approx(6 + LORA / TRAINED)
    assert sums(HINGE, "methods.spo.norm_scope=backbone") == pytest.approx(6 + WHOLE / TRAINED)
    assert sums("methods.spo.inner.steps=2") == pytest.approx(1 + 2 * WHOLE / TRAINED)
    assert sums("methods.spo.inner.steps=5") == pytest.approx(1 + 3 * WHOLE / TRAINED)
    assert sums("methods.spo.inner.steps=0") == 1


@pytest.mark.parametrize(("how", "precise"), [("auto", False), ("exact", False), ("difference", True)])
def test_a_difference_in_float32_takes_copies_of_what_is_frozen(how, precise):
    estimate = estimate_of(tiny(layers=6), ADAPTER, HALF, *SHORT, f"methods.spo.inner.method={how}", method="spo")
    assert (estimate.items["copies for computing"] == 4 * estimate.parameters["frozen"]) is precise


def test_sharding_gathers_the_root_and_two_layers():
    root = 64 * 96 * 2 + 64
    layer = (TRAINED - root) // 3
    for precision, size in (("float64", 8), ("float32", 4), ("bfloat16", 2)):
        estimate = estimate_of(tiny(), *SHARDED, f"train.precision={precision}")
        assert estimate.items["gathered layers"] == size * (root + 2 * layer)
        assert "copies for computing" not in estimate.items
    assert estimate.config.train.num_workers == 2
    assert "gathered layers" not in estimate_of(tiny()).items


def test_offloading_moves_shards_to_main_memory():
    base = ["preference.dynamics_every=1", "train.checkpoint.every=1"]
    there = estimate_of(tiny(), *base, *SHARDED, method="spo", device="cuda")
    away = estimate_of(tiny(), *base, *SHARDED, "train.cpu_offload=true", method="spo", device="cuda")
    shards = {"parameters", "gradients", "optimizer states", SUMS, "learning dynamics"}
    assert set(there.main_memory) == {"checkpoint under way"}
    assert set(away.main_memory) == {"checkpoint under way"} | shards
    assert not shards & set(away.items)
    assert shards < set(there.items)
    assert away.total == there.total - sum(there.items[name] for name in shards)
    assert "gradients, in main memory" in away.table()
    assert not estimate_of(tiny(), *SHARDED, "train.cpu_offload=true").main_memory  # a CPU's is main memory already
    alone = estimate_of(tiny(), "train.cpu_offload=true", device="cuda")
    assert "gathered layers" in alone.items  # a single worker is sharded to be offloaded


def test_sft_trains_theta_on_one_side():
    def sft(*overrides):
        return estimate_of(tiny(), "sft.batch_size=4", *overrides, method=None)

    dpo = estimate_of(tiny())
    assert sft().parameters["phi"] == 0 < dpo.parameters["phi"]
    assert 2 < dpo.items["activations"] / sft().items["activations"] < 2.2
    assert sft("sft.batch_size=2").items["activations"] == sft().items["activations"] / 2
    assert sft(LAST).items["activations"] < sft().items["activations"] / 2  # frozen layers below keep nothing
    assert "learning dynamics" not in sft("preference.dynamics_every=1").items


def test_tables_add_up():
    estimate = estimate_of(QWEN_HALF_B, "train.max_length=1024", method="spo", device="cuda")
    head, *lines = estimate.table().splitlines()
    assert "494,032,768 theta" in head
    units = {"GiB": 1.0, "MiB": 1 / 1024}
    sizes = [float(line.split()[-2]) * units[line.split()[-1]] for line in lines]
    assert lines[-1].startswith("total")
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.05 * len(sizes))
    assert len({len(line) for line in lines}) == 1
    check_memory(estimate, estimate.total, "method_spo")


def test_the_stage_says_whether_there_is_a_method():
    config = load(QUICKSTART, BASE)
    for stage, method in (("sft", config.methods["dpo"]), ("method_dpo", None)):
        with pytest.raises(ValueError, match="SFT has none"):
            estimate_memory(config, tiny(), stage, method)
    with pytest.raises(UserError, match="3 layers"):
        estimate_of(tiny(), "model.theta={type: last_layers, count: 9}")
