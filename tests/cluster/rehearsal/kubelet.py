"""The part of a kubelet that a rehearsal needs: pods that start, become ready, and end as Kubernetes ends them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.helpers import PATIENCE, until
from tests.cluster.rehearsal.container import Surroundings, inside, script
from tests.cluster.rehearsal.kuberay import Pod

GATEWAY = "10.244.0.1"
_APART = ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--propagation=private"]


@dataclass
class Running:
    """A pod that was started.

    Attributes:
        pod: it.
        ip: its address.
        process: the parent of its process 1, which ends as that does.
        said: the file with all that its container says.
        asked: when it got SIGTERM, by the monotonic clock in seconds.
    """

    pod: Pod
    ip: str
    process: subprocess.Popen[bytes]
    said: Path
    asked: float | None = None

    @property
    def name(self) -> str:
        """Of the pod."""
        return self.pod.name

    @property
    def command(self) -> str:
        """What its container does, without the shell around it."""
        return " ".join(self.pod.container["args"][0].split("; ")[-1].split())

    @property
    def main(self) -> psutil.Process:
        """Its process 1."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    @property
    def grace(self) -> float:
        """Seconds between SIGTERM and SIGKILL; 30 where the manifest does not say."""
        return float(self.pod.spec.get("terminationGracePeriodSeconds", 30))

    def alive(self) -> bool:
        """Whether its process 1 has not ended."""
        return self.process.poll() is None

    def ready(self) -> bool:
        """What its readiness probe says now."""
        probe = self.pod.container["readinessProbe"]
        url = f"http://{self.ip}:{probe['httpGet']['port']}{probe['httpGet']['path']}"
        with suppress(OSError), urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as answer:
            return bool(200 <= answer.status < 400)
        return False

    def until_ready(self) -> None:
        """Wait for that."""
        until(lambda: self.ready() or self._end_it_if_over(), f"{self.name} is ready")

    def _end_it_if_over(self) -> bool:
        assert self.alive(), f"{self.name} has ended:\n{self.said.read_text()}"
        return False

    def terminate(self) -> None:
        """SIGTERM to its process 1, as when a pod is deleted; `terminated` is the rest."""
        self.asked = time.monotonic()
        self.main.send_signal(signal.SIGTERM)

    def terminated(self) -> float:
        """Wait until it has ended, which must be before its grace is over; returns seconds since SIGTERM."""
        assert self.asked is not None
        try:
            self.process.wait(max(0.0, self.asked + self.grace - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} had to be killed:\n{self.said.read_text()}") from None
        return time.monotonic() - self.asked

    def kill(self) -> None:
        """SIGKILL to its process 1, with which the kernel ends all others of the pod."""
        if self.alive():
            self.main.kill()
            self.process.wait()


class Kubelet:
    """A machine with a network of pods.

    Args:
        folder: where it keeps what pods say, and has room for their roots.
        volumes: folders by the name of the claim or of the ConfigMap.
        environment: variables that the image has beside its own.
    """

    def __init__(self, folder: Path, volumes: dict[str, Path], environment: dict[str, str]) -> None:
        self._folder, self._names = folder, {"localhost": "127.0.0.1"}
        self._around = Surroundings(GATEWAY, folder / "hosts", volumes, environment)
        self._count = 0
        for words in (
            "link set lo up",
            "link add pods type bridge",
            f"addr add {GATEWAY}/16 dev pods",
            "link set pods up",
        ):
            _ip(words)

    def run(self, pod: Pod, service: str | None = None) -> Running:
        """Start a pod; the name of the service, if there is one, leads to it from now on."""
        self._count += 1
        ip, root = f"10.244.0.{self._count + 9}", self._folder / pod.name
        self._names |= {pod.name: ip} if service is None else {pod.name: ip, service: ip}
        self._around.hosts.write_text("".join(f"{ip} {name}\n" for name, ip in self._names.items()))
        root.mkdir()
        said = self._folder / f"{pod.name}.txt"
        with said.open("wb") as file:
            process = subprocess.Popen(
                [*_APART, "bash", "-c", script(pod, root, ip, self._around)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        running = Running(pod, ip, process, said)
        self._plug(running)
        return running

    def execute(self, running: Running, *command: str) -> str:
        """What a command prints in a pod's container, as by `kubectl exec`."""
        words = ["nsenter", f"--target={running.main.pid}", "--mount", "--net", "--pid", "--uts", "--ipc"]
        words += inside(running.pod, self._around, *command)
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _plug(self, running: Running) -> None:
        number, own = self._count, Path("/proc/self/ns/net").readlink()

        def apart() -> bool:
            assert running.alive(), running.said.read_text()
            return Path(f"/proc/{running.process.pid}/ns/net").readlink() != own

        until(apart, "a network for the pod", PATIENCE)
        _ip(f"link add pod{number} type veth peer name eth0 netns {running.process.pid}")
        _ip(f"link set pod{number} master pods")
        _ip(f"link set pod{number} up")


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, stdout=sys.stderr)
