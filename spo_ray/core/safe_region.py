"""The safe region: a weight lambda that adapts until the policy keeps its distance from falling.

Instead of a fixed penalty lambda, ``min L_pref  s.t.  gap <= epsilon`` by dual ascent: every step lambda rises where
the gap is above epsilon, and falls where it is below. Which gap is a choice of the caller:

* the mean fall of log pi(y_w) since the reference model, ``mean(log pi_ref(y_w) - log pi(y_w))`` in nats: how far the
  policy has left the region where the preferred answers are as likely as they were;
* the paper's value-function gap ``L_SFT(theta, phi) - L_SFT*(phi)``, to first order ``sum_k eta ||grad L_SFT||^2`` over
  the lower level's steps: how far theta is from the best for the current adapters, not from the reference.
"""

import math
from dataclasses import dataclass


@dataclass
class DualVariable:
    """lambda of the constraint ``gap <= epsilon``.

    Args:
        value: where lambda starts.
        epsilon: the largest gap that is allowed, in the gap's unit.
        learning_rate: how far lambda moves for a violation of 1.
        lowest: lambda never falls below. Above 0, because without the SFT gradient there is no value-function gap.
        highest: lambda never rises above.
    """

    value: float
    epsilon: float
    learning_rate: float
    lowest: float = 1e-3
    highest: float = 100.0

    def update(self, gap: float) -> float:
        """One step of projected dual ascent; gives the new lambda. A gap that is no number changes nothing."""
        if math.isnan(gap):
            return self.value
        risen = self.value + self.learning_rate * (gap - self.epsilon)
        self.value = min(self.highest, max(self.lowest, risen))
        return self.value

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.value = state["value"]
