"""Pydantic's errors in the user's terms: the key, its line, what was given, and the nearest right spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from zoray.config.schema import RunConfig
from zoray.config.sections import (
    ReplicaRange,
    ResidentMemory,
    StreamedMemory,
    Zero3Memory,
)
from zoray.config.tasks import TASKS, task_tag
from zoray.config.trainable import TRAINABLE_KINDS, TRAINABLE_TAGS, trainable_kind
from zoray.config.yaml12 import Document
from zoray.errors import ConfigError

_KINDS: dict[str, dict[str, type[BaseModel]]] = {
    "task": dict(TASKS),
    "memory": {"resident": ResidentMemory, "zero3": Zero3Memory, "streamed": StreamedMemory},
}
"""Sections whose keys depend on their `kind`; the first is taken where that is not given."""

_TAGS = (*(kind for kinds in _KINDS.values() for kind in kinds), *TRAINABLE_TAGS, "name", "mapping", "list", "str",
         "list[str]")  # fmt: skip
"""Elements pydantic puts into the place of an error for members of a union; they are no keys of the file."""

_OTHER_NAMES = {
    "lr": "learning_rate",
    "batch_size": "per_direction_batch_size",
    "per_device_train_batch_size": "per_direction_batch_size",
    "gradient_accumulation_steps": "microbatches",
    "eval_batch_size": "per_device_eval_batch_size",
    "scheduler": "lr_scheduler_type",
    "model_name_or_path": "model",
    "torch_dtype": "dtype",
    "zo_eps": "epsilon",
    "eps": "epsilon",
    "clip": "max_projected_gradient",
    "max_grad_norm": "max_projected_gradient",
    "num_train_epochs": "max_steps",
    "steps": "max_steps",
    "workers": "replicas",
    "num_workers": "replicas",
    "save_interval": "save_steps",
    "tracker": "report_to",
    "trackers": "report_to",
}


@dataclass(frozen=True, slots=True)
class _Fault:
    what: str
    where: str
    advice: str | None


def explain(error: ValidationError, document: Document) -> ConfigError:
    """One ConfigError for all the faults pydantic found."""
    details = {(_keys(each["loc"], document.data), each["type"] == "fault"): each for each in error.errors()[::-1]}
    faults = [_fault(each, document) for each in list(details.values())[::-1]]
    if len(faults) == 1:
        return ConfigError(faults[0].what, where=faults[0].where, advice=faults[0].advice)
    lines = [f"The configuration has {len(faults)} faults:"]
    for fault in faults:
        lines.append(f"  - {fault.what} ({fault.where})" + (f" {fault.advice}" if fault.advice else ""))
    return ConfigError("\n".join(lines), where=str(document.file))


def _fault(details: ErrorDetails, document: Document) -> _Fault:
    context = details.get("ctx", {})
    if details["type"] == "fault":
        keys = tuple(str(context["key"]).split("."))
        return _Fault(str(context["message"]), document.where(keys), str(context["advice"]))
    keys = _keys(details["loc"], document.data)
    name, where = ".".join(keys), document.where(keys)
    match details["type"]:
        case "extra_forbidden":
            return _Fault(f"There is no key {name}.", where, _nearest_key(keys, document.data))
        case "missing":
            return _Fault(f"The key {name} is missing.", where, "See docs/configuration.md.")
        case "union_tag_not_found":
            return _Fault(f"The key {name}.kind is missing.", where, f"Use one of {_kinds(name)}.")
        case "union_tag_invalid":
            what = f"{name}.kind is {context['tag']!r}; it must be one of {_kinds(name)}."
            return _Fault(what, document.where((*keys, "kind")), _nearest_value(context["tag"], _kinds(name)))
        case "literal_error":
            what = f"{name} is {details['input']!r}; it must be {context['expected']}."
            return _Fault(what, where, _nearest_value(details["input"], context["expected"]))
        case _:
            reason = details["msg"].removeprefix("Input ")
            return _Fault(f"{name} is {_short(details['input'])}; it {reason}.", where, _type_advice(details))


def _keys(loc: tuple[int | str, ...], data: Any) -> tuple[str, ...]:
    keys: list[str] = []
    for element in loc:
        present = isinstance(data, dict) and element in data
        if present or element not in _TAGS:
            keys.append(str(element))
        if present:
            data = data[element]
    return tuple(keys)


def _type_advice(details: ErrorDetails) -> str | None:
    value = details["input"]
    if details["type"] == "string_type" and isinstance(value, int | float):
        return f"YAML reads this as a {type(value).__name__}; put it in quotes if the text is meant."
    if details["type"] in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return "This is text, where a number or true or false belongs."
    if details["type"] == "int_type" and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    return None


def _nearest_key(keys: tuple[str, ...], data: dict[str, Any]) -> str:
    """A key of the same section spelt like this one, what others call it, or the section it belongs to."""
    *section, wrong = keys
    prefix = "".join(f"{key}." for key in section)
    here = list(_section_fields(tuple(section), data))
    close = difflib.get_close_matches(wrong, here, n=1, cutoff=0.6)
    if wrong in _OTHER_NAMES and _OTHER_NAMES[wrong] in RunConfig.model_fields:
        return f"Did you mean {_OTHER_NAMES[wrong]}?"
    elsewhere = [path for path in _all_keys(data) if path.split(".")[-1] == wrong and path != ".".join(keys)]
    if elsewhere:
        return f"Did you mean {elsewhere[0]}?"
    if close:
        return f"Did you mean {prefix}{close[0]}?"
    return f"The keys here are {', '.join(here)}."


def _section_fields(section: tuple[str, ...], data: Any) -> dict[str, Any]:
    model: type[BaseModel] = RunConfig
    for key in section:
        data = data.get(key) if isinstance(data, dict) else None
        model = _section_class(model, key, data)
    return dict(model.model_fields)


def _section_class(model: type[BaseModel], key: str, data: Any) -> type[BaseModel]:
    if key in _KINDS:
        kind = data.get("kind") if isinstance(data, dict) else None
        if key == "task":
            kind = task_tag(data)
        return _KINDS[key].get(str(kind), next(iter(_KINDS[key].values())))
    if key == "trainable":
        return TRAINABLE_KINDS[trainable_kind(data)]
    if key == "replicas":
        return ReplicaRange
    annotation = model.model_fields[key].annotation
    candidates = [annotation, *get_args(annotation)]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))


def _all_keys(data: dict[str, Any]) -> list[str]:
    paths = list(RunConfig.model_fields)
    for section in (("task",), ("direction",), ("memory",)):
        paths += [".".join((*section, name)) for name in _section_fields(section, data)]
    for kind in TRAINABLE_KINDS:
        names = _section_fields(("trainable", kind), {"trainable": {kind: {}}})
        paths += [f"trainable.{kind}", *(f"trainable.{kind}.{name}" for name in names)]
    return paths


def _nearest_value(value: Any, expected: str) -> str | None:
    choices = re.findall(r"'([^']*)'", expected)
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else None


def _kinds(section: str) -> str:
    """What `kind` can be: a task that is put into words is told by its other keys."""
    return _listed(kind for kind in _KINDS[section] if kind != "prompted")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
