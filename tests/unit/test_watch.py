"""`zoray watch`: what is shown of a run's status, what is said of its changes, and how it ends."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.journal import Progress, Split
from actors.lock import RunLock
from actors.status import ReplicaStatus, RunStatus
from launch.control import Known, status_of, to_json
from launch.watching.view import Changes, view
from launch.watching.watch import Watch, remembered, watch
from tests.unit.run_builder import BuiltRun, build_run
from zoray.errors import ResourceError, RunError
from zoray.protocol import Evaluation
from zoray.runs import RunFolder

CURVE = tuple((float(step), 4.0 - step / 50) for step in range(100))


def replica(name: str, state: str = "active", **keys: Any) -> ReplicaStatus:
    whole = ReplicaStatus(name, state, "abcdef0123456789", "host", 77, (77,), 100, 0, "probe of step 100", 5.0)
    return replace(whole, **keys)


def status(*replicas: ReplicaStatus, state: str = "running", **keys: Any) -> RunStatus:
    progress = Progress(
        step=100,
        max_steps=400,
        loss=2.0,
        first=Evaluation(4.0, 0.1, 10, 0),
        last=Evaluation(3.0, 0.1, 10, 0),
        tokens_per_second=1234.0,
        split=Split(2.0, 1.5, 0.1, 0.4),
        replicas=2,
        sent=1000,
        received=24,
        remaining=3661.0,
        replica_steps=200,
        trainable=1_000_000,
        curve=CURVE,
        metrics_url="http://here:1/metrics",
    )
    made = RunStatus(
        "r", state, 2, 1, None, replicas or (replica("r0"), replica("r1")), progress, {"lost": 0, "late": 3}
    )
    inside = {key: keys.pop(key) for key in list(keys) if key in Progress.__slots__}
    return replace(made, progress=replace(progress, **inside), **keys)


def shown(what: RunStatus, changes: Changes | None = None, width: int = 100, height: int = 40) -> list[str]:
    console = Console(record=True, width=width, height=height, file=io.StringIO(), force_terminal=True)
    console.print(view(what, changes or Changes(), width, height))
    return console.export_text().splitlines()


# ---- the view ----


def test_everything_that_is_asked_for_is_there() -> None:
    lines = shown(status(replica("r0"), replica("r7", "starting", pid=None, step=None, lag=None, item=None)))
    text = "\n".join(lines)
    assert "r: running; 1 active, 1 starting, 2 wanted (at least 1)" in text
    assert "100/400" in text and "2.0000" in text and "3.0000 ± 0.1000" in text
    assert "1:01:01" in text
    assert "probe 75%" in text and "commit 5%" in text and "wait 20%" in text
    # 2 bytes for each of a million weights, 200 times, against 1024.
    assert "1.0 KiB; data parallel 381.5 MiB, 390,625 times as much" in text
    assert "late 3" in text and "lost" not in text
    assert "http://here:1/metrics" in text
    (row,) = [line for line in lines if line.strip().startswith("r7 ")]
    assert row.split()[1] == "starting" and "-" in row
    assert any("⣀" <= sign <= "⣿" for sign in text)


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (200, 60)])
@pytest.mark.parametrize("count", [0, 1, 64])
def test_it_fits_the_terminal(width: int, height: int, count: int) -> None:
    changes = Changes()
    made = replace(status(), replicas=tuple(replica(f"r{i}") for i in range(count)))
    changes.take(made)
    for target in range(3, 12):
        changes.take(replace(made, target=target))
    lines = shown(made, changes, width, height)
    assert all(len(line) <= width for line in lines)
    if height >= 24 and width >= 80:
        assert len(lines) <= height
        assert (f"and {count - 1} more" in "\n".join(lines)) or count < 64 or height > 24


def test_a_run_that_has_not_begun_can_be_looked_at() -> None:
    fresh = replace(status(state="starting"), progress=Progress(0, 400), replicas=(), faults={})
    text = "\n".join(shown(fresh))
    assert "r: starting; none" in text and "no step yet" in text and "faults none" in text


def test_markup_in_names_is_not_interpreted() -> None:
    assert "[red]r" in shown(replace(status(), run="[red]r"))[0]


# ---- changes ----


def test_the_first_look_changes_nothing_but_says_the_warnings() -> None:
    changes = Changes()
    assert changes.take(status(warnings=("careful",))) == ["warning: careful"]
    assert changes.take(status(warnings=("careful",))) == []


def test_replicas_that_come_and_go_are_told() -> None:
    changes = Changes()
    changes.take(status(replica("r0"), replica("r1", "starting", seconds=9.0)))
    told = changes.take(
        status(replica("r1"), replica("r2", "starting"), target=5, faults={"lost": 1, "late": 3}, warnings=("w",))
    )
    assert told == [
        "r0 is gone, it was active",
        "r1 is active, it was starting for 0:00:09",
        "r2 is starting on machine abcdef01",
        "5 replicas wanted, instead of 2",
        "fault: 1 lost",
        "warning: w",
    ]
    assert [text.split(" ", 1)[1] for text in changes.recent] == told[-5:]


# ---- a run from its start to its end, or to that of its coordinator ----


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    return build_run(tmp_path_factory.mktemp("watch"))


@pytest.fixture
def folder(built: BuiltRun, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(built.folder.path, tmp_path / "runs" / "tiny")))


def watched(folder: RunFolder | None, *said: RunStatus | Exception | None, terminal: bool = False) -> str:
    """What is shown of a run that says so; it must be enough for the watch to end."""
    console = Console(record=True, width=200, file=io.StringIO(), force_terminal=terminal, soft_wrap=True)
    answers: Iterator[RunStatus | Exception | None] = iter(said)

    def look() -> RunStatus | None:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        Watch(console, "tiny", folder).until_it_ends(look)
    finally:
        text = console.export_text()
    assert next(answers, None) is None
    return text


@pytest.mark.parametrize("terminal", [False, True])
def test_it_ends_with_the_run(terminal: bool) -> None:
    done = status(state="done", text="all 400 steps are committed", step=400)
    text = watched(None, None, status(), None, status(step=200), done, terminal=terminal)
    assert "r: done, all 400 steps are committed" in text and "resume" not in text
    assert "held-out loss 4.0000 ± 0.1000 before, 3.0000 ± 0.1000 after" in text


def test_lines_where_there_is_no_terminal() -> None:
    steps = [status(step=step) for step in (1, 5, 9, 10, 11, 25)]
    done = status(replica("r0"), state="stopped", text="stopped at step 27", step=27)
    text = watched(None, *steps, done)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("step ")] == [
        f"{step}/400" for step in (1, 10, 25, 27)
    ]
    assert "r1 is gone, it was active" in text
    assert "r: stopped, stopped at step 27" in text and "zoray resume tiny" in text


def test_the_end_is_told_by_the_folder_where_the_coordinator_is_gone_already(folder: RunFolder) -> None:
    folder.write_state({"state": "done", "step": 6, "text": "all 6 steps are committed"})
    for last in (None, ResourceError("the coordinator of tiny died")):
        text = watched(folder, status(), last)
        assert "tiny: done, step 6 of 6: all 6 steps are committed" in text


def test_a_coordinator_that_died_is_an_error_that_says_how_to_go_on(folder: RunFolder) -> None:
    folder.write_state({"state": "running"})
    for last in (None, ResourceError("the coordinator of tiny died")):
        with pytest.raises(RunError, match="died after step 6") as caught:
            watched(folder, status(), last)
        assert f"zoray resume {folder.reference}" in str(caught.value.advice)


def test_a_run_that_goes_on_but_is_not_heard_of_is_not_said_to_be_dead(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.watching.watch._PATIENCE", 0.0)
    folder.write_state({"state": "running"})
    lock = RunLock(folder.path).acquire()
    try:
        with pytest.raises(ResourceError, match="Nothing is heard of r any more, after step 100"):
            watched(folder, status(), None, ResourceError("no route to host"))
    finally:
        lock.release()


def test_without_a_folder_nobody_knows_how_it_ended() -> None:
    with pytest.raises(ResourceError, match="the coordinator of r died") as caught:
        watched(None, status(), ResourceError("the coordinator of r died"))
    assert "zoray status tiny" in str(caught.value.advice)


def test_what_cannot_be_looked_at_at_all_is_said_as_it_is(folder: RunFolder) -> None:
    folder.write_state({"state": "running"})
    lock = RunLock(folder.path).acquire()
    try:
        with pytest.raises(ResourceError, match=r"^no route"):
            watched(folder, ResourceError("no route"))
    finally:
        lock.release()


# ---- a run that has ended ----


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_has_ended_is_shown_as_it_was(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    folder.write_state({"state": "done", "step": 6, "text": "all 6 steps are committed"})
    watch("tiny", str(folder.path.parent), None)
    out = capsys.readouterr().out
    assert "all 6 steps are committed" in out and "held-out loss" in out
    assert ("└1" in out) == terminal


def test_a_folder_remembers_all_lives_of_its_coordinator(folder: RunFolder) -> None:
    rows = list(folder.rows("steps"))
    folder.forget("steps", -1)
    for row, sent in zip(rows, (10, 20, 30, 5, 10, 15), strict=True):
        folder.append("steps", {**row, "sent": sent, "received": 2 * sent, "replicas": 3, "tokens": 50.0})
    folder.write_state({"state": "stopped", "step": 6, "text": "t", "trainable": 7})
    found = remembered(folder)
    assert (found.step, found.max_steps, found.sent, found.received) == (6, 6, 45, 90)
    assert (found.replica_steps, found.trainable, found.tokens_per_second) == (18, 7, 200.0)
    assert found.split == Split(0.25, 0.2, 0.01, 0.04) or found.split.total == pytest.approx(0.25)
    assert found.curve == tuple((float(row["step"]), row["loss"]) for row in rows)
    assert found.first is not None and found.last is not None and found.first != found.last


def test_a_run_without_a_step_has_nothing_to_remember(folder: RunFolder) -> None:
    folder.forget("steps", -1)
    os.remove(folder.path / "metrics" / "evaluations.jsonl")
    found = remembered(folder)
    assert found.curve == () and found.loss is None and found.split == Split()


def test_an_unknown_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunError, match="no run 'nope'"):
        watch("nope", str(tmp_path), None)


def test_status_crosses_a_wire_and_comes_back() -> None:
    starting = replica("r0", "starting", host=None, pid=None, step=None, lag=None)
    for made in (status(), status(starting, loss=None, last=None), status(text="x", curve=())):
        assert status_of(json.loads(to_json(made))) == made
    diverged = status(curve=((0.0, float("nan")),), last=Evaluation(float("nan"), 0.1, 10, 0))
    assert to_json(status_of(json.loads(to_json(diverged)))) == to_json(diverged)
    with pytest.raises(RunError, match="same version"):
        status_of({"run": "r"})


def answering(*texts: str) -> Any:
    def asks(address: str, *words: str, every: float = 1.0) -> Iterator[str]:
        assert (address, words) == ("http://head:8265", ("status", "r", "--json"))
        yield from texts
        raise ResourceError("the cluster is gone")

    return asks


@pytest.mark.parametrize(("state", "says"), [("done", "all 400 steps"), ("stopped", "stopped at"), ("lost", "died")])
def test_watch_over_http_sees_the_end(
    state: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"done": "all 400 steps are committed", "stopped": "stopped at step 100"}.get(state)
    known = Known("r", "/there/r", "r", state, 100, 400, 2.0, text)
    monkeypatch.setattr("launch.jobs.remote.asks", answering(to_json(status()), to_json(known)))
    if state == "lost":
        with pytest.raises(RunError, match=says):
            watch("r", "runs", None, "http://head:8265")
        return
    watch("r", "runs", None, "http://head:8265")
    said = capsys.readouterr().out
    assert says in said and "step 100/400" in said


def test_watch_over_http_says_that_nothing_is_heard_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.jobs.remote.asks", answering(to_json(status())))
    with pytest.raises(ResourceError, match="Nothing is heard of r any more, after step 100"):
        watch("r", "runs", None, "http://head:8265")
