"""The mathematics: pure PyTorch and standard library.

``from spo_ray.core import spo_gradients`` is the short way to ``spo_ray.core.spo.spo_gradients``. Names are looked up
when they are first used, so that grading a million answers never imports torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "spo_gradients": "spo",
    "completion_logps": "logps",
    "token_logps": "logps",
    "dpo": "losses",
    "dpo_nll": "losses",
    "nll": "losses",
    "simpo": "losses",
    "sft_loss": "losses",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
