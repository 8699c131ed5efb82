"""Tensors that are counted without being there: a model's forwards, run for the memory that they would take.

torch's fake tensors have a shape, a dtype, a device and a lifetime, and no memory; every operation runs on them with
the kernel that the real ones would get. What the proof of the fast paths (`zoray.proof`) reads off them is answered as
an ordinary model would: numbers agree, and two tensors are equal if they are the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoray.directions import Address, Bytes, Directions
from zoray.layout import ParamSpec

_aten: Any = torch.ops.aten


class Shadow:
    """A model from the device "meta", made to run on tensors without memory. The model is changed.

    Args:
        model: see `zoray.models.blank_model`.
        padded: whether its batches are padded, so that attention needs a mask.

    Attributes:
        tensors: the model's own.
    """

    def __init__(self, model: nn.Module, padded: bool) -> None:
        self.model, self.padded = model, padded
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        made: dict[int, torch.Tensor] = {}
        with self._mode:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            made.setdefault(id(tensor), _without_memory(tensor))
                            tensors[name] = made[id(tensor)]  # type: ignore[assignment]
        self.tensors = list(made.values())

    @contextmanager
    def running(self, *modes: TorchDispatchMode) -> Iterator[None]:
        """Tensors made in this block have no memory; the modes see the operations on them."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for mode in (self._mode, *modes, _Answers(self.padded)):
                stack.enter_context(mode)
            yield


class ShadowDirections(Directions):
    """Directions whose bits are all alike: they have their size, and are not drawn."""

    def read(self, addresses: Sequence[Address], start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of several directions; see `Directions`."""
        return np.zeros((len(addresses), stop - start), np.uint8)

    def normals(self, address: Address, spec: ParamSpec) -> npt.NDArray[np.float32]:
        """Normals of one parameter; see `Directions`."""
        return np.zeros(spec.numel, np.float32)

    def dense(self, address: Address, spec: ParamSpec) -> torch.Tensor:
        """z of one parameter beside what it is made of; see `Directions`."""
        return torch.empty(spec.numel, dtype=torch.int8).float().view(spec.shape)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what can only be known of values.

    All positions of a mask are chosen, so that as much is computed as ever could be.
    """

    def __init__(self, padded: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.padded = padded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            # The one question that models ask of a batch is whether a mask leaves everything as it is.
            return not self.padded if args[0].dtype == torch.bool else 0
        if func is _aten.equal.default:
            return args[0].untyped_storage()._cdata == args[1].untyped_storage()._cdata
        if func is _aten.nonzero.default:
            return _all_places(args[0])
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        if func is _aten._grouped_mm.default:
            # Its shape rule for tensors without memory knows bfloat16 alone.
            return args[0].new_empty((*args[0].shape[:-1], args[1].shape[-1]))
        return func(*args, **kwargs)


def _places(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """A mask as the indices of what it chooses, a tensor for each of its dimensions; other indices as they are."""
    masks = (torch.bool, torch.uint8)
    return _all_places(index).unbind(1) if index is not None and index.dtype in masks else (index,)


def _all_places(mask: torch.Tensor) -> torch.Tensor:
    return torch.empty((mask.numel(), mask.dim()), dtype=torch.int64)
