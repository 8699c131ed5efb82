"""Where a replica's weights live: here, resident in the memory of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from zoray.commits import Commit
from zoray.digest import digest
from zoray.directions import Directions
from zoray.layout import trainable_parameters
from zoray.update import apply_commits, whole

_ALIGNMENT = 64


class Resident:
    """All trainable weights in one process's memory, on whatever device the model is on.

    Args:
        model: its parameters are given aligned, contiguous storage (the values do not change): the rounding of a
            matrix product can depend on the alignment of its operands, and must not depend on where a file put them.
        directions: the run's directions.
    """

    def __init__(self, model: nn.Module, directions: Directions) -> None:
        align(model)
        self._parameters = trainable_parameters(model)
        self._directions = directions
        self._shards = whole(self._parameters, directions)

    def apply(self, commits: Sequence[Commit]) -> None:
        """Apply consecutive commits in place."""
        apply_commits(self._directions, self._shards, commits)

    def digest(self) -> int:
        """Digest of the trainable weights (64 bits)."""
        return digest((name, p) for name, p in self._parameters.items())

    def state(self) -> dict[str, torch.Tensor]:
        """The trainable weights by name: views, not copies."""
        return {name: p.detach() for name, p in self._parameters.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Overwrite the trainable weights with those of a snapshot of the same layout."""
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(state[name])


def align(model: nn.Module) -> None:
    """Give every parameter and buffer that needs it contiguous storage on a 64-byte border."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and (tensor.data_ptr() % _ALIGNMENT or not tensor.is_contiguous()):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        elif not tensor.is_contiguous():
            tensor.data = tensor.data.contiguous()
