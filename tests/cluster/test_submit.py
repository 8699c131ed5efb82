"""A run on a cluster from a laptop that has nothing but the port of the head's job server, and a token for it."""

from __future__ import annotations

import http.server
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.conftest import place
from tests.cluster.helpers import ROOT, ZORAY, Driver, Machines, Result, Workplace, ledger_of, until
from tests.cluster.host import UNSHARE
from zoray.runs import RunFolder

pytestmark = pytest.mark.timeout(900)

TOKEN = "9d1c3bd0a2f74a0c8f2c5a3f6f1b7e44"


def _can_mount() -> bool:
    """Whether this machine lets a test have volumes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*UNSHARE, "mount", "-t", "tmpfs", "none", folder]
        return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


own_volumes = pytest.mark.skipif(not _can_mount(), reason="no mount namespaces on this machine")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all machines of the cluster mount; its runs are in `runs`."""
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def head(environment: dict[str, str], volume: Path) -> Iterator[Machines]:
    """A head with its job server, which wants a token."""
    # Not below pytest's folder: the paths of Ray's sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="zoray-") as folder:
        own = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "ZORAY_VOLUME": str(volume)}
        cluster = Machines({**environment, **own}, "--dashboard")
        yield cluster
        cluster.close()


@pytest.fixture
def laptop(
    head: Machines, config: str, environment: dict[str, str], brake: Path, tmp_path: Path
) -> Iterator[Workplace]:
    """Where there is run.yaml, the address of the job server and the token, and no folder of any run."""
    env = {**environment, "RAY_ADDRESS": head.http, "RAY_AUTH_TOKEN": TOKEN}
    yield from place(tmp_path, config, env, brake)


def steps(folder: RunFolder) -> int:
    rows = list(folder.rows("steps"))
    return int(rows[-1]["step"]) + 1 if rows else 0


def logs(folder: RunFolder, text: str, count: int = 1) -> None:
    until(lambda: folder.log.exists() and folder.log.read_text().count(text) >= count, f"{text} in the log")


def same(folder: RunFolder, undisturbed: Result) -> None:
    last = list(folder.rows("digests"))[-1]
    assert Result(ledger_of(folder), last["step"], last["digest"]) == undisturbed


def done(laptop: Workplace, *words: str) -> str:
    """What a command says that must not fail."""
    ran = laptop.zoray(*words)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_a_run_is_submitted_seen_scaled_stopped_and_resumed(
    laptop: Workplace, head: Machines, volume: Path, undisturbed: Result
) -> None:
    laptop.slow_from(10)
    head.have(2)
    said = done(laptop, "submit", "run.yaml", "run_name=far")
    folder = RunFolder(volume / "runs" / "far")
    assert said.splitlines()[0] == "run far" and f"accepted, folder {folder.path}" in said
    assert not (laptop.folder / "runs").exists()
    until(lambda: steps(folder) >= 10, "step 10")

    assert "2 replicas wanted, instead of 1" in done(laptop, "scale", "far", "2")
    status = laptop.status("far")
    assert (status["run"], status["state"], status["target"]) == ("far", "running", 2)
    assert "step 10/200" in done(laptop, "logs", "far")
    # What is wrong is told as it is told on the cluster, with its exit status.
    with ThreadPoolExecutor() as both:
        bad = both.submit(laptop.refused, 2, "scale", "far", "0")
        taken = both.submit(laptop.refused, 6, "submit", "run.yaml", "run_name=far")
        unknown = both.submit(laptop.refused, 6, "logs", "nope")
        listed = both.submit(done, laptop, "list", "--json")
        assert "cannot be scaled to 0 replicas" in bad.result()
        assert "The run far is in progress on this cluster" in taken.result()
        assert "give one of: far" in unknown.result()
        assert [row["run"] for row in json.loads(listed.result())] == ["far"]
    logs(folder, " joins with the weights ", 2)

    assert "stops at the next step boundary" in done(laptop, "stop", "far")
    until(lambda: folder.read_state().get("state") == "stopped", "the end of the run")
    step = steps(folder)
    laptop.full_speed()
    with ThreadPoolExecutor() as both:
        resumed = both.submit(done, laptop, "resume", "far", "--follow")
        until(lambda: folder.read_state().get("state") == "running", "the run's second life")
        # Where it has come to an end before it was looked at, that is what there is to see.
        assert "all 200 steps are committed" in done(laptop, "watch", "far")
        said = resumed.result()
    assert f"continuing with step {step}" in said and f"digest of the weights {undisturbed.digest}" in said
    same(folder, undisturbed)
    # One after the other: `stop` would find the job that is being refused, and stop that.
    assert "The run far exists already" in laptop.refused(6, "submit", "run.yaml", "run_name=far")
    assert "all 200 steps are committed" in laptop.refused(6, "stop", "far")


def test_a_followed_run_goes_on_without_the_laptop(
    laptop: Workplace, head: Machines, volume: Path, undisturbed: Result
) -> None:
    laptop.slow_from(10)
    head.have(1)
    file = laptop.folder / "said.txt"
    with file.open("wb") as output:
        words = [*ZORAY, "submit", "run.yaml", "run_name=alone", "--follow"]
        command = subprocess.Popen(
            words, cwd=laptop.folder, env=laptop.env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    folder = RunFolder(volume / "runs" / "alone")
    driver = Driver(command, file, folder)  # type: ignore[arg-type]
    laptop.started.append(driver)
    until(lambda: "step 10/200" in driver.text, "step 10 on the laptop")
    command.send_signal(signal.SIGINT)
    assert driver.ends() == 130
    assert "the run alone goes on without this command" in driver.text and "Traceback" not in driver.text
    at = steps(folder)
    driver_of_run = folder.read_state()["pid"]
    until(lambda: steps(folder) > at, "another step")
    laptop.full_speed()
    said = done(laptop, "logs", "alone", "--follow")
    assert f"digest of the weights {undisturbed.digest}" in said and "@zoray" not in said
    assert folder.read_state()["pid"] == driver_of_run
    same(folder, undisturbed)


@contextmanager
def foreign_server(answer: bytes, status: int = 200) -> Iterator[str]:
    """A server that answers everything alike."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_the_laptop_itself_refuses(laptop: Workplace, tmp_path: Path) -> None:
    submit = ("submit", "run.yaml")
    old, silent = b'{"ray_version": "2.40.0", "version": "4"}', "http://127.0.0.1:1"
    with (
        foreign_server(old) as other_ray,
        foreign_server(b"nothing here", 404) as no_ray,
        ThreadPoolExecutor(4) as several,
    ):

        def refused(code: int, *words: str, **env: str) -> Callable[[], str]:
            place = Workplace(laptop.folder, {**laptop.env, **env}, laptop.brake)
            return several.submit(place.refused, code, *words).result

        cases = {
            "cannot be reached": refused(7, *submit, "--address", silent),
            "check the address and the port-forward": refused(7, "status", "far", "--address", silent),
            "is not the job server": refused(7, *submit, "--address", no_ray),
            "The cluster runs Ray 2.40.0, and this machine has": refused(7, *submit, "--address", other_ray),
            "wants a token, and none was sent": refused(7, *submit, RAY_AUTH_TOKEN=""),
            "refuses this token": refused(7, *submit, RAY_AUTH_TOKEN="x" * 32),
            "needs the address of Ray's job server": refused(2, *submit, RAY_ADDRESS="127.0.0.1:6379"),
            "There is no key learning_rat": refused(2, *submit, "learning_rat=1"),
            "is not a folder": refused(2, *submit, "--working-dir", str(tmp_path / "none")),
        }
        for text, said in cases.items():
            assert text in said(), said()


def test_what_the_cluster_refuses_before_it_begins(laptop: Workplace, head: Machines, volume: Path) -> None:
    head.have(1)
    copy = laptop.folder / "copy"
    for package in ("zoray", "actors", "launch"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "zoray" / "update.py").open("a") as file:
        file.write("# changed\n")
    changed = Workplace(laptop.folder, {**laptop.env, "PYTHONPATH": str(copy)}, laptop.brake)
    (volume / "file").touch()
    submit = ("submit", "run.yaml", "run_name=refused")
    # One after the other: they have one name, which none of them keeps.
    assert "The cluster has another code of Zoray" in changed.refused(7, *submit)
    said = laptop.refused(7, *submit, "gpus_per_replica=1")
    assert "A replica needs 1 CPU and 1 GPU" in said and "1 × 1 CPU + 0 GPU" in said
    assert "cannot be made" in laptop.refused(6, *submit, "output_dir=file/runs")
    assert not (volume / "runs" / "refused").exists()


@own_volumes
def test_a_path_that_only_the_laptop_has(laptop: Workplace, head: Machines, volume: Path) -> None:
    head.have(1)
    here = laptop.folder / "here"
    here.mkdir()
    (laptop.folder / "text.jsonl").write_text('{"text": "a probe"}\n')
    script = f'mount -t tmpfs none {here} && cp text.jsonl {here} && exec "$@"'
    words = [*UNSHARE, "sh", "-c", script, "-", sys.executable, "-m", "launch.cli", "submit", "run.yaml"]
    words += ["task.train=here/text.jsonl", "run_name=refused"]
    ran = subprocess.run(words, cwd=laptop.folder, env=laptop.env, capture_output=True, text=True)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr, ran.stdout + ran.stderr
    assert f"task.train is {here}/text.jsonl, which exists on the machine you submit from" in ran.stderr
    assert not (volume / "runs" / "refused").exists()


@own_volumes
def test_a_volume_that_a_worker_does_not_have(laptop: Workplace, head: Machines, volume: Path) -> None:
    (volume / "runs").mkdir(exist_ok=True)
    with head.apart(volume / "runs"):
        said = laptop.refused(6, "submit", "run.yaml", "run_name=refused")
    assert "cannot write to the run's folder: what the head has written is not there" in said
    assert not (volume / "runs" / "refused").exists()
