"""Object stores: what names one, and how files are listed, fetched and put there, through `pyarrow.fs`.

A URI may say how its store is reached (`s3://bucket/key?endpoint_override=localhost:9000&scheme=http&region=...`); what
it does not say comes from the environment, as everywhere (`AWS_ENDPOINT_URL`, `AWS_REGION`, the usual chain of
credentials). A store that does not answer is given up after about half a minute. `pyarrow.fs` is imported late: most of
the command line does without it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_CONNECT, _SILENCE, _ATTEMPTS = 5.0, 10.0, 3
"""Seconds to connect, seconds without a byte, and attempts; the three together bound a call to a store that is gone."""

_AT_ONCE = 8
_CHUNK = 16 << 20
_CREDENTIALS = (
    "Give every machine credentials for it: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or a role of the "
    "machine (Google Cloud: application default credentials)."
)
_ADDRESS = "Check the address, the region, the network and AWS_ENDPOINT_URL."
_REFUSALS = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "INVALID_CLIENT_TOKEN", "SIGNATURE", "TOKEN", "403", "401")
_UNREACHED = ("NETWORK_CONNECTION", "SERVICE_UNAVAILABLE", "REQUEST_TIMEOUT", "curl", "CURL", "UNAVAILABLE")


class StoreError(OSError):
    """A store that cannot be reached, or refuses what is asked of it; says why, and what to do about it."""

    def __init__(self, what: str, advice: str | None = None) -> None:
        super().__init__(what)
        self.what, self.advice = what, advice


@dataclass(frozen=True, slots=True)
class Entry:
    """A file below a URI: its name relative to that, its size in bytes, and what changes with its content."""

    name: str
    size: int
    version: str


def is_uri(path: str) -> bool:
    """Whether a path is the URI of a store, and not a local one or a name on the hub."""
    return "://" in path


def shown(uri: str) -> str:
    """The URI as it may be printed and kept: without keys, and without the way to the store."""
    if not is_uri(uri):
        return uri
    scheme, _, rest = uri.partition("://")
    keys, _, place = rest.partition("?")[0].rpartition("@")
    # A secret may have slashes in it, and a key an @; only keys and secrets are parted by a colon.
    return f"{scheme}://{place if ':' in keys else rest.partition('?')[0]}"


def has_keys(uri: str) -> bool:
    """Whether a URI has credentials in it."""
    place = uri.partition("?")[0]
    return is_uri(uri) and shown(uri) != place


def join(uri: str, *names: str) -> str:
    """The URI of something below another one."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path="/".join((parts.path.rstrip("/"), *names))))


def cache_root() -> Path:
    """`$ZORAY_CACHE`, or `~/.cache/zoray`: what a machine's processes share, and anyone may delete between runs."""
    root = os.environ.get("ZORAY_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "zoray"


def opened(path: str) -> tuple[Any, str]:
    """A `pyarrow.fs.FileSystem`, and the path within it; a path that is no URI is a local one.

    Raises:
        StoreError: the URI is wrong, or the region of its bucket cannot be found.
    """
    from pyarrow import fs

    if not is_uri(path):
        return fs.LocalFileSystem(), path
    with faults(path):
        filesystem, inner = fs.FileSystem.from_uri(_patient(path))
        if isinstance(filesystem, fs.S3FileSystem):
            # Only its constructor takes these; without them a server that accepts and says nothing holds for minutes.
            _, (options,) = filesystem.__reduce__()
            options |= {"connect_timeout": _CONNECT, "request_timeout": _SILENCE}
            attempts = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
            filesystem = fs.S3FileSystem(**_given(options), retry_strategy=attempts)
    return filesystem, inner


@contextmanager
def faults(uri: str) -> Iterator[None]:
    """Say what a store refuses in words.

    Raises:
        StoreError: in place of what `pyarrow` raises.
    """
    import pyarrow as pa

    try:
        yield
    except StoreError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise _explained(uri, error) from error


def versions(filesystem: Any, files: Sequence[Any]) -> list[str]:
    """What changes with the content of each of some files (`FileInfo`): the store's own tag, else the time of change.

    Raises:
        StoreError: they cannot be asked for.
    """
    from pyarrow import fs

    def version(info: Any) -> str:
        told = {}
        if not isinstance(filesystem, fs.LocalFileSystem):
            with faults(info.path), filesystem.open_input_file(info.path) as file:
                told = {_text(key).lower(): _text(value) for key, value in (file.metadata() or {}).items()}
        # Times are whole seconds in most stores: too coarse to tell two uploads of equal size apart.
        return told.get("etag") or told.get("generation") or str(info.mtime_ns or 0)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(version, files))


def reached(uri: str, error: Exception) -> StoreError | None:
    """What an error while reading says of the store; None if it is about the content."""
    network = "AWS Error" in str(error) or "google::cloud" in str(error)
    return _explained(uri, error) if network else None


def names(uri: str) -> list[str]:
    """Names of all files below a URI, relative to it, in order; none if there is nothing.

    Raises:
        StoreError: the store cannot be asked, or has no such bucket.
    """
    _, inner, files = _below(uri)
    return [each.path[len(inner) + 1 :] for each in files]


def entries(uri: str) -> list[Entry]:
    """As `names`, with what else there is to know of each.

    Raises:
        StoreError: as `names`.
    """
    filesystem, inner, files = _below(uri)
    tags = versions(filesystem, files)
    return [Entry(each.path[len(inner) + 1 :], each.size, tag) for each, tag in zip(files, tags, strict=True)]


def _below(uri: str) -> tuple[Any, str, list[Any]]:
    """The file system, the path within it without a slash at its end, and the `FileInfo` of all files below that."""
    from pyarrow import fs

    filesystem, inner = opened(uri)
    found = []
    # Where nothing is allowed to be there, a bucket may be missing too without a word: so it is not allowed.
    with faults(uri), suppress(FileNotFoundError):
        found = filesystem.get_file_info(fs.FileSelector(inner, recursive=True))
    files = sorted((each for each in found if each.type == fs.FileType.File), key=lambda each: str(each.path))
    return filesystem, inner.rstrip("/"), files


def fetch(uri: str, names: Sequence[str], folder: Path) -> None:
    """Copy files below a URI into a local folder, under their names there.

    Raises:
        StoreError: one cannot be had.
        OSError: the folder cannot be written.
    """
    from pyarrow import fs

    filesystem, inner = opened(uri)

    def copy(name: str) -> None:
        there, here = f"{inner.rstrip('/')}/{name}", folder / name
        here.parent.mkdir(parents=True, exist_ok=True)
        with faults(uri):
            fs.copy_files(there, str(here), filesystem, fs.LocalFileSystem(), chunk_size=_CHUNK, use_threads=False)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(copy, names))


def put(folder: Path, uri: str, last: str) -> None:
    """Copy all files of a local folder below a URI, `last` after all others: stores cannot rename.

    Whoever looks for `last` finds all files or none.

    Raises:
        StoreError: one cannot be written; what was written before stays.
    """
    from pyarrow import fs

    filesystem, inner = opened(uri)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with faults(uri):
        for path in sorted(files, key=lambda path: path == folder / last):
            there = f"{inner.rstrip('/')}/{path.relative_to(folder).as_posix()}"
            if isinstance(filesystem, fs.LocalFileSystem):
                filesystem.create_dir(there.rpartition("/")[0], recursive=True)
            fs.copy_files(str(path), there, fs.LocalFileSystem(), filesystem, chunk_size=_CHUNK, use_threads=False)


def read(uri: str) -> bytes:
    """A file's content.

    Raises:
        StoreError: it cannot be had.
    """
    filesystem, inner = opened(uri)
    with faults(uri), filesystem.open_input_stream(inner) as file:
        return bytes(file.read())


def remove(uri: str, first: str) -> None:
    """Delete everything below a URI, the file `first` before all others.

    Raises:
        StoreError: it cannot be deleted.
    """
    filesystem, inner = opened(uri)
    with faults(uri):
        for delete, path in ((filesystem.delete_file, f"{inner}/{first}"), (filesystem.delete_dir, inner)):
            with suppress(FileNotFoundError):
                delete(path)


def check_writable(uri: str) -> None:
    """See that files can be written below a URI, and deleted, by doing so.

    Raises:
        StoreError: they cannot.
    """
    from pyarrow import fs

    filesystem, inner = opened(uri)
    probe = f"{inner.rstrip('/')}/.zoray-{secrets.token_hex(4)}"
    with faults(uri):
        if isinstance(filesystem, fs.LocalFileSystem):
            filesystem.create_dir(inner, recursive=True)
        with filesystem.open_output_stream(probe) as file:
            file.write(b"zoray\n")
        filesystem.delete_file(probe)


def check_readable(uri: str) -> None:
    """See that there is something at a URI.

    Raises:
        StoreError: there is not, or it cannot be asked for.
    """
    from pyarrow import fs

    filesystem, inner = opened(uri)
    with faults(uri):
        if filesystem.get_file_info(inner).type == fs.FileType.NotFound:
            raise FileNotFoundError(inner)


def _patient(uri: str) -> str:
    """Google's client retries for a quarter of an hour unless the URI says otherwise."""
    parts = urlsplit(uri)
    if parts.scheme not in ("gs", "gcs") or "retry_limit_seconds" in parts.query:
        return uri
    limit = f"retry_limit_seconds={_SILENCE * _ATTEMPTS:g}"
    return urlunsplit(parts._replace(query=f"{parts.query}&{limit}" if parts.query else limit))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Options of an S3FileSystem, without those that stand for nothing."""
    proxy = options["proxy_options"]
    return {
        name: value
        for name, value in options.items()
        if value not in (None, "") and not (name == "proxy_options" and not proxy["host"])
    }


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _explained(uri: str, error: Exception) -> StoreError:
    import pyarrow as pa

    text = (str(error).splitlines() or [""])[0]
    about = text.partition("Details: ")[2] or text.partition("AWS Error ")[2] or text
    about = about.partition(" (Request ID")[0].rstrip(". ")
    about = about if len(about) <= 200 else f"{about[:197]}..."
    if "NO_SUCH_BUCKET" in text:
        return StoreError(f"There is no bucket of the name in {shown(uri)}", "Check the name, and AWS_ENDPOINT_URL.")
    if isinstance(error, pa.ArrowInvalid | pa.ArrowNotImplementedError):
        return StoreError(
            f"The address {shown(uri)} cannot be opened" + (f": {about}" if not has_keys(uri) else ""),
            "Write s3://bucket/key or gs://bucket/key.",
        )
    if isinstance(error, FileNotFoundError):
        return StoreError(f"There is nothing at {shown(uri)}")
    if any(word in text for word in _UNREACHED):
        return StoreError(f"The store of {shown(uri)} cannot be reached: {about}", _ADDRESS)
    if any(word in text for word in _REFUSALS):
        return StoreError(f"The store of {shown(uri)} refuses access: {about}", _CREDENTIALS)
    return StoreError(f"{shown(uri)} cannot be used: {about}")
