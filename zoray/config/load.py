"""Reading and writing configuration files, and saying what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zoray.config.faults import explain
from zoray.config.schema import RunConfig
from zoray.config.yaml12 import Document, dump_yaml, parse_value, read_document
from zoray.errors import ConfigError

_PATH_KEYS = (("model",), ("task", "train"), ("task", "eval"))


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a configuration file.

    Args:
        path: a YAML file.
        overrides: `a.b=value`, the value in YAML; they win over the file.

    Relative paths of the model and the data that exist beside the file are taken from there, else from the working
    directory; for those given as overrides it is the other way round. What exists in neither place stays as written
    (a name on the hub; or missing, which is reported when it is used).

    Raises:
        ConfigError: all that is wrong with the file, with keys, lines and the nearest right spelling.
    """
    file = Path(path)
    document = read_document(file)
    given = [_override(document, text) for text in overrides]
    folders = [file.resolve().parent, Path.cwd()]
    for keys in _PATH_KEYS:
        from_command = any(keys[: len(key)] == key for key in given)
        _resolve(document.data, keys, folders[::-1] if from_command else folders)
    try:
        return RunConfig.model_validate(document.data)
    except ValidationError as error:
        raise explain(error, document) from None


def with_memory(config: RunConfig, text: str) -> RunConfig:
    """The configuration with another section `memory`, given as YAML.

    Raises:
        ConfigError: it is no such section.
    """
    given = f"--memory {text}"
    data = {**config.model_dump(mode="json"), "memory": parse_value(text, given)}
    document = Document(Path("the command line"), data, {}, {("memory",): given})
    try:
        return RunConfig.model_validate(document.data)
    except ValidationError as error:
        raise explain(error, document) from None


def dump(config: RunConfig) -> str:
    """The configuration as YAML, with every key; `load` reads it back to an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def _override(document: Document, text: str) -> tuple[str, ...]:
    """Writes one `a.b=value` into the document's data and returns its key."""
    name, separator, value = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not separator or not all(keys):
        raise ConfigError(
            f"{text!r} is not an override.", where="the command line", advice="Write key=value or a.b=value."
        )
    section = document.data
    for depth, key in enumerate(keys[:-1], start=1):
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            outer = ".".join(keys[:depth])
            raise ConfigError(
                f"{text!r} sets a key inside {outer}, which is {inner!r} and has no keys.",
                where=f"the command line, and {document.where(keys[:depth])}",
                advice=f"Give the whole of it: {outer}='{{{'.'.join(keys[depth:])}: ...}}'.",
            )
        section = inner
    section[keys[-1]] = parse_value(value, text)
    document.replace(keys, text)
    return keys


def _resolve(data: dict[str, Any], keys: tuple[str, ...], folders: Sequence[Path]) -> None:
    """Makes the path at `keys` absolute if it exists in one of the folders."""
    section: Any = data
    for key in keys[:-1]:
        section = section.get(key) if isinstance(section, dict) else None
    value = section.get(keys[-1]) if isinstance(section, dict) else None
    if not isinstance(value, str) or not value:
        return
    for folder in folders:
        candidate = folder / Path(value).expanduser()
        if os.path.exists(candidate):
            # Only the folder is resolved: a file that is a link may owe its suffix to its own name.
            section[keys[-1]] = str(candidate.parent.resolve() / candidate.name)
            return
