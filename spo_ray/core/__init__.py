"""The mathematics of SPO, in PyTorch and the standard library alone.

``from spo_ray.core import spo_gradients`` is short for ``from spo_ray.core.spo import spo_gradients``. Names are
imported when they are first used, so that processes that only grade answers never import torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "spo": "spo_gradients",
    "logps": "completion_logps token_logps",
    "losses": "PairLogps dpo cdpo robust_dpo ipo simpo alpha_dpo dpop nll dpo_nll sft_loss",
    "running_statistics": "RunningStatistics",
    "safe_region": "DualVariable",
    "dynamics": "GradientTerms forecast",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
