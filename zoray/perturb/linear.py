"""Linear layers: y = x W^T + bias, corrected by +-eps (x . b) a^T for the rank-1 direction z = a b^T of W.

Covers `nn.Linear` (weight (out, in)) and GPT-2's `Conv1D` (weight (in, out)). The correction is written first and the
product with W is accumulated onto it, so that perturbing costs no extra pass over the output.

Where only some weights are moved, z has no factors: W +- eps z is then made a few output features at a time, in pieces
that stay in cache, and multiplied with each sign's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from zoray.layout import ParamSpec
from zoray.perturb.context import Active, Signs
from zoray.perturb.rows import ALL_LED, RowRule

_PIECE_ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer with the specs of those of its parameters that are trained.

    Attributes:
        transposed: the weight is stored (in, out), as in `Conv1D`.
        weight, bias: specs, None where the parameter is frozen or missing.
        rule: whether its input has the rows of the batch.
    """

    module: nn.Module
    transposed: bool
    weight: ParamSpec | None
    bias: ParamSpec | None
    rule: RowRule = ALL_LED

    def __call__(self, active: Active, x: torch.Tensor) -> torch.Tensor:
        """The perturbed output, shape (..., out) for x of shape (..., in), in x's dtype."""
        if active.signs is Signs.BOTH:
            x = self.rule.expanded(x, active.rows)
        weight = self.module._parameters["weight"]
        assert weight is not None
        matrix = weight if self.transposed else weight.t()
        flat = x.reshape(-1, matrix.shape[0])
        out = self.product(active, flat, self.project(active, flat), slice(0, matrix.shape[1]))
        return out.view(*x.shape[:-1], matrix.shape[1])

    def project(self, active: Active, flat: torch.Tensor) -> torch.Tensor | None:
        """+-eps/sqrt(r) (x . b), shape (rows, r): the second half of the rows has the other sign.

        None where nothing of the weight is moved, or only some of it.
        """
        if self.weight is None or not active.touches(self.weight) or active.masked(self.weight):
            return None
        left, right = active.factors(self.weight, flat)
        inputs = left if self.transposed else right
        scale = active.scale * active.weight(self.weight)
        coefficients = (flat @ inputs.t()).mul_(scale)
        if active.signs is Signs.BOTH:
            coefficients[len(flat) // 2 :].neg_()
        return coefficients

    def product(
        self, active: Active, flat: torch.Tensor, coefficients: torch.Tensor | None, outputs: slice
    ) -> torch.Tensor:
        """Perturbed output of some of the output features, shape (rows, len(outputs)).

        Args:
            flat: inputs (rows, in); for both signs the plus rows come first.
            coefficients: what `project` returned for them.
            outputs: the range of output features.
        """
        weight, bias = self.module._parameters["weight"], self.module._parameters.get("bias")
        assert weight is not None
        matrix = weight[:, outputs] if self.transposed else weight[outputs].t()
        out = flat.new_empty(len(flat), matrix.shape[1])
        vectors = active.vector(bias, self.bias)
        count = 1 if vectors is None else len(vectors)
        for part in range(count):
            rows = slice(part * len(flat) // count, (part + 1) * len(flat) // count)
            base = None if vectors is None else vectors[part, outputs].to(flat.dtype)
            self._correction(
                active, out[rows], coefficients if coefficients is None else coefficients[rows], base, outputs
            )
        if self.weight is not None and active.touches(self.weight) and active.masked(self.weight):
            return self._add_masked(active, self.weight, flat, out, outputs.start)
        return out.addmm_(flat, matrix)

    def _add_masked(
        self, active: Active, spec: ParamSpec, flat: torch.Tensor, out: torch.Tensor, first: int
    ) -> torch.Tensor:
        """Add x (W +- eps z)^T to `out`, whose first column is output feature `first`."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        left, right = active.factors(spec, flat)
        half = len(flat) // 2 if active.signs is Signs.BOTH else len(flat)
        width = max(1, _PIECE_ELEMENTS // flat.shape[1])
        for start in range(0, out.shape[1], width):
            columns = slice(start, min(start + width, out.shape[1]))
            features = slice(first + columns.start, first + columns.stop)
            piece = weight[:, features] if self.transposed else weight[features]
            z = left.t() @ right[:, features] if self.transposed else left[:, features].t() @ right
            change = z.float().mul_(active.scale * active.weight(spec))
            mask = active.mask(spec, piece)
            assert mask is not None
            change.mul_(mask)
            for rows in (slice(0, half), slice(half, len(flat))):
                if rows.start < rows.stop:
                    moved = (piece + change).to(flat.dtype)
                    out[rows, columns].addmm_(flat[rows], moved if self.transposed else moved.t())
                change.neg_()
        return out

    def _correction(
        self,
        active: Active,
        out: torch.Tensor,
        coefficients: torch.Tensor | None,
        base: torch.Tensor | None,
        outputs: slice,
    ) -> None:
        """Write bias + (+-eps (x . b)) a^T into `out`."""
        if self.weight is None or coefficients is None:
            out.copy_(torch.zeros_like(out[:1]) if base is None else base)
            return
        left, right = active.factors(self.weight, out)
        spread = (right if self.transposed else left)[:, outputs]
        if len(spread) == 1 and out.is_cuda:
            # As a product it takes three passes over the output, by a kernel for other machines.
            torch.addcmul(out.new_zeros(1) if base is None else base, coefficients, spread, out=out)
        elif base is None:
            torch.mm(coefficients, spread, out=out)
        else:
            torch.addmm(base, coefficients, spread, out=out)
