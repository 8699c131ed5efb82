"""All of a replica's weights, resident in the memory of one process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from zoray.directions import Directions
from zoray.layout import trainable_parameters
from zoray.memory.base import Memory
from zoray.update import Shard, whole

ALIGNMENT = 64
"""Bytes; torch begins every storage of its own on such a border."""


class Resident(Memory):
    """All trainable weights in one process's memory, on whatever device the model is on.

    Args:
        model: its parameters are given aligned, contiguous storage (the values do not change): the rounding of a
            matrix product can depend on the alignment of its operands, and must not depend on where a file put them.
        directions: the run's directions.
    """

    def __init__(self, model: nn.Module, directions: Directions) -> None:
        super().__init__(directions)
        align(model)
        self._shards = whole(trainable_parameters(model), directions)

    def shards(self, writing: bool = False) -> Iterator[Shard]:
        """One shard per parameter: all of it."""
        return iter(self._shards)

    def settle(self) -> None:
        """There are no copies."""


def align(model: nn.Module) -> None:
    """Give every parameter and buffer that needs it contiguous storage on a 64-byte border."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = aligned(tensor.data)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it is contiguous and, on a processor, begins on a 64-byte border; else a copy that does."""
    if tensor.device.type == "cpu" and (tensor.data_ptr() % ALIGNMENT or not tensor.is_contiguous()):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()
