"""Reading rows of text from JSONL, JSON, CSV and Parquet: a file, or a folder of files in the order of their names.

A path may be local or on an object store (`zoray.stores`), and may end in `.gz`, `.bz2` or `.zst` on top of JSONL, JSON
or CSV. CSV and Parquet are parsed by `pyarrow`; JSON by the standard library, because every row then keeps its line and
its types are never guessed (text that looks like a date stays text).
"""

from __future__ import annotations

import contextlib
import csv as _csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet

from zoray import stores
from zoray.config import CellKind
from zoray.errors import DataError

ROWS_PER_CHUNK = 1024
_BLOCK_BYTES = 16 << 20
_PACKED = (".gz", ".bz2", ".zst")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_INTEGER = re.compile(r"[+-]?\d+")
_CHECK = "Check task.train and task.eval."


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a data set.

    Attributes:
        path: as it is shown; `s3://bucket/...` on a store.
        size: in bytes.
        version: what changes with its content: the time of change in nanoseconds since 1970, or a store's own tag.
        filesystem, inner: where it is opened.
    """

    path: str
    size: int
    version: str
    filesystem: pa.fs.FileSystem
    inner: str

    @property
    def suffix(self) -> str:
        """The suffix that tells the format."""
        return _suffix(self.path)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one file; `first_row` counts from 1, a CSV's header not counted."""

    file: str
    first_row: int
    columns: dict[str, list[Any]]

    def place(self, position: int) -> str:
        """The place of a row, for messages."""
        return f"{self.file}, row {self.first_row + position}"

    def where(self, position: int, column: str) -> str:
        """The place of a cell, for messages."""
        return f"{self.place(position)}, column {column}"


def find_files(path: str) -> list[DataFile]:
    """The files of a data set.

    Raises:
        DataError: the path does not exist, is of no known format, or is a folder without such files.
    """
    try:
        filesystem, inner = stores.opened(path)
        with stores.faults(path):
            info = filesystem.get_file_info(inner)
            if info.type == pa.fs.FileType.NotFound and stores.is_uri(path):
                # Of a bucket that is missing, only a listing says so.
                with contextlib.suppress(FileNotFoundError):
                    filesystem.get_file_info(pa.fs.FileSelector(inner))
            folder = info.type == pa.fs.FileType.Directory
            infos = filesystem.get_file_info(pa.fs.FileSelector(inner)) if folder else [info]
    except stores.StoreError as error:
        raise DataError(f"{error.what}.", where=stores.shown(path), advice=error.advice or _CHECK) from error
    if info.type == pa.fs.FileType.NotFound:
        raise DataError("There is no such file or folder.", where=stores.shown(path), advice=_CHECK)
    files = [each for each in infos if each.type == pa.fs.FileType.File and not each.base_name.startswith((".", "_"))]
    known = [each for each in files if _suffix(each.path) in _SUFFIXES]
    if not known:
        found = ", ".join(sorted(each.base_name for each in files)[:5]) or "nothing"
        raise DataError(
            f"There is no file of a known format; found: {found}.",
            where=stores.shown(path),
            advice=f"Known are {', '.join(_SUFFIXES)}, the first five also with {', '.join(_PACKED)}.",
        )
    known.sort(key=lambda each: each.path)
    scheme = f"{path.partition('://')[0]}://" if stores.is_uri(path) else ""
    try:
        versions = stores.versions(filesystem, known)
    except stores.StoreError as error:
        raise DataError(f"{error.what}.", where=stores.shown(path), advice=error.advice) from error
    return [
        DataFile(f"{scheme}{each.path}", each.size or 0, version, filesystem, each.path)
        for each, version in zip(known, versions, strict=True)
    ]


def read_rows(files: list[DataFile], columns: Mapping[str, CellKind]) -> Iterator[Chunk]:
    """Streams the named columns of all files, every cell checked.

    Raises:
        DataError: a file that cannot be parsed, a column that is not there, a cell that is null or of another type.
    """
    for file in files:
        first_row = 1
        for rows in _read_file(file, columns):
            chunk = Chunk(file.path, first_row, rows)
            for column, kind in columns.items():
                _check(chunk, column, kind)
            first_row += len(next(iter(rows.values())))
            yield chunk


def _read_file(file: DataFile, columns: Mapping[str, CellKind]) -> Iterator[dict[str, list[Any]]]:
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json}
    try:
        yield from readers.get(file.suffix, _read_jsonl)(file, columns)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        if stores.is_uri(file.path) and (fault := stores.reached(file.path, error)) is not None:
            raise DataError(f"{fault.what}.", where=file.path, advice=fault.advice) from error
        # Arrow's own errors are ValueErrors and OSErrors; what is wrong is in their first line.
        raise DataError(f"The file cannot be read: {str(error).splitlines()[0]}.", where=file.path) from error


def _read_parquet(file: DataFile, columns: Mapping[str, CellKind]) -> Iterator[dict[str, list[Any]]]:
    with file.filesystem.open_input_file(file.inner) as stream:
        reader = pa.parquet.ParquetFile(stream)
        _require(columns, reader.schema_arrow.names, file.path)
        for batch in reader.iter_batches(batch_size=ROWS_PER_CHUNK, columns=list(columns)):
            yield {name: batch.column(name).to_pylist() for name in columns}


def _read_csv(file: DataFile, columns: Mapping[str, CellKind]) -> Iterator[dict[str, list[Any]]]:
    delimiter = "\t" if file.suffix == ".tsv" else ","
    with file.filesystem.open_input_stream(file.inner) as stream:
        header = next(_csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter), [])
    _require(columns, header, file.path)
    with file.filesystem.open_input_stream(file.inner) as stream:
        reader = pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())
            ),
        )
        for block in reader:
            for start in range(0, block.num_rows, ROWS_PER_CHUNK):
                part = block.slice(start, ROWS_PER_CHUNK)
                rows = {name: part.column(name).to_pylist() for name in columns}
                yield {name: _csv_labels(rows[name]) if columns[name] == "label" else rows[name] for name in columns}


def _csv_labels(cells: list[Any]) -> list[Any]:
    """CSV has no types: what looks like an integer is one, and nothing at all is a null."""
    return [int(cell) if _INTEGER.fullmatch(cell) else (cell or None) for cell in cells]


def _read_json(file: DataFile, columns: Mapping[str, CellKind]) -> Iterator[dict[str, list[Any]]]:
    """A `.json` file is one array of objects, or JSONL under another name."""
    with file.filesystem.open_input_stream(file.inner) as stream:
        text = stream.read().decode("utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _objects_to_rows(_parse_lines(text.split("\n"), file.path), columns, file.path)
        return
    try:
        objects = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"This is not JSON: {error.msg}.", where=f"{file.path}, line {error.lineno}") from error
    yield from _objects_to_rows(enumerate(objects, start=1), columns, file.path)


def _read_jsonl(file: DataFile, columns: Mapping[str, CellKind]) -> Iterator[dict[str, list[Any]]]:
    with file.filesystem.open_input_stream(file.inner) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig", newline="\n")
        yield from _objects_to_rows(_parse_lines(lines, file.path), columns, file.path)


def _parse_lines(lines: Any, path: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.isspace() or not line:
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"This line is not JSON: {error.msg}.",
                where=f"{path}, line {number}, character {error.colno}",
                advice="JSONL has one whole object per line.",
            ) from error


def _objects_to_rows(
    objects: Iterator[tuple[int, Any]], columns: Mapping[str, CellKind], path: str
) -> Iterator[dict[str, list[Any]]]:
    rows: dict[str, list[Any]] = {name: [] for name in columns}
    count = 0
    for number, each in objects:
        if not isinstance(each, dict):
            raise DataError(f"This is not an object but {_short(each)}.", where=f"{path}, row {number}")
        if not all(name in each for name in columns):
            _require(columns, list(each), f"{path}, row {number}")
        for name, cells in rows.items():
            cells.append(each[name])
        count += 1
        if count % ROWS_PER_CHUNK == 0:
            yield rows
            rows = {name: [] for name in columns}
    if count % ROWS_PER_CHUNK:
        yield rows


def _require(columns: Mapping[str, CellKind], present: list[str], where: str) -> None:
    for name in columns:
        if name not in present:
            raise DataError(
                f"There is no column {name!r}; there are {', '.join(map(repr, present)) or 'none'}.",
                where=where,
                advice="Set task.text_column (or the key of the column meant) to one of them.",
            )
        if present.count(name) > 1:
            raise DataError(f"There are {present.count(name)} columns {name!r}.", where=where, advice="Rename one.")


def _check(chunk: Chunk, column: str, kind: CellKind) -> None:
    accepted = {"text": (str,), "label": (str, int), "value": (str, int, float, bool, list, dict)}[kind]
    for position, cell in enumerate(chunk.columns[column]):
        if type(cell) in accepted:
            continue
        wanted = {"text": "text", "label": "an integer or text", "value": "text, a number, a list or a mapping"}[kind]
        what = "The cell is null" if cell is None else f"The cell is {_short(cell)} ({type(cell).__name__})"
        raise DataError(f"{what}; it must be {wanted}.", where=chunk.where(position, column), advice="Clean the data.")


def _suffix(path: str) -> str:
    pure = PurePosixPath(path)
    return PurePosixPath(pure.stem).suffix if pure.suffix in _PACKED else pure.suffix


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
