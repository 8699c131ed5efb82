"""A model on an object store, as a folder of this machine: downloaded once, shared by all its processes.

The folder lies in the cache under what the store's listing says of its files, so a model that is changed there is
another folder. It is filled under a lock, beside its place, and renamed into it: a reader finds a whole model or none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from zoray import stores
from zoray.errors import ModelError
from zoray.models.words import some

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".onnx", ".gguf")
_log = logging.getLogger(__name__)


def fetched(uri: str) -> Path:
    """The folder of this machine that has the model; downloads it if there is none yet.

    Raises:
        ModelError: the store cannot be reached, has no model there, or the cache has no room for it.
    """
    folder = stores.cache_root() / "models"
    pointer = folder / f"{_digest(f'{stores.shown(uri)}?{urlsplit(uri).query}')}.last"
    try:
        files = listed(uri)
    except _Unreached as error:
        if (place := _before(pointer)) is None:
            raise
        _log.warning("%s; the model is taken from %s, as it was when this machine saw it last", error.what, place)
        return place
    key = _digest(json.dumps([(each.name, each.size, each.version) for each in files]))
    place = folder / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            if not place.is_dir():
                _download(uri, files, place)
            _note(pointer, key)
    except stores.StoreError as error:
        raise _Unreached(f"{error.what}.", where="model", advice=error.advice) from error
    except OSError as error:
        raise ModelError(
            f"The model cannot be downloaded to this machine: {error}.",
            where=str(folder),
            advice="Set ZORAY_CACHE to a folder with room.",
        ) from error
    return place


def listed(uri: str) -> list[stores.Entry]:
    """The files of the model that are needed, in the order of their names.

    Raises:
        ModelError: the store cannot be reached, or there is no model.
    """
    try:
        files = stores.entries(uri)
    except stores.StoreError as error:
        raise _Unreached(f"{error.what}.", where="model", advice=error.advice) from error
    require_config([each.name for each in files], stores.shown(uri))
    safe = any(each.name.endswith(".safetensors") and "/" not in each.name for each in files)
    return [each for each in files if _needed(each.name, safe)]


def require_config(names: list[str], folder: str) -> None:
    """Refuse a folder of files of these names that is no model.

    Raises:
        ModelError: it has no config.json.
    """
    if "config.json" not in names:
        adapter = "It is an adapter of peft: merge it into its base model (merge_and_unload) and save that."
        raise ModelError(
            f"The folder {folder} has no config.json; it has {some(names) if names else 'nothing'}.",
            where="model",
            advice=adapter if "adapter_config.json" in names else "Name a folder made by save_pretrained.",
        )


class _Unreached(ModelError):
    """The store does not answer, or not with what was asked for."""


def _needed(name: str, safe: bool) -> bool:
    """Not the weights of checkpoints in subfolders, and those of other formats only where there are no safetensors."""
    weights = name.endswith(_WEIGHTS)
    return not weights or ("/" not in name and (name.endswith(".safetensors") or not safe))


def _download(uri: str, files: list[stores.Entry], place: Path) -> None:
    for left_behind in place.parent.glob(f".{place.name}.*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    size, free = sum(each.size for each in files), shutil.disk_usage(place.parent).free
    if size > free:
        raise OSError(f"it has {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        stores.fetch(uri, [each.name for each in files], temporary)
        for each in files:
            if (found := (temporary / each.name).stat().st_size) != each.size:
                raise OSError(f"{each.name} has {found} bytes instead of {each.size}; was it changed meanwhile?")
            with (temporary / each.name).open("rb") as file:
                os.fsync(file.fileno())
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _before(pointer: Path) -> Path | None:
    """The folder that had the model of a URI the last time; None if there is none."""
    try:
        place = pointer.parent / pointer.read_text()
    except OSError:
        return None
    return place if place.is_dir() else None


def _note(pointer: Path, key: str) -> None:
    temporary = pointer.with_name(f"{pointer.name}.{os.getpid()}")
    temporary.write_text(key)
    temporary.rename(pointer)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
