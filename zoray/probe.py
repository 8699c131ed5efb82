"""The probe: one projected gradient, a pure function of the weights and the probe's address.

g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)   (Spall 1992, two-sided SPSA)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch

from zoray.aggregate import ProbeResult
from zoray.directions import Directions
from zoray.errors import ModelError
from zoray.loss import Batch, LossFunction, ModelLoss, RowLosses, doubled
from zoray.objective import Objective
from zoray.partitioned import is_partitioned
from zoray.perturb import Active, Engine, NotBatchable, Signs
from zoray.proof import Verdict, head_layer

_log = logging.getLogger(__name__)


class Prober:
    """Runs probes of one model on the paths that were proved right for it.

    Args:
        loss: a custom loss; by default the model's own (`ModelLoss`).
        objective: what is minimised and measured; by default that loss.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        directions: Directions,
        verdict: Verdict,
        loss: LossFunction | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.directions, self.verdict = directions, verdict
        self.engine = Engine(model, directions.layout, frozenset(verdict.strays), verdict.rows)
        self._model, self._objective = model, objective or Objective()
        self._loss = _bind(model, self.engine, verdict, loss, self._objective.whole)
        self._partitioned = any(map(is_partitioned, model.parameters()))
        self._warned: set[object] = set()

    def losses(self, step: int, index: int, batch: Batch, epsilon: float) -> tuple[float, float]:
        """(L(theta + eps z), L(theta - eps z)) in float64 for the direction (step, index).

        A batch whose shapes rule out one forward for both signs, unlike those of the batch it was proved on, takes two.
        Nothing of that is remembered: the paths of a probe must not depend on the probes before it.
        """
        rows = len(batch["labels"])
        with torch.no_grad():
            if self.verdict.batched:
                try:
                    losses = self._run(step, index, doubled(batch, rows), epsilon, Signs.BOTH, 2 * rows)
                    return losses.mean(slice(0, rows)), losses.mean(slice(rows, None))
                except NotBatchable as fault:
                    self._refuse_alone(batch, fault)
                    self._warn(batch, fault)
            plus = self._run(step, index, batch, epsilon, Signs.PLUS, rows)
            minus = self._run(step, index, batch, epsilon, Signs.MINUS, rows)
            return plus.mean(), minus.mean()

    def probe(self, step: int, direction: int, batch: Batch, epsilon: float, microbatch: int = 0) -> ProbeResult:
        """The probe at (step, direction, microbatch); its scalars are rounded to float32, as they travel."""
        return ProbeResult.of_losses(
            step, direction, microbatch, *self.losses(step, direction, batch, epsilon), epsilon
        )

    def side(self, step: int, direction: int, batch: Batch, epsilon: float, sign: Literal[1, -1]) -> float:
        """One of the two `losses` alone (float64), bit for bit; for probes of two forwards only.

        Raises:
            ModelError: both signs are in one forward on the proved path, whose losses have other last bits.
        """
        if self.verdict.batched:
            raise ModelError(
                "Both signs of a probe are in one forward here, and cannot be split.",
                where="signs",
                advice="set signs: sequential",
            )
        with torch.no_grad():
            signs = Signs.PLUS if sign > 0 else Signs.MINUS
            return self._run(step, direction, batch, epsilon, signs, len(batch["labels"])).mean()

    def evaluate(self, batch: Batch) -> RowLosses:
        """Row losses at the unperturbed weights, with what else the objective measures."""
        with torch.no_grad():
            return self._objective.evaluate(self._model, batch, lambda: self._loss(batch, None))

    def _refuse_alone(self, batch: Batch, fault: NotBatchable) -> None:
        """Raises ModelError if other processes hold parts of the weights: they would wait for this forward's rest."""
        if self._partitioned:
            shapes = {name: tuple(tensor.shape) for name, tensor in sorted(batch.items())}
            raise ModelError(
                f"A batch of shapes {shapes} needs two forwards per probe: {fault}. Sharded replicas cannot change to "
                f"that for one batch.",
                where="signs",
                advice="set signs: sequential",
            )

    def _warn(self, batch: Batch, fault: NotBatchable) -> None:
        """Say, once for each shape, that a batch takes the slower path."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(batch.items()))
        if shapes not in self._warned:
            self._warned.add(shapes)
            _log.warning("Two forwards per probe for a batch of shapes %s: %s.", dict(shapes), fault)

    def _run(self, step: int, index: int, batch: Batch, epsilon: float, signs: Signs, rows: int) -> RowLosses:
        active = Active(self.directions, step, index, epsilon, signs, rows)
        with self.engine.perturbed(active):
            return self._objective.probe(self._model, batch, lambda: self._loss(batch, active))


def _bind(
    model: torch.nn.Module, engine: Engine, verdict: Verdict, loss: LossFunction | None, kept: bool
) -> Callable[[Batch, Active | None], RowLosses]:
    if loss is not None:
        return lambda batch, active: loss(model, batch)
    own = ModelLoss(model, verdict.chunked, verdict.shifted, kept)
    layer = head_layer(own, engine)
    return lambda batch, active: own(batch, active, layer)
