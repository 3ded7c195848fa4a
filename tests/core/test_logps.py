import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, Qwen2Config

from spo_ray.core.lm_head import Head, find_head
from spo_ray.core.logps import chunked_logps, completion_logps, token_logps

from .tiny import relative_error, tiny_batch, tiny_model


def direct(model, ids, labels):
    """Full softmax over all positions, one sequence at a time."""
    total = []
    for row, target in zip(ids, labels, strict=True):
        length = int((target != -100).nonzero().max()) + 1
        logps = torch.log_softmax(model(input_ids=row[None, :length]).logits[0], dim=-1)
        total.append(sum(logps[t - 1, row[t]] for t in range(length) if target[t] != -100))
    return torch.stack(total)


def test_sums_match_a_direct_computation_and_padding_changes_nothing():
    model, _, _ = tiny_model()
    model.eval()
    batch = tiny_batch()
    keys = [batch[f"chosen_{k}"] for k in ("input_ids", "labels", "attention_mask")]
    logps, tokens = completion_logps(model, *keys)
    assert torch.allclose(logps, direct(model, keys[0], keys[1]), atol=1e-5)
    assert tokens.tolist() == [(row != -100).sum() for row in keys[1]]
    wide = [torch.cat([k, torch.full((3, 5), fill)], dim=1) for k, fill in zip(keys, (7, -100, 0), strict=True)]
    assert torch.allclose(completion_logps(model, *wide)[0], logps, atol=1e-5)


def test_masked_positions_are_zero():
    model, _, _ = tiny_model()
    batch = tiny_batch()
    logps, mask = token_logps(model, *(batch[f"chosen_{k}"] for k in ("input_ids", "labels", "attention_mask")))
    assert mask.sum().item() == (batch["chosen_labels"] != -100).sum().item()
    assert (logps[~mask] == 0).all()
    assert (logps[mask] < 0).all()


def test_empty_completions_and_completions_without_context_are_refused():
    model, _, _ = tiny_model()
    ids, mask = torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="no completion token"):
        token_logps(model, ids, torch.full((1, 4), -100), mask)
    with pytest.raises(ValueError, match="no context"):
        token_logps(model, ids, ids, mask)


FAMILIES = [
    (Qwen2Config, {"tie_word_embeddings": True}, "linear"),
    (LlamaConfig, {}, "linear"),
    (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 5.0}, "module"),
    (GraniteConfig, {"logits_scaling": 2.0}, None),  # scales its logits: it can't be taken apart
]


def family_model(kind, options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "initializer_range": 0.5}
    return AutoModelForCausalLM.from_config(kind(**sizes, **heads, **options)).double().eval()


def test_what_is_known_of_a_model_does_not_keep_it():
    """Sharded models know each other's parts in circles: one is made here."""
    model = family_model(*FAMILIES[0][:2])
    model.get_decoder().known_to = [model]
    assert find_head(model, torch.ones(1, 2, dtype=torch.long)) is not None
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(("kind", "options", "head"), FAMILIES)
def test_chunks_of_every_family_have_the_values_and_gradients_of_full_logits(kind, options, head):
    model = family_model(kind, options)
    found = find_head(model, torch.ones(1, 2, dtype=torch.long))
    assert (None if found is None else "module" if found.weight is None else "linear") == head
    batch, weights = tiny_batch(), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    keys = [batch[f"chosen_{k}"] for k in ("input_ids", "labels", "attention_mask")]
    truth = direct(model, keys[0], keys[1])
    expected = torch.autograd.grad((truth * weights).sum(), list(model.parameters()))
    for chunk in (None, 1, 4):
        logps, _ = completion_logps(model, *keys, chunk_tokens=chunk)
        assert torch.allclose(logps, truth, atol=1e-9)
        grads = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
        assert relative_error(grads, expected) < 1e-6  # the norms compute in float32


@pytest.mark.parametrize(("kind", "options", "head"), FAMILIES[:3])
def test_no_tensor_with_more_logits_than_a_chunk_exists_forward_or_backward(kind, options, head):
    class Largest(TorchDispatchMode):
        """The most rows of any tensor as wide as the vocabulary."""

        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == 50:
                    self.rows = max(self.rows, value.numel() // 50)
            return out

    model, batch = family_model(kind, options), tiny_batch()
    keys = [batch[f"chosen_{k}"] for k in ("input_ids", "labels", "attention_mask")]
    completion = int((keys[1] != -100).sum())
    rows = {}
    for chunk in (4, completion):
        find_head(model, keys[0])  # its two-token probe is not what is measured
        with Largest() as largest:
            completion_logps(model, *keys, chunk_tokens=chunk)[0].sum().backward()
        rows[chunk] = largest.rows
    width = 16  # the output embedding's transpose, [D, V], is as wide too
    assert rows[4] <= max(4, width)
    assert rows[completion] == max(completion, width) < keys[0].numel()


def test_bfloat16_autocast_is_as_close_as_its_rounding():
    double, *_ = tiny_model()
    single = tiny_model()[0].float().eval()
    keys = [tiny_batch()[f"chosen_{k}"] for k in ("input_ids", "labels", "attention_mask")]
    truth = completion_logps(double.eval(), *keys)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = completion_logps(single, *keys)[0]
    assert logps.dtype == torch.float32
    assert torch.allclose(logps.double(), truth, rtol=2e-2)
    assert not torch.allclose(logps.double(), truth, rtol=1e-5)


def test_confident_tokens_keep_their_gradient_in_bfloat16():
    """1 - pi of a sure token is small: rounding pi to bfloat16 first would lose it."""
    hidden = torch.tensor([[10.0, 0.0]], dtype=torch.bfloat16)
    output = torch.nn.Linear(2, 3, bias=False).to(torch.bfloat16)
    output.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.0]], dtype=torch.bfloat16)
    value = chunked_logps(Head(output, output, None), hidden, torch.tensor([0]))
    (grad,) = torch.autograd.grad(value, output.weight)
    logits = output.weight.double() @ hidden[0].double()
    p = torch.softmax(logits, 0)
    assert grad[0, 0].item() == pytest.approx(10.0 * (1 - p[0]).item(), rel=0.02)
