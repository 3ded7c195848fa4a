from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, OPTConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spo_ray.core.gradients import full_precision
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import LOSSES, dpo, nll
from spo_ray.core.shared_prompt import can_share
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
BASES = ["dpo", "cdpo", "robust_dpo", "ipo", "simpo", "alpha_dpo", "dpop", "nll", "dpo_nll"]
BASES += ["dpo_shift", "cal_dpo", "apo_zero", "apo_down", "nca", "exo_pair", "slic", "cpo", "orpo", "odpo", "rpo"]
EXACT = [
    *[{"base": base, "beta": 0.01 if base == "slic" else 2.0, "margin": 1.0} for base in BASES],  # its hinge ends at 1
    *[{"base": base, "lambda_sft": 0.7, "inner_steps": 1} for base in BASES],
    *[{"lambda_sft": 2.0, "inner_steps": k, "eta": 1e-2} for k in (0, 1, 3)],
    *[{"lambda_sft": 2.0, "inner_steps": k, "sft_reduction": "token_mean", "eta": 1e-1} for k in (0, 1, 3)],
]
HINGED = [
    {"gamma": 0.5, "norm_scope": scope, "hinge": hinge, "norm_of": of}
    for scope in ("all", "backbone", "adapters")
    for hinge, of in (("batch", "sum"), ("pair", "sum"), ("batch", "mean"), ("pair", "mean"))
] + [
    {"gamma": 0.5, "hinge": "pair", "norm_scope": "adapters", "lambda_sft": 1.0, "inner_steps": 1, "base": "simpo"},
    {"gamma": 0.5, "lambda_sft": 1.0, "inner_steps": 3, "sft_reduction": "token_mean", "base": "alpha_dpo"},
    {"gamma": 0.5, "lambda_sft": 1.0, "inner_steps": 1, "norm_of": "mean", "base": "ipo"},
]


def test_every_loss_goes_through_the_oracle():
    assert set(BASES) == set(LOSSES)


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
    for per_backward in (1, 2, None):
        found, _, n = run(batch, pairs_per_backward=per_backward, **options)
        assert relative_error(found[:n], truth[:n]) < 1e-10
        assert relative_error(found[n:], truth[n:]) < 1e-10


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("case", HINGED, ids=str)
def test_hinge_matches_double_backward_and_sleeps_when_inactive(case, pairs):
    """By differences, and exactly in the cases without a lower level, whose exact term (b) is another number."""
    options, active = DEFAULTS | case, []
    tolerances = {"difference": 5e-6} | ({} if options["inner_steps"] else {"exact": 1e-12})
    for batch in (tiny_batch(pairs), swapped(tiny_batch(pairs))):
        model, backbone, adapters = tiny_model()
        truth, value = objective_gradient(model, batch, backbone, adapters, **options)
        for method, tolerance in tolerances.items():
            found, metrics, n = run(batch, inner_method=method, **options)
            assert metrics["spo/R"] == pytest.approx(value, rel=1e-9)
            assert relative_error(found[:n], truth[:n]) < tolerance
            assert relative_error(found[n:], truth[n:]) < tolerance
            active.append(metrics["spo/hinge_active"])
    assert max(active) > 0


def test_without_lower_level_and_hinge_it_is_the_base_loss_plus_nll_on_theta():
    batch = tiny_batch()
    plain, _, n = run(batch, **DEFAULTS)
    nll, _, _ = run(batch, **DEFAULTS | {"base": "nll"})
    mixed, _, _ = run(batch, **DEFAULTS | {"lambda_sft": 0.7})
    expected = [a + 0.7 * b for a, b in zip(plain[:n], nll[:n], strict=True)] + plain[n:]
    assert relative_error(mixed, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hinge", ["batch", "pair"])
def test_parameters_gradients_flags_and_modes_come_back_bit_for_bit(dtype, hinge):
    model, backbone, adapters = tiny_model(dtype=dtype)
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
    options = DEFAULTS | {"lambda_sft": 1.0, "inner_steps": 2, "gamma": 1.0, "eta": 0.1, "hinge": hinge}
    for batch in (tiny_batch(), swapped(tiny_batch())):
        spo_gradients(model, batch, backbone=backbone, adapters=adapters, **options)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2:] == after[2:]


def test_state_comes_back_when_the_loss_fails():
    model, backbone, adapters = tiny_model()
    model.train()

    def broken(pairs):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        spo_gradients(model, tiny_batch(), backbone=backbone, adapters=adapters, **DEFAULTS | {"base": broken})
    assert all(m.training for m in model.modules())


def test_the_base_may_be_a_callable_of_log_probabilities():
    batch = tiny_batch()
    by_name, _, _ = run(batch, **DEFAULTS)

    def losses(p):
        return -torch.nn.functional.logsigmoid(0.5 * ((p.chosen - p.ref_chosen) - (p.rejected - p.ref_rejected)))

    per_pair, _, _ = run(batch, **DEFAULTS | {"base": losses})
    assert relative_error(by_name, per_pair) < 1e-14
    function, _, _ = run(batch, **DEFAULTS | {"base": partial(dpo, beta=0.5)})
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


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 0.02), (True, 0.05)])
def test_hinge_in_single_precision_and_under_autocast(autocast, tolerance):
    """Compare what gamma adds with float64: by differences, and exactly under autocast."""
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


@pytest.mark.parametrize("sharded", [False, True])
def test_flash_attention_makes_way_in_full_precision(monkeypatch, sharded):
    """A stand-in, as FlashAttention runs on GPUs alone: like it, it takes half precision only."""
    half = []

    def flash(module, query, key, value, mask, **named):
        if not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        half.append(query)  # the mask is of padding at the right, which causal attention never sees
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    double, *names = tiny_model()
    single, batch = tiny_model()[0].float(), swapped(tiny_batch())
    options = DEFAULTS | {"gamma": 1.0, "lambda_sft": 1.0, "inner_steps": 1}
    exact, _ = gradient_of(double, names, batch, **options)
    single.config._attn_implementation = "flash_attention_2"
    if sharded:  # which leaves half precision in a way of its own
        single.full_precision = lambda: full_precision(SimpleNamespace(parameters=single.parameters))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, metrics = gradient_of(single, names, batch, **options)
    assert metrics["spo/hinge_active"]
    assert half
    assert single.config._attn_implementation == "flash_attention_2"
    assert relative_error(found, exact) < 0.03


def test_inner_gap_is_what_the_lower_level_gains():
    model, backbone, adapters = tiny_model()
    batch, eta = tiny_batch(), 1e-5
    options = DEFAULTS | {"lambda_sft": 1.0, "inner_steps": 3, "eta": eta}
    _, metrics = spo_gradients(model, batch, backbone=backbone, adapters=adapters, **options)
    model.eval()
    theta = [dict(model.named_parameters())[name] for name in backbone]
    losses = []
    for _ in range(4):
        keys = ("input_ids", "labels", "attention_mask")
        loss = -completion_logps(model, *(batch[f"chosen_{key}"] for key in keys))[0].mean()
        losses.append(loss.item())
        for p, g in zip(theta, torch.autograd.grad(loss, theta), strict=True):
            p.data -= eta * g
    assert metrics["spo/inner_gap"] == pytest.approx(losses[0] - losses[-1], rel=0.02)


@pytest.mark.parametrize("case", [{}, {"norm_of": "mean"}, {"norm_of": "mean", "gamma": 0.5}, {"gamma": 0.5}], ids=str)
def test_side_gradients_and_their_terms(case):
    model, backbone, adapters = tiny_model()
    batch, sides = tiny_batch(), {}
    plain, _, _ = run(batch, **DEFAULTS | case)
    grads, metrics = spo_gradients(
        model,
        batch,
        backbone=backbone,
        adapters=adapters,
        side_gradients=sides,
        **DEFAULTS | {"lambda_sft": 1.0} | case,
    )
    model.eval()
    truth = {}
    for side in ("chosen", "rejected"):
        keys = ("input_ids", "labels", "attention_mask")
        logps = completion_logps(model, *(batch[f"{side}_{key}"] for key in keys))[0]
        truth[side] = torch.autograd.grad(logps.mean(), [dict(model.named_parameters())[n] for n in grads])
        assert relative_error(sides[side], truth[side]) < 1e-6
    w, r = (torch.cat([g.flatten() for g in truth[side]]) for side in ("chosen", "rejected"))
    assert metrics["dynamics/chosen_term"] == pytest.approx((w @ w - w @ r).item(), rel=1e-6)
    assert metrics["dynamics/rejected_term"] == pytest.approx((w @ r - r @ r).item(), rel=1e-6)
    assert relative_error(list(grads.values())[len(backbone) :], plain[len(backbone) :]) < 1e-12


@pytest.mark.parametrize("case", [{}, {"base": "alpha_dpo"}, {"lambda_sft": 1.0, "inner_steps": 1, "gamma": 0.5}])
def test_padding_order_chunks_and_grouping_change_nothing(case):
    options, batch = DEFAULTS | case, tiny_batch(3)
    whole, metrics, _ = run(batch, **options)
    order = torch.tensor([2, 0, 1])
    other = {key: value[order] for key, value in batch.items()}
    for side in ("chosen", "rejected"):
        for key, fill in (("input_ids", 7), ("labels", -100), ("attention_mask", 0)):
            other[f"{side}_{key}"] = torch.nn.functional.pad(other[f"{side}_{key}"], (0, 5), value=fill)
    for more in ({}, {"chunk_tokens": 1}, {"chunk_tokens": 4, "pairs_per_backward": 2}, {"pairs_per_backward": 1}):
        found, again, _ = run(other, **options, **more)
        assert relative_error(found, whole) < 1e-8
        assert again == pytest.approx(metrics, rel=1e-6)


def same_prompts(batch):
    for i in range(len(batch["chosen_input_ids"])):
        batch["rejected_input_ids"][i, : 3 + i] = batch["chosen_input_ids"][i, : 3 + i]
    return batch


def test_a_shared_prompt_changes_nothing():
    batch, calls = same_prompts(tiny_batch(3)), []
    for base in ("dpo", "ipo", "dpo_nll", "alpha_dpo"):
        for per_backward in (1, 3):
            options = DEFAULTS | {"base": base, "pairs_per_backward": per_backward}
            tiny = tiny_model()
            handle = tiny[0].get_decoder().register_forward_hook(lambda module, args, out: calls.append(out[0].shape))
            apart, metrics, _ = run(batch, **options, share_prompt=False)
            before = len(calls)
            together, again, _ = run(batch, tiny, **options, share_prompt=True)
            handle.remove()
            assert relative_error(together, apart) < 1e-12
            assert again == pytest.approx(metrics, rel=1e-9)
            assert max(shape[1] for shape in calls[before:]) > 12  # longer than either side: it was one pass
    different = tiny_batch(3)  # other prompts on the two sides
    apart, _, _ = run(different, **DEFAULTS, share_prompt=False)
    together, _, _ = run(different, **DEFAULTS, share_prompt=True)
    assert relative_error(together, apart) < 1e-12


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    options, batch = DEFAULTS | {"lambda_sft": 1.0, "inner_steps": 1, "gamma": 0.5}, swapped(tiny_batch())
    plain, _, _ = run(batch, tiny_model(dtype=torch.float32), **options)
    tiny = tiny_model(dtype=torch.float32)
    base = tiny[0].get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer, calls = base.model.layers[0].mlp, []
    layer.register_forward_pre_hook(lambda *args: calls.append(1))
    tiny[0].train()
    found, _, _ = run(batch, tiny, **options)
    recomputed = len(calls)
    calls.clear()
    tiny[0].eval()
    run(batch, tiny, **options)
    assert recomputed > 1.5 * len(calls)
    assert relative_error(found, plain) < 1e-5


def gradients_of(config, batch, checkpointed=False, **options):
    """Return the gradients of all parameters of a new model, and the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    names = [name for name, _ in model.named_parameters()]
    grads, _ = spo_gradients(model.train(), batch, backbone=names, adapters=[], **DEFAULTS, **options)
    return list(grads.values()), model


def test_layers_that_drop_by_themselves_do_not_while_they_are_recomputed():
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    config = OPTConfig(**sizes, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5, max_position_embeddings=32)
    plain, _ = gradients_of(config, tiny_batch())
    found, model = gradients_of(config, tiny_batch(), checkpointed=True)
    assert relative_error(found, plain) < 1e-5
    assert model.model.decoder.layerdrop == model.model.decoder.layers[0].dropout == 0.5


def test_a_shared_prompt_needs_no_more_positions_than_its_sides():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=12)  # the longer side's
    batch = same_prompts(tiny_batch())
    apart, _ = gradients_of(config, batch, share_prompt=False)
    together, _ = gradients_of(config, batch, share_prompt=True)
    assert relative_error(together, apart) < 1e-5


def test_positions_that_are_made_of_the_mask_are_not_shared():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    batch = same_prompts(tiny_batch())
    apart, model = gradients_of(FalconConfig(**sizes, alibi=True), batch, share_prompt=False)
    together, _ = gradients_of(FalconConfig(**sizes, alibi=True), batch, share_prompt=True)
    assert relative_error(together, apart) < 1e-6
    assert not can_share(model)


def test_models_without_a_known_head_are_scored_through_their_logits():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(50, 8, dtype=torch.float64)
            self.out = torch.nn.Linear(8, 50, dtype=torch.float64)

        def forward(self, input_ids, attention_mask=None):
            hidden = self.embed(input_ids).cumsum(1)
            return SimpleNamespace(logits=self.out(torch.tanh(hidden)))

    model, batch = Bare(), tiny_batch()
    names = [name for name, _ in model.named_parameters()]
    options = DEFAULTS | {"lambda_sft": 1.0, "inner_steps": 2}
    truth, _ = objective_gradient(model, batch, names[:1], names[1:], **options)
    found, _ = spo_gradients(model, batch, backbone=names[:1], adapters=names[1:], **options)
    assert relative_error(list(found.values()), truth) < 1e-10
