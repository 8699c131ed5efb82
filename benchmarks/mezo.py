"""MeZO as published, for comparison: algorithm 1 of Malladi et al. 2023 (arXiv 2305.17333), written by ourselves.

Gaussian noise is regenerated from a seed, parameter by parameter; the weights are moved by +eps, -2 eps and +eps in
place, and the update regenerates the noise once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def _move(model: nn.Module, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        z = torch.normal(mean=0.0, std=1.0, size=parameter.shape, dtype=parameter.dtype)
        parameter.data.add_(z, alpha=scale)


def mezo_step(model: nn.Module, batch: dict[str, torch.Tensor], seed: int, epsilon: float, rate: float) -> float:
    """One step with one direction on a batch of a language model; returns the projected gradient."""
    return descend(model, lambda: float(model(**batch, use_cache=False).loss), seed, epsilon, rate)[0]


@torch.no_grad()
def descend(model: nn.Module, loss: Callable[[], float], seed: int, epsilon: float, rate: float) -> tuple[float, float]:
    """One step with one direction on any loss; returns the projected gradient and the mean of the two losses."""
    _move(model, seed, epsilon)
    plus = loss()
    _move(model, seed, -2 * epsilon)
    minus = loss()
    _move(model, seed, epsilon)
    gradient = (plus - minus) / (2 * epsilon)
    _move(model, seed, -rate * gradient)
    return gradient, (plus + minus) / 2


@torch.no_grad()
def regenerate(model: nn.Module, seeds: range, scale: float) -> None:
    """Apply other workers' directions as Gaussian noise, one after the other."""
    for seed in seeds:
        _move(model, seed, scale)
