"""What `kubectl kustomize` makes of a folder, for the part of kustomize that `k8s/` uses, and no other.

So that the overlays are checked where no kubectl is; where there is one, the two are compared.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

_KEYS = {
    *("apiVersion", "kind", "namespace", "resources", "components"),
    *("configMapGenerator", "generatorOptions", "patches"),
}


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization, as sorted by `key`.

    Raises:
        ValueError: it uses what this loader does not know, or a patch does not fit.
    """
    return sorted(_apply(folder, []), key=key)


def key(document: Object) -> tuple[str, str]:
    """By what an object is told from the others."""
    return document["kind"], document["metadata"]["name"]


def _apply(folder: Path, made: list[Object]) -> list[Object]:
    """The objects so far (of a component: those it is applied to), and what a kustomization adds and changes."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(settings) - _KEYS:
        raise ValueError(f"{folder}: {sorted(unknown)} are not known here")
    made = list(made)
    for name in settings.get("resources", []):
        path = folder / name
        # Through JSON: what anchors share in a file must not be changed together.
        made += (
            _apply(path, []) if path.is_dir() else json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))
        )
    made += [_config_map(folder, settings, generator) for generator in settings.get("configMapGenerator", [])]
    for name in settings.get("components", []):
        made = _apply(folder / name, made)
    for patch in settings.get("patches", []):
        made = _patched(folder, made, patch)
    if namespace := settings.get("namespace"):
        for document in made:
            if document["kind"] != "Namespace":
                document["metadata"]["namespace"] = namespace
    return made


def _config_map(folder: Path, settings: Object, generator: Object) -> Object:
    if settings.get("generatorOptions") != {"disableNameSuffixHash": True} or set(generator) != {"name", "files"}:
        raise ValueError(f"{folder}: only configMapGenerator of files without a hash is known here")
    data = {name: (folder / name).read_text() for name in generator["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def _patched(folder: Path, made: list[Object], patch: Object) -> list[Object]:
    text = (folder / patch["path"]).read_text() if "path" in patch else patch["patch"]
    target = patch["target"]
    chosen = [d for d in made if d["kind"] == target["kind"] and d["metadata"]["name"] == target.get("name", key(d)[1])]
    if not chosen:
        raise ValueError(f"{folder}: no object is the target {target}")
    for document in chosen:
        changed = deepcopy(document)
        for operation in yaml.safe_load(text):
            _operate(changed, operation)
        made[made.index(document)] = changed
    return made


def _operate(document: Object, operation: Object) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = document
    try:
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place[part]
        at: Any = int(last) if isinstance(place, list) and last != "-" else last
        match operation["op"]:
            case "add" if isinstance(place, list):
                place.insert(len(place) if at == "-" else at, deepcopy(operation["value"]))
            case "add":
                place[at] = deepcopy(operation["value"])
            case "replace":
                place[at]  # it must be there
                place[at] = deepcopy(operation["value"])
            case "remove":
                del place[at]
            case other:
                raise ValueError(f"{other} is not known here")
    except (KeyError, IndexError) as error:
        raise ValueError(f"{operation['path']} is not there: {error}") from None
