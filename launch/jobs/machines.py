"""What the machines of a cluster must have before a submitted run may begin: accelerators, the volume, the same Zoray.

One short task on every machine that could hold a replica; none of them takes a processor or an accelerator.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoray import __version__
from zoray.config import RunConfig
from zoray.errors import ConfigError, ResourceError, RunError
from zoray.identity import code_digest
from zoray.runs import RunFolder
from zoray.stores import StoreError, check_readable, check_writable, is_uri

_PATIENCE = 90.0
_STORES = 4
_CACHED = 5.0
"""Seconds for which a machine may believe that a new folder of a network volume is not there."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a machine of the cluster has.

    Attributes:
        host: its name.
        version, code: of its Zoray.
        missing: those of the paths asked for that it does not have.
        storage: why it cannot write to the run's folder; None: it can.
        unreached: URIs asked for that it cannot read, or write to, with the reason and what to do.
    """

    host: str
    version: str
    code: str
    missing: tuple[str, ...]
    storage: str | None
    unreached: tuple[tuple[str, str, str], ...] = ()


def check_offers(config: RunConfig) -> None:
    """Refuse replicas that no machine could hold, and that no autoscaler could make a machine for.

    Raises:
        ResourceError: with what the cluster has.
    """
    needs = _needs(config)
    if _fitting(needs) or _may_grow(needs):
        return
    need = " and ".join(f"{amount:g} {kind}" for kind, amount in needs.items())
    groups = _groups()
    have = [_words(resources) for resources in (groups if groups is not None else map(_resources, _alive()))]
    counted = ", ".join(f"{have.count(words)} × {words}" for words in dict.fromkeys(have)) or "none"
    what = "worker group" if groups is not None else "machine"
    raise ResourceError(
        f"A replica needs {need}, which no {what} of the cluster offers; it has: {counted}.",
        where="gpus_per_replica, threads_per_replica, memory.shards",
        advice="ask for less per replica, or add a worker group that has it",
    )


def check_machines(config: RunConfig, folder: RunFolder) -> list[str]:
    """See that every machine a replica may be put on has this Zoray, the files, and the run's folder to write to.

    Returns what could not be seen, in words.

    Raises:
        ResourceError: a machine has another Zoray, or none.
        ConfigError: a machine lacks the model or the data, or cannot reach the store they or the snapshots are on.
        RunError: a machine cannot write to the run's folder, or has another volume there.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = folder.path / f".seen-{secrets.token_hex(4)}"
    token.write_text(token.name)
    paths = {key: path for key, path in local_paths(config).items() if os.path.isabs(path)}
    uris = {key: value for key, value in named_places(config).items() if is_uri(value)}
    remote: Any = ray.remote(look)
    asked = {}
    for node in _fitting(_needs(config)):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": there}
        seen = remote.options(**options).remote(str(token), list(paths.values()), uris)
        asked[seen] = node["NodeManagerHostname"]
    unseen, deadline = [], time.monotonic() + _PATIENCE
    try:
        for reference, host in asked.items():
            try:
                _check(ray.get(reference, timeout=max(0.0, deadline - time.monotonic())), paths, uris, folder)
            except RayTaskError as error:
                raise _no_zoray(host, error) from None
            except (GetTimeoutError, RayError):
                # It leaves, or is busy: the run does without it until it is seen.
                unseen.append(f"the machine {host} could not be looked at")
    finally:
        token.unlink(missing_ok=True)
    return unseen


def look(token: str, paths: Sequence[str], uris: Mapping[str, str] | None = None) -> Seen:
    """What this machine has; runs on it.

    Args:
        token: a file in the run's folder that holds its own name.
        paths: to look for.
        uris: to read from, and that of `snapshot_dir` to write to, by key.
    """
    missing = tuple(path for path in paths if not os.path.exists(path))

    def reach(named: tuple[str, str]) -> tuple[str, str, str] | None:
        key, uri = named
        try:
            (check_writable if key == "snapshot_dir" else check_readable)(uri)
        except StoreError as error:
            return uri, error.what, error.advice or ""
        return None

    # All at once: one after the other, stores that are silent would take longer than anybody waits here.
    with ThreadPoolExecutor(_STORES) as pool:
        unreached = tuple(each for each in pool.map(reach, (uris or {}).items()) if each)
    host = socket.gethostname()
    return Seen(host, __version__, code_digest(), missing, _storage_fault(Path(token)), unreached)


def named_places(config: RunConfig) -> dict[str, str]:
    """The keys that say where the model, the data and the snapshots are, with their values."""
    task = config.task
    named = {
        "model": config.model,
        "task.train": task.train,
        "task.eval": task.eval,
        "snapshot_dir": config.snapshot_dir,
    }
    return {key: value for key, value in named.items() if value is not None}


def local_paths(config: RunConfig) -> dict[str, str]:
    """Those of the named places that are not on an object store."""
    return {key: value for key, value in named_places(config).items() if not is_uri(value)}


def _storage_fault(token: Path) -> str | None:
    until = time.monotonic() + _CACHED
    while not token.is_file():
        if time.monotonic() > until:
            return "what the head has written is not there"
        time.sleep(0.1)
    probe = token.with_name(f"{token.name}-{secrets.token_hex(4)}")
    try:
        probe.write_text(probe.name)
    except OSError as error:
        return str(error)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


def _check(seen: Seen, paths: dict[str, str], uris: dict[str, str], folder: RunFolder) -> None:
    if (seen.version, seen.code) != (__version__, code_digest()):
        raise ResourceError(
            f"The machine {seen.host} has Zoray {seen.version} with code {seen.code}, the head {__version__} with "
            f"{code_digest()}.",
            where=f"handshake with {seen.host}",
            advice="give the head and all worker groups the same image",
        )
    if seen.storage is not None:
        raise RunError(
            f"The machine {seen.host} cannot write to the run's folder: {seen.storage}.",
            where=str(folder.path),
            advice="output_dir must be on a volume that the head and all workers mount, and may write to",
        )
    for key, path in paths.items():
        if path in seen.missing:
            raise ConfigError(
                f"{key} is {path}, which the machine {seen.host} does not have.",
                where=key,
                advice="put it on a volume that all machines mount, or on an object store",
            )
    unreached = {uri: (what, advice) for uri, what, advice in seen.unreached}
    for key, uri in uris.items():
        if uri in unreached:
            what, advice = unreached[uri]
            raise ConfigError(
                f"{key} is of no use to the machine {seen.host}: {what}.", where=key, advice=advice or None
            )


def _no_zoray(host: str, error: Exception) -> ResourceError:
    lines = str(error).strip().splitlines()
    return ResourceError(
        f"The machine {host} cannot run this Zoray: {lines[-1] if lines else type(error).__name__}",
        where=f"a task on {host}",
        advice="give the head and all worker groups the same image",
    )


def _needs(config: RunConfig) -> dict[str, float]:
    return {kind: amount for kind, amount in config.needs.items() if amount > 0}


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _resources(node: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = node["Resources"]
    return found


def _fitting(needs: dict[str, float]) -> list[dict[str, Any]]:
    """The machines that have what a replica needs, whether or not it is free."""
    return [node for node in _alive() if _enough(_resources(node), needs)]


def _enough(resources: dict[str, float], needs: dict[str, float]) -> bool:
    return all(resources.get(kind, 0.0) >= amount for kind, amount in needs.items())


def _may_grow(needs: dict[str, float]) -> bool:
    """Whether an autoscaler could make a machine for a replica; what it offers is not always told."""
    groups = _groups()
    if groups is not None:
        return any(_enough(resources, needs) for resources in groups)
    # KubeRay turns Ray's own monitor off where its autoscaler runs beside the head; `ray up` leaves its file there.
    beside = "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", "")
    return beside or Path("~/ray_bootstrap_config.yaml").expanduser().exists()


def _groups() -> list[dict[str, float]] | None:
    """What a machine of each worker group has, where the autoscaler has told the cluster; None: it has not."""
    # Nothing public gives it.
    from ray._private.state import state

    ask = getattr(state, "get_cluster_config", None)
    config = ask() if ask is not None else None
    if config is None or not config.node_group_configs:
        return None
    return [dict(group.resources) for group in config.node_group_configs if group.max_count != 0]


def _words(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU + {resources.get('GPU', 0):g} GPU"
