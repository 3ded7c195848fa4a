"""Sequence log-probabilities of completions.

Conventions, here and everywhere: ``labels`` repeats ``input_ids`` on the completion and is -100 elsewhere, batches are
right-padded, and the log-probability of a completion is the sum over its tokens, the end-of-turn token included.
Shape suffixes: B pairs or sequences, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100


def token_logps(model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every completion token under a causal language model.

    Args:
        model: maps ``input_ids [B, T]`` to an output with ``logits``; Hugging Face's ``logits_to_keep`` spares the
            prompt's logits.
        input_ids: [B, T].
        labels: [B, T], -100 outside the completion.
        attention_mask: [B, T], 0 on padding.

    Returns:
        ``(logps, mask)``, both [B, S] with S the positions from the first completion token of the batch on. ``logps``
        (nats) is float32, or float64 for a float64 model, and 0 where ``mask`` is False.

    Raises:
        ValueError: a row without completion tokens, or whose first token belongs to the completion.
    """
    targets = labels[:, 1:]
    mask = targets != IGNORE
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a sequence has no completion token to score: drop empty completions before batching")
    if bool((labels[:, 0] != IGNORE).any()):
        raise ValueError("a sequence starts with its completion: the first token has no context to be predicted from")
    start = int(mask.any(dim=0).to(torch.int8).argmax())
    kept = input_ids.shape[1] - start
    output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=kept)
    logits = output.logits[:, -kept:-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets, mask = targets[:, start:], mask[:, start:]
    nll = F.cross_entropy(logits.transpose(1, 2), targets.masked_fill(~mask, 0), reduction="none")
    return -nll * mask, mask


def completion_logps(
    model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed log-probability (nats) and token count of each completion, both [B]; see :func:`token_logps`."""
    logps, mask = token_logps(model, input_ids, labels, attention_mask)
    return logps.sum(dim=1), mask.sum(dim=1)
