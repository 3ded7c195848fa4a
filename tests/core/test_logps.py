import pytest
import torch

from spo_ray.core.logps import completion_logps, token_logps

from .tiny import tiny_batch, tiny_model


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
