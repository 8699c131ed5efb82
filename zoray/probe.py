"""What probes are made of: losses beside the weights and at them, pure functions of the weights and the address.

`zoray.estimators` makes projected gradients of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from zoray.aggregate import MeanLoss
from zoray.directions import Directions
from zoray.errors import ModelError
from zoray.loss import Batch, LossFunction, ModelLoss, RowLosses, doubled
from zoray.objective import Objective
from zoray.partitioned import is_partitioned
from zoray.perturb import Active, Engine, NotBatchable, Signs
from zoray.proof import Verdict, head_layer

_log = logging.getLogger(__name__)

Sign = Literal[1, 0, -1]
"""Which side of the weights: theta + epsilon z, theta itself, or theta - epsilon z."""

BESIDE: tuple[Sign, Sign] = (1, -1)
"""Both sides."""


class Prober:
    """Runs the forwards of one model's probes on the paths that were proved right for it.

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
        self._whole = ModelLoss(model, shifted=verdict.shifted) if loss is None else partial(loss, model)
        self._partitioned = any(map(is_partitioned, model.parameters()))
        self._warned: set[object] = set()

    def losses(self, step: int, index: int, batch: Batch, epsilon: float) -> tuple[MeanLoss, MeanLoss]:
        """(L(theta + eps z), L(theta - eps z)) for the direction (step, index).

        A batch whose shapes rule out one forward for both signs, unlike those of the batch it was proved on, takes two.
        Nothing of that is remembered: the paths of a probe must not depend on the probes before it.
        """
        rows = len(batch["labels"])
        with torch.no_grad():
            if self.verdict.batched:
                try:
                    losses = self._run(step, index, doubled(batch, rows), epsilon, Signs.BOTH, 2 * rows)
                    return _mean(losses, slice(0, rows)), _mean(losses, slice(rows, None))
                except NotBatchable as fault:
                    self._refuse_alone(batch, fault)
                    self._warn(batch, fault)
            plus = self._run(step, index, batch, epsilon, Signs.PLUS, rows)
            minus = self._run(step, index, batch, epsilon, Signs.MINUS, rows)
            return _mean(plus), _mean(minus)

    def side(self, step: int, direction: int, batch: Batch, epsilon: float, sign: Sign) -> MeanLoss:
        """One of the two `losses` alone, bit for bit; for probes of two forwards only.

        Sign 0 is L(theta), whatever the direction: by the same kernels, so that what a difference is made of is rounded
        alike. It may be asked for where both signs are in one forward, too.

        Raises:
            ModelError: both signs are in one forward on the proved path, whose losses have other last bits.
        """
        if self.verdict.batched and sign == 0:
            return self.losses(step, direction, batch, 0.0)[0]
        if self.verdict.batched:
            raise ModelError(
                "Both signs of a probe are in one forward here, and cannot be split.",
                where="signs",
                advice="set signs: sequential",
            )
        with torch.no_grad():
            signs = Signs.MINUS if sign < 0 else Signs.PLUS
            return _mean(self._run(step, direction, batch, epsilon * abs(sign), signs, len(batch["labels"])))

    def evaluate(self, batch: Batch) -> RowLosses:
        """Row losses at the unperturbed weights, with what else the objective measures."""
        with torch.no_grad():
            return self._objective.evaluate(self._model, batch, lambda: self._loss(batch, None))

    def mean_loss(self, batch: Batch) -> torch.Tensor:
        """L(theta), a float64 number, with whatever torch takes down to differentiate it: the head is in one piece."""
        losses = self._objective.probe(self._model, batch, lambda: self._whole(batch))
        return losses.sums.sum() / losses.counts.sum()

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


def _mean(losses: RowLosses, rows: slice = slice(None)) -> MeanLoss:
    return MeanLoss(losses.mean(rows), losses.contrast(rows))


def _bind(
    model: torch.nn.Module, engine: Engine, verdict: Verdict, loss: LossFunction | None, kept: bool
) -> Callable[[Batch, Active | None], RowLosses]:
    if loss is not None:
        return lambda batch, active: loss(model, batch)
    own = ModelLoss(model, verdict.chunked, verdict.shifted, kept)
    layer = head_layer(own, engine)
    return lambda batch, active: own(batch, active, layer)
