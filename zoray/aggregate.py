"""From the scalars of a step to its commit: mean, clip, optimizer, quantise to one byte per direction.

The only place where floating-point results of replicas are combined. It runs in one process, in float64 and in a fixed
order, so the commit does not depend on who computed what, nor on when it arrived. The estimate
`1/K sum_k g_k z_k` is SPSA's (Spall 1992) as MeZO uses it (Malladi et al. 2023, arXiv 2305.17333); the int8
coefficients are Zoray's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from zoray.commits import COEFFICIENT_LIMIT, HASH_SIZE, Commit, float32, seal
from zoray.errors import NumericsError, ZorayError
from zoray.optim import SGD, Optimizer, OptimizerState
from zoray.optim.shaping import mean
from zoray.optim.width import disagreement, share_of_noise


class MeanLoss(NamedTuple):
    """What one evaluation of a probe found, float64.

    Attributes:
        loss: mean over the targets of the batch.
        contrast: its noise, as `zoray.loss.RowLosses.contrast` has it from the two halves of the batch; None: not told.
    """

    loss: float
    contrast: float | None = None


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one probe found.

    Attributes:
        step: number of the step.
        direction: index of the direction in that step.
        microbatch: index of the batch the direction was tried on.
        projected_gradient: <grad L, z>, or what the estimator has for it: two-sided SPSA
            (L(theta + epsilon z) - L(theta - epsilon z)) / (2 epsilon).
        loss: mean of the two losses; of other estimators, the loss at theta.
        curvature: z'Hz, the second difference of the loss along the direction; None where it was not measured.
        contrast: a sample of the noise of the projected gradient: the difference that the contrasts of its losses make
            in place of the losses. Of mean 0 and of the noise's variance. None where the batch has one row, or the
            projected gradient is no difference.
    """

    step: int
    direction: int
    microbatch: int
    projected_gradient: float
    loss: float
    curvature: float | None = None
    contrast: float | None = None

    @classmethod
    def of_losses(
        cls, step: int, direction: int, microbatch: int, plus: MeanLoss, minus: MeanLoss, epsilon: float
    ) -> ProbeResult:
        """The probe whose two losses are given; its scalars are rounded to float32, as they travel."""
        loss = float32((plus.loss + minus.loss) / 2)
        return cls._of_difference((step, direction, microbatch), plus, minus, 2 * epsilon, loss)

    @classmethod
    def of_one_side(
        cls, step: int, direction: int, microbatch: int, plus: MeanLoss, centre: MeanLoss, epsilon: float
    ) -> ProbeResult:
        """The probe of the losses at theta + epsilon z and at theta itself, as FZOO has it (2506.09034)."""
        return cls._of_difference((step, direction, microbatch), plus, centre, epsilon, float32(centre.loss))

    @classmethod
    def _of_difference(
        cls, address: tuple[int, int, int], one: MeanLoss, other: MeanLoss, distance: float, loss: float
    ) -> ProbeResult:
        contrast = None
        if one.contrast is not None and other.contrast is not None:
            contrast = float32((one.contrast - other.contrast) / distance)
        return cls(*address, float32((one.loss - other.loss) / distance), loss, contrast=contrast)


def second_difference(mean: float, centre: float, epsilon: float) -> float:
    """z'Hz of the mean of the losses at theta +- epsilon z and the loss at theta."""
    return 2 * (mean - centre) / epsilon**2


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A commit and how it came about.

    Attributes:
        commit: what goes into the ledger.
        nonfinite: directions left out, because a projected gradient or a loss of theirs was not finite.
        clipped: directions whose projected gradient was beyond `max_projected_gradient`.
        scale: weight of a coefficient of 1 (of plain SGD: projected gradient); 0 if all coefficients are 0.
        projected_gradients: mean over the microbatches of each direction, before clipping; nan for those left out.
        disagreement: share of noise in them, as `zoray.optim.width` measures it between microbatches, and with one
            between the halves of the batches; nan if these do not tell.
        step_factor: what steps are multiplied with since the loss has risen (`zoray.optim.brake`); 1: it has not.
    """

    commit: Commit
    nonfinite: int
    clipped: int
    scale: float
    projected_gradients: tuple[float, ...]
    disagreement: float = math.nan
    step_factor: float = 1.0


def aggregate(
    step: int,
    results: Iterable[ProbeResult],
    *,
    directions: int,
    microbatches: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    max_projected_gradient: float | None = None,
    previous: bytes,
    optimizer: Optimizer = SGD,
    state: OptimizerState | None = None,
) -> Aggregate:
    """Decide the commit of `step` from the results of all its probes, given in any order.

    A direction with anything not finite gets coefficient 0; if all do, the commit is null (`Commit.applied` is False).
    The loss of the commit is the mean over the probes of the directions that count.

    Args:
        step: number of the step.
        results: one for each (direction, microbatch).
        directions: K, directions per step; the sum is divided by it, directions left out included.
        microbatches: batches per direction.
        learning_rate: the rate of this very step.
        weight_decay: decoupled (Loshchilov and Hutter 2019): the weights are multiplied by 1 - learning_rate * this.
        max_projected_gradient: bound on the size of a direction's mean projected gradient; None for no bound.
        previous: hash the commit follows (32 bytes).
        optimizer: what the projected gradients are turned into weights by.
        state: the optimizer's state after the commit before; by default that before the first.

    Raises:
        ZorayError: a result is missing, given twice, or of another step, or the first lacks the curvature that the
            optimizer wants.
        NumericsError: the factor of the update or of the weights is too large for float32.
    """
    table = _table(step, results, directions, microbatches)
    if optimizer.wants_curvature and table[0, 0].curvature is None:
        what = f"the optimizer goes by the curvature, and the first probe of step {step} has not measured it"
        raise ZorayError(what, advice="give curved=True to replica.probe for direction 0 of microbatch 0")
    gradients: list[float] = []
    losses: list[float] = []
    for k in range(directions):
        row = [table[k, m] for m in range(microbatches)]
        gradient = mean([result.projected_gradient for result in row])
        finite = math.isfinite(gradient) and all(math.isfinite(result.loss) for result in row)
        gradients.append(gradient if finite else math.nan)
        losses.extend(result.loss for result in row if finite)
    bound = math.inf if max_projected_gradient is None else max_projected_gradient
    bounded = [g if math.isnan(g) else max(-bound, min(bound, g)) for g in gradients]
    rows = [[table[k, m].projected_gradient for m in range(microbatches)] for k in range(directions)]
    counted = [k for k, gradient in enumerate(gradients) if not math.isnan(gradient)]
    if microbatches > 1:
        noise = disagreement([rows[k] for k in counted])
    else:
        noise = share_of_noise([gradients[k] for k in counted], [table[k, 0].contrast for k in counted])
    state = optimizer.initial() if state is None else state
    if losses:
        update = optimizer.update(state, step, bounded, noise, table[0, 0].curvature, mean(losses))
    else:
        update = optimizer.idle(state, step, directions)
    coefficients, scale = _quantise([weight for *_, weight in update.terms])
    eta = float32(learning_rate * scale / directions)
    decay = float32(1.0 - learning_rate * weight_decay) if losses else 1.0
    if not (math.isfinite(eta) and math.isfinite(decay)):
        what = f"step {step} would scale its update by {eta} and the weights by {decay}"
        raise NumericsError(what, where="learning_rate", advice="lower it, or set max_projected_gradient")
    loss = float32(mean(losses)) if losses else math.nan
    terms = [(s, k, c) for (s, k, _), c in zip(update.terms, coefficients, strict=True)]
    # A step whose directions do not count any more goes as a whole: a record has room for few runs of indices.
    counting = {step, *(s for s, _, c in terms if c)}
    return Aggregate(
        commit=seal(
            step,
            eta,
            decay,
            loss,
            [term for term in terms if term[0] in counting],
            previous,
            optimizer.notes(update, scale),
        ),
        nonfinite=sum(map(math.isnan, gradients)),
        clipped=sum(abs(g) > bound for g in gradients),
        scale=scale,
        projected_gradients=tuple(gradients),
        disagreement=noise,
        step_factor=update.brake.factor,
    )


def commit(
    step: int,
    probes: Iterable[ProbeResult],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    max_projected_gradient: float | None = None,
    previous: bytes = bytes(HASH_SIZE),
    optimizer: Optimizer = SGD,
    state: OptimizerState | None = None,
) -> Commit:
    """The commit of `step` for a plain script: directions and microbatches are those of the probes given.

    Raises:
        ZorayError: there is no probe, they are not all of one grid, or the first has no curvature (see `aggregate`).
    """
    results = list(probes)
    if not results:
        raise ZorayError(f"step {step} has no probes", advice="call replica.probe for at least one direction")
    return aggregate(
        step,
        results,
        directions=1 + max(result.direction for result in results),
        microbatches=1 + max(result.microbatch for result in results),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        max_projected_gradient=max_projected_gradient,
        previous=previous,
        optimizer=optimizer,
        state=state,
    ).commit


def _table(
    step: int, results: Iterable[ProbeResult], directions: int, microbatches: int
) -> dict[tuple[int, int], ProbeResult]:
    """The results by (direction, microbatch), exactly one for each."""
    table: dict[tuple[int, int], ProbeResult] = {}
    for result in results:
        address = result.direction, result.microbatch
        wanted = result.step == step and 0 <= address[0] < directions and 0 <= address[1] < microbatches
        if not wanted or address in table:
            what = "is given twice" if wanted else f"is not a probe of step {step}, {directions} x {microbatches}"
            raise ZorayError(f"the result of (step {result.step}, direction {address[0]}, batch {address[1]}) {what}")
        table[address] = result
    if len(table) < directions * microbatches or not table:
        raise ZorayError(f"step {step} has {len(table)} results of {directions} x {microbatches} probes")
    return table


def _quantise(weights: list[float]) -> tuple[list[int], float]:
    """Int8 coefficients and the scale that turns them back: a weight is about scale * c, within half a scale."""
    scale = max(map(abs, weights)) / COEFFICIENT_LIMIT
    # Below the normal numbers a quotient by the scale would have no correct digits, and could pass 127.
    if scale < sys.float_info.min:
        return [0] * len(weights), 0.0
    return [round(weight / scale) for weight in weights], scale
