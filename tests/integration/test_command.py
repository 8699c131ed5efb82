"""The command as a user has it: its own process, its own embedded Ray, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import Inputs
from zoray.ledger import Ledger
from zoray.runs import RunFolder

ZORAY = [sys.executable, "-m", "launch.cli"]


UNDISTURBED = 120


def prepare(folder: Path, inputs: Inputs) -> Path:
    keys = {**inputs.base, "max_steps": 30, "eval_steps": 15, "replicas": 2, "logging_steps": 1, "output_dir": "runs"}
    (folder / "run.yaml").write_text(yaml.safe_dump(keys))
    return folder


@pytest.fixture
def workplace(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with run.yaml, where commands are run."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return prepare(tmp_path, inputs)


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The ledger of a run that nobody stops; that of one of fewer steps is its beginning."""
    folder = prepare(tmp_path_factory.mktemp("undisturbed"), inputs)
    done = zoray(folder, "train", "run.yaml", "run_name=b", f"max_steps={UNDISTURBED}")
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "runs" / "b" / "ledger" / "commits.bin").read_bytes()


def zoray(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ZORAY, *words], cwd=folder, capture_output=True, text=True, timeout=200)


def interrupted(folder: Path, number: signal.Signals, *words: str) -> tuple[int, str]:
    """Run a command and send a signal to its whole process group, as a terminal does, when a step is done."""
    process = subprocess.Popen(
        [*ZORAY, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step ") and not line.startswith("step 0"):
            os.killpg(process.pid, number)
            break
    rest, _ = process.communicate(timeout=120)
    return process.returncode, "".join(lines) + rest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_at_a_step_and_resume_ends_as_undisturbed(
    number: signal.Signals, workplace: Path, undisturbed: bytes
) -> None:
    status, text = interrupted(workplace, number, "train", "run.yaml", "run_name=a", "max_steps=200")
    assert status == 130, text
    assert "zoray resume a" in text and "Traceback" not in text
    folder = RunFolder.find("a", str(workplace / "runs"))
    with Ledger.open(folder.ledger, repair=False) as ledger:
        assert 0 < ledger.next_step < UNDISTURBED - 10 and not ledger.warnings
        stopped = ledger.next_step
    done = zoray(workplace, "resume", "a", f"max_steps={stopped + 10}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continuing with step {stopped}" in done.stdout
    assert undisturbed.startswith((folder.ledger / "commits.bin").read_bytes())
    checked = zoray(workplace, "verify", "a")
    assert checked.returncode == 0 and "verified" in checked.stdout


def test_the_same_command_begins_a_run_and_continues_it(workplace: Path) -> None:
    """As a Kubernetes Job gives it; before the first time, a begin was killed that left nothing but a folder."""
    command = ("train", "--or-resume", "run.yaml", "run_name=a", "replicas=1", "eval_steps=2")
    (workplace / "runs" / "a" / "metrics").mkdir(parents=True)
    for goal, said in ((2, "all 2 steps"), (4, "continuing with step 2")):
        done = zoray(workplace, *command, f"max_steps={goal}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout
        with Ledger.open(RunFolder.find("a", str(workplace / "runs")).ledger, repair=False) as ledger:
            assert ledger.next_step == goal


def test_a_signal_that_ends_the_coordinator_too_is_an_interruption(workplace: Path) -> None:
    """As `timeout`, Slurm and systemd send it: to the processes of the embedded Ray as well."""
    command = [*ZORAY, "train", "run.yaml", "run_name=a", "max_steps=200"]
    with subprocess.Popen(
        command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        assert driver.stdout is not None
        next(line for line in driver.stdout if line.startswith("step ") and not line.startswith("step 0"))
        coordinator = RunFolder.find("a", str(workplace / "runs")).read_state()["pid"]
        # Or it might stop at the end of a step before it is killed.
        os.kill(coordinator, signal.SIGSTOP)
        driver.send_signal(signal.SIGTERM)
        os.kill(coordinator, signal.SIGKILL)
        text = driver.stdout.read()
    assert driver.returncode == 130, text
    assert "stopped by a signal" in text and "zoray resume a" in text and "Traceback" not in text


def test_the_commands_after_a_run(workplace: Path) -> None:
    done = zoray(workplace, "train", "run.yaml", "run_name=c", "max_steps=4", "eval_steps=2", "save_steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data-parallel training would have sent" in done.stdout and "zoray verify c" in done.stdout

    again = zoray(workplace, "train", "run.yaml", "run_name=c")
    assert again.returncode == 6 and "exists already" in again.stderr and "Traceback" not in again.stderr
    changed = zoray(workplace, "resume", "c", "epsilon=0.1")
    assert changed.returncode == 6 and "epsilon" in changed.stderr

    evaluated = json.loads(zoray(workplace, "eval", "c", "--json").stdout)
    assert evaluated["step"] == 4 and evaluated["count"] > 0
    rows = list(RunFolder.find("c", str(workplace / "runs")).rows("evaluations"))
    assert evaluated["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    assert len(zoray(workplace, "log", "c", "--json").stdout.splitlines()) == 4
    assert zoray(workplace, "plot", "c", "--to", "c.png").returncode == 0
    assert (workplace / "c.png").read_bytes().startswith(b"\x89PNG")


def test_nan_is_exit_status_8_and_a_missing_model_leaves_no_folder(workplace: Path) -> None:
    diverging = zoray(workplace, "train", "run.yaml", "run_name=d", "learning_rate=1e30", "eval_on_start=false")
    assert diverging.returncode == 8 and "learning_rate" in diverging.stderr, diverging.stdout + diverging.stderr
    missing = zoray(workplace, "train", "run.yaml", "run_name=e", "model=/no/such/model")
    assert missing.returncode == 4 and not (workplace / "runs" / "e").exists()
    refused = zoray(workplace, "train", "run.yaml", "run_name=f", "trainable=no_such_layer")
    assert refused.returncode == 2 and not (workplace / "runs" / "f").exists()
