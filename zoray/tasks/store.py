"""Tokenised data in one memory-mapped Arrow file: made once, shared by all replicas of a machine.

The file lies in a cache folder under the fingerprint of what it was made from. It is made under a lock, written beside
its place and renamed into it, so that a reader finds a whole file or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock

from zoray.errors import DataError
from zoray.stores import cache_root
from zoray.tasks.source import DataFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_METADATA = b"zoray"
_log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int32]


@dataclass(slots=True)
class TokenBatch:
    """Some examples on their way into a store: tokens of each, and one integer per example and extra column."""

    tokens: list[list[int]]
    extras: dict[str, list[int]] = field(default_factory=dict)


Facts = dict[str, Any]
"""What is known once all is tokenised (warnings, labels), kept in the file as JSON."""

Rows = Callable[[Facts], Iterator[TokenBatch]]
"""Produces a data set and notes its facts; it is called only if the store does not exist."""


class TokenStore:
    """Read access to a tokenised data set; its pages are shared with every process that opened the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = pa.memory_map(str(path))
        reader = pa.ipc.open_file(self._map)
        if not reader.num_record_batches:
            raise pa.ArrowInvalid("no record batches")
        last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        self.facts: Facts = json.loads(last.custom_metadata[_METADATA])
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches - 1)]
        self._offsets = [_view(each.column("tokens").offsets) for each in batches]
        self._values = [_view(each.column("tokens").values) for each in batches]
        names = [name for name in reader.schema.names if name != "tokens"]
        self._extras = {name: [_view(each.column(name)) for each in batches] for name in names}
        self._starts = np.cumsum([0, *(each.num_rows for each in batches)])

    def __len__(self) -> int:
        """Number of examples."""
        return int(self._starts[-1])

    def tokens(self, index: int) -> Ints:
        """The tokens of an example, int32, a view of the file."""
        batch, row = self._locate(index)
        start, stop = self._offsets[batch][row : row + 2]
        return self._values[batch][start:stop]

    def extra(self, name: str, index: int) -> int:
        """An example's integer in an extra column."""
        batch, row = self._locate(index)
        return int(self._extras[name][batch][row])

    def column(self, name: str) -> Ints:
        """The integers of all examples in an extra column, int32."""
        return np.concatenate(self._extras[name])

    @property
    def lengths(self) -> Ints:
        """Tokens of each example, int32."""
        return np.concatenate([np.diff(each) for each in self._offsets])

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all examples: equal data sets have equal digests, wherever their files lie."""
        return str(self.facts["digest"])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return batch, index - int(self._starts[batch])


def open_store(fingerprint: str, rows: Rows, extras: tuple[str, ...] = ()) -> TokenStore:
    """The store of that fingerprint, made from `rows` if it does not exist yet.

    Raises:
        DataError: the cache folder cannot be written, or whatever `rows` raises.
    """
    folder = cache_folder()
    path = folder / f"{fingerprint}.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{fingerprint}.lock"):
            if path.exists():
                with contextlib.suppress(pa.ArrowException, OSError, KeyError, TypeError, ValueError):
                    return TokenStore(path)
                _log.warning("%s is damaged; it is made again", path)
            for left_behind in folder.glob(f"{fingerprint}.*.tmp"):
                left_behind.unlink()
            _write(path, rows, extras)
            return TokenStore(path)
    except OSError as error:
        raise DataError(
            f"The tokenised data cannot be written: {error}.",
            where=str(path),
            advice="Set ZORAY_CACHE to a folder with room.",
        ) from error


def cache_folder() -> Path:
    """`$ZORAY_CACHE/tokenized`, or `~/.cache/zoray/tokenized`; it may be deleted whenever no run uses it."""
    return cache_root() / "tokenized"


def fingerprint(files: list[DataFile], tokenizer: PreTrainedTokenizerBase, keys: Mapping[str, Any]) -> str:
    """Names a store by its files (path, size, version), its tokenizer and the keys it was made with."""
    described = {
        "format": _FORMAT,
        "files": [(each.path, each.size, each.version) for each in files],
        "tokenizer": _tokenizer_digest(tokenizer),
        "keys": dict(keys),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256(f"{type(tokenizer).__name__} {tokenizer.special_tokens_map}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # These two record the last call, not the tokenizer.
        state.pop("truncation", None)
        state.pop("padding", None)
        digest.update(json.dumps(state, sort_keys=True).encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _write(path: Path, rows: Rows, extras: tuple[str, ...]) -> None:
    list_type = pa.list_(pa.int32())
    schema = pa.schema([("tokens", list_type), *((name, pa.int32()) for name in extras)])
    digest = hashlib.sha256()
    facts: Facts = {"examples": 0, "tokens": 0, "largest_token": -1, "warnings": []}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                for batch in rows(facts):
                    arrays = [pa.array(batch.tokens, list_type)]
                    arrays += [pa.array(batch.extras[name], pa.int32()) for name in extras]
                    _note(facts, digest, arrays)
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                facts["digest"] = digest.hexdigest()
                empty = pa.record_batch([pa.array([], each.type) for each in schema], schema=schema)
                writer.write_batch(empty, custom_metadata={_METADATA: json.dumps(facts).encode()})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _note(facts: Facts, digest: Any, arrays: list[pa.Array]) -> None:
    values = _view(arrays[0].values)
    facts["examples"] += len(arrays[0])
    facts["tokens"] += len(values)
    facts["largest_token"] = max(facts["largest_token"], int(values.max(initial=-1)))
    for array in (np.diff(_view(arrays[0].offsets)), values, *(_view(each) for each in arrays[1:])):
        digest.update(array.astype("<i4").tobytes())


def _view(array: pa.Array) -> Ints:
    view: Ints = array.to_numpy(zero_copy_only=True)
    return view
