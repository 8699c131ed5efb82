"""Runs in progress, from another process: find one, look at it, scale it, stop it.

The Python API of an elastic run::

    with control.attach("sst2-7f3a") as run:
        run.scale(12)
        print(run.status().progress.step)
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zoray.errors import ResourceError, RunError
from zoray.runs import RunFolder

if TYPE_CHECKING:
    from actors.status import RunStatus

_T = TypeVar("_T")
_PATIENCE = 30.0

IN_PROGRESS = ("starting", "running")
"""What the state file of a run says while a coordinator has it, or had it when it was killed."""


class Run:
    """A run in progress; made by `attach`.

    Attributes:
        name: of the run.
    """

    def __init__(self, name: str, coordinator: Any) -> None:
        self.name, self._coordinator = name, coordinator

    def status(self, wait: float = 0.0) -> RunStatus:
        """Where the run is, and its replicas, after some seconds, or as soon as it has ended.

        Raises:
            ZorayError: the coordinator died.
        """
        return self._ask("status", wait)  # type: ignore[no-any-return]

    def scale(self, replicas: int, memory: str | None = None) -> RunStatus:
        """Change how many replicas there should be. The run goes on meanwhile, and its result does not change.

        Args:
            replicas: in all.
            memory: section `memory`, as YAML, of the replicas that are started from now on; None: as it was.

        Raises:
            ConfigError: fewer than the run's minimum or more than its maximum, or no such section.
        """
        return self._ask("scale", replicas, memory)  # type: ignore[no-any-return]

    def stop(self) -> None:
        """End the run at the next step boundary; it can be resumed. Asked twice, it ends without comparing digests."""
        self._ask("stop")

    def _ask(self, method: str, *arguments: object) -> Any:
        from actors.inbox import receive

        return receive(
            getattr(self._coordinator, method).remote(*arguments), f"the coordinator of {self.name}", _PATIENCE
        )


@contextmanager
def attach(run: str, output_dir: str = "runs", address: str | None = None) -> Iterator[Run]:
    """Connect to a run in progress.

    Args:
        run: its name, or the path of its folder.
        output_dir: folder the runs are in.
        address: of Ray, if the run's folder is not here to tell (also `RAY_ADDRESS`).

    Raises:
        RunError: there is no such run in progress; the error lists those there are.
        ResourceError: its cluster cannot be reached.
    """
    folder = RunFolder.here(run, output_dir)
    name = folder.name if folder else Path(run).name
    if folder is not None and not address:
        told = known(folder)
        if told.state not in IN_PROGRESS:
            raise _not_running(name, told.words, output_dir, told)
        state = folder.read_state()
        address = state["ray"]
        if state.get("auth"):
            # Ray reads it when it is first imported.
            os.environ.setdefault("RAY_AUTH_MODE", state["auth"])
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        RunFolder.find(run, output_dir)
    with _cluster(str(address), name):
        import ray

        from actors.coordinator import actor_name

        try:
            coordinator = ray.get_actor(actor_name(name))
        except ValueError:
            why = f"no coordinator of it is on the cluster at {address}"
            raise _not_running(name, why, output_dir, known(folder) if folder else None, _names()) from None
        yield Run(name, coordinator)


def running(address: str) -> dict[str, RunStatus]:
    """The runs in progress on a cluster, by name.

    Raises:
        ResourceError: it cannot be reached.
    """
    with _cluster(address, "runs"):
        import ray

        from actors.coordinator import actor_name

        return {name: Run(name, ray.get_actor(actor_name(name))).status() for name in _names()}


def _names() -> list[str]:
    """The runs that have a coordinator on the cluster we are connected to."""
    from ray.util import list_named_actors

    from actors.coordinator import actor_name
    from launch.cluster import NAMESPACE

    names = [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    prefix = actor_name("")
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


@dataclass(frozen=True, slots=True)
class Known:
    """A run whose folder is here.

    Attributes:
        name, path: of the run.
        reference: what to call it by in a command.
        state: "starting", "running", how it ended, or "lost" (its coordinator is gone without a word).
        step, max_steps: committed steps, of so many; None where it cannot be read.
        loss: of the last step recorded.
        text: how it ended.
    """

    name: str
    path: str
    reference: str
    state: str
    step: int | None
    max_steps: int | None
    loss: float | None
    text: str | None

    @property
    def words(self) -> str:
        """What became of it, for a person."""
        if self.state == "lost":
            return "its coordinator is gone without a word"
        return f"it has ended: {self.text}" if self.text else "nothing is known of its end"


def known(folder: RunFolder) -> Known:
    """What the folder of a run tells, whoever runs it."""
    from actors.lock import held_by
    from zoray.errors import ZorayError

    said = folder.read_state()
    state = str(said.get("state", "unknown"))
    if state in IN_PROGRESS and held_by(folder.path) is None:
        state = "lost"
    rows = list(folder.rows("steps"))
    try:
        max_steps: int | None = folder.config().max_steps
    except ZorayError:
        max_steps = None
    last = rows[-1] if rows else {}
    step = said["step"] if "step" in said else int(last["step"]) + 1 if last else 0
    loss = last.get("loss")
    return Known(folder.name, str(folder.path), folder.reference, state, step, max_steps, loss, said.get("text"))


def _not_running(name: str, why: str, output_dir: str, told: Known | None, there: Iterable[str] = ()) -> RunError:
    """That a run cannot be looked at or changed; `there` are runs in progress whose folders need not be here."""
    here = RunFolder.all(output_dir)
    others = sorted({*there, *(run.name for run in here if known(run).state in IN_PROGRESS)} - {name})
    advice = f"in progress: {', '.join(others)}" if others else "no run is in progress"
    if told is not None and told.state != "done":
        advice = f"`zoray resume {told.reference}` continues it; {advice}"
    elif told is None and here:
        advice += f"; all runs here: {', '.join(run.name for run in here)}"
    return RunError(f"The run {name} is not in progress: {why}.", where=name, advice=advice)


@contextmanager
def _cluster(address: str, what: str) -> Iterator[None]:
    """Be connected to a cluster for the time of the block; a connection there is already is used and kept."""
    import ray

    from launch.cluster import NAMESPACE

    if ray.is_initialized():
        yield
        return
    try:
        _knock(address)
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ResourceError(
            f"The Ray cluster of {what} cannot be reached: {error}.",
            where=address,
            advice="its head may be gone: `zoray resume` continues the run elsewhere",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See that someone listens at host:port; Ray itself would try for many minutes before it says that nobody does.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()


def to_json(status: RunStatus | Known) -> str:
    """One JSON object; numbers that are not finite are null."""
    from dataclasses import asdict

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and value - value != 0 else value

    return json.dumps(clean(asdict(status)))


def status_of(said: dict[str, Any]) -> RunStatus:
    """The status that `to_json` has made this of.

    Raises:
        RunError: it is none of this version.
    """
    from actors.status import RunStatus

    progress = dict(said.get("progress", {}))
    for name in ("first", "last"):
        if progress.get(name):
            progress[name] = {key: _number(value) for key, value in progress[name].items()}
    progress["curve"] = [(step, _number(loss)) for step, loss in progress.get("curve", ())]
    return _read(RunStatus, {**said, "progress": progress})


def _number(value: float | None) -> float:
    """JSON has none that is not finite."""
    return math.nan if value is None else value


def known_of(said: dict[str, Any]) -> Known:
    """As `status_of`, of a run whose folder alone tells."""
    return _read(Known, said)


def _read(kind: type[_T], said: dict[str, Any]) -> _T:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(said)
    except ValidationError as error:
        raise RunError(
            f"The cluster's answer is not understood: {error.errors()[0]['msg']}.",
            advice="the cluster must have the same version of Zoray as this machine",
        ) from None
