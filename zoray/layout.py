"""The layout of a model's trainable parameters: which bits of a direction belong to which parameter.

Every direction is one bit string. Each parameter owns a fixed range of it, so that any machine, and any shard of a
parameter, reads the same signs for the same weights. The layout depends on names and shapes alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from zoray.errors import ConfigError, ModelError
from zoray.partitioned import shape_of

DirectionKind = Literal["inputs", "rank", "rademacher", "gaussian"]

Side = Literal["rows", "cols"]
"""Which dimension of a matrix its inputs are along."""

MIXED_BYTES = 16
"""Bytes that say which inputs a factor is mixed from, and with which signs (see `zoray.inputs`)."""

BLOCK_BYTES = 32
"""One Philox 4x64 block. Every piece of a direction starts on such a border."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One trainable parameter, seen as a matrix of `rows` x `cols` in row-major order.

    A `rank` of 0 means dense signs (or normals), one per element, and then `rows` is 1.
    `offset` and `row_bytes`/`col_bytes` say where its pieces lie in the direction's byte string: first `rank` pieces
    of `row_bytes` (the left factors a), then `rank` pieces of `col_bytes` (the right factors b). The factors of the
    `mixed` side, if there is one, are mixed from inputs; their pieces say how, a block before the signs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: int
    cols: int
    rank: int
    offset: int
    row_bytes: int
    col_bytes: int
    mixed: Side | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    @property
    def end(self) -> int:
        """First byte behind this parameter's range, before alignment."""
        return self.offset + max(self.rank, 1) * self.col_bytes + self.rank * self.row_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """All trainable parameters, sorted by name, and the length of a direction's byte string."""

    kind: DirectionKind
    specs: tuple[ParamSpec, ...]
    total_bytes: int

    @property
    def numel(self) -> int:
        """Number of trainable weights."""
        return sum(spec.numel for spec in self.specs)

    @property
    def identity(self) -> str:
        """Digest (hex) of names, shapes, dtypes and ranges: equal if and only if two replicas can share a ledger."""
        description = [self.kind, *({k: v for k, v in asdict(spec).items() if v is not None} for spec in self.specs)]
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that require a gradient, by name in sorted order; a tied parameter appears once."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(sorted(named.items()))


def make_layout(
    parameters: Mapping[str, torch.Tensor],
    kind: DirectionKind = "rank",
    rank: int = 1,
    inputs: Mapping[str, Side] | None = None,
) -> Layout:
    """Lay the parameters' ranges out one behind the other, each on a block border.

    Args:
        parameters: the trainable parameters by name, of float32, bfloat16 or float16.
        kind: "rank" for z = (1/sqrt(r)) sum_i a_i b_i^T on matrices and dense signs on vectors; "inputs" for the same
            with factors that are mixed from inputs where there are any; "rademacher" for dense signs everywhere;
            "gaussian" for dense standard normals everywhere.
        rank: r of the first two kinds.
        inputs: by parameter, which side of its matrix inputs are along; of kind "inputs".

    Raises:
        ModelError: no parameter, or one of a type that cannot be updated.
    """
    if rank < 1:
        raise ConfigError(f"The rank of a direction must be at least 1, not {rank}.", where="direction.rank")
    if not parameters:
        raise ModelError("The model has no trainable parameter.", advice="check `trainable` in the configuration")
    specs: list[ParamSpec] = []
    offset = 0
    for name, tensor in sorted(parameters.items()):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(
                f"Parameter {name!r} is {tensor.dtype}; only float32, bfloat16 and float16 can be trained.",
                advice="choose another dtype, or leave this parameter out of `trainable`",
            )
        shape = shape_of(tensor)
        rows, cols = matrix_view(shape)
        factored = kind in ("inputs", "rank") and rank * (rows + cols) < rows * cols
        if not factored:
            rows, cols = 1, math.prod(shape)
        mixed = (inputs or {}).get(name) if factored and kind == "inputs" else None
        spec = ParamSpec(
            name=name,
            shape=shape,
            dtype=str(tensor.dtype).removeprefix("torch."),
            rows=rows,
            cols=cols,
            rank=rank if factored else 0,
            offset=offset,
            row_bytes=_piece(rows, mixed == "rows") if factored else 0,
            col_bytes=_piece(cols, mixed == "cols"),
            mixed=mixed,
        )
        specs.append(spec)
        offset = spec.end
    return Layout(kind, tuple(specs), offset)


def matrix_view(shape: tuple[int, ...]) -> tuple[int, int]:
    """The two-way grouping of the dimensions that is closest to square: (2, 3, 4) -> (6, 4), (5,) -> (1, 5).

    A rank-1 direction then needs the fewest bits, and a fused mixture-of-experts tensor keeps a left factor per expert
    and output feature.
    """
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(len(shape) + 1)]
    return min(splits, key=lambda split: (split[0] + split[1], split[0]))


def _piece(signs: int, mixed: bool) -> int:
    """Bytes of a factor's piece: its signs, and before them, on a block of its own, what it is mixed from."""
    return _aligned(signs) + (_aligned(8 * MIXED_BYTES) if mixed else 0)


def _aligned(bits: int) -> int:
    return -(-bits // (8 * BLOCK_BYTES)) * BLOCK_BYTES
