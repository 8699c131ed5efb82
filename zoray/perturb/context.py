"""The direction that is in force during a perturbed forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cached_property

import torch

from zoray.directions import Bytes, Directions
from zoray.layout import ParamSpec

_MIXED_SIZE = 8
"""About that of mixed factors; a power of two."""


class Signs(Enum):
    """Which half of the pair the rows of the current call belong to."""

    BOTH = 0
    """2B rows: the first half at theta + eps z, the second at theta - eps z."""
    PLUS = 1
    MINUS = -1


class NotBatchable(Exception):
    """The rows of a module's tensors cannot be told apart into the two signs; the text says which and why."""


class Active:
    """One direction, scaled by epsilon, with its factors unpacked for one model.

    Args:
        directions: the run's directions.
        step, index: the direction's address.
        epsilon: half the distance between the two evaluations.
        signs: what the rows of the model's input are.
        rows: number of rows of the model's input (2B for `Signs.BOTH`).
    """

    def __init__(self, directions: Directions, step: int, index: int, epsilon: float, signs: Signs, rows: int) -> None:
        self.directions, self.address = directions, (step, index)
        self.epsilon, self.signs, self.rows = epsilon, signs, rows
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def _packed(self) -> Bytes:
        packed: Bytes = self.directions.read([self.address], 0, self.directions.layout.total_bytes)[0]
        return packed

    @property
    def scale(self) -> float:
        """+-epsilon; for both signs at once the caller negates the second half of the rows."""
        return -self.epsilon if self.signs is Signs.MINUS else self.epsilon

    def factors(self, spec: ParamSpec, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (a, b) of a rank-r parameter, shapes (r, rows) and (r, cols), on `like`'s device and in its dtype.

        They are exact in every dtype; mixed ones, of integers, are of the size of signs, as float16 needs it.
        """
        if spec.name not in self._factors:
            left, right = self.directions.unpack(self._packed[spec.offset : spec.end], spec)
            assert left is not None
            if spec.mixed is not None:
                (left if spec.mixed == "rows" else right).div_(_MIXED_SIZE)
            self._factors[spec.name] = _sent(left, like.device, like.dtype), _sent(right, like.device, like.dtype)
        return self._factors[spec.name]

    def weight(self, spec: ParamSpec) -> float:
        """What a product of `factors` is multiplied with in z."""
        return float(self.directions.scale(spec)) * (1 if spec.mixed is None else _MIXED_SIZE)

    def touches(self, spec: ParamSpec) -> bool:
        """Whether the direction moves the parameter."""
        coverage = self.directions.coverage
        return coverage.touches(coverage.group(spec), self.address[0])

    def mask(self, spec: ParamSpec, values: torch.Tensor) -> torch.Tensor | None:
        """Which of some weights of a parameter the direction moves, a bool tensor of their shape; None: all of them."""
        return self.directions.coverage.mask(spec, values)

    def masked(self, spec: ParamSpec) -> bool:
        """Whether some of the parameter's weights may not be moved, so that its z has no factors."""
        return spec.name in self.directions.coverage.limits

    def noise(self, spec: ParamSpec, parameter: torch.Tensor) -> torch.Tensor:
        """z of one parameter, float32, in its own shape, without epsilon and sign; 0 where a weight is not moved."""
        z = _sent(self.directions.dense(self.address, spec).view(parameter.shape), parameter.device)
        mask = self.mask(spec, parameter)
        return z if mask is None else z.mul_(mask)

    def perturbed(self, parameter: torch.Tensor, spec: ParamSpec, dtype: torch.dtype | None = None) -> torch.Tensor:
        """theta +- eps z of one parameter as a new tensor; for one sign only."""
        if self.signs is Signs.BOTH:
            raise AssertionError("a perturbed copy has one sign")
        z = self.noise(spec, parameter)
        return z.mul_(self.scale).add_(parameter).to(dtype or parameter.dtype)

    def vector(self, parameter: torch.Tensor | None, spec: ParamSpec | None) -> torch.Tensor | None:
        """A perturbed vector in float32, (2, n) for both signs, (1, n) for one or where it stays; None if missing."""
        if parameter is None:
            return None
        exact = parameter.detach().float()
        if spec is None or not self.touches(spec):
            return exact.unsqueeze(0)
        z = self.noise(spec, exact).mul_(self.scale)
        return torch.stack([exact + z, exact - z]) if self.signs is Signs.BOTH else (exact + z).unsqueeze(0)

    @contextmanager
    def only(self, signs: Signs) -> Iterator[None]:
        """One sign for the time of the block: the rows of the current call all belong to it."""
        before, self.signs = self.signs, signs
        try:
            yield
        finally:
            self.signs = before


def _sent(values: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A processor's tensor on a device; an accelerator is not waited for, so that it never has nothing to do."""
    values = values.to(dtype or values.dtype)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
