"""Giving every trainable parameter its direction for a tangent, for the time of a forward.

A rank-1 direction of a linear layer or an embedding is never made dense: the layer's output gets the tangent
(x . b) a^T, as the perturbed forward's gets a correction (`zoray.perturb`). What other modules own is swapped for dual
numbers, value and tangent, for the whole forward, and so is what is used behind its owner's back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional

from zoray.perturb import Active, Engine
from zoray.perturb.embedding import EmbeddingLayer
from zoray.perturb.engine import no_fused_attention, replaced_forward
from zoray.perturb.linear import LinearLayer

_unpack: Any = forward_ad.unpack_dual
_make: Any = forward_ad.make_dual


@contextmanager
def tangents(engine: Engine, active: Active) -> Iterator[None]:
    """Within the block a forward of the engine's model carries derivatives along the direction in force.

    Args:
        engine: knows the model's modules; strays are swapped, as for a perturbed forward.
        active: the direction; its epsilon and its signs do not matter.
    """
    made: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(no_fused_attention())
        for module in engine.model.modules():
            own, factored = dict(module._parameters), _factored(engine, module, active)
            stack.callback(module._parameters.update, own)
            for name, parameter in own.items():
                spec = None if parameter is None else engine.specs.get(parameter)
                if parameter is None or spec is None or not active.touches(spec):
                    continue
                if factored is not None and name == "weight":
                    continue
                if spec.name not in made:
                    z = active.noise(spec, parameter).to(parameter.dtype)
                    made[spec.name] = _make(parameter.detach(), z)
                module._parameters[name] = made[spec.name]  # type: ignore[assignment]
            if factored is not None:
                stack.enter_context(replaced_forward(module, partial(factored, engine.handlers[module], active)))
        yield


def _factored(engine: Engine, module: nn.Module, active: Active) -> Any:
    """The forward of a layer whose weight is moved along a direction of factors, if it is."""
    match engine.handlers.get(module):
        case LinearLayer(weight=spec) if spec is not None and active.touches(spec) and not active.masked(spec):
            return _linear
        case EmbeddingLayer(weight=spec) if active.touches(spec) and not active.masked(spec):
            return _embedding
    return None


def _linear(layer: LinearLayer, active: Active, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The output of a linear layer, with the tangent of its weight's direction added to what there is."""
    (x,) = (*args, *kwargs.values())
    weight, bias = layer.module._parameters["weight"], layer.module._parameters.get("bias")
    assert weight is not None and layer.weight is not None
    value = _unpack(x).primal
    left, right = active.factors(layer.weight, value)
    inputs, outputs = (left, right) if layer.transposed else (right, left)
    slope = (value @ inputs.t()).mul_(active.weight(layer.weight)) @ outputs
    return _added(functional.linear(x, weight.t() if layer.transposed else weight, bias), slope)


def _embedding(layer: EmbeddingLayer, active: Active, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The rows of an embedding, with the tangents a[token] b."""
    (tokens,) = (*args, *kwargs.values())
    weight = layer.module._parameters["weight"]
    assert weight is not None
    rows = functional.embedding(tokens, weight)
    left, right = active.factors(layer.weight, rows)
    return _added(rows, (left.t()[tokens] * active.weight(layer.weight)) @ right)


def _added(output: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    value, tangent = _unpack(output)
    both: torch.Tensor = _make(value, slope if tangent is None else tangent + slope)
    return both
