"""Two-sided SPSA: g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)   (Spall 1992)."""

from __future__ import annotations

from zoray.aggregate import ProbeResult
from zoray.estimators.base import Estimator
from zoray.loss import Batch


class Spsa(Estimator):
    """<grad L, z> up to an error in epsilon^2, from two losses, which one forward gives where that is proved right."""

    def probe(self, step: int, direction: int, batch: Batch, epsilon: float, microbatch: int = 0) -> ProbeResult:
        """The probe; its loss is the mean of the two."""
        losses = self.prober.losses(step, direction, batch, epsilon)
        return ProbeResult.of_losses(step, direction, microbatch, *losses, epsilon)
