"""The exact update: theta <- decay * theta - eta * sum_k c_k z_k, bit for bit the same everywhere.

S = sum_k c_k z_k is a product of small integers (`product`), but for a scale that goes into eta;
delta = round32(eta * S), and W = round(round(decay * W) - delta): separately rounded IEEE operations, never a fused
multiply-add. Half-precision weights are rounded stochastically (`rounding`). Every element depends on its own address
alone, so any split into row blocks, flat shards or groups of commits gives the same bits.

Where directions move only some weights (`coverage`), S has terms of those steps only in which the parameter's group is
moved, and is 0 for a weight whose magnitude, when the commit's step begins, is above the limit. Decay acts on all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from zoray import fused
from zoray.commits import Commit
from zoray.directions import Bytes, Directions, unpack_signs
from zoray.inputs import LARGEST_MIXED
from zoray.layout import BLOCK_BYTES, ParamSpec, Side
from zoray.product import factor_dtype, integer_product
from zoray.rounding import rounding_key, stochastic_round

BLOCK_ELEMENTS = 1 << 19
"""Weights updated at a time: the block and its int32 sum stay in cache, also over a whole group of commits."""

DEVICE_BLOCK_ELEMENTS = 1 << 23
"""The same on an accelerator, where starting the kernels for a small block takes longer than they do."""

_FUSED_BLOCK_ELEMENTS = 1 << 25
"""The same where an update is one kernel, which needs nothing of the block's size but its sum."""

Signs = npt.NDArray[np.int8]
_Outer = tuple[torch.Tensor, torch.Tensor]

_GROUP_TERMS = 1024
_PACKED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """A flat part of a parameter: elements start, start+1, ... in row-major order, as a contiguous 1-D tensor."""

    spec: ParamSpec
    values: torch.Tensor
    start: int = 0

    @property
    def stop(self) -> int:
        """Index behind the last element."""
        return self.start + self.values.numel()


def apply_commits(
    directions: Directions, shards: Iterable[Shard], commits: Sequence[Commit], block_elements: int | None = None
) -> None:
    """Apply commits in order, in place: parameter by parameter, all commits of a group for one block at a time.

    Args:
        directions: the run's directions.
        shards: the weights this process holds, gone through once for each group of commits; float32, bfloat16 or
            float16.
        commits: consecutive commits, the first being the one after the weights' step.
        block_elements: weights per block, by default as suits the device; any value gives the same bits.
    """
    with torch.no_grad():
        for group in groups_of(commits, directions):
            for shard in shards:
                group.apply(shard, block_elements)


@dataclass(frozen=True, slots=True)
class _Block:
    """A rectangle [row, row+height) x [col, col+width) of a parameter; `values` is its (height, width) view."""

    spec: ParamSpec
    values: torch.Tensor
    row: int
    col: int


def _blocks(shard: Shard, block_elements: int) -> Iterator[_Block]:
    """Rectangles that tile a flat shard: a first partial row, blocks of whole rows, a last partial row."""
    spec, position, stop = shard.spec, shard.start, shard.stop
    while position < stop:
        row, col = divmod(position, spec.cols)
        if col == 0 and stop - position >= spec.cols and spec.cols <= block_elements:
            height = min((stop - position) // spec.cols, max(1, block_elements // spec.cols))
            width = spec.cols
        else:
            height, width = 1, min(spec.cols - col, stop - position, block_elements)
        begin = position - shard.start
        yield _Block(spec, shard.values[begin : begin + height * width].view(height, width), row, col)
        position += height * width


class Group:
    """Consecutive commits, ready to be applied to any shard of any parameter.

    Args:
        directions: the run's directions.
        commits: consecutive commits with at most about a thousand terms (see `groups_of`).
    """

    def __init__(self, directions: Directions, commits: Sequence[Commit]) -> None:
        self.directions, self._commits = directions, commits
        self._sums: dict[int | None, _Sums] = {}

    def apply(self, shard: Shard, block_elements: int | None = None) -> None:
        """Apply all commits of the group to a shard, block by block and in place; no gradients may be recorded."""
        self._of(shard.spec).apply(shard, block_elements)

    def changes(self, spec: ParamSpec) -> bool:
        """Whether any of the commits may change a weight of the parameter."""
        return bool(self._of(spec).commits)

    def _of(self, spec: ParamSpec) -> _Sums:
        """The commits as they are for all parameters that are moved at the same steps."""
        group = self.directions.coverage.group(spec)
        if group not in self._sums:
            self._sums[group] = _Sums(self.directions, self._commits, group)
        return self._sums[group]


class _Sums:
    """Consecutive commits with the bits of those of their directions that move a group of parameters.

    Args:
        directions, commits: see `Group`.
        group: number of the group; None for parameters that are moved at every step.
    """

    def __init__(self, directions: Directions, commits: Sequence[Commit], group: int | None) -> None:
        self.directions = directions
        touches = partial(directions.coverage.touches, group)
        moving = [(c, [t for t in c.terms if t[2] != 0 and touches(t[0])]) for c in commits]
        moving = [(c, terms) for c, terms in moving if (terms and c.eta != 0.0) or c.decay != 1.0]
        self.commits, terms = [c for c, _ in moving], [terms for _, terms in moving]
        self.addresses = [(step, index) for term in terms for step, index, _ in term]
        self.coefficients = np.array([c for term in terms for *_, c in term], dtype=np.int8)
        borders = np.cumsum([0, *map(len, terms)])
        self.ranges = [slice(int(a), int(b)) for a, b in pairwise(borders)]
        total = directions.layout.total_bytes
        fits = len(self.addresses) * total <= _PACKED_BYTES and directions.layout.kind in ("inputs", "rank")
        self._packed = directions.read(self.addresses, 0, total) if fits else None

    def apply(self, shard: Shard, block_elements: int | None = None) -> None:
        """Apply the commits to a shard of a parameter of the group; see `Group`."""
        if not self.commits:
            return
        spec, device = shard.spec, shard.values.device
        limited = spec.name in self.directions.coverage.limits
        in_one = not limited and fused.usable(device, shard.values.dtype)
        if block_elements is None and device.type == "cpu":
            block_elements = BLOCK_ELEMENTS
        elif block_elements is None:
            block_elements = _FUSED_BLOCK_ELEMENTS if in_one else DEVICE_BLOCK_ELEMENTS
        etas = [float(np.float32(commit.eta) * self.directions.scale(spec)) for commit in self.commits]
        if self.directions.layout.kind == "gaussian":
            for block in _blocks(shard, block_elements):
                for commit, eta, terms in zip(self.commits, etas, self.ranges, strict=True):
                    _step(block, commit, eta, self._normal_sum(terms, block), self.directions)
            return
        one_each = max(spec.rank, 1) == 1 and all(terms.stop - terms.start == 1 for terms in self.ranges)
        single = one_each and not limited and not in_one
        dtype = torch.float32 if single else factor_dtype(device)
        right, mixed = None, None
        if spec.rank:
            right = _factor(self._right(spec), device, dtype)
            mixed = self._mixed(spec, "rows") if spec.mixed == "rows" else None
        else:
            block_elements = min(block_elements, max(1, _PACKED_BYTES // max(1, len(self.addresses))))
        if spec.mixed is not None and shard.values.dtype == torch.float32:
            _drop_signs_of_zeros(shard.values)
        for block in _blocks(shard, block_elements):
            left, across = self._factors(block, right, mixed, dtype)
            updates: Iterator[torch.Tensor | _Outer] = self._sums(left, across, spec)
            if single:
                updates = self._outer(left, across, etas, spec)
            for commit, eta, update in zip(self.commits, etas, updates, strict=True):
                _step(block, commit, eta, update, self.directions)

    def _bytes(self, start: int, stop: int) -> Bytes:
        if self._packed is not None:
            return self._packed[:, start:stop]
        return self.directions.read(self.addresses, start, stop)

    def _factors(
        self, block: _Block, right: torch.Tensor | None, mixed: Signs | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """a_k of the block's rows, (terms * rank, height), and b_k of its columns, (terms * rank, width).

        One of the two, whose elements are signs, is multiplied with c_k: a_k, or b_k where a_k is `mixed`.
        """
        spec, (height, width), device = block.spec, block.values.shape, block.values.device
        if right is None:
            across = self._signs(spec.offset, spec.col_bytes, 1, block.col, width)
            return _factor(self.coefficients[:, None, None], device, dtype), _factor(across, device, dtype)
        columns = right[:, block.col : block.col + width]
        if mixed is not None:
            return _factor(mixed[:, :, block.row : block.row + height], device, dtype), columns
        left = self._signs(spec.offset, spec.row_bytes, spec.rank, block.row, height)
        left *= self.coefficients[:, None, None]
        return _factor(left, device, dtype), columns

    def _right(self, spec: ParamSpec) -> Signs:
        """b_k of all columns, int8 (terms, rank, cols), multiplied with c_k where a_k is mixed."""
        if spec.mixed == "cols":
            return self._mixed(spec, "cols")
        right = self._signs(spec.offset + spec.rank * spec.row_bytes, spec.col_bytes, spec.rank, 0, spec.cols)
        if spec.mixed == "rows":
            right *= self.coefficients[:, None, None]
        return right

    def _mixed(self, spec: ParamSpec, side: Side) -> Signs:
        """The mixed factors, int8 (terms, rank, rows or cols)."""
        piece = spec.row_bytes if side == "rows" else spec.col_bytes
        start = spec.offset + (0 if side == "rows" else spec.rank * spec.row_bytes)
        packed = self._bytes(start, start + spec.rank * piece)
        return self.directions.unpacked(packed.reshape(len(self.addresses), spec.rank, piece), spec, side)

    def _sums(self, left: torch.Tensor, right: torch.Tensor, spec: ParamSpec) -> Iterator[torch.Tensor]:
        """S of each commit, (height, width) of integers."""
        rank, largest = max(spec.rank, 1), 127 * (1 if spec.mixed is None else LARGEST_MIXED)
        for terms in self.ranges:
            rows = slice(terms.start * rank, terms.stop * rank)
            yield integer_product(left[rows].t(), right[rows], largest)

    def _outer(
        self, left: torch.Tensor, right: torch.Tensor, etas: Sequence[float], spec: ParamSpec
    ) -> Iterator[_Outer]:
        """-eta S of each commit, which has one term, as two factors (height, 1) and (1, width).

        One of them is of signs. eta * c times the other is rounded here, and its product with a sign is exact: fused
        into the sum or not, the bits are the same.
        """
        scales = torch.tensor(etas, dtype=torch.float32, device=left.device).neg_()[:, None]
        if spec.mixed is None:
            return zip((left * scales)[:, :, None], right[:, None, :], strict=True)
        # Their c_k is on the signs so far.
        c = torch.from_numpy(self.coefficients).to(left)[:, None]
        left, right = (left / c, right * c * scales) if spec.mixed == "cols" else (left * c * scales, right / c)
        return zip(left[:, :, None], right[:, None, :], strict=True)

    def _signs(self, start: int, piece_bytes: int, pieces: int, first: int, count: int) -> Signs:
        """Signs first..first+count-1 of each of `pieces` adjacent pieces, int8 (terms, pieces, count)."""
        align = 8 * BLOCK_BYTES
        low = first // align * align
        low_byte, high_byte = low // 8, min(piece_bytes, -(-(first + count) // align) * BLOCK_BYTES)
        if pieces == 1:
            packed = self._bytes(start + low_byte, start + high_byte)[:, None, :]
        else:
            whole = self._bytes(start, start + pieces * piece_bytes)
            packed = whole.reshape(len(self.addresses), pieces, piece_bytes)[:, :, low_byte:high_byte]
        return unpack_signs(packed, first - low + count)[:, :, first - low :]

    def _normal_sum(self, terms: slice, block: _Block) -> torch.Tensor:
        """sum_k c_k z_k of Gaussian directions, float32, added in the order of the terms (not exact)."""
        total = torch.zeros_like(block.values, dtype=torch.float32)
        for address, coefficient in zip(self.addresses[terms], self.coefficients[terms], strict=True):
            z = self.directions.normals(address, block.spec)[block.col : block.col + total.numel()]
            total.add_(torch.from_numpy(z * np.float32(coefficient)).view_as(total).to(total.device))
        return total


def _factor(signs: Signs, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(terms, rank, count) as one row per outer product, where and as the product wants it."""
    return torch.from_numpy(signs).flatten(0, 1).to(device, dtype)


def _step(block: _Block, commit: Commit, eta: float, update: torch.Tensor | _Outer, directions: Directions) -> None:
    """One commit on one block; `update` is S, or the two factors of -eta S if all of the block's weights are moved."""
    values, spec = block.values, block.spec
    start = block.row * spec.cols + block.col
    if (
        isinstance(update, torch.Tensor)
        and spec.name not in directions.coverage.limits
        and fused.usable(values.device, values.dtype)
    ):
        key = rounding_key(directions.run_seed, commit.step, spec.name)
        fused.subtract(values, _float32(update), eta, commit.decay, key, start, drop=spec.mixed is not None)
        return
    exact = values.float()  # the weights themselves where they are float32
    # Before anything is done to them: the probes saw these.
    mask = directions.coverage.mask(spec, exact)
    if commit.decay != 1.0:
        exact.mul_(commit.decay)
    if spec.mixed is not None and (commit.decay != 1.0 or values.dtype != torch.float32):
        # Tiny weights have become zeros; a sum or difference in float32 makes no -0.0 out of others.
        _drop_signs_of_zeros(exact)
    if isinstance(update, torch.Tensor):
        change = _float32(update).mul_(eta)
        exact.sub_(change if mask is None else change.mul_(mask))
    else:
        exact.addcmul_(*update)
    if values.dtype != torch.float32:
        key = rounding_key(directions.run_seed, commit.step, spec.name)
        values.copy_(stochastic_round(exact, values.dtype, key, start))


def _drop_signs_of_zeros(weights: torch.Tensor) -> None:
    """Makes 0.0 of -0.0. Where a mixed factor is 0, S is a zero whose sign depends on how it is computed.

    Added to 0.0 it changes nothing, to -0.0 it would.
    """
    weights.add_(0.0)


def _float32(total: torch.Tensor) -> torch.Tensor:
    """The integers of `total` (int32 or float32) as float32, in the same memory: `total` is lost."""
    return total if total.dtype == torch.float32 else total.view(torch.float32).copy_(total)


def groups_of(commits: Sequence[Commit], directions: Directions) -> Iterator[Group]:
    """Groups of commits whose directions fit in memory together, in order."""
    rank = max((spec.rank for spec in directions.layout.specs), default=1)
    batch: list[Commit] = []
    terms = 0
    for commit in commits:
        count = len(commit.terms) * max(rank, 1)
        if batch and terms + count > _GROUP_TERMS:
            yield Group(directions, batch)
            batch, terms = [], 0
        batch.append(commit)
        terms += count
    if batch:
        yield Group(directions, batch)


def whole(parameters: Mapping[str, torch.Tensor], directions: Directions) -> list[Shard]:
    """One shard per parameter, viewing its storage; the parameters must be contiguous."""
    return [Shard(spec, parameters[spec.name].detach().view(-1)) for spec in directions.layout.specs]
