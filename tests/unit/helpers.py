"""Small things the tests of the core share."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from zoray.commits import Commit, seal
from zoray.coverage import EVERYTHING, Coverage
from zoray.directions import Directions
from zoray.inputs import POOL, Mixture
from zoray.layout import Layout, Side, make_layout, trainable_parameters
from zoray.replica import Replica


def commit_of(step: int, coefficients: list[int], eta: float = 2.0**-16, decay: float = 1.0) -> Commit:
    terms = tuple((step, index, c) for index, c in enumerate(coefficients))
    return seal(step, eta, decay, 1.0, terms, bytes(32))


def directions_for(
    tensors: dict[str, torch.Tensor],
    kind: str = "rank",
    rank: int = 1,
    run_seed: int = 0,
    coverage: Coverage = EVERYTHING,
) -> Directions:
    layout = make_layout(tensors, kind, rank, SIDES)  # type: ignore[arg-type]
    return Directions(layout, run_seed, coverage, mixtures_for(layout))


SIDES: dict[str, Side] = {"matrix": "rows", "wide": "cols", "w": "cols"}
"""Which side of some tensors inputs are along, in directions of kind "inputs"."""


def mixtures_for(layout: Layout) -> dict[str, Mixture]:
    """Inputs of all sizes."""
    made = {}
    for number, spec in enumerate(spec for spec in layout.specs if spec.mixed):
        generator = np.random.default_rng(number)
        features = spec.rows if spec.mixed == "rows" else spec.cols
        inputs = generator.standard_normal((POOL - 3, features)) * generator.exponential(1, features)
        missing = generator.integers(0, 2, (POOL, features), dtype=np.int8) * 2 - 1
        made[spec.name] = Mixture.of(inputs, missing.astype(np.int8))
    return made


def really_perturbed(model: nn.Module, replica: Replica, step: int, index: int, shift: float) -> nn.Module:
    """A copy of the model whose weights are theta + shift z, as far as the step moves them."""
    twin = copy.deepcopy(model)
    parameters = trainable_parameters(twin)
    coverage = replica.directions.coverage
    with torch.no_grad():
        for spec in replica.layout.specs:
            if coverage.groups.get(spec.name) not in (None, step // coverage.steps % coverage.count):
                continue
            z = replica.directions.dense((step, index), spec)
            z[parameters[spec.name].float().abs() > coverage.limits.get(spec.name, math.inf)] = 0
            parameters[spec.name].copy_(parameters[spec.name].float() + shift * z)
    return twin


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit pattern, so that -0.0 and NaN count."""
    return tensor.detach().clone().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


Words = npt.NDArray[np.uint64]


def philox_blocks(run_seed: int, step: Words, index: Words, block: Words) -> Words:
    """Block numbers `block` of the directions (step, index), written from the paper: Philox 4x64-10, shape (n, 4).

    Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". NumPy counts up before it draws.
    """
    counter = [block + np.uint64(1), np.zeros_like(block), index, step]
    key = [np.uint64(run_seed), np.uint64(0x5A6F_7261_7901)]
    with np.errstate(over="ignore"):
        for _ in range(10):
            high0, low0 = _wide_product(np.uint64(0xD2E7470EE14C6C93), counter[0])
            high1, low1 = _wide_product(np.uint64(0xCA5A826395121157), counter[2])
            counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
            key = [key[0] + np.uint64(0x9E3779B97F4A7C15), key[1] + np.uint64(0xBB67AE8584CAA73B)]
    return np.stack(counter, axis=1)


def _wide_product(a: np.uint64, b: Words) -> tuple[Words, Words]:
    """High and low 64 bits of a 64-bit product, by halves."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    a1, a0, b1, b0 = a >> half, a & mask, b >> half, b & mask
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & mask)
    return a1 * b1 + (middle >> half) + (other >> half), a * b


def printed_elsewhere(code: str, folder: Path) -> set[str]:
    """What code prints in processes of their own, with another number of threads and kernel for attention each.

    Args:
        code: its arguments are the folder of a model, the kernel's name and the number of threads.
    """
    return {
        subprocess.run(
            [sys.executable, "-c", code, str(folder), attention, threads],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for attention, threads in (("sdpa", "1"), ("eager", "2"))
    }
