"""From a method's configuration to the arguments of the one step that trains them all."""

from collections.abc import Callable
from functools import partial
from typing import Any

from spo_ray.config import Dpo, DpoNll, MethodConfig, Nll, SimPo, Spo
from spo_ray.core.losses import dpo, dpo_nll, nll, simpo

PLAIN = {"lambda_sft": 0.0, "gamma": 0.0, "inner_steps": 0, "eta": 0.0}
"""The SPO step without its lower level and its hinge: the base loss alone."""


def step_arguments(method: MethodConfig) -> dict[str, Any]:
    """Keyword arguments for :func:`spo_ray.core.spo.spo_gradients`."""
    return ARGUMENTS[method.type](method)


def _nll(method: Nll) -> dict[str, Any]:
    return PLAIN | {"base": partial(nll, sft_reduction=method.sft_reduction), "beta": 1.0}


def _dpo(method: Dpo) -> dict[str, Any]:
    return PLAIN | {"base": dpo, "beta": method.beta}


def _dpo_nll(method: DpoNll) -> dict[str, Any]:
    base = partial(dpo_nll, mu=method.mu, sft_reduction=method.sft_reduction)
    return PLAIN | {"base": base, "beta": method.beta}


def _simpo(method: SimPo) -> dict[str, Any]:
    return PLAIN | {"base": simpo, "beta": method.beta, "margin": method.margin}


def _spo(method: Spo) -> dict[str, Any]:
    return {
        "base": method.base,
        "beta": method.beta,
        "margin": method.margin,
        "lambda_sft": method.lambda_sft,
        "gamma": method.gamma,
        "inner_steps": method.inner.steps,
        "eta": method.inner.eta,
        "inner_mode": method.inner.mode,
        "sft_reduction": method.sft_reduction,
        "norm_scope": method.norm_scope,
        "hinge": method.hinge,
    }


ARGUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "nll": _nll,
    "dpo": _dpo,
    "dpo_nll": _dpo_nll,
    "simpo": _simpo,
    "spo": _spo,
}
