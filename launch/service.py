"""A server that runs for as long as a command does: started with a log of its own, waited for, watched and ended."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from zoray.errors import ResourceError

_PATIENCE = 60.0
_GRACE = 10.0


class Service:
    """A process that serves HTTP on this machine; a context manager, which starts it and ends it.

    Args:
        name: for messages.
        command: the program and its arguments.
        port: it listens on, on the loopback interface.
        ready: path that answers 200 when it can be used.
        log: file for what it prints; written anew.
        environment: added to this process's.

    Attributes:
        url: where it serves, without a slash at the end.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        ready: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.url, self.log = name, f"http://127.0.0.1:{port}", log
        self._command, self._port, self._ready, self._environment = command, port, ready, environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Service:
        """Start it, and wait until it can be used.

        Raises:
            ResourceError: its port is taken, or it ends at once, or does not answer.
        """
        self._check_port()
        with self.log.open("wb") as log:
            # In a session of its own: Ctrl-C is for this command, which ends its servers in order.
            self._process = subprocess.Popen(
                list(self._command), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **self._environment},
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """See that it still runs.

        Raises:
            ResourceError: it has ended, with the last lines of its log.
        """
        assert self._process is not None
        if (status := self._process.poll()) is not None:
            said = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            text = f"{self.name} has ended with status {status}: " + " / ".join(said or ["it said nothing"])
            raise ResourceError(text, where=str(self.log), advice="remove the cause it names, then start anew")

    def _wait(self) -> None:
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            self.check()
            try:
                with urllib.request.urlopen(self.url + self._ready, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise ResourceError(f"{self.name} does not answer within {_PATIENCE:g} s.", where=f"{self.url}, {self.log}")

    def _check_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except (OSError, OverflowError) as error:
                raise ResourceError(
                    f"{self.name} cannot have port {self._port}: {error}.",
                    where=f"port {self._port}",
                    advice="choose another one, see `zoray monitor --help`",
                ) from error
