"""The schemas of Kubernetes objects, from the custom resource definitions in ../shared/crds (or ZORAY_CRDS).

A definition carries the types of Kubernetes itself inside: those of a pod, of a claim, of a rule of a NetworkPolicy. So
these, too, are checked against the real thing, without a cluster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("ZORAY_CRDS") or ROOT.parent / "shared" / "crds")

needs_crds = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no custom resource definitions at {FOLDER} (ZORAY_CRDS says where else)"
)

Object = dict[str, Any]

_DEFINITIONS = {
    "RayJob": "ray.io_rayjobs",
    "RayCluster": "ray.io_rayclusters",
    "PodMonitor": "monitoring.coreos.com_podmonitors",
    "ServiceMonitor": "monitoring.coreos.com_servicemonitors",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules",
}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
_METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": _NAME, "maxLength": 253},
        "namespace": {"type": "string", "pattern": _NAME, "maxLength": 63},
        "annotations": _TEXTS,
        "labels": {
            "type": "object",
            "propertyNames": {"pattern": r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"},
            "additionalProperties": {
                "type": "string",
                "pattern": r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$",
            },
        },
    },
}


def faults(document: Object) -> list[str]:
    """What the API server would refuse in an object, with the path to it; fields it does not know included."""
    found = _validator(document["apiVersion"], document["kind"]).iter_errors(document)
    return [f"{error.json_path}: {error.message[:300]}" for error in found]


@lru_cache
def _validator(api: str, kind: str) -> Draft7Validator:
    return Draft7Validator(_schema(api, kind))


def _schema(api: str, kind: str) -> Object:
    if kind in _DEFINITIONS:
        return _object(api, kind, _closed(_definition(kind, api.split("/")[1])["properties"]["spec"]), "spec")
    pod = _definition("RayJob", "v1")["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]
    match api, kind:
        case "v1", "Namespace":
            return _object(api, kind, {"type": "object", "maxProperties": 0}, "spec", required=False)
        case "v1", "ConfigMap":
            return _object(api, kind, _TEXTS, "data")
        case "v1", "PersistentVolumeClaim":
            volumes = pod["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]["volumes"]
            claim = volumes["items"]["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]
            return _object(api, kind, _closed(claim["properties"]["spec"]), "spec")
        case "networking.k8s.io/v1", "NetworkPolicy":
            rules = pod["networkPolicy"]["properties"]["head"]["properties"]
            selector = rules["ingressRules"]["items"]["properties"]["from"]["items"]["properties"]["podSelector"]
            policy = {
                "type": "object",
                "required": ["podSelector"],
                "properties": {
                    "podSelector": selector,
                    "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
                    "ingress": rules["ingressRules"],
                    "egress": rules["egressRules"],
                },
            }
            return _object(api, kind, _closed(policy), "spec")
    raise KeyError(f"no schema for {api} {kind}")


def _object(api: str, kind: str, content: Object, key: str, required: bool = True) -> Object:
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", *([key] if required else [])],
        "additionalProperties": False,
        "properties": {"apiVersion": {"const": api}, "kind": {"const": kind}, "metadata": _METADATA, key: content},
    }


@lru_cache
def _definition(kind: str, version: str) -> Object:
    text = (FOLDER / f"{_DEFINITIONS[kind]}.yaml").read_text()
    # The safe loader in C: these files have tens of thousands of lines.
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (found,) = (item for item in definition["spec"]["versions"] if item["name"] == version)
    schema: Object = found["schema"]["openAPIV3Schema"]
    return schema


def _closed(schema: Any) -> Any:
    """A schema that refuses unknown fields, as `kubectl apply` does, where the cluster would silently drop them."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    opened = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(schema)
    # A schema, not a field that happens to be called `properties`.
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not opened:
        closed["additionalProperties"] = False
    return closed


def documents(text: str) -> Iterator[Object]:
    """The objects of a file."""
    yield from (document for document in yaml.safe_load_all(text) if document is not None)
