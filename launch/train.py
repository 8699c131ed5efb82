"""`zoray train` and `zoray resume`: make or find the run's folder, reach a cluster, watch the coordinator."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from actors.lock import RunLock
from launch.cluster import Place, connect
from launch.preflight import (
    check_libraries,
    check_memory,
    check_objective,
    check_paths,
    check_port,
    check_snapshots,
    check_trackers,
)
from launch.progress import Watcher
from zoray.config import RunConfig, changed, load
from zoray.errors import LedgerError, NumericsError, ResourceError, RunError, ZorayError
from zoray.runs import RunFolder

STOPPED = 130
"""Exit status of a run that was ended by Ctrl-C, as a shell would have it."""

_LONGER = "; the end of a run can be moved where lr_scheduler_type is constant, constant_with_warmup or inverse_sqrt"


def train(config_path: str, overrides: list[str]) -> None:
    """Start a run and see it to its end.

    Raises:
        ZorayError: the run cannot start, or ended with a fault.
        Stopped: it was stopped at a step boundary.
    """
    config = load(config_path, overrides)
    check_port(config)
    check_trackers(config)
    check_paths(config)
    check_objective(config)
    check_libraries(config)
    check_memory(config)
    begin(RunFolder.create(config, Path(config_path).stem), config)


def begin(folder: RunFolder, config: RunConfig) -> None:
    """See a new run, whose folder has just been made, to its end; without a first step no folder is left behind.

    The folder is this process's from the beginning: nobody takes it for one that a kill left.

    Raises:
        ZorayError, SystemExit: as `train`.
    """
    with nothing_left_behind(folder), RunLock(folder.path) as claim:
        check_snapshots(folder, config)
        _follow(folder, config, resume=False, claim=claim)


@contextmanager
def nothing_left_behind(folder: RunFolder) -> Iterator[None]:
    """Delete the folder of a run that fails before its first step, unless it is another process's by then."""
    # As long as it is open, no other folder can be taken for it.
    handle = os.open(folder.path, os.O_RDONLY)
    try:
        yield
    except BaseException as error:
        # Whoever has its lock may be about to write the first step.
        another = isinstance(error, RunError) and error.where == str(folder.path / "lock")
        if not another and folder.is_at(handle) and not (folder.ledger / "commits.bin").exists():
            shutil.rmtree(folder.set_aside(), ignore_errors=True)
        raise
    finally:
        os.close(handle)


def resume(run: str, overrides: list[str], output_dir: str = "runs", break_lock: bool = False) -> None:
    """Continue a run with the first step that is not in its ledger.

    `break_lock`: although another machine still seems to run it.

    Raises:
        ZorayError: the run cannot continue; the error names the key if an override would change its mathematics.
        Stopped: it was stopped again.
    """
    folder, config = resumable(run, overrides, output_dir, break_lock)
    check_port(config)
    check_trackers(config)
    check_libraries(config)
    check_memory(config)
    proceed(folder, config, break_lock)


def resumable(run: str, overrides: list[str], output_dir: str, break_lock: bool) -> tuple[RunFolder, RunConfig]:
    """The folder and the configuration of a run that can be continued.

    Raises:
        ZorayError: it cannot.
    """
    folder = RunFolder.find(run, output_dir)
    before, config = folder.config(), folder.config(overrides)
    for key, old, new in changed(before, config):
        raise RunError(
            f"{key} was {old!r} and would become {new!r}; that would change the mathematics of the run.",
            where=f"{folder.config_path}, {key}",
            advice="resume without it, or start a new run" + (_LONGER if key == "max_steps" else ""),
        )
    if not break_lock:
        # To refuse a run that goes on before anything is started for it; the coordinator's own lock is what counts.
        RunLock(folder.path).acquire().release()
    folder.require_ledger()
    return folder, config


def proceed(folder: RunFolder, config: RunConfig, break_lock: bool = False) -> None:
    """See a run that is `resumable` to its end.

    Raises:
        ZorayError, SystemExit: as `resume`.
    """
    _follow(folder, config, resume=True, break_lock=break_lock)


def _follow(
    folder: RunFolder, config: RunConfig, *, resume: bool, break_lock: bool = False, claim: RunLock | None = None
) -> None:
    """Run a coordinator on the cluster's head and show its progress until the run is over.

    `claim`: this process's hold on the run, which the coordinator is given.
    """
    watcher = Watcher(folder, config)
    with watcher.starting():
        place = connect(config)
        import ray

        coordinator = start_coordinator(folder, config, place)
        if claim is not None:
            # As late as possible: between two holders the run is anybody's.
            _receive(coordinator.__ray_ready__.remote(), folder)
            claim.release()
        prepared = _receive(coordinator.prepare.remote(resume, break_lock), folder)
        if resume:
            folder.write_config(config)
    watcher.begin(prepared, place)
    running = coordinator.run.remote()
    with interrupts(lambda: coordinator.stop.remote()) as interrupted:
        try:
            while not ray.wait([running], timeout=watcher.interval)[0]:
                watcher.show(_receive(coordinator.progress.remote(), folder), stopping=interrupted.is_set())
            finish = _receive(running, folder)
            progress = _receive(coordinator.progress.remote(), folder)
        except _CoordinatorDied as died:
            if not (interrupted.is_set() and place.embedded):
                raise
            # `timeout`, Slurm and systemd send a signal to every process of a command, so to the embedded Ray's too.
            ray.shutdown()
            watcher.cut_off(died)
            raise Stopped(by_signal=True) from None
    watcher.end(progress, finish)
    ray.shutdown()
    _conclude(finish, folder, interrupted.is_set())


class Stopped(SystemExit):
    """The run was stopped at a step boundary.

    Attributes:
        by_signal: to this process; else by `zoray stop`, from another one.
    """

    def __init__(self, by_signal: bool) -> None:
        super().__init__(STOPPED)
        self.by_signal = by_signal


class _CoordinatorDied(ResourceError):
    """The process of the coordinator is gone, its ledger is there."""


def _receive(reference: Any, folder: RunFolder) -> Any:
    """Wait for an answer of the coordinator; if it died, say how the run goes on.

    Raises:
        ZorayError: what the coordinator raised, or that it died.
    """
    import ray
    from ray.exceptions import RayActorError, RayError

    from actors.inbox import fault, first_line

    try:
        return ray.get(reference)
    except RayError as error:
        if not isinstance(error, RayActorError) or not (folder.ledger / "commits.bin").exists():
            raise fault(error, "the coordinator") from None
        raise _CoordinatorDied(
            f"The coordinator of {folder.name} died: {first_line(error)}",
            where=str(folder.log),
            advice=f"nothing that was committed is lost: continue with `zoray resume {folder.reference}`",
        ) from None


def start_coordinator(folder: RunFolder, config: RunConfig, place: Place) -> Any:
    """The run's coordinator, as an actor on the head, under a name by which other processes find it.

    Raises:
        RunError: the cluster has one of that name already.
    """
    import ray

    from actors.coordinator import Coordinator, actor_name

    options: dict[str, Any] = {
        "name": actor_name(folder.name),
        "num_cpus": 0,
        "resources": {"node:__internal_head__": 0.001},
        "max_concurrency": 64,
    }
    # Ray makes methods remote at run time, behind the back of any type checker.
    remote: Any = ray.remote(Coordinator)
    _forget_dead(options["name"])
    try:
        return remote.options(**options).remote(config, str(folder.path), place.embedded)
    except ValueError as error:
        raise RunError(
            f"The run {folder.name} is running on this cluster already.",
            where=place.words,
            advice=f"look at it with `zoray status {folder.reference}`, or end it with `zoray stop {folder.reference}`",
        ) from error


def _forget_dead(name: str) -> None:
    """Free the name of an actor whose process is dead: Ray keeps it as long as somebody has a handle."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    try:
        old: Any = ray.get_actor(name)
    except ValueError:
        return
    try:
        ray.get(old.progress.remote(), timeout=10)
    except GetTimeoutError:
        return
    except RayActorError:
        ray.kill(old)


def _conclude(finish: Any, folder: RunFolder, by_signal: bool) -> None:
    if finish.reason == "stopped":
        raise Stopped(by_signal)
    kinds: dict[str, type[ZorayError]] = {"numerics": NumericsError, "storage": LedgerError, "failed": RunError}
    if finish.reason in kinds:
        raise kinds[finish.reason](finish.text, where=f"step {finish.step} of {folder.name}", advice=finish.advice)


@contextmanager
def interrupts(stop: Any) -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into a stop at the next step boundary for the time of the block."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        asked.set()
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
