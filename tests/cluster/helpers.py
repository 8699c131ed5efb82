"""Commands, runs and machines as a user has them, each in processes of its own; waiting for what happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from zoray.runs import RunFolder

ROOT = Path(__file__).parents[2]
ZORAY = [sys.executable, "-m", "launch.cli"]
PATIENCE = 240.0
"""Seconds within which anything a test waits for must have happened, on a machine that is busy with other things."""


def until(happened: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait for something of which no process tells; returns what `happened` returns when it is true."""
    deadline = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return value


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass(frozen=True)
class Result:
    """What comes of a run: the files of its ledger, its last step and the digest of the weights there."""

    ledger: dict[str, bytes]
    step: int
    digest: str


def ledger_of(folder: RunFolder) -> dict[str, bytes]:
    """The files of a run's ledger."""
    return {path.name: path.read_bytes() for path in folder.ledger.iterdir()}


class Machines:
    """A head without processors and raylets that a test adds, kills and drains; see `host.py`.

    Attributes:
        address: of the cluster.
        http: address of the head's job server, where it has one.
        nodes: ids of the raylets that are neither killed nor draining.
    """

    def __init__(self, env: dict[str, str], *options: str) -> None:
        script = Path(__file__).with_name("host.py")
        self._host = subprocess.Popen(
            [sys.executable, str(script), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
        )
        assert self._host.stdout is not None
        self.address, url = self._host.stdout.readline().split()
        self.http = f"http://{url}"
        self.nodes: list[str] = []
        self._draining: list[str] = []

    def add(self, cpus: int = 1) -> str:
        """A raylet with so many processors; returns its id."""
        self.nodes.append(self._ask("add", cpus))
        return self.nodes[-1]

    def kill(self, node: str) -> None:
        """kill -9 of a raylet."""
        self.nodes.remove(node)
        self._ask("kill", node)

    def drain(self, node: str) -> None:
        """Tell the cluster that a raylet is about to be taken away."""
        self.nodes.remove(node)
        self._draining.append(node)
        self._ask("drain", node)

    @contextmanager
    def apart(self, folder: Path) -> Iterator[None]:
        """A raylet with another volume at `folder` than the head's, and no other raylet, for the time of the block."""
        self.have(0)
        self._ask("add_apart", str(folder))
        try:
            yield
        finally:
            self._ask("remove_apart")

    def demand(self) -> int:
        """For how many replicas the cluster's autoscaler was asked to have room."""
        return int(self._ask("demand"))

    def have(self, count: int) -> list[str]:
        """Add or remove raylets until there are so many, and none that drains; returns their ids."""
        for node in [*self._draining, *self.nodes[count:]]:
            self._ask("remove", node)
        self._draining, self.nodes = [], self.nodes[:count]
        while len(self.nodes) < count:
            self.add()
        return list(self.nodes)

    def close(self) -> None:
        """End of the cluster."""
        try:
            self._host.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._host.terminate()
            self._host.communicate(timeout=60)

    def _ask(self, *words: object) -> Any:
        assert self._host.stdin is not None and self._host.stdout is not None
        self._host.stdin.write(json.dumps(words) + "\n")
        self._host.stdin.flush()
        answer = self._host.stdout.readline()
        assert answer, f"the cluster's process died of {words}"
        return json.loads(answer)


@dataclass
class Driver:
    """A `zoray train` or `zoray resume` in progress.

    Attributes:
        process: of the command.
        said: the file with all it says.
        folder: of its run.
    """

    process: subprocess.Popen[bytes]
    said: Path
    folder: RunFolder

    @property
    def text(self) -> str:
        """All it has said so far."""
        return self.said.read_text()

    @property
    def log(self) -> str:
        """The run's log so far."""
        return self.folder.log.read_text() if self.folder.log.exists() else ""

    def steps(self) -> int:
        """Committed steps, as the run's metrics tell."""
        rows = list(self.folder.rows("steps"))
        return int(rows[-1]["step"]) + 1 if rows else 0

    def reaches(self, step: int) -> None:
        """Wait until so many steps are committed."""
        self._until(lambda: self.steps() >= step, f"step {step}")

    def logs(self, text: str) -> str:
        """Wait for a line in the run's log that has this text, and return it."""
        return self._until(
            lambda: next((line for line in self.log.splitlines() if text in line), None), f"{text!r} in the log"
        )

    def joins(self, count: int) -> None:
        """Wait until so many replicas have come to work."""
        self._until(lambda: self.log.count(" joins with the weights ") >= count, f"{count} replicas")

    def ends(self) -> int:
        """Wait until it is over; returns its exit status."""
        return self.process.wait(PATIENCE)

    def ends_as(self, undisturbed: Result) -> None:
        """See it to its end, with the ledger and the weights of the undisturbed run."""
        assert self.ends() == 0, self.text
        last = list(self.folder.rows("digests"))[-1]
        assert Result(ledger_of(self.folder), last["step"], last["digest"]) == undisturbed
        assert f"digest of the weights {undisturbed.digest}" in self.text

    def kill(self) -> None:
        """kill -9 of the driver, and of nothing else."""
        self.process.kill()
        self.process.wait()

    def _until(self, happened: Callable[[], Any], what: str) -> Any:
        def look() -> Any:
            value = happened()
            assert value or self.process.poll() is None, f"{what} never came:\n{self.text}\n{self.log}"
            return value

        return until(look, what)


@dataclass
class Workplace:
    """A folder with run.yaml in which commands are run, on a cluster or without one.

    Attributes:
        folder: the current directory of the commands; runs are in `runs`.
        env: their environment.
        brake: the file that makes replicas slow, see `brake/sitecustomize.py`.
    """

    folder: Path
    env: dict[str, str]
    brake: Path
    started: list[Driver] = field(default_factory=list)

    def zoray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [*ZORAY, *words], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=PATIENCE
        )

    def start(self, command: str, run: str, *words: str, **env: str) -> Driver:
        """Start `zoray train` or `zoray resume`, with more in its environment."""
        what = ["train", "run.yaml", f"run_name={run}"] if command == "train" else [command, run]
        said = self.folder / f"{run}-{len(self.started)}.txt"
        with said.open("wb") as file:
            process = subprocess.Popen(
                [*ZORAY, *what, *words],
                cwd=self.folder,
                env={**self.env, **env},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        driver = Driver(process, said, RunFolder(self.folder / "runs" / run))
        self.started.append(driver)
        return driver

    def slow_from(self, step: int) -> None:
        """Let replicas be slow from a step on, so that something can be done to the run there."""
        self.brake.write_text(str(step))

    def full_speed(self) -> None:
        """Let replicas be fast to the end."""
        self.slow_from(1 << 30)

    def status(self, run: str) -> dict[str, Any]:
        """What `zoray status --json` says."""
        done = self.zoray("status", run, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    def refused(self, code: int, *words: str) -> str:
        """Run a command that must fail; returns what it says, which is meant for a person."""
        done = self.zoray(*words)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    def api(self, run: str, code: str) -> str:
        """Run code with `run` from the Python API, in another process that has no folder of it; what it prints."""
        lines = f"from launch.control import attach\nwith attach({run!r}) as run:\n    {code}"
        done = subprocess.run(
            [sys.executable, "-c", lines],
            cwd=self.folder.parent,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def close(self) -> None:
        """End what a failed test has left."""
        for driver in self.started:
            if driver.process.poll() is None:
                os.killpg(driver.process.pid, signal.SIGKILL)
                driver.process.wait()
