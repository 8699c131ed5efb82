"""Counting the bytes of tensors that are alive, as the operations make them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that storages made within the block have had at the same time.

    One that no allocator gave does not count: it is mapped from a file, and its pages are the kernel's to drop. Nor
    does what a library makes for itself, or another thread. Tensors without memory (`zoray.planning.shadow`) count
    as what they stand for.

    Args:
        there: the tensors that are there before; by default they are looked for among all objects, which takes a while.
    """

    def __init__(self, there: Iterable[torch.Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = 0
        self._there = there
        self._known = set[int]()

    def __enter__(self) -> Any:
        for found in gc.get_objects() if self._there is None else self._there:
            if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
                self._note(found.untyped_storage(), 0)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._note(storage, storage.nbytes() if storage.resizable() else 0)
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
