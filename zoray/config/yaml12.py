"""YAML with the places of its keys, and with numbers as YAML 1.2 has them.

PyYAML follows YAML 1.1, where `1e-6` is a string and the second of two equal keys silently wins. Here it is a number,
and equal keys are an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zoray.errors import ConfigError

_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-6` as a number."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the strings `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # PyYAML folds the rarer line breaks (NEL, LS) into spaces unless they are escaped.
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)


@dataclass(slots=True)
class Document:
    """A file's data with what is needed to say where a key stands."""

    file: Path
    data: dict[str, Any]
    lines: dict[tuple[str, ...], int]
    overridden: dict[tuple[str, ...], str] = field(default_factory=dict)

    def replace(self, keys: tuple[str, ...], override: str) -> None:
        """Notes that what the file said at a key and below it was replaced by an override."""
        self.lines = {known: line for known, line in self.lines.items() if known[: len(keys)] != keys}
        self.overridden[keys] = override

    def where(self, keys: tuple[str, ...]) -> str:
        """The place of a key: the override that gave it, else file and line (that of the section if it is absent)."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.overridden:
                return f"the command line, {self.overridden[keys[:length]]}"
            if keys[:length] in self.lines:
                return f"{self.file}, line {self.lines[keys[:length]]}"
        return str(self.file)


def read_document(file: Path) -> Document:
    """Parses a file that must hold one mapping; raises ConfigError with the line of what is wrong."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"There is no configuration file {file}.", advice="See configs/ for some to start from."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration cannot be read: {error}.", where=str(file)) from error
    lines: dict[tuple[str, ...], int] = {}
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                "The configuration is not a mapping of keys to values.",
                where=str(file),
                advice="Write lines of the form `key: value`; see docs/configuration.md.",
            )
        _note_lines(node, (), lines, file)
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"The file is not YAML: {_problem(error)}.", where=f"{file}{_line(error)}") from error
    finally:
        loader.dispose()
    return Document(file, data, lines)


def parse_value(value: str, override: str) -> Any:
    """The value of an override."""
    try:
        return yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"The value is not YAML: {_problem(error)}.",
            where=f"the command line, {override}",
            advice="Put a value with special characters in quotes, inside those of the shell.",
        ) from error


def dump_yaml(data: dict[str, Any]) -> str:
    """Block style, keys in their order, lists and text as `read_document` reads them back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _note_lines(node: yaml.Node, prefix: tuple[str, ...], lines: dict[tuple[str, ...], int], file: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        keys = (*prefix, str(key.value))
        line = key.start_mark.line + 1
        if keys in lines:
            raise ConfigError(
                f"The key {'.'.join(keys)} is given twice.",
                where=f"{file}, lines {lines[keys]} and {line}",
                advice="Keep one of them.",
            )
        lines[keys] = line
        _note_lines(value, keys, lines, file)


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error)


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""
