"""Parameters whose values are somewhere else, and are brought in by whatever use is made of them.

Between two calls of its module a streamed parameter keeps its shape, dtype and device, and has no values: it is of the
class `Away`, as a parameter of one of torch's lazy modules is of `UninitializedParameter` until it has a shape. What
code reads without touching values is answered; any other use fetches them first, so a use nobody foresaw is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from zoray.partitioned import Home, home_of

_VIEWS = frozenset({torch.Tensor.data, torch.Tensor.T, torch.Tensor.mT, torch.Tensor.H, torch.Tensor.mH})
"""Properties that lead to values; the others are of the shape, the dtype and the device."""

_METADATA = frozenset(
    {
        torch.Tensor.__len__,
        torch.Tensor.dim,
        torch.Tensor.element_size,
        torch.Tensor.is_complex,
        torch.Tensor.is_contiguous,
        torch.Tensor.is_floating_point,
        torch.Tensor.ndimension,
        torch.Tensor.nelement,
        torch.Tensor.new_empty,
        torch.Tensor.new_full,
        torch.Tensor.new_ones,
        torch.Tensor.new_zeros,
        torch.Tensor.numel,
        torch.Tensor.requires_grad_,
        torch.Tensor.size,
        torch.Tensor.untyped_storage,
    }
)


class Away(nn.Parameter):
    """A parameter that has no values at the moment."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called instead of every torch function that is given one."""
        homes: list[Home] = []
        if _reads_values(func):
            homes = list(_homes([*args, *(kwargs or {}).values()]))
        try:
            for home in homes:
                # None must be sent away again to make room for another.
                with torch._C.DisableTorchFunction():
                    home.hold()
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        finally:
            for home in homes:
                home.let_go()


def send_away(parameter: nn.Parameter, nothing: torch.Tensor) -> None:
    """Take a parameter's values from it.

    Args:
        nothing: one element of the parameter's dtype, on the device it computes on: it stands in its place.
    """
    parameter.data = nothing.expand(parameter.shape)
    parameter.__class__ = Away


def bring_back(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Give a parameter values, of its own shape."""
    parameter.__class__ = nn.Parameter
    parameter.data = values


def _reads_values(func: Any) -> bool:
    if type(func).__name__ == "method-wrapper":
        return func.__self__ in _VIEWS
    return func not in _METADATA


def _homes(values: Iterable[Any]) -> Iterator[Home]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _homes(value)
        elif isinstance(value, nn.Parameter) and (home := home_of(value)) is not None:
            yield home
