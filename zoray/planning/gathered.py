"""What ZeRO-3's gathering takes in a forward, on tensors without memory.

DeepSpeed gathers the parameters of a module before its call and lets go of them after it (see `zoray.memory.zero3`). A
single one arrives in its place; several arrive in one buffer and are copied out of it, so that they are there twice for
that moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def part_of(tensor: torch.Tensor, shards: int) -> int:
    """Elements of a parameter that each of so many processes holds: all hold as many as the first."""
    return -(-tensor.numel() // shards)


@contextmanager
def gathering(model: nn.Module, shards: int) -> Iterator[None]:
    """The model's forwards in this block take what those of one of `shards` processes would.

    The parameters stay whole throughout, and what takes memory lies beside them; they have what `zoray.partitioned`
    looks at in a partitioned one.
    """
    whole = list(model.parameters())
    for parameter in whole:
        _Gathered(parameter, shards)
    with ExitStack() as stack:
        for module in model.modules():
            own: list[Any] = list(module.parameters(recurse=False))
            if own:
                stack.callback(module.register_forward_pre_hook(_before(own, shards)).remove)
                stack.callback(module.register_forward_hook(_after(own)).remove)
        try:
            yield
        finally:
            for parameter in whole:
                for name in _NAMES:
                    delattr(parameter, name)


_NAMES = ("ds_tensor", "ds_status", "ds_active_sub_modules", "all_gather", "partition", "zoray_gathered")


class _Gathered:
    """Makes a parameter look partitioned, and holds what it takes while it is gathered."""

    def __init__(self, parameter: Any, shards: int) -> None:
        self.parameter, self.elements = parameter, part_of(parameter, shards) * shards
        self.held: torch.Tensor | None = None
        parameter.ds_tensor, parameter.ds_active_sub_modules = None, set()
        parameter.all_gather, parameter.partition = self.gather, self.part
        parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
        parameter.zoray_gathered = self

    def gather(self, elements: int | None = None) -> None:
        """Take the memory of the whole, or of so many elements."""
        self.held = torch.empty(elements or self.elements, dtype=self.parameter.dtype)
        self.parameter.ds_status.name = "AVAILABLE"

    def part(self) -> None:
        """Let go of it."""
        self.held = None
        self.parameter.ds_status.name = "NOT_AVAILABLE"


def _before(own: list[Any], shards: int) -> Any:
    def gather(module: nn.Module, inputs: object) -> None:
        missing = [parameter.zoray_gathered for parameter in own if parameter.zoray_gathered.held is None]
        arriving = torch.empty(0)
        if len(missing) > 1:
            arriving = torch.empty(sum(each.elements for each in missing), dtype=own[0].dtype)
        for each in missing:
            each.gather(each.parameter.numel() if len(arriving) else None)
        for parameter in own:
            parameter.ds_active_sub_modules.add(id(module))

    return gather


def _after(own: list[Any]) -> Any:
    def release(module: nn.Module, inputs: object, output: object) -> None:
        for parameter in own:
            parameter.ds_active_sub_modules.discard(id(module))
            if not parameter.ds_active_sub_modules and parameter.zoray_gathered.held is not None:
                parameter.partition()

    return release
