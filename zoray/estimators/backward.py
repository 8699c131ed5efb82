"""<grad L, z>, exactly, from the gradient: for replicas with memory to spare.

One backward serves every direction that is probed on the batch. What travels is the scalar all the same, as in Ferret
(Shu et al. 2024, arXiv 2409.06277), and the weights get the same update.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from zoray.aggregate import ProbeResult
from zoray.commits import float32
from zoray.directions import Address, Directions
from zoray.errors import ModelError
from zoray.estimators.base import Estimator, Kept
from zoray.layout import ParamSpec
from zoray.loss import Batch
from zoray.probe import Prober

_BLOCK_ELEMENTS = 1 << 20
"""Elements of a gradient that are widened at a time."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """The mean loss of a batch, and its gradient by each parameter that it depends on, in the parameter's dtype.

    Of a parameter of which only some weights are moved, the gradient by those: it is 0 by the others.
    """

    loss: float
    parts: tuple[tuple[ParamSpec, torch.Tensor], ...]


class Backprop(Estimator):
    """<grad L, z> from a backward, which the probes of other directions on the same batch have in common."""

    differentiates = True

    def __init__(self, prober: Prober) -> None:
        super().__init__(prober)
        self._gradient = Kept[Gradient]()

    def probe(self, step: int, direction: int, batch: Batch, epsilon: float, microbatch: int = 0) -> ProbeResult:
        """The probe; its loss is L(theta), and epsilon has no part in it.

        Raises:
            ModelError: the loss has no gradient.
        """
        found = self._gradient.of(batch, partial(gradient, self.prober, batch))
        slope = projected(found, self.prober.directions, (step, direction))
        return ProbeResult(step, direction, microbatch, float32(slope), float32(found.loss))

    def forget(self) -> None:
        """The weights have changed, and the gradient with them."""
        self._gradient.forget()


def gradient(prober: Prober, batch: Batch) -> Gradient:
    """The gradient of the mean loss of a batch at the current weights.

    Raises:
        ModelError: the loss has none.
    """
    parameters = {spec: parameter for parameter, spec in prober.engine.specs.items()}
    specs = prober.directions.layout.specs
    with torch.enable_grad():
        loss = prober.mean_loss(batch)
        if not loss.requires_grad:
            raise ModelError(
                "The loss has no gradient by the weights.",
                where="estimator",
                advice="use estimator: spsa, which takes any loss",
            )
        wanted = [parameters[spec] for spec in specs]
        found: tuple[torch.Tensor | None, ...] = torch.autograd.grad(loss, wanted, allow_unused=True)
    rest, parts = list(found), list[tuple[ParamSpec, torch.Tensor]]()
    del found
    for number, spec in enumerate(specs):
        # What is made of one takes its place: there may be no room for both of all of them.
        part, rest[number] = rest[number], None
        if part is None:
            continue
        mask = prober.directions.coverage.mask(spec, parameters[spec].detach())
        # A probe reads each of them row by row. Never in place: two parameters may have one gradient.
        parts.append((spec, part.contiguous() if mask is None else part.masked_fill(~mask, 0).contiguous()))
    return Gradient(float(loss.detach()), tuple(parts))


def projected(found: Gradient, directions: Directions, address: Address) -> float:
    """<G, z> of one direction: the products of a row are added in float32, all else in float64, in a fixed order.

    Where z has factors it is never made dense: <G, a b^T> = a^T G b.
    """
    coverage, total = directions.coverage, None
    for spec, part in found.parts:
        if not coverage.touches(coverage.group(spec), address[0]):
            continue
        matrix = part.view(spec.rows, spec.cols)
        slope = _factored(matrix, directions, address, spec) if spec.rank else _dense(matrix, directions, address, spec)
        total = slope if total is None else total + slope.to(total.device)
    return 0.0 if total is None else float(total)


def _factored(matrix: torch.Tensor, directions: Directions, address: Address, spec: ParamSpec) -> torch.Tensor:
    left, right = (factor.to(matrix.device) for factor in directions.factors(address, spec) if factor is not None)
    rows = max(1, _BLOCK_ELEMENTS // spec.cols)
    sides = [block.float() @ right.t() for block in torch.split(matrix, rows)]
    # 1/sqrt(r) sum_i a_i^T (G b_i)
    return (torch.cat(sides).double() * left.t()).sum() * float(directions.scale(spec))


def _dense(matrix: torch.Tensor, directions: Directions, address: Address, spec: ParamSpec) -> torch.Tensor:
    z = directions.dense(address, spec).view(-1).to(matrix.device)
    blocks = (torch.split(each, _BLOCK_ELEMENTS) for each in (matrix.view(-1), z))
    return torch.stack([(block.double() * part).sum() for block, part in zip(*blocks, strict=True)]).sum()
