"""The lock of a run: one writer, who is named, whose death frees it, and whose silence does on another machine."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.lock import RunLock, file_system_clock, held_by
from zoray.errors import RunError

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_700_000_000.0
OTHER = {"host": "elsewhere", "pid": 17, "since": "2026-01-02T03:04:05+00:00", "run": "a"}
HOLDER = """
import sys
from pathlib import Path
from actors.lock import RunLock
lock = RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


def lock(folder: Path, now: float = NOW) -> RunLock:
    """A lock whose own thread never wakes, at a time of the test's choice."""
    return RunLock(folder, interval=3600.0, clock=lambda folder: now)


def lay(folder: Path, content: object, at: float = NOW) -> Path:
    path = folder / "lock"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    os.utime(path, (at, at))
    return path


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock; a line on its standard input makes it release."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdin=pipe, stdout=pipe, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def refused(folder: Path, now: float = NOW, break_lock: bool = False) -> RunError:
    before = (folder / "lock").read_bytes()
    with pytest.raises(RunError) as caught:
        lock(folder, now).acquire(break_lock)
    assert (folder / "lock").read_bytes() == before
    assert caught.value.where == str(folder / "lock")
    return caught.value


def test_a_lock_is_taken_and_given_back(folder: Path) -> None:
    assert held_by(folder) is None
    with lock(folder) as taken:
        said = json.loads(taken.path.read_text())
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": "2023-11-14T22:13:20+00:00", "run": "a"}
        assert said == held_by(folder) == me
        assert taken.beat() and not taken.lost
    assert (folder / "lock").read_bytes() == b"" and held_by(folder) is None
    assert not taken.beat()
    taken.release()
    with lock(folder).acquire() as again, again as same:
        assert same is again and held_by(folder) is not None
    assert os.listdir(folder) == ["lock"]


def test_a_second_lock_in_the_same_process_is_refused(folder: Path) -> None:
    with lock(folder) as first:
        for break_lock in (False, True):
            error = refused(folder, break_lock=break_lock)
            assert f"process {os.getpid()} on {socket.gethostname()}, since 2023-11-14T22:13:20+00:00" in error.what
            assert "zoray stop a" in str(error.advice)
            assert ("--break-lock" in str(error.advice)) == break_lock
        with pytest.raises(RunError):
            first.acquire()
        assert first.beat()
    lock(folder).acquire().release()


def test_a_lock_held_by_another_process_is_refused_until_it_is_released(folder: Path) -> None:
    with holder(folder) as other:
        for break_lock in (False, True):
            # However long ago its last sign of life was: it hangs, perhaps, but it is there.
            os.utime(folder / "lock", (NOW - 1000, NOW - 1000))
            error = refused(folder, break_lock=break_lock)
            assert f"process {other.pid} on {socket.gethostname()}, since 2" in error.what
            assert "zoray stop a" in str(error.advice) and f"pid {other.pid} on host" in str(error.advice)
        owner = held_by(folder)
        assert owner is not None and owner["pid"] == other.pid
        assert other.stdin is not None and other.stdout is not None
        print(file=other.stdin, flush=True)
        assert other.stdout.readline() == "released\n"
        assert held_by(folder) is None
        with lock(folder):
            pass


def test_a_process_that_was_killed_leaves_the_run_at_once(folder: Path) -> None:
    with holder(folder) as other:
        other.kill()
        other.wait()
        assert json.loads((folder / "lock").read_text())["pid"] == other.pid
        assert held_by(folder) is None
        with lock(folder, file_system_clock(folder)):
            assert json.loads((folder / "lock").read_text())["pid"] == os.getpid()


def test_another_machine_keeps_the_run_while_it_gives_signs_of_life(folder: Path) -> None:
    lay(folder, OTHER)
    for age in (-5.0, 0.0, 12.4, 29.9):
        error = refused(folder, NOW + age)
        assert "process 17 on elsewhere" in error.what and f"was {int(max(age, 0))} s ago" in error.what
        assert "after 30 s" in str(error.advice) and "--break-lock" in str(error.advice)
        assert held_by(folder, clock=lambda folder: NOW) == OTHER


def test_another_machine_that_fell_silent_loses_the_run(folder: Path) -> None:
    lay(folder, OTHER)
    assert held_by(folder, clock=lambda folder: NOW + 30) is None
    with lock(folder, NOW + 30) as taken:
        assert json.loads(taken.path.read_text())["host"] == socket.gethostname()


def test_another_machine_known_to_be_gone_is_overridden(folder: Path) -> None:
    lay(folder, OTHER)
    refused(folder, NOW + 1)
    with lock(folder, NOW + 1).acquire(break_lock=True) as taken:
        assert json.loads(taken.path.read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("content", [b'{"host": "elsewh', b"\0" * 80, b"[1]", b"\xff", b"{}"])
def test_content_that_cannot_be_read_may_be_another_machine(folder: Path, content: bytes) -> None:
    lay(folder, content)
    assert "process unknown on unknown" in refused(folder, NOW + 29).what
    assert held_by(folder, clock=lambda folder: NOW + 29) == dict.fromkeys(OTHER, "unknown")
    assert held_by(folder, clock=lambda folder: NOW + 30) is None
    with lock(folder, NOW + 30):
        pass


def test_an_emptied_file_is_free(folder: Path) -> None:
    lay(folder, b"")
    assert held_by(folder, clock=lambda folder: NOW) is None
    with lock(folder):
        pass


def test_a_beat_is_a_sign_of_life(folder: Path) -> None:
    with lock(folder) as taken:
        os.utime(taken.path, (NOW, NOW))
        assert taken.beat()
        assert abs(file_system_clock(folder) - taken.path.stat().st_mtime) < 10


def test_signs_of_life_are_given_until_the_release(folder: Path) -> None:
    beats, enough = [0], threading.Event()

    class Counting(RunLock):
        def beat(self) -> bool:
            beats[0] += 1
            if beats[0] == 3:
                enough.set()
            return super().beat()

    with Counting(folder, interval=0.001):
        assert enough.wait(60)
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "lock")
        assert thread.daemon
    thread.join(60)
    assert not thread.is_alive()


def test_who_was_overridden_notices_and_leaves_the_file_alone(folder: Path) -> None:
    with lock(folder) as taken:
        path = lay(folder, OTHER)
        assert not taken.beat() and taken.lost
        assert path.stat().st_mtime == NOW
        path.write_bytes(b"")
        assert not taken.beat()
        lay(folder, OTHER)
    assert json.loads(path.read_text()) == OTHER


def test_a_file_that_was_deleted_is_lost(folder: Path) -> None:
    with lock(folder) as taken:
        taken.path.unlink()
        assert not taken.beat() and taken.lost
    assert os.listdir(folder) == []


def test_a_volume_that_is_away_for_a_while_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with lock(folder) as taken:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", away)
            assert taken.beat() and not taken.lost
        assert taken.beat()


def test_without_flock_signs_of_life_decide_on_this_machine_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(fd: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with lock(folder) as taken:
        os.utime(taken.path, (NOW, NOW))
        assert "4 s ago" in refused(folder, NOW + 4).what
        assert held_by(folder, clock=lambda folder: NOW + 4) is not None
        with lock(folder, NOW + 31):
            pass
    assert (folder / "lock").read_bytes() == b""


def test_looking_does_not_pass_for_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock, looking = lay(folder, b""), fcntl.flock, [os.open(folder / "lock", os.O_RDONLY)]
    assert path.exists()
    flock(looking[0], fcntl.LOCK_SH)

    def looked(fd: int, kind: int) -> None:
        try:
            flock(fd, kind)
        finally:
            # It looks for as long as the first attempt takes.
            if kind & fcntl.LOCK_SH and looking:
                os.close(looking.pop())

    monkeypatch.setattr(fcntl, "flock", looked)
    with lock(folder):
        assert not looking


def test_the_clock_is_the_file_systems(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)
    (folder / "new").touch()
    assert abs(file_system_clock(folder) - (folder / "new").stat().st_mtime) < 10
    assert os.listdir(folder) == ["new"]
    assert file_system_clock(folder / "nowhere") == NOW


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_may_not_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*arguments: Any) -> int:
        raise OSError(code, os.strerror(code))

    before = len(os.listdir("/proc/self/fd"))
    # A full disk refuses the content, the others the file. (Whom a folder's mode stops, root is not.)
    monkeypatch.setattr(os, "pwrite" if code == errno.ENOSPC else "open", refuse)
    with pytest.raises(RunError, match=os.strerror(code)) as caught:
        lock(folder).acquire()
    monkeypatch.undo()
    assert caught.value.where == str(folder / "lock") and "may write to it" in str(caught.value.advice)
    assert len(os.listdir("/proc/self/fd")) == before
    lock(folder).acquire().release()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="The run nowhere cannot be locked: No such file") as caught:
        lock(tmp_path / "nowhere").acquire()
    assert "folder is there" in str(caught.value.advice)
    assert held_by(tmp_path / "nowhere") is None


def test_the_file_of_a_folder_that_was_replaced_locks_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has deleted the folder and made a new one, between the opening of the file and its lock."""
    flock = fcntl.flock

    def replaced(fd: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        folder.rename(folder.with_name("old"))
        folder.mkdir()
        (folder / "lock").touch()
        flock(fd, kind)

    monkeypatch.setattr(fcntl, "flock", replaced)
    with pytest.raises(RunError, match="replaced at this moment"):
        RunLock(folder).acquire()
    RunLock(folder).acquire().release()
