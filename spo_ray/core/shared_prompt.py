"""Log-probabilities of both completions of a pair in one forward pass with one copy of their prompt.

A row holds prompt, chosen and rejected completion. An attention mask hides the chosen completion from the rejected one,
whose positions continue from the prompt. The prompt is computed once, and a pair takes one backward, so that dense
gradients (above all of the embedding) are formed once. Usable where no gradient of one side alone is needed.
"""

import torch
from torch import Tensor, nn

from spo_ray.core.lm_head import Head, call
from spo_ray.core.logps import IGNORE, chunked_logps

Rows = tuple[Tensor, Tensor]
"""``input_ids`` and ``labels`` [B, T] of one side, right-padded."""


def can_share(model: nn.Module) -> bool:
    """Return True if a model accepts the mask: PyTorch's attention, and no sliding window or ALiBi."""
    config = getattr(model, "config", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and not hasattr(config, "layer_types")
    plain = getattr(config, "_attn_implementation", None) == "sdpa" and not getattr(config, "alibi", False)
    return plain and kinds == {"full_attention"} and not windowed


def prompt_lengths(chosen: Rows, rejected: Rows) -> list[int] | None:
    """Return the prompt length of each pair, or None if the prompts of the two sides differ."""
    lengths = []
    for ids_w, labels_w, ids_l, labels_l in zip(*chosen, *rejected, strict=True):
        start_w, start_l = (int((labels != IGNORE).int().argmax()) for labels in (labels_w, labels_l))
        if start_w != start_l or not torch.equal(ids_w[:start_w], ids_l[:start_l]):
            return None
        lengths.append(start_w)
    return lengths


def pair_logps(
    model: nn.Module, head: Head, chosen: Rows, rejected: Rows, prompts: list[int], chunk_tokens: int | None
) -> Tensor:
    """Return log-probabilities [2B] of the chosen, then of the rejected completions."""
    device = chosen[0].device
    ends = [[_end(labels) for labels in side[1]] for side in (chosen, rejected)]
    width = max(w + r - p for p, w, r in zip(prompts, *ends, strict=True))
    ids = chosen[0].new_zeros(len(prompts), width)
    positions = torch.arange(width, device=device).repeat(len(prompts), 1)
    mask = torch.ones(width, width, dtype=torch.bool, device=device).tril().repeat(len(prompts), 1, 1, 1)
    sources: list[list[Tensor]] = [[], []]
    for i, (prompt, end_w, end_l) in enumerate(zip(prompts, *ends, strict=True)):
        end = end_w + end_l - prompt
        ids[i, :end_w] = chosen[0][i, :end_w]
        ids[i, end_w:end] = rejected[0][i, prompt:end_l]
        positions[i, end_w:end] = torch.arange(prompt, end_l, device=device)
        positions[i, end:] = 0  # the position of padding may be above the largest that the model has
        mask[i, 0, end_w:, prompt:end_w] = False
        steps = torch.arange(width, device=device)
        sources[0].append(i * width + steps[prompt - 1 : end_w - 1])
        sources[1].append(i * width + torch.cat([steps[prompt - 1 : prompt], steps[end_w : end - 1]]))
    inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    hidden = call(head.decoder, input_ids=ids, **inputs)[0].flatten(0, 1)
    targets = torch.cat([ids_[labels != IGNORE] for ids_, labels in (chosen, rejected)])
    order = [*sources[0], *sources[1]]
    logps = chunked_logps(head, hidden[torch.cat(order)], targets, chunk_tokens)
    return torch.stack([part.sum() for part in logps.split([len(part) for part in order])])


def _end(labels: Tensor) -> int:
    """Return the position after the last completion token."""
    return int((labels != IGNORE).nonzero()[-1]) + 1
