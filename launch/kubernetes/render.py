"""`zoray render`: a run's configuration as Kubernetes objects, ready for `kubectl apply`."""

from __future__ import annotations

import os
import re
import secrets
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from launch.kubernetes.kuberay import objects
from launch.kubernetes.pods import METRICS_PORT, MOUNT, Cluster, release
from launch.kubernetes.rules import MAX_NAME, violations
from launch.preflight import count_weights, host_bytes
from zoray import __version__
from zoray.config import RunConfig, load
from zoray.errors import ConfigError, ZorayError
from zoray.stores import is_uri

_RAY_PORTS = {6379: "GCS", 8080: "metrics", 8265: "dashboard", 10001: "client", 52365: "agent"}
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUANTITY = re.compile(r"([1-9]\d*)([KMGTPE]i|[kMGTPE])?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18} | {
    f"{letter}i": 1 << 10 * power for power, letter in enumerate("KMGTPE", start=1)
}


def render(config_path: str, overrides: list[str], **settings: Any) -> None:
    """Print the objects of a run as YAML; what the cluster's volume must have, and where, is said on standard error.

    `settings` are those of `Cluster`, without the version of Ray, which is the one installed here.

    Raises:
        ConfigError: the configuration or a setting is not right, or Kubernetes, KubeRay or Kueue would refuse it.
    """
    cluster = Cluster(ray=version("ray"), **settings)
    config = load(config_path, overrides)
    _check_settings(cluster)
    _check_config(config, cluster)
    name = job_name(config, config_path)
    warnings = _planned(config, cluster)
    config, notes = placed(config, config_path)
    made = objects(name, config.model_copy(update={"run_name": name}), cluster)
    if faults := violations(made[-1]):
        raise ConfigError(f"KubeRay would refuse the RayJob: {'; '.join(faults)}.", where=config_path)
    for note in warnings + notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"# The run {name}, made by `zoray render` {__version__} for Ray {cluster.ray}.")
    print(f"#   kubectl apply -f FILE; kubectl logs -n {cluster.namespace} -f job/{name}")
    print(to_yaml(made), end="")


def job_name(config: RunConfig, config_path: str) -> str:
    """Name of the run and of its objects: `run_name`, or one made from the file's name and four hexadecimal digits.

    Raises:
        ConfigError: `run_name` cannot name a RayJob.
    """
    if config.run_name is None:
        stem = re.sub(r"[^a-z0-9]+", "-", Path(config_path).stem.lower()).strip("-")
        stem = stem if stem[:1].isalpha() else f"run-{stem}".strip("-")
        return f"{stem[: MAX_NAME - 5].rstrip('-')}-{secrets.token_hex(2)}"
    if len(config.run_name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", config.run_name):
        raise ConfigError(
            f"{config.run_name!r} cannot be the name of a RayJob.",
            where=f"{config_path}, run_name",
            advice=f"use at most {MAX_NAME} lower-case letters, digits and '-', beginning with a letter",
        )
    return config.run_name


def placed(config: RunConfig, config_path: str) -> tuple[RunConfig, list[str]]:
    """The configuration with the paths of the cluster, and what a person must know about them.

    A file or folder found here, beside the configuration or in the working directory, is expected at the same place
    below the volume's mount; names on the hub, URLs and what is given as a path of the cluster stay.

    Raises:
        ConfigError: a path leads to somewhere on this machine that the cluster has no counterpart of.
    """
    notes: list[str] = []
    task = config.task.model_copy(
        update={
            key: _place(path, f"task.{key}", config_path, notes)
            for key in ("train", "eval")
            if (path := getattr(config.task, key)) is not None
        }
    )
    changes = {
        "model": _place(config.model, "model", config_path, notes),
        "task": task,
        "output_dir": _runs(config.output_dir, "output_dir", config_path),
        "snapshot_dir": _snapshots(config, config_path),
        "metrics_port": config.metrics_port or METRICS_PORT,
    }
    return config.model_copy(update=changes), notes


def to_yaml(documents: list[dict[str, Any]]) -> str:
    """YAML documents as a person would write them: keys in their order, long text in blocks, no anchors."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _place(path: str, key: str, config_path: str, notes: list[str]) -> str:
    if is_uri(path):
        return path
    # `load` has made absolute what it found here. Data that is relative still was not found; a model may be on the hub.
    if not path.startswith("/"):
        if key == "model":
            notes.append(f"the model {path} is taken from the hub: there is no such folder here")
            return path
        if ".." not in Path(path).parts:
            return _on_volume(Path(path), key, notes)
    elif Path(path).is_relative_to(MOUNT) or not Path(path).exists():
        return path
    for folder in (Path(config_path).resolve().parent, Path.cwd()):
        if Path(path).is_relative_to(folder):
            return _on_volume(Path(path).relative_to(folder), key, notes)
    raise ConfigError(
        f"{path} is a path of this machine, and nothing tells where it is on the cluster.",
        where=f"{config_path}, {key}",
        advice=f"put it on the cluster's volume and give that path, {MOUNT}/..., or the URL of an object store",
    )


def _runs(path: str, key: str, config_path: str) -> str:
    """A folder the run writes to, on the volume: what is elsewhere in a pod is gone with it."""
    folder = Path(MOUNT) / path
    if not folder.is_relative_to(MOUNT) or ".." in folder.parts:
        raise ConfigError(
            f"{path} is not on the cluster's volume, and would be lost with its pod.",
            where=f"{config_path}, {key}",
            advice=f"leave it out, or give a folder below {MOUNT}",
        )
    return str(folder)


def _snapshots(config: RunConfig, config_path: str) -> str | None:
    """Where the snapshots are kept: on a store, or on the volume, which what is relative is taken from too."""
    where = config.snapshot_dir
    if where is None or is_uri(where):
        return where
    _runs(os.path.normpath(Path(MOUNT) / config.output_dir / where), "snapshot_dir", config_path)
    return where


def _on_volume(path: Path, key: str, notes: list[str]) -> str:
    where = str(Path(MOUNT) / path)
    notes.append(f"{key} must be on the cluster's volume, as {where}")
    return where


def _check_settings(cluster: Cluster) -> None:
    """That the names and amounts are such as Kubernetes takes."""
    queue = cluster.queue if cluster.queue is not None else "none"
    for option, text, pattern, right in (
        ("--image", cluster.image, re.compile(r"[^\s@][^\s]*"), "the name of an image"),
        ("--namespace", cluster.namespace, _LABEL, "lower-case letters, digits and '-', at most 63"),
        ("--storage-claim", cluster.claim, _SUBDOMAIN, "the name of a PersistentVolumeClaim"),
        ("--queue", queue, _LABEL, "the name of a Kueue LocalQueue"),
        ("--memory", cluster.memory, _QUANTITY, "a whole amount such as 16Gi"),
    ):
        if not pattern.fullmatch(text):
            raise ConfigError(f"{text!r} is not {right}.", where=f"the command line, {option}")
    if cluster.auth and release(cluster.ray) < (2, 52):
        raise ConfigError(
            f"Ray {cluster.ray} has no token authentication.", where="--auth", advice="use Ray 2.52 or later"
        )


def _check_config(config: RunConfig, cluster: Cluster) -> None:
    """That pods of whole GPUs can hold the replicas, their memory the weights, and that the port is free in a pod."""
    if config.gpus_per_replica > 1 and config.gpus_per_replica % 1:
        raise ConfigError(
            f"A replica cannot have {config.gpus_per_replica:g} GPUs: above 1 Ray takes whole numbers only.",
            where="gpus_per_replica",
        )
    if config.metrics_port in _RAY_PORTS or 0 < config.metrics_port < 1024:
        use = _RAY_PORTS.get(config.metrics_port)
        raise ConfigError(
            f"Port {config.metrics_port} is Ray's own ({use})." if use else "Ports below 1024 are for root only.",
            where="metrics_port",
            advice=f"leave it out: {METRICS_PORT} is taken then",
        )
    weights = count_weights(Path(config.model))
    memory = _amount(cluster.memory)
    size, processes = host_bytes(config, weights or 0), host_bytes(config, 0)
    if size > memory:
        raise ConfigError(
            f"{cluster.memory} are too little for a replica: its weights take {(size - processes) / 2**30:.1f} GiB, "
            f"its {'process' if config.shards == 1 else 'processes'} {processes / 2**30:.1f} GiB.",
            where="--memory",
            advice="give each replica more memory, or use a shorter dtype",
        )


def _planned(config: RunConfig, cluster: Cluster) -> list[str]:
    """What a person should know of `--memory`, as `zoray plan` sees it; nothing if the model is not described here."""
    if not (Path(config.model) / "config.json").is_file():
        return []
    # Torch and transformers are imported for it.
    from zoray.planning import Planner

    try:
        need = Planner(config).plan().need.host.peak * config.shards
    except ZorayError as error:
        return [f"whether --memory {cluster.memory} is enough cannot be planned: {error.what}"]
    if need <= _amount(cluster.memory):
        return []
    planned = f"{need / 2**30:.1f} GiB"
    return [f"--memory {cluster.memory} may be too little: a replica is planned to need {planned} (zoray plan)"]


def _amount(quantity: str) -> int:
    """Bytes of a Kubernetes quantity."""
    match = _QUANTITY.fullmatch(quantity)
    assert match is not None
    return int(match[1]) * _UNITS[match[2] or ""]


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """No anchors, although parts of the objects are shared."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Lists are indented below their key."""
        super().increase_indent(flow, False)


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
# Kubernetes reads YAML by Go's library: these are a number and a truth to it, though not to PyYAML.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^\d+[eE]\d+$"), list("0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^[yYnN]$"), list("yYnN"))
