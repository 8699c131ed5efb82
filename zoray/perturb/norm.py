"""LayerNorm and `nn.RMSNorm`: normalise, then scale and shift by the perturbed vectors, in float32.

A weight near 1 and a step of 1e-3 cannot be told apart in bfloat16, so the vectors stay in float32 and only the output
is rounded to the input's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from zoray.layout import ParamSpec
from zoray.perturb.context import Active, Signs
from zoray.perturb.rows import ALL_LED, RowRule


@dataclass(frozen=True, slots=True)
class NormLayer:
    """A normalisation layer with the specs of those of its vectors that are trained."""

    module: nn.LayerNorm | nn.RMSNorm
    weight: ParamSpec | None
    bias: ParamSpec | None
    rule: RowRule = ALL_LED

    def __call__(self, active: Active, x: torch.Tensor) -> torch.Tensor:
        """Perturbed output of x's shape and dtype."""
        if active.signs is Signs.BOTH:
            x = self.rule.expanded(x, active.rows)
        shape = self.module.normalized_shape
        parameters = self.module._parameters
        weight = active.vector(_flat(parameters.get("weight")), self.weight)
        bias = active.vector(_flat(parameters.get("bias")), self.bias)
        exact = x.float()
        if isinstance(self.module, nn.LayerNorm):
            normal = functional.layer_norm(exact, shape, eps=self.module.eps)
        else:
            eps = torch.finfo(x.dtype).eps if self.module.eps is None else self.module.eps
            normal = functional.rms_norm(exact, shape, eps=eps)
        halves = normal.view(2 if active.signs is Signs.BOTH else 1, -1, *shape)
        scale, shift = (each if each is None else each.view(-1, 1, *shape) for each in (weight, bias))
        if x.is_cuda and scale is not None and shift is not None:
            # One pass in place of three.
            return torch.addcmul(shift, halves, scale, out=x.new_empty(halves.shape)).view(x.shape)
        if scale is not None:
            halves.mul_(scale)
        if shift is not None:
            halves.add_(shift)
        return normal.to(x.dtype)


def _flat(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.detach().reshape(-1)
