"""Safe region: the weight lambda as the dual variable of a constraint on the policy.

``min L_pref  s.t.  gap <= epsilon`` is solved by dual ascent: in every step lambda rises if the gap is above epsilon,
and falls if it is below. The caller chooses the gap:

* the mean fall of log pi(y_w) since the reference model, ``mean(log pi_ref(y_w) - log pi(y_w))`` in nats: how far the
  policy has left the region in which the chosen answers are as likely as before;
* the paper's value-function gap ``L_SFT(theta, phi) - L_SFT*(phi)``, to first order ``sum_k eta ||grad L_SFT||^2`` over
  the steps of the lower level: how far theta is from the optimum for the current adapters, not from the reference.
"""

import math
from dataclasses import dataclass


@dataclass
class DualVariable:
    """Dual variable lambda of the constraint ``gap <= epsilon``.

    Args:
        value: lambda at the start.
        epsilon: the largest allowed gap, in the gap's unit.
        learning_rate: change of lambda in a step for a violation of 1.
        lowest: lower limit of lambda. Above 0, because without the SFT gradient there is no value-function gap.
        highest: upper limit of lambda.
    """

    value: float
    epsilon: float
    learning_rate: float
    lowest: float = 1e-3
    highest: float = 100.0

    def update(self, gap: float) -> float:
        """Make a step of projected dual ascent and return the new lambda; a NaN gap changes nothing."""
        if math.isnan(gap):
            return self.value
        risen = self.value + self.learning_rate * (gap - self.epsilon)
        self.value = min(self.highest, max(self.lowest, risen))
        return self.value

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self.value = state["value"]
