"""Loading a model that is larger than memory: each parameter goes to a file as soon as a module has it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from zoray.errors import ResourceError
from zoray.memory.streamed import Streaming
from zoray.partitioned import mark_spilled

_ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def streamed_loading(streaming: Streaming) -> Iterator[None]:
    """Models that are loaded in this block never are in memory whole, if they will be streamed from a file.

    What will be streamed from memory is loaded into it, and moved from there unit by unit: that takes no more than one
    unit besides. For a file each parameter is written to another file, likewise without a name, and mapped from there,
    until `Streamed` puts it where it belongs.

    Args:
        streaming: as given to `Streamed`.

    Raises:
        ResourceError: that disk is full.
    """
    if streaming.folder is None:
        yield
        return
    before = os.environ.get(_ASYNC)
    # transformers would read ahead in threads, as fast as it can, what is written more slowly here.
    os.environ[_ASYNC] = "1"
    try:
        with tempfile.TemporaryFile(dir=streaming.folder, buffering=0) as file:
            hook = register_module_parameter_registration_hook(_Spill(file.fileno()))
            try:
                yield
            finally:
                hook.remove()
    finally:
        if before is None:
            del os.environ[_ASYNC]
        else:
            os.environ[_ASYNC] = before


class _Spill:
    """Called when a module is given a parameter."""

    def __init__(self, file: int) -> None:
        self._file, self._end = file, 0

    def __call__(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if type(parameter) is not nn.Parameter or parameter.device.type != "cpu" or not parameter.numel():
            return
        if not mark_spilled(parameter):
            return
        values = parameter.detach().contiguous()
        size = values.numel() * values.element_size()
        place: Any = self._place(size)
        mapped = torch.frombuffer(place, dtype=values.dtype, count=values.numel()).view(values.shape)
        mapped.copy_(values)
        parameter.data = mapped

    def _place(self, size: int) -> mmap.mmap:
        """That many bytes of the file; the mapping keeps it when it is closed."""
        try:
            os.posix_fallocate(self._file, self._end, size)
        except OSError as error:
            raise ResourceError(
                f"There is no room for weights in files: {error.strerror}.",
                where="memory.nvme_path",
                advice="name a folder on a disk that has room for all weights of the model, twice while it is loaded",
            ) from error
        start, self._end = self._end, self._end + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        return mmap.mmap(self._file, size, offset=start)
