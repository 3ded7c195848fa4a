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
    "cdpo": "losses",
    "robust_dpo": "losses",
    "ipo": "losses",
    "simpo": "losses",
    "alpha_dpo": "losses",
    "dpop": "losses",
    "nll": "losses",
    "dpo_nll": "losses",
    "sft_loss": "losses",
    "RunningStatistics": "running",
    "ReferenceStatistics": "running",
    "DualVariable": "safe_region",
    "GradientTerms": "dynamics",
    "forecast": "dynamics",
    "sgd_forecast": "dynamics",
    "corollary1_bounds": "dynamics",
    "log_gap_change": "dynamics",
    "adamw_update": "dynamics",
    "mass_shift": "dynamics",
    "sequence_logps": "dynamics",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
