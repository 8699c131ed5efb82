"""Parameters that are whole and in their place only for the time of their module's call.

A streamed parameter (`zoray.memory.streamed`) has a home, which brings it to the device; all of it is this process's.
ZeRO-3 gives each of R processes the elements [rank P, (rank + 1) P) of every parameter, P = ceil(numel / R), and leaves
an empty tensor in the parameter's place; DeepSpeed's hooks make it whole for the time of its module's call (Rajbhandari
et al. 2020, ZeRO). What a parameter was is written on it by DeepSpeed, so nothing here imports DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch

_HOLDER = "zoray"
"""Stands among the modules that are using a parameter, which keeps DeepSpeed from taking it apart."""


class Part(NamedTuple):
    """Elements start, start+1, ... of a tensor in row-major order: those this process holds, as a 1-D tensor."""

    values: torch.Tensor
    start: int


class Home(Protocol):
    """Where the values of a streamed parameter are between two uses; it is written on the parameter as `zoray_home`."""

    def hold(self) -> None:
        """Bring the values to their place, and keep them there."""

    def let_go(self) -> None:
        """What `hold` was called for is over."""

    def part(self, tensor: torch.Tensor, writing: bool) -> AbstractContextManager[torch.Tensor]:
        """A parameter's values as a 1-D tensor, for the time of the block (see `own_part`)."""


def home_of(tensor: torch.Tensor | None) -> Home | None:
    """The home of a streamed parameter; None for any other."""
    found: Home | None = getattr(tensor, "zoray_home", None)
    return found


def mark_spilled(parameter: torch.Tensor) -> bool:
    """Note that a parameter's values were put into a file while its model is loaded; False if they were before."""
    known = is_spilled(parameter)
    parameter.zoray_spilled = True  # type: ignore[attr-defined]
    return not known


def is_spilled(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are in a file, from where its memory will take them; they are aligned there."""
    return hasattr(tensor, "zoray_spilled")


def is_partitioned(tensor: torch.Tensor | None) -> bool:
    """Whether this process holds no more than a part of the tensor."""
    return hasattr(tensor, "ds_tensor")


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter, partitioned or not."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_gathered(parameter: Any) -> bool:
    """Whether a partitioned parameter is whole at the moment: gathered, and no longer on its way."""
    return bool(parameter.ds_status.name == "AVAILABLE")


@contextmanager
def own_part(tensor: Any, writing: bool = False) -> Iterator[Part]:
    """The part of a parameter that is this process's own, as a view; all of one that is not partitioned.

    The parts of all processes are disjoint and make up the parameter. What lies behind its last element, in the part of
    the last process, is nobody's. A part that lies in a file is read for the time of the block.

    Args:
        tensor: the parameter; a partitioned one must not be gathered, if it is written to.
        writing: the view may be written to.
    """
    home = home_of(tensor)
    if home is not None:
        with home.part(tensor, writing) as values:
            yield Part(values, 0)
        return
    if not is_partitioned(tensor):
        yield Part(tensor.detach().reshape(-1), 0)
        return
    swapper = tensor.nvme_swapper if tensor.ds_tensor.status.name == "NOT_AVAILABLE" else None
    if swapper is not None:
        swapper.swap_in([tensor], async_op=False)
    size = tensor.ds_tensor.ds_numel
    start = min(tensor.ds_zero_partition_rank * size, tensor.ds_numel)
    try:
        yield Part(tensor.ds_tensor.detach().view(-1)[: min(size, tensor.ds_numel - start)], start)
    finally:
        if swapper is not None:
            # The first writes the file and lets go of the buffer, the second only lets go of it.
            (swapper.swap_out_and_release if writing else swapper.remove_partition_and_release_buffers)([tensor])


def holds_buffers(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether what is not partitioned counts as this process's own: all have the same, and the first counts."""
    return all(tensor.ds_zero_partition_rank == 0 for tensor in tensors if hasattr(tensor, "ds_zero_partition_rank"))


@contextmanager
def kept_whole(parameters: Iterable[torch.Tensor]) -> Iterator[Callable[[], None]]:
    """Keep parameters from being taken away or apart, from the call of what this yields to the end of the block.

    They are in their place for their module's call; this lets their use go on after that, without another all-gather.
    """
    everything = list(parameters)
    partitioned: list[Any] = [parameter for parameter in everything if is_partitioned(parameter)]
    homes = [home for parameter in everything if (home := home_of(parameter)) is not None]
    held: list[Home] = []

    def keep() -> None:
        for parameter in partitioned:
            parameter.ds_active_sub_modules.add(_HOLDER)
        for home in homes:
            home.hold()
            held.append(home)

    try:
        yield keep
    finally:
        for home in held:
            home.let_go()
        for parameter in partitioned:
            parameter.ds_active_sub_modules.discard(_HOLDER)
            if is_gathered(parameter) and not parameter.ds_active_sub_modules:
                parameter.partition()


@contextmanager
def altered(parameter: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Gather a partitioned parameter and let it have other values, made from its own, for the time of the block.

    The process's own part is not touched. All processes must do this together.
    """
    with kept_whole([parameter]) as keep:
        keep()
        parameter.all_gather()
        before = parameter.data
        parameter.data = change(before)
        try:
            yield
        finally:
            parameter.data = before
