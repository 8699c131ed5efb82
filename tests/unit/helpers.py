"""Small things the tests of the core share."""

from __future__ import annotations

import copy

import torch
from torch import nn

from zoray.commits import Commit, seal
from zoray.directions import Directions
from zoray.layout import make_layout, trainable_parameters
from zoray.replica import Replica


def commit_of(step: int, coefficients: list[int], eta: float = 2.0**-16, decay: float = 1.0) -> Commit:
    terms = tuple((step, index, c) for index, c in enumerate(coefficients))
    return seal(step, eta, decay, 1.0, terms, bytes(32))


def directions_for(
    tensors: dict[str, torch.Tensor], kind: str = "rank", rank: int = 1, run_seed: int = 0
) -> Directions:
    return Directions(make_layout(tensors, kind, rank), run_seed)


def really_perturbed(model: nn.Module, replica: Replica, step: int, index: int, shift: float) -> nn.Module:
    """A copy of the model whose weights are theta + shift z."""
    twin = copy.deepcopy(model)
    parameters = trainable_parameters(twin)
    with torch.no_grad():
        for spec in replica.layout.specs:
            z = replica.directions.dense((step, index), spec)
            parameters[spec.name].copy_(parameters[spec.name].float() + shift * z)
    return twin


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit pattern, so that -0.0 and NaN count."""
    return tensor.detach().clone().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])
