"""`zoray train --or-resume`, as far as it gets without Ray: which run it means, and when it waits or refuses."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from actors.lock import RunLock
from launch import repeat, train
from launch.train import Stopped
from tests.unit.run_builder import BuiltRun, build_run, write_config
from zoray.errors import ConfigError, RunError
from zoray.runs import RunFolder


@pytest.fixture
def built(tmp_path: Path) -> BuiltRun:
    return build_run(tmp_path, max_steps=1)


def words(built: BuiltRun, *more: str) -> tuple[str, list[str]]:
    """The arguments that mean a run."""
    return str(built.folder.config_path), [f"run_name={built.name}", f"output_dir={built.output_dir}", *more]


def test_a_run_without_a_name_cannot_be_found_again(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_name is not given"):
        repeat.train_or_resume(str(write_config(tmp_path)), ["run_name=null"])


def test_another_computation_under_the_same_name_is_refused_and_the_run_stays_as_it_was(built: BuiltRun) -> None:
    before = built.folder.config_path.read_bytes()
    with pytest.raises(RunError, match=r"epsilon was .* and would become 0.5"):
        repeat.train_or_resume(*words(built, "epsilon=0.5"))
    assert built.folder.config_path.read_bytes() == before


def test_what_changes_no_result_counts_from_then_on(built: BuiltRun) -> None:
    config = built.config.model_copy(update={"replicas": 7})
    repeat._renew(built.folder, config, "run.yaml")
    assert built.folder.config().replicas == 7


@pytest.mark.parametrize("by_signal", [True, False])
def test_a_run_that_was_stopped_from_elsewhere_has_ended_well(
    built: BuiltRun, by_signal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or Kubernetes would begin again what somebody has just stopped."""

    def stopped(*arguments: object) -> None:
        raise Stopped(by_signal)

    monkeypatch.setattr(repeat, "resume", stopped)
    with pytest.raises(Stopped) if by_signal else nullcontext():
        repeat.train_or_resume(*words(built))


def test_a_run_that_another_process_has_is_waited_for(built: BuiltRun, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with RunLock(built.folder.path) as lock:

        def end_of_the_other(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                lock.release()

        monkeypatch.setattr(time, "sleep", end_of_the_other)
        repeat._await_end(built.folder)
    assert len(waits) == 3


def test_a_run_that_another_process_keeps_is_refused(built: BuiltRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "PATIENCE", 0.0)
    with RunLock(built.folder.path), pytest.raises(RunError, match="is being written by process"):
        repeat.train_or_resume(*words(built))


def test_a_run_that_another_process_is_about_to_begin_is_not_begun_again(
    built: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands of one name, begun at once: only a lock tells the folder of one from what a kill left."""
    config = built.config.model_copy(update={"output_dir": str(tmp_path / "new"), "run_name": "a"})
    monkeypatch.setattr(repeat, "PATIENCE", 0.0)
    refusals = []

    def follow(folder: RunFolder, *arguments: object, **options: object) -> None:
        with pytest.raises(RunError, match="is being written by process") as refused:
            repeat.train_or_resume(str(built.folder.config_path), ["run_name=a", f"output_dir={tmp_path / 'new'}"])
        refusals.append(refused)
        assert folder.config_path.is_file()

    monkeypatch.setattr(train, "_follow", follow)
    train.begin(RunFolder.create(config, "x"), config)
    assert refusals


def test_what_a_kill_left_is_begun_again_by_one_of_two(
    built: BuiltRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = built.config.model_copy(update={"output_dir": str(tmp_path / "new"), "run_name": "a"})
    left = RunFolder.create(config, "x")
    (left.path / "state.json.tmp").touch()
    begun = []

    def begin(path: str, overrides: list[str]) -> None:
        assert not left.path.exists()
        begun.append(path)

    monkeypatch.setattr(repeat, "train", begin)
    words = (str(built.folder.config_path), ["run_name=a", f"output_dir={tmp_path / 'new'}"])
    with RunLock(left.path):
        monkeypatch.setattr(repeat, "_await_end", lambda folder: None)
        with pytest.raises(RunError, match="is being written by process"):
            repeat.train_or_resume(*words)
        assert left.config_path.is_file()
    repeat.train_or_resume(*words)
    assert len(begun) == 1


def test_only_a_folder_in_which_nothing_is_but_a_run_before_its_first_step_is_begun_again(
    built: BuiltRun, tmp_path: Path
) -> None:
    made = RunFolder.create(built.config.model_copy(update={"output_dir": str(tmp_path / "new"), "run_name": "a"}), "x")
    assert repeat._is_unborn(made)
    (made.path / ".lock-x").touch()
    (made.path / "state.json.tmp").touch()
    assert repeat._is_unborn(made)
    (made.path / "notes.md").write_text("mine")
    assert not repeat._is_unborn(made)
    assert not repeat._is_unborn(RunFolder(tmp_path / "new" / "nowhere"))


def test_a_folder_that_has_become_another_processs_is_not_deleted(built: BuiltRun, tmp_path: Path) -> None:
    config = built.config.model_copy(update={"output_dir": str(tmp_path / "new"), "run_name": "a"})
    mine = RunFolder.create(config, "x")
    with pytest.raises(RunError, match="refused"), train.nothing_left_behind(mine):
        mine.set_aside()
        theirs = RunFolder.create(config, "x")
        raise RunError("refused")
    assert theirs.config_path.is_file()
    with pytest.raises(RunError, match="refused"), train.nothing_left_behind(theirs):
        raise RunError("refused")
    assert not theirs.path.exists()
