"""Log-probabilities of completions, computed without holding the logits of a whole batch.

Conventions, here and everywhere: ``labels`` repeats ``input_ids`` on the completion and is -100 elsewhere, batches are
right-padded, and the log-probability of a completion is the sum over its tokens, the end-of-turn token included.
Shape suffixes: B pairs or sequences, T tokens, N completion tokens of a batch, D hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from spo_ray.core.lm_head import Head, call, find_head
from spo_ray.core.sharded import inside

IGNORE = -100
LOGITS_PER_CHUNK = 2**24
"""Logits in memory at a time, by default: 64 MiB in float32."""


def token_logps(
    model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every completion token under a causal language model.

    Logits are computed at completion tokens only, ``chunk_tokens`` at a time, from the decoder's hidden states and the
    output embedding. Models that can't be split (:func:`spo_ray.core.lm_head.find_head`) compute them at once, with
    ``logits_to_keep`` if they support it.

    Args:
        model: a causal language model; models outside Hugging Face need an output with ``logits``.
        input_ids, labels, attention_mask: [B, T]; labels are -100 outside the completion.
        chunk_tokens: most tokens in a chunk; None: as many as give 2**24 logits.

    Returns:
        ``(logps, mask)``, both [B, S] with S positions from the batch's first completion token on. ``logps`` (nats) is
        float32, or float64 for a float64 model, and 0 where ``mask`` is False.

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
    mask, targets = mask[:, start:], targets[:, start:]
    wanted = targets[mask]
    head = find_head(model, input_ids)
    if head is None:
        kept = input_ids.shape[1] - start
        inputs = {"use_cache": False, "logits_to_keep": kept}
        logits = call(model, input_ids=input_ids, attention_mask=attention_mask, **inputs).logits
        flat = _gathered(logits[:, -kept:-1][mask], wanted)
    else:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}

        def forward() -> Tensor:
            hidden = call(head.decoder, **inputs)[0]
            return chunked_logps(head, hidden[:, start:-1][mask], wanted, chunk_tokens)

        flat = inside(model, forward)
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat), mask


def completion_logps(
    model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-probability (nats) and token count of each completion, both [B]; see :func:`token_logps`."""
    logps, mask = token_logps(model, input_ids, labels, attention_mask, chunk_tokens=chunk_tokens)
    return logps.sum(dim=1), mask.sum(dim=1)


def chunked_logps(head: Head, hidden: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Return ``log softmax(head(hidden))`` at the targets: [N] from hidden states [N, D] and token ids [N].

    Forward and backward hold the logits of one chunk at a time.
    """
    weight = head.weight
    vocabulary = len(weight) if weight is not None else getattr(head.output, "out_features", 2**17)
    size = chunk_size(len(hidden), vocabulary, chunk_tokens)
    if weight is not None:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return _LinearLogps.apply(hidden, weight, targets, size)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(_headed, head, h, t, use_reentrant=False) for h, t in parts])


def chunk_size(tokens: int, vocabulary: int, chunk_tokens: int | None = None) -> int:
    """Return the number of tokens whose logits are computed at a time.

    Chunks are of nearly equal size: on a CPU the head of a last chunk of one to three tokens is less exact.
    """
    most = chunk_tokens or max(1, LOGITS_PER_CHUNK // vocabulary)
    return max(1, -(-tokens // max(1, -(-tokens // most))))


def _headed(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return _gathered(head.logits(hidden), targets)


def _gathered(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(logits, targets, reduction="none")


class _LinearLogps(torch.autograd.Function):
    """Log-probabilities through an output embedding without bias.

    With z = W h, e = exp(z - max z) and s = sum e, the gradient with respect to z is ``g * (onehot - e / s)``. The
    factors g and 1 / s are per token, so the backward applies them to the [N, D] side of both its products and needs no
    further pass over [N, V]. A single chunk keeps e for the backward; several chunks compute it again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
        kept, sums, logps = None, [], []
        for h, t in zip(hidden.split(size), targets.split(size), strict=True):
            kept, total, values = _exponentials(h, weight, t)
            sums.append(total)
            logps.append(values)
        if len(logps) > 1 or not any(ctx.needs_input_grad[:2]):
            kept = None
        ctx.save_for_backward(hidden, weight, targets, torch.cat(sums), kept)
        ctx.size = size
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, weight, targets, sums, kept = ctx.saved_tensors
        scale = -(grad / sums)[:, None].to(hidden.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        for start in range(0, len(hidden), ctx.size):
            rows = slice(start, start + ctx.size)
            e = _exponentials(hidden[rows], weight, targets[rows])[0] if kept is None else kept
            e = e.to(weight.dtype)
            torch.mm(e, weight, out=grad_hidden[rows])
            if ctx.needs_input_grad[1]:
                scaled = hidden[rows] * scale[rows]
                grad_weight = e.T @ scaled if grad_weight is None else grad_weight.addmm_(e.T, scaled)
        return grad_hidden.mul_(scale), grad_weight, None, None


def _exponentials(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(e - s * onehot [N, V], s [N], log-probabilities [N])`` of a chunk.

    s is subtracted here, in full precision: for a token that the model is sure of, the target's entry is a small
    difference of large numbers.
    """
    z = hidden @ weight.T
    z = z if z.dtype == torch.float64 else z.float()
    at_target = z.gather(1, targets[:, None])[:, 0]
    top = z.amax(dim=1)
    e = z.sub_(top[:, None]).exp_()
    sums = e.sum(dim=1)
    e.scatter_add_(1, targets[:, None], -sums[:, None])
    return e, sums, at_target - top - sums.log()
