"""One-sided differences: g = (L(theta + eps z) - L(theta)) / eps   (FZOO, Dang et al. 2025, arXiv 2506.09034).

All directions that are probed on one batch share L(theta), so that K directions take K + 1 forwards of B rows
where all are on one batch.
"""

from __future__ import annotations

from functools import partial

from zoray.aggregate import MeanLoss, ProbeResult
from zoray.estimators.base import Estimator, Kept
from zoray.loss import Batch
from zoray.probe import Prober


class OneSided(Estimator):
    """<grad L, z> up to an error in epsilon, eps/2 z'Hz, which two-sided differences do not have."""

    def __init__(self, prober: Prober) -> None:
        super().__init__(prober)
        self._centre = Kept[MeanLoss]()

    def probe(self, step: int, direction: int, batch: Batch, epsilon: float, microbatch: int = 0) -> ProbeResult:
        """The probe; its loss is L(theta)."""
        centre = self._centre.of(batch, partial(self.prober.side, step, 0, batch, epsilon, 0))
        plus = self.prober.side(step, direction, batch, epsilon, 1)
        return ProbeResult.of_one_side(step, direction, microbatch, plus, centre, epsilon)

    def forget(self) -> None:
        """The weights have changed, and L(theta) with them."""
        self._centre.forget()
