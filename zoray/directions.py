"""Addressable random directions.

A direction is addressed by (run seed, step, index) and regenerated from that address wherever it is needed; it is never
sent and never stored. Its bits are the raw stream of NumPy's Philox 4x64 counter generator (Salmon et al. 2011), which
NumPy keeps fixed for ever, keyed by the run seed with the address as counter: distinct addresses are distinct counters
of a bijection, so no two directions of a run can share a block of bits.

Rademacher directions (bit 0 is +1, bit 1 is -1) have E[z z^T] = I, and so have rank-r directions
z = (1/sqrt(r)) sum_i a_i b_i^T with a, b of signs (Sarkar et al. 2025, EGGROLL; Spall 1992). Of kind "inputs", the
factors on the input side of linear layers are mixed from inputs instead (`zoray.inputs`), and E[z z^T] is their second
moment there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from zoray.coverage import EVERYTHING, Coverage
from zoray.inputs import Mixture
from zoray.layout import BLOCK_BYTES, Layout, ParamSpec, Side

Bytes = npt.NDArray[np.uint8]
Address = tuple[int, int]
"""(step, index) of a direction; the run seed is the third part."""

_DOMAIN = 0x5A6F_7261_7901
"""Second half of the Philox key: keeps the bits of directions apart from every other use of the run seed."""


def direction_bytes(run_seed: int, step: int, index: int, start: int, stop: int) -> Bytes:
    """Bytes [start, stop) of a direction's bit string; both are multiples of `BLOCK_BYTES`.

    Args:
        run_seed: 0 <= run_seed < 2^64; 0 is a seed like any other.
        step, index: the rest of the direction's address.
    """
    counter = np.array([start // BLOCK_BYTES, 0, index, step], dtype=np.uint64)
    key = np.array([run_seed, _DOMAIN], dtype=np.uint64)
    words = np.random.Philox(counter=counter, key=key).random_raw((stop - start) // 8)
    return words.astype("<u8", copy=False).view(np.uint8)


def unpack_signs(packed: Bytes, count: int) -> npt.NDArray[np.int8]:
    """The first `count` signs (+1 or -1, int8) of each row of packed bytes (..., nbytes)."""
    bits = np.unpackbits(packed, axis=-1, count=count, bitorder="little").view(np.int8)
    signs: npt.NDArray[np.int8] = 1 - 2 * bits
    return signs


class Directions:
    """The directions of one run over one layout.

    Args:
        layout: the parameters they are of.
        run_seed: 0 <= run_seed < 2^64.
        coverage: which weights they move. It decides nothing here: who perturbs or updates weights asks it.
        inputs: by parameter, what its factors are mixed from; of all that the layout calls mixed, before the first
            direction is drawn.
    """

    def __init__(
        self,
        layout: Layout,
        run_seed: int,
        coverage: Coverage = EVERYTHING,
        inputs: Mapping[str, Mixture] | None = None,
    ) -> None:
        self.layout = layout
        self.run_seed = run_seed
        self.coverage = coverage
        self.inputs = inputs or {}

    @property
    def inputs(self) -> Mapping[str, Mixture]:
        """What factors are mixed from, by parameter; see `zoray.inputs`."""
        return self._inputs

    @inputs.setter
    def inputs(self, inputs: Mapping[str, Mixture]) -> None:
        self._inputs = inputs
        strains = [inputs[spec.name].strain if spec.name in inputs else 1.0 for spec in self.layout.specs if spec.rank]
        self._size = np.float32(math.sqrt(len(strains) / math.fsum(strains))) if inputs else np.float32(1)

    @property
    def identity(self) -> str:
        """Digest (hex) of layout, coverage and inputs: equal if and only if two replicas can share a ledger."""
        parts = [self.coverage.identity]
        if self.inputs:
            parts += [
                self._size.tobytes().hex(),
                *(f"{name} {self.inputs[name].digest}" for name in sorted(self.inputs)),
            ]
        if not any(parts):
            return self.layout.identity
        return hashlib.sha256(" ".join([self.layout.identity, *parts]).encode()).hexdigest()[:32]

    def all_groups(self) -> Directions:
        """The same with all groups of the coverage moved at every step."""
        return type(self)(self.layout, self.run_seed, self.coverage.all_groups(), self.inputs)

    def read(self, addresses: Sequence[Address], start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of several directions, shape (len(addresses), stop - start)."""
        rows = [direction_bytes(self.run_seed, step, index, start, stop) for step, index in addresses]
        return np.stack(rows) if rows else np.zeros((0, stop - start), np.uint8)

    def normals(self, address: Address, spec: ParamSpec) -> npt.NDArray[np.float32]:
        """Standard normals of one parameter, shape (numel,); only the `gaussian` kind uses them."""
        counter = np.array([0, 1 + spec.offset // BLOCK_BYTES, address[1], address[0]], dtype=np.uint64)
        key = np.array([self.run_seed, _DOMAIN], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(counter=counter, key=key))
        return generator.standard_normal(spec.numel, dtype=np.float32)

    def dense(self, address: Address, spec: ParamSpec) -> torch.Tensor:
        """z of one parameter as a float32 tensor of the parameter's shape."""
        if self.layout.kind == "gaussian":
            return torch.from_numpy(self.normals(address, spec)).view(spec.shape)
        left, right = self.factors(address, spec)
        if left is None:
            return right.mul_(float(self.scale(spec))).view(spec.shape)
        return (left.t() @ right).mul_(float(self.scale(spec))).view(spec.shape)

    def factors(self, address: Address, spec: ParamSpec) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The factors (a of shape (r, rows), b of shape (r, cols)), or (None, signs of shape (1, cols)) if dense."""
        packed = self.read([address], spec.offset, spec.end)[0]
        return self.unpack(packed, spec)

    def unpack(self, packed: Bytes, spec: ParamSpec) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Factors of one parameter, float32 integers, out of its own range of a direction's bytes."""
        split = spec.rank * spec.row_bytes
        right = self.unpacked(packed[split:].reshape(-1, spec.col_bytes), spec, "cols")
        if spec.rank == 0:
            return None, torch.from_numpy(right).float()
        left = self.unpacked(packed[:split].reshape(-1, spec.row_bytes), spec, "rows")
        return torch.from_numpy(left).float(), torch.from_numpy(right).float()

    def unpacked(self, packed: Bytes, spec: ParamSpec, side: Side) -> npt.NDArray[np.int8]:
        """What the bytes (..., row_bytes or col_bytes) of factors of one side stand for, int8 (..., rows or cols)."""
        if spec.mixed == side:
            return self.inputs[spec.name].mix(packed)
        return unpack_signs(packed, spec.rows if side == "rows" else spec.cols)

    def scale(self, spec: ParamSpec) -> np.float32:
        """What a product of factors, or a dense direction's signs, are multiplied with to make z.

        1/sqrt(r) for r products; then the elements of z have mean square 1, and signs have E[z z^T] = I. Where factors
        are mixed, all of z is made smaller, by one number, so that a step of epsilon moves the layers' outputs by about
        as much as one of signs would: inputs are in line with each other, and the loss would bend within the step.
        """
        scale = self._size * np.float32(1.0 / np.sqrt(max(spec.rank, 1)))
        return scale if spec.mixed is None else scale * self.inputs[spec.name].scale
