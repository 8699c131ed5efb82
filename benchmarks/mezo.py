"""MeZO as published, for comparison: algorithm 1 of Malladi et al. 2023 (arXiv 2305.17333), written by ourselves.

Gaussian noise is regenerated from a seed, parameter by parameter; the weights are moved by +eps, -2 eps and +eps in
place, and the update regenerates the noise once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

Noise = Iterable[tuple[nn.Parameter, torch.Tensor]]


def normals(model: nn.Module, seed: int) -> Noise:
    """Each parameter that is trained, and its part of the direction of that seed, made when it is asked for."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter, torch.normal(mean=0.0, std=1.0, size=parameter.shape, dtype=parameter.dtype)


def move(noise: Noise, scale: float) -> None:
    """Add a direction to the weights, in place."""
    for parameter, z in noise:
        parameter.data.add_(z, alpha=scale)


def mezo_step(model: nn.Module, batch: dict[str, torch.Tensor], seed: int, epsilon: float, rate: float) -> float:
    """One step with one direction on a batch of a language model; returns the projected gradient."""
    return descend(lambda: normals(model, seed), lambda: float(model(**batch, use_cache=False).loss), epsilon, rate)[0]


@torch.no_grad()
def descend(noise: Callable[[], Noise], loss: Callable[[], float], epsilon: float, rate: float) -> tuple[float, float]:
    """One step along one direction on any loss; returns the projected gradient and the mean of the two losses.

    Args:
        noise: the direction, the same at each of four calls: made anew, as published, or kept from the first.
    """
    move(noise(), epsilon)
    plus = loss()
    move(noise(), -2 * epsilon)
    minus = loss()
    move(noise(), epsilon)
    gradient = (plus - minus) / (2 * epsilon)
    move(noise(), -rate * gradient)
    return gradient, (plus + minus) / 2


@torch.no_grad()
def regenerate(model: nn.Module, seeds: range, scale: float) -> None:
    """Apply other workers' directions as Gaussian noise, one after the other."""
    for seed in seeds:
        move(normals(model, seed), scale)
