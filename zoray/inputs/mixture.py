"""Inputs of one layer, as small integers, and the factors that are mixed from them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from zoray.layout import BLOCK_BYTES, MIXED_BYTES

POOL = 64
"""Inputs that are kept of a layer."""

TERMS = MIXED_BYTES
"""Inputs in one factor: one of each `POOL / TERMS` neighbours."""

LARGEST = 7
"""Magnitude of the integers."""

SIGNS = 8
"""Magnitude of the signs that are added; that of a sum of `TERMS` inputs is about the same."""

LARGEST_MIXED = TERMS * LARGEST + SIGNS
"""Magnitude of a factor's integers, which fit int8."""

_NOTHING = 2.0**-16
"""Mean magnitude of what is no input any more once the mean is taken off, of inputs of `_TYPICAL`."""

_TYPICAL = 1.6
"""What the mean magnitude of an input becomes: of normal ones, one standard deviation is then 2."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Inputs of a layer.

    Attributes:
        values: int8 (POOL, features), between -7 and 7.
    """

    values: npt.NDArray[np.int8]

    @classmethod
    def of(cls, inputs: npt.NDArray[np.float64], missing: npt.NDArray[np.int8], *, centred: bool = False) -> Mixture:
        """From inputs as they are.

        Each is divided by about its mean magnitude, and what is far above that is cut off: attention sinks have inputs
        a thousand times those of other tokens, and some features are that much larger than others.

        Args:
            inputs: (count, features), count <= POOL.
            missing: signs (POOL, features), which stand for the inputs that are 0 or not there.
            centred: take off what they have in common, once they are as large as each other.
        """
        if centred and len(inputs) > 1:
            inputs = _centred(inputs)
        values = 2 * missing
        for number, row in enumerate(inputs):
            if (scaled := _scaled(row)) is not None:
                values[number] = np.rint(scaled)
        return cls(values)

    @cached_property
    def scale(self) -> np.float32:
        """1 over the root mean square of a factor's elements, which makes them as large as signs."""
        energy = int(np.square(self.values, dtype=np.int64).sum()) * TERMS
        return np.float32(1 / np.sqrt(energy / self.values.size + SIGNS**2))

    @cached_property
    def strain(self) -> float:
        """How much more an input's product with a factor varies, in mean square, than with one of signs.

        Inputs have much in common, so a factor made of some reaches the others too: by the more, the more features. Of
        the inputs that are kept, with factors of the others.
        """
        # Integers that float64 holds, whatever order they are summed in: NumPy's own product of integers is slow.
        values = self.values.astype(np.float64)
        products = (values @ values.T).astype(np.int64)
        own = np.diag(products)
        shared, lengths = int(np.square(products).sum() - np.square(own).sum()), int(own.sum())
        return float(self.scale) ** 2 * (TERMS * shared / (POOL - 1) + SIGNS**2 * lengths) / lengths

    def mix(self, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
        """The factors that random bytes stand for.

        Args:
            packed: (..., a block and as many bits as features): which inputs and with which signs, and signs.

        Returns:
            int8 (..., features): sums of TERMS inputs and of signs, at most `LARGEST_MIXED` in magnitude.
        """
        group = POOL // TERMS
        chosen = (packed[..., :TERMS] >> 1) % group + group * np.arange(TERMS, dtype=np.uint8)
        signs = 1 - 2 * (packed[..., :TERMS] & 1).astype(np.int8)
        bits = np.unpackbits(packed[..., BLOCK_BYTES:], axis=-1, count=self.values.shape[1], bitorder="little")
        total: npt.NDArray[np.int8] = SIGNS - 2 * SIGNS * bits.view(np.int8)
        for term in range(TERMS):
            total += self.values[chosen[..., term]] * signs[..., term, None]
        return total

    @cached_property
    def digest(self) -> str:
        """Digest (hex) of the values."""
        return hashlib.sha256(self.values.tobytes()).hexdigest()


def _centred(inputs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Inputs without what they have in common, once they are as large as each other; 0 where they say nothing."""
    scaled = [_scaled(row) for row in inputs]
    known = [number for number, row in enumerate(scaled) if row is not None]
    apart = np.zeros_like(inputs)
    if known:
        alike = np.array([scaled[number] for number in known])
        apart[known] = alike - alike.mean(0)
    # Of inputs that are the same, what is left is the last bits of a sum, which machines differ in.
    apart[np.abs(apart).mean(1) < _NOTHING] = 0
    return apart


def _scaled(row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """An input, of a mean magnitude that suits the integers, and cut off at theirs; None of one that is 0."""
    mean = float(np.abs(row).mean())
    if not (mean > 0 and np.isfinite(mean)):
        return None
    # To a few bits: machines differ in the last ones of a sum.
    mantissa, exponent = np.frexp(_TYPICAL / mean)
    scale = np.ldexp(np.round(mantissa * 64) / 64, exponent)
    cut: npt.NDArray[np.float64] = np.clip(row * scale, -LARGEST, LARGEST)
    return cut
