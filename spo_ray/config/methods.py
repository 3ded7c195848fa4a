"""The schema of the preference methods: a union told apart by ``type``, so that no method carries another's fields."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, model_validator

from spo_ray.config.base import ConfigModel

SftReduction = Literal["sum", "token_mean"]
FlipRate = Annotated[float, Field(ge=0.0, lt=0.5)]


class Trained(ConfigModel):
    """What every method has."""

    lr: PositiveFloat | None = None
    """Peak learning rate of theta and phi; None: those of ``preference``."""


class Nll(Trained):
    """-log pi(y_w) alone."""

    type: Literal["nll"]
    sft_reduction: SftReduction = "sum"


class Dpo(Trained):
    """DPO."""

    type: Literal["dpo"]
    beta: PositiveFloat = 0.5


class CDpo(Trained):
    """Conservative DPO."""

    type: Literal["cdpo"]
    beta: PositiveFloat = 0.5
    label_smoothing: FlipRate = 0.1
    """Share of pairs believed to be the wrong way round."""


class RobustDpo(Trained):
    """Robust DPO: without bias under flipped labels."""

    type: Literal["robust_dpo"]
    beta: PositiveFloat = 0.5
    label_smoothing: FlipRate = 0.1


class Ipo(Trained):
    """IPO."""

    type: Literal["ipo"]
    beta: PositiveFloat = 0.1
    """The paper's tau."""
    ipo_reduction: Literal["mean", "sum"] = "mean"
    """Log-ratios per token, or summed (the paper)."""


class SimPo(Trained):
    """SimPO; the margin is absolute: -log sigma(beta * (mean_w - mean_l) - margin)."""

    type: Literal["simpo"]
    beta: PositiveFloat = 2.0
    margin: NonNegativeFloat = 1.0


class AlphaDpo(Trained):
    """AlphaDPO; alpha is beta times the alpha of its public trainer."""

    type: Literal["alpha_dpo"]
    beta: PositiveFloat = 2.0
    margin: NonNegativeFloat = 1.0
    alpha: NonNegativeFloat = 0.5


class Dpop(Trained):
    """DPO-Positive."""

    type: Literal["dpop"]
    beta: PositiveFloat = 0.3
    penalty: NonNegativeFloat = 50.0
    """Weight of a fall of log pi(y_w), inside beta."""


class DpoNll(Trained):
    """DPO + mu * L_SFT, on all parameters."""

    type: Literal["dpo_nll"]
    beta: PositiveFloat = 0.5
    mu: NonNegativeFloat = 1.0
    sft_reduction: SftReduction = "sum"


Base = Dpo | CDpo | RobustDpo | Ipo | SimPo | AlphaDpo | Dpop
BASES: dict[str, type[Base]] = {
    "dpo": Dpo,
    "cdpo": CDpo,
    "robust_dpo": RobustDpo,
    "ipo": Ipo,
    "simpo": SimPo,
    "alpha_dpo": AlphaDpo,
    "dpop": Dpop,
}
BASE_FIELDS = ("beta", "margin", "alpha", "label_smoothing", "ipo_reduction", "penalty")


class Inner(ConfigModel):
    """SPO's lower level: K gradient steps on the SFT loss."""

    steps: Annotated[int, Field(ge=0)] = 1
    """K; 0 drops term (b)."""
    eta: PositiveFloat = 2e-5
    mode: Literal["rescaled", "literal"] = "rescaled"
    """Term (b) over a longer step, scaled back, or literally at theta_hat."""
    full_precision: bool = True
    """The rescaled (b) in float32 whatever ``train.precision``; without, it is cheaper and its direction rough."""


class SafeRegion(ConfigModel):
    """lambda by dual ascent on ``gap <= epsilon`` instead of a fixed one."""

    gap: Literal["reference", "inner"] = "reference"
    """The mean fall of log pi(y_w) since the SFT model, or the paper's L_SFT - L_SFT*."""
    epsilon: NonNegativeFloat = 0.0
    """Nats."""
    lr: PositiveFloat = 0.1
    """Rise of lambda a step for a gap of epsilon + 1."""
    max_lambda: PositiveFloat = 100.0


class Spo(Trained):
    """Stable Preference Optimization around a base loss, whose own fields stand here too."""

    type: Literal["spo"]
    base: Literal["dpo", "cdpo", "robust_dpo", "ipo", "simpo", "alpha_dpo", "dpop"] = "dpo"
    beta: PositiveFloat | None = None
    margin: NonNegativeFloat | None = None
    alpha: NonNegativeFloat | None = None
    label_smoothing: FlipRate | None = None
    ipo_reduction: Literal["mean", "sum"] | None = None
    penalty: NonNegativeFloat | None = None
    lambda_sft: NonNegativeFloat = 1.0
    """Weight of the SFT loss; with a safe region, where it starts."""
    safe_region: SafeRegion | None = None
    gamma: NonNegativeFloat = 0.0
    inner: Inner = Inner()
    sft_reduction: SftReduction = "sum"
    norm_scope: Literal["all", "backbone", "adapters"] = "all"
    norm_of: Literal["sum", "mean"] = "sum"
    """R's norms of summed log-probabilities, or of means per token (for length-normalised bases)."""
    hinge: Literal["batch", "pair"] = "batch"
    difference: Literal["forward", "central"] = "forward"
    """Finite differences in grad R and the rescaled (b)."""

    @model_validator(mode="after")
    def _base_takes_its_fields(self) -> "Spo":
        known = BASES[self.base].model_fields
        wrong = [name for name in self._given() if name not in known]
        if wrong:
            raise ValueError(f"base {self.base} takes no {' and no '.join(wrong)}")
        if self.safe_region and self.safe_region.gap == "inner" and not self.inner.steps:
            raise ValueError("safe_region.gap=inner needs a lower level: inner.steps must be at least 1")
        return self

    def _given(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in BASE_FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def base_config(self) -> Base:
        """The base loss as a method of its own, with its defaults for what is not given."""
        return BASES[self.base].model_validate({"type": self.base, **self._given()})


def _not_reserved(name: str) -> str:
    if name in {"base", "sft"}:
        raise ValueError(f"{name!r} is the name of a checkpoint that every run has")
    return name


MethodName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$"), AfterValidator(_not_reserved)]
MethodConfig = Annotated[
    Nll | Dpo | CDpo | RobustDpo | Ipo | SimPo | AlphaDpo | Dpop | DpoNll | Spo, Field(discriminator="type")
]
