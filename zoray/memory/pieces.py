"""The weights of a memory as files that any other memory reads, however many processes hold either.

One process writes `weights.safetensors`, each parameter in its own shape. Of several, process i of n writes
`part-i-of-n.safetensors` with its flat shards, and where each begins. The files are mapped, not read: a process touches
no more of them than it asks for.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zoray.digest import tensor_digest
from zoray.layout import ParamSpec
from zoray.memory.base import Memory
from zoray.update import Shard

WHOLE = "weights.safetensors"
_MASK = (1 << 64) - 1


def write(folder: Path, memory: Memory) -> Path:
    """Write what this process holds to a file of its own in `folder`, which is returned.

    Raises:
        OSError: the storage is full or gone.
    """
    if memory.size == 1:
        path = folder / WHOLE
        save_file({shard.spec.name: _kept(memory, shard).view(shard.spec.shape) for shard in memory.shards()}, path)
        return path
    path = folder / f"part-{memory.rank}-of-{memory.size}.safetensors"
    values, starts = {}, {}
    for shard in memory.shards():
        values[shard.spec.name], starts[shard.spec.name] = _kept(memory, shard), shard.start
    save_file(values, path, {"starts": json.dumps(starts)})
    return path


def _kept(memory: Memory, shard: Shard) -> torch.Tensor:
    return shard.values.clone() if memory.fleeting else shard.values.cpu()


class Pieces:
    """The weights in a folder that `write` has filled; a context manager, and a `zoray.memory.base.Reader`.

    Raises:
        ValueError, OSError, SafetensorError: there are none, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        whole = folder / WHOLE
        paths = [whole] if whole.exists() else sorted(folder.glob("part-*-of-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"{whole} is not there, nor parts of it")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for path in paths:
            file: Any = safe_open(path, framework="pt")
            starts = json.loads((file.metadata() or {}).get("starts", "{}"))
            for name in file.keys():  # noqa: SIM118 (it is not a dictionary)
                values = file.get_tensor(name)
                self._shapes[name] = tuple(values.shape) if path == whole else ()
                self._pieces[name].append((int(starts.get(name, 0)), values.view(-1)))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pieces.clear()

    def check(self, specs: Iterable[ParamSpec]) -> None:
        """Raises ValueError unless every parameter is there, of its shape and dtype, without a gap."""
        for spec in specs:
            position = 0
            for start, values in self._pieces.get(spec.name, ()):
                dtype = str(values.dtype).removeprefix("torch.")
                if start != position or dtype != spec.dtype:
                    raise ValueError(f"{spec.name} is {dtype} from element {start} on")
                position += values.numel()
            if position != spec.numel or self._shapes[spec.name] not in ((), spec.shape):
                raise ValueError(f"{spec.name} has {position} elements, in the shape {self._shapes.get(spec.name)}")

    def __call__(self, spec: ParamSpec, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a parameter in row-major order, as they are in the files."""
        found = [
            values[max(start - first, 0) : stop - first]
            for first, values in self._pieces[spec.name]
            if first < stop and start < first + values.numel()
        ]
        return found[0] if len(found) == 1 else torch.cat([*found, torch.empty(0, dtype=getattr(torch, spec.dtype))])

    def digest(self, shards: Iterable[Shard]) -> int:
        """Digest of the elements that some shards have, as they are here."""
        parts = (tensor_digest(s.spec.name, self(s.spec, s.start, s.stop), s.start) for s in shards)
        return sum(parts) & _MASK

    def whole_digest(self) -> int:
        """Digest of everything in the files."""
        pieces = ((name, start, values) for name, found in self._pieces.items() for start, values in found)
        return sum(tensor_digest(name, values, start) for name, start, values in pieces) & _MASK
