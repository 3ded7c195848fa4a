"""Split a causal language model into decoder and head, so that logits can be computed in chunks."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """Parts of a model: ``logits = output(decoder(...))``, with a soft cap on the logits in Gemma 2."""

    decoder: nn.Module
    output: nn.Module
    softcap: float | None

    @property
    def weight(self) -> Tensor | None:
        """The output embedding [V, D] if the head is only a product with it, else None."""
        plain = type(self.output) is nn.Linear and self.output.bias is None and self.softcap is None
        hooked = self.output._forward_hooks or self.output._forward_pre_hooks or "forward" in vars(self.output)
        return self.output.weight if plain and not hooked else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states [..., D]."""
        return _capped(self.output(hidden), self.softcap)


KNOWN = "_spo_ray_head"
"""Attribute of the model that caches (output embedding, head or None)."""


def find_head(model: nn.Module, input_ids: Tensor) -> Head | None:
    """Return the parts of a Hugging Face model, or None if they would not give its logits.

    Some models scale hidden states or logits. Therefore one forward pass over two tokens checks, when a model is first
    used, that its logits are the output embedding applied to the decoder's output.
    """
    parts = (getattr(model, "get_decoder", None), getattr(model, "get_output_embeddings", None))
    decoder, output = (get() if callable(get) else None for get in parts)
    if not isinstance(decoder, nn.Module) or not isinstance(output, nn.Module) or decoder is model:
        return None
    known = vars(model).get(KNOWN)
    if known is None or known[0] is not output:
        softcap = getattr(getattr(model, "config", None), "final_logit_softcapping", None)
        head = Head(decoder, output, softcap)
        known = vars(model)[KNOWN] = (output, head if _is_whole(model, head, input_ids[:1, :2]) else None)
    return known[1]


@torch.no_grad()
def _is_whole(model: nn.Module, head: Head, input_ids: Tensor) -> bool:
    """Return True if the head applied to the decoder's output gives the model's logits bit for bit."""
    seen: dict[str, Any] = {}
    handles = [
        head.decoder.register_forward_hook(lambda module, args, out: seen.update(hidden=out[0])),
        head.output.register_forward_hook(lambda module, args, out: seen.update(taken=args[0], given=out)),
    ]
    try:
        logits = call(model, input_ids=input_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    hidden = seen.get("hidden")
    return (
        isinstance(hidden, Tensor)
        and hidden.shape[:2] == input_ids.shape
        and "taken" in seen
        and torch.equal(seen["taken"], hidden)
        and torch.equal(_capped(seen["given"], head.softcap), logits)
    )


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def base_of(model: Any) -> Any:
    """Return the Hugging Face model inside PEFT's wrapper, or the model itself if it is not wrapped."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def call(model: nn.Module, **inputs: Any) -> Any:
    """Call a model with the inputs that its signature accepts; leave out the others."""
    names = inspect.signature(base_of(model).forward).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in names.values())
    return model(**{key: value for key, value in inputs.items() if free or key in names})
