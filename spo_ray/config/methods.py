"""Sections for the preference methods: one class for each ``type``, so that no method has another's fields."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, PositiveFloat, model_validator

from spo_ray.config.base import ConfigModel


class Trained(ConfigModel):
    """Fields of every method."""

    lr: PositiveFloat | None = None
    """Peak learning rate of theta and phi; None: the rates of ``preference``."""


class WithSftLoss(ConfigModel):
    """Fields of the methods that have the SFT loss L_SFT, -log pi(y_w), as a term."""

    sft_reduction: Literal["sum", "token_mean"] = "sum"
    """L_SFT summed over a completion's tokens, or their mean."""


class Scaled(Trained):
    """Fields of DPO and the losses derived from it."""

    beta: PositiveFloat = 0.5
    """Factor of the log-ratios of policy and reference; a smaller one lets the policy move further."""


class Smoothed(Scaled):
    """Fields of the losses that assume some labels are wrong."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    """Assumed share of pairs whose chosen and rejected responses are swapped."""


class Nll(Trained, WithSftLoss):
    """The SFT loss alone: -log pi(y_w)."""

    type: Literal["nll"]


class Dpo(Scaled):
    """DPO: direct preference optimization."""

    type: Literal["dpo"]


class CDpo(Smoothed):
    """Conservative DPO: cross-entropy with smoothed labels."""

    type: Literal["cdpo"]


class RobustDpo(Smoothed):
    """Robust DPO: an unbiased estimate of DPO's loss where labels are flipped at random."""

    type: Literal["robust_dpo"]


class Ipo(Trained):
    """IPO: squared distance of the log-ratios from a margin."""

    type: Literal["ipo"]
    beta: PositiveFloat = 0.1
    """The paper's tau: the margin that is aimed at is 1 / (2 beta)."""
    ipo_reduction: Literal["mean", "sum"] = "mean"
    """Mean of the log-ratios over a completion's tokens, or their sum as in the paper."""


class LengthNormalised(Trained):
    """Fields of the losses on mean log-probabilities per token."""

    beta: PositiveFloat = 2.0
    """Factor of the difference of the two completions' mean log-probabilities per token."""
    margin: NonNegativeFloat = 1.0
    """Target margin, absolute: -log sigma(beta * (mean_w - mean_l) - margin)."""


class SimPo(LengthNormalised):
    """SimPO: no reference model."""

    type: Literal["simpo"]


class AlphaDpo(LengthNormalised):
    """AlphaDPO: SimPO with a margin of its own for each pair, from policy and reference."""

    type: Literal["alpha_dpo"]
    alpha: NonNegativeFloat = 0.5
    """Weight of the pair's own part of the margin: beta times the alpha of the public trainer."""


class Dpop(Trained):
    """DPO-Positive: DPO with a penalty where log pi(y_w) falls below the reference's."""

    type: Literal["dpop"]
    beta: PositiveFloat = 0.3
    """Factor of the log-ratios of policy and reference."""
    penalty: NonNegativeFloat = 50.0
    """Weight of the fall of log pi(y_w) below the reference, in nats; beta multiplies it too."""


class DpoShift(Scaled):
    """DPO-Shift: DPO with a smaller weight of the rejected response."""

    type: Literal["dpo_shift"]
    shift: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Factor of the rejected response's log-ratio; 1 is DPO."""


class CalDpo(Trained):
    """Cal-DPO: DPO with a target for each of the two log-ratios."""

    type: Literal["cal_dpo"]
    beta: PositiveFloat = 0.1
    """The targets of the log-ratios are 1 / (2 beta) for the chosen and -1 / (2 beta) for the rejected response."""


class WithScores(Scaled):
    """Fields of the losses that read the scores of the two responses."""


class Odpo(WithScores):
    """ODPO: DPO with an offset, a margin from the scores of the two responses."""

    type: Literal["odpo"]
    alpha: NonNegativeFloat = 1.0
    """Weight of the margin; 0 is DPO."""
    scaling: Literal["log", "linear"] = "log"
    """Margin from the logarithm of the scores' difference, as in the paper, or from the difference itself."""


class Rpo(WithScores):
    """RPO: the rewards' difference has the scores' difference as its target (Nemotron)."""

    type: Literal["rpo"]
    eta: PositiveFloat = 1.0
    """Factor of the scores' difference."""


class ApoZero(Scaled):
    """APO-zero: raises chosen and lowers rejected responses, for chosen ones that are better than the model's own."""

    type: Literal["apo_zero"]


class ApoDown(Scaled):
    """APO-down: lowers both, rejected responses further, for chosen ones that are worse than the model's own."""

    type: Literal["apo_down"]


class Nca(Scaled):
    """NCA: noise contrastive alignment, which holds each reward by itself."""

    type: Literal["nca"]


class ExoPair(Scaled):
    """EXO of pairs: reverse KL divergence from the smoothed label."""

    type: Literal["exo_pair"]
    label_smoothing: Annotated[float, Field(gt=0.0, lt=0.5)] = 1e-3
    """Assumed share of pairs whose chosen and rejected responses are swapped."""


class Slic(Scaled):
    """SLiC: a hinge on the difference of DPO's rewards."""

    type: Literal["slic"]


class WithOwnSftLoss(Trained):
    """Fields of the losses without a reference model that have an SFT loss of their own."""

    beta: PositiveFloat = 0.1
    """Weight of the preference term: a factor of the log-probabilities in CPO, of the loss in ORPO."""
    mu: NonNegativeFloat = 1.0
    """Weight of the SFT loss."""
    sft_reduction: Literal["sum", "token_mean"] = "token_mean"
    """SFT loss summed over a completion's tokens, or their mean."""


class Cpo(WithOwnSftLoss):
    """CPO: contrastive preference optimization, DPO without a reference model and with an SFT loss."""

    type: Literal["cpo"]


class Orpo(WithOwnSftLoss):
    """ORPO: the odds ratio of the two responses' mean probabilities, with an SFT loss."""

    type: Literal["orpo"]


class DpoNll(Scaled, WithSftLoss):
    """DPO + mu * L_SFT, on all parameters."""

    type: Literal["dpo_nll"]
    mu: NonNegativeFloat = 1.0
    """Weight of the SFT loss."""


class Own(Trained):
    """A loss of your own: write its place as the type, and its parameters beside it."""

    type: Literal["own"]
    loss: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """Place of the function, ``package.module:function``. ``type: package.module:function`` sets it too."""
    parameters: dict[str, str | int | float | bool | None] = {}
    """Arguments of the function beside the batch. All unknown fields of the method are parameters."""


def _own_loss(value: Any) -> Any:
    """Return a method whose type is the place of a function in the form of :class:`Own`; any other as it is."""
    if not isinstance(value, dict):
        return value
    place = value.get("type")
    if isinstance(place, str) and ":" in place:
        value = value | {"type": "own", "loss": place}
    if value.get("type") != "own":
        return value
    more = {name: item for name, item in value.items() if name not in Own.model_fields}
    kept = {name: item for name, item in value.items() if name in Own.model_fields}
    return kept | {"parameters": value.get("parameters", {}) | more}


Ratios = Dpo | CDpo | RobustDpo | Ipo | Dpop | DpoShift | CalDpo | ApoZero | ApoDown | Nca | ExoPair | Slic | Odpo | Rpo
Base = Ratios | SimPo | AlphaDpo | Cpo | Orpo | Own
"""Losses that SPO can be built around."""
BASE_FIELDS = {name for loss in get_args(Base) for name in loss.model_fields} - {
    "type",
    "lr",
    "sft_reduction",
    "parameters",
}


class Inner(ConfigModel):
    """SPO's lower level: K gradient steps of theta on the SFT loss."""

    steps: Annotated[int, Field(ge=0)] = 1
    """Number of steps K; 0 drops term (b)."""
    eta: PositiveFloat = 2e-5
    """Size of a step."""
    every: Annotated[int, Field(ge=1)] = 1
    """Term (b) in one step of so many, with so many times the weight; in the others K is 0."""
    method: Literal["auto", "exact", "difference"] = "auto"
    """Computation of term (b): exact derivatives, a difference of gradients, or by precision and size of the step."""


class SafeRegion(ConfigModel):
    """Lambda by dual ascent on ``gap <= epsilon`` instead of a fixed lambda."""

    gap: Literal["reference", "inner"] = "reference"
    """Gap: the batch's mean fall of log pi(y_w) since the reference model, or the paper's L_SFT - L_SFT*, in nats."""
    epsilon: NonNegativeFloat = 0.0
    """Gap that is allowed, in nats."""
    lr: PositiveFloat = 0.1
    """Change of lambda in a step, per nat that the gap is above epsilon."""
    max_lambda: PositiveFloat = 100.0
    """Largest lambda."""


class Spo(Trained, WithSftLoss):
    """SPO: a base loss, lambda times the lower level's loss on the chosen responses, and gamma times a hinge."""

    type: Literal["spo"]
    base: Annotated[Base, Field(discriminator="type"), BeforeValidator(_own_loss)] = Dpo(type="dpo")
    """Base loss with its own fields, such as ``{type: simpo, beta: 2.0, margin: 1.0}``."""
    lambda_sft: NonNegativeFloat = 1.0
    """Weight lambda of the SFT loss; with a safe region, its start."""
    safe_region: SafeRegion | None = None
    """Lambda by dual ascent; None: lambda stays as it is."""
    gamma: NonNegativeFloat = 0.0
    """Weight of the hinge R on gradient norms; 0 drops it."""
    inner: Inner = Inner()
    norm_scope: Literal["all", "backbone", "adapters"] = "all"
    """Parameters over which R takes gradient norms."""
    norm_of: Literal["sum", "mean"] = "sum"
    """Log-probabilities whose gradients R compares: sums, or means per token for length-normalised bases."""
    hinge: Literal["batch", "pair"] = "batch"
    """R on the batch's mean gradients, or for each pair as in the paper, which sharded training can't do."""

    @model_validator(mode="before")
    @classmethod
    def _base_is_a_section(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        base, flat = value.get("base", {}), {name: value[name] for name in value if name in BASE_FIELDS}
        section = (
            {"type": base} if isinstance(base, str) else {"type": "dpo"} | (base if isinstance(base, dict) else {})
        )
        if flat or isinstance(base, str):
            text = ", ".join(f"{name}: {item}" for name, item in (section | flat).items())
            raise ValueError(f"the base loss is a section with its own fields: write base: {{{text}}}")
        return value | {"base": section} if isinstance(value.get("base"), dict) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "Spo":
        if self.base.lr is not None:
            raise ValueError("base.lr has no effect: set the method's own lr")
        if self.safe_region and self.safe_region.gap == "inner" and not self.inner.steps:
            raise ValueError("safe_region.gap=inner needs a lower level: inner.steps must be at least 1")
        if self.safe_region and self.safe_region.gap == "inner" and self.inner.every > 1:
            raise ValueError("safe_region.gap=inner needs the gap of every step: inner.every must be 1")
        return self


def base_loss(method: Any) -> Any:
    """Return the section of the loss that SPO is built around; any other method's own section."""
    return method.base if isinstance(method, Spo) else method


def _not_reserved(name: str) -> str:
    if name in {"base", "sft"}:
        raise ValueError(f"{name!r} is reserved for a checkpoint of every run: choose another name")
    return name


MethodName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$"), AfterValidator(_not_reserved)]
MethodConfig = Annotated[Nll | Base | DpoNll | Spo, Field(discriminator="type"), BeforeValidator(_own_loss)]
