"""Run folders: their names, finding them, and tables that survive a crash."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from zoray.config import RunConfig
from zoray.errors import RunError
from zoray.runs import RunFolder


def config(output: Path, **keys: Any) -> RunConfig:
    task = {"kind": "causal_lm", "train": "t"}
    return RunConfig.model_validate({"model": "m", "max_steps": 1, "task": task, "output_dir": str(output), **keys})


def test_a_new_run(tmp_path: Path) -> None:
    made = config(tmp_path / "runs", run_name="a", learning_rate=3e-5)
    folder = RunFolder.create(made, "ignored")
    assert (folder.name, folder.path) == ("a", tmp_path / "runs" / "a")
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "metrics", "snapshots"]
    assert folder.config() == made
    assert folder.config(["replicas=5"]).replicas == 5


@pytest.mark.parametrize(("stem", "start"), [("sst2", "sst2"), ("a b/ü", "a-b"), ("...", "run")])
def test_a_name_is_made_from_the_files(tmp_path: Path, stem: str, start: str) -> None:
    names = {RunFolder.create(config(tmp_path), stem).name for _ in range(3)}
    assert len(names) == 3
    assert all(re.fullmatch(rf"{start}-[0-9a-f]{{4}}", name) for name in names)


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, run_name="a", seed=1), "x")
    with pytest.raises(RunError, match="The run a exists already") as caught:
        RunFolder.create(config(tmp_path, run_name="a", seed=2), "x")
    assert f"zoray resume {tmp_path / 'a'}`" in str(caught.value.advice)
    assert folder.config().seed == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.create(config(tmp_path / "file", run_name="a"), "x")


def test_runs_are_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunFolder.create(config(tmp_path / "runs", run_name="a"), "x")
    assert RunFolder.find("a", str(tmp_path / "runs")) == made
    monkeypatch.chdir(tmp_path)
    assert RunFolder.find("a") == RunFolder.find("runs/a") == RunFolder.find(str(made.path)) == made


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run 'a'") as caught:
        RunFolder.find("a", str(tmp_path))
    assert "zoray train" in str(caught.value.advice)
    for name in ("b", "c"):
        RunFolder.create(config(tmp_path, run_name=name), "x")
    with pytest.raises(RunError) as caught:
        RunFolder.find("a", str(tmp_path))
    assert caught.value.advice == "give one of: b, c"


def test_rows_come_in_order_and_the_last_of_a_step_counts(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, run_name="a"), "x")
    assert list(folder.rows("steps")) == []
    for step, loss in ((0, 3.0), (2, 1.0), (1, 2.0), (2, 1.5)):
        folder.append("steps", {"step": step, "loss": loss})
    assert [(row["step"], row["loss"]) for row in folder.rows("steps")] == [(0, 3.0), (1, 2.0), (2, 1.5)]


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, run_name="a"), "x")
    folder.append("steps", {"step": 0})
    path = folder.path / "metrics" / "steps.jsonl"
    path.write_text(path.read_text() + '{"step": 1, "lo')
    assert [row["step"] for row in folder.rows("steps")] == [0]


def test_a_line_cut_off_by_a_crash_does_not_swallow_the_next(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics").mkdir()
    folder.append("steps", {"step": 0, "loss": 1.0})
    path = tmp_path / "metrics" / "steps.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 1, "lo')
    folder.append("steps", {"step": 1, "loss": 2.0})
    assert [row["loss"] for row in folder.rows("steps")] == [1.0, 2.0]


def test_rows_after_a_step_are_forgotten(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, run_name="a"), "x")
    folder.forget("steps", 3)
    assert not list((folder.path / "metrics").iterdir())
    for step, loss in ((0, 3.0), (1, 2.0), (2, 9.0), (1, 1.5), (2, 1.0), (3, 0.5)):
        folder.append("steps", {"step": step, "loss": loss})
        folder.append("digests", {"step": step})
    path = folder.path / "metrics" / "steps.jsonl"
    before = path.read_bytes()
    for after in (3, 100):
        folder.forget("steps", after)
        assert path.read_bytes() == before
    with path.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    folder.forget("steps", 1)
    assert path.read_bytes().splitlines() == [before.splitlines()[at] for at in (0, 1, 3)]
    folder.append("steps", {"step": 2, "loss": 0.75})
    assert [row["loss"] for row in folder.rows("steps")] == [3.0, 1.5, 0.75]
    folder.forget("steps", -1)
    assert list(folder.rows("steps")) == []
    assert [row["step"] for row in folder.rows("digests")] == [0, 1, 2, 3]
    assert sorted(path.name for path in (folder.path / "metrics").iterdir()) == ["digests.jsonl", "steps.jsonl"]


def test_a_crash_while_forgetting_leaves_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(config(tmp_path, run_name="a"), "x")
    for step in range(3):
        folder.append("steps", {"step": step})

    def full(path: Path, target: Path) -> None:
        assert path.read_bytes() == b'{"step": 0}\n'
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        folder.forget("steps", 0)
    assert [row["step"] for row in folder.rows("steps")] == [0, 1, 2]
    assert os.listdir(folder.path / "metrics") == ["steps.jsonl"]


def test_the_state_is_what_was_said_last(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, run_name="a"), "x")
    assert folder.state_path == tmp_path / "a" / "state.json"
    assert folder.read_state() == {}
    for state in ({"status": "running", "address": {"host": "h", "port": 1}}, {"status": "finished"}):
        folder.write_state(state)
        assert folder.read_state() == state == json.loads(folder.state_path.read_text())
    assert sorted(os.listdir(folder.path)) == ["config.yaml", "metrics", "snapshots", "state.json"]


@pytest.mark.parametrize("content", [b"", b'{"status": "ru', b"[1]", b"\0\0\0", b"\xff"])
def test_a_state_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.state_path.write_bytes(content)
    assert folder.read_state() == {}
    folder.state_path.unlink()
    folder.state_path.mkdir()
    assert folder.read_state() == {}


def test_all_runs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RunFolder.all(str(tmp_path / "nowhere")) == []
    made = [RunFolder.create(config(tmp_path / "runs", run_name=name), "x") for name in ("c", "a", "b")]
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "runs" / "file").write_text("")
    (tmp_path / "runs" / "odd" / "config.yaml").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert RunFolder.all() == RunFolder.all(str(tmp_path / "runs")) == sorted(made, key=lambda folder: folder.name)
