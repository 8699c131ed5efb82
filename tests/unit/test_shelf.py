"""Snapshots on a real S3 server: whole or not there, verified like those in a folder, never what a run waits for."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.replica import ReplicaActor
from actors.settings import STORE_PATIENCE, settings
from launch.jobs.machines import look
from launch.preflight import check_snapshots
from launch.restore import restore
from launch.verify import verify
from tests.conftest import S3
from tests.unit.run_builder import BuiltRun, build_run, write_config
from tests.unit.test_snapshot import at, ledger, replica
from zoray import stores
from zoray.config import RunConfig, load
from zoray.errors import NumericsError, RunError
from zoray.identity import header_digest
from zoray.ledger import Ledger
from zoray.protocol import Failed, Item, Kind, decode_answer, encode_request
from zoray.runs import RunFolder
from zoray.shelf import shelf
from zoray.snapshot import found, head_at, load_newest, replay, save, steps, sweep, usable

__all__ = ["ledger"]  # a fixture

DEAD = "s3://b/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"


def saved(ledger: Ledger, uri: str, *places: int, **keys: Any) -> None:
    for step in places:
        save(uri, at(ledger, step), head_at(ledger, step), header_digest(ledger.header), **keys)


def loaded(ledger: Ledger, uri: str) -> int:
    """The step of the newest usable snapshot; what it holds is compared."""
    one = replica()
    load_newest(uri, one, header_digest(ledger.header), usable(found(uri), ledger))
    assert one.digest() == at(ledger, one.step).digest()
    return one.step


def test_what_was_saved_comes_back(s3: S3, ledger: Ledger) -> None:
    saved(ledger, s3.uri("run"), 2, 4)
    assert steps(s3.uri("run")) == [2, 4]
    assert found(s3.uri("run")) == {step: f"{at(ledger, step).digest():016x}" for step in (2, 4)}
    assert loaded(ledger, s3.uri("run")) == 4
    assert list((stores.cache_root() / "snapshots").iterdir()) == []


def test_old_ones_are_deleted(s3: S3, ledger: Ledger) -> None:
    for step in (1, 2, 3, 4):
        saved(ledger, s3.uri("run"), step, keep=2)
    assert {name.split("/")[1] for name in s3.names()} == {"step-3", "step-4"}


def test_one_that_exists_stays_and_a_wrong_one_does_not(s3: S3, ledger: Ledger) -> None:
    saved(ledger, s3.uri("run"), 2)
    before = s3.read("run", "step-2", "snapshot.json")
    save(s3.uri("run"), at(ledger, 2), head_at(ledger, 2), "another run")
    assert s3.read("run", "step-2", "snapshot.json") == before
    s3.write(json.dumps({**json.loads(before), "digest": "0" * 16}).encode(), "run", "step-2", "snapshot.json")
    saved(ledger, s3.uri("run"), 2)
    assert s3.read("run", "step-2", "snapshot.json") == before


def edited(s3: S3, **keys: object) -> None:
    place = ("run", "step-4", "snapshot.json")
    s3.write(json.dumps({**json.loads(s3.read(*place)), **keys}).encode(), *place)


def weights(s3: S3, change: Callable[[bytes], bytes]) -> None:
    place = ("run", "step-4", "weights.safetensors")
    s3.write(change(s3.read(*place)), *place)


DAMAGE: dict[str, Callable[[S3], object]] = {
    "one bit": lambda s3: weights(s3, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "cut": lambda s3: weights(s3, lambda data: data[: len(data) // 2]),
    "empty": lambda s3: weights(s3, lambda data: b""),
    "no weights": lambda s3: s3.delete("run", "step-4", "weights.safetensors"),
    "not json": lambda s3: s3.write(b"{", "run", "step-4", "snapshot.json"),
    "another run": lambda s3: edited(s3, run="another"),
    "other commits": lambda s3: edited(s3, head="7" * 64),
    "digest": lambda s3: edited(s3, digest="0" * 16),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_passed_over_with_a_warning(
    s3: S3, ledger: Ledger, caplog: pytest.LogCaptureFixture, damage: Callable[[S3], object]
) -> None:
    saved(ledger, s3.uri("run"), 2, 4)
    damage(s3)
    with caplog.at_level(logging.WARNING):
        assert loaded(ledger, s3.uri("run")) == 2
    assert f"step-4 of {s3.uri('run')} is passed over" in caplog.text


@pytest.mark.parametrize("cut", [0, 1])
def test_an_upload_that_broke_off_does_not_exist(
    s3: S3, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    from pyarrow import fs

    saved(ledger, s3.uri("run"), 2)
    whole, left = fs.copy_files, iter(range(cut))

    def copy(*arguments: Any, **keys: Any) -> None:
        if next(left, None) is None:
            raise OSError("AWS Error NETWORK_CONNECTION during UploadPart operation: gone")
        whole(*arguments, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "copy_files", copy)
        with pytest.raises(OSError, match="cannot be reached"):
            saved(ledger, s3.uri("run"), 4)
    assert len(s3.names("run/step-4/")) == cut
    assert steps(s3.uri("run")) == [2] and loaded(ledger, s3.uri("run")) == 2
    assert caplog.text == ""
    sweep(s3.uri("run"))
    assert s3.names("run/step-4/") == []
    saved(ledger, s3.uri("run"), 4)
    assert loaded(ledger, s3.uri("run")) == 4


def test_sweep_deletes_what_is_too_late_and_nothing_else(s3: S3, ledger: Ledger) -> None:
    saved(ledger, s3.uri("run"), 2, 4)
    saved(ledger, s3.uri("run2"), 4)
    others = [s3.write(b"x", "run", *names) for names in (("final", "config.json"), ("step-x", "a"), ("notes.md",))]
    sweep(s3.uri("run"), after=2)
    assert all(stores.read(each) == b"x" for each in others)
    assert steps(s3.uri("run")) == [2] and steps(s3.uri("run2")) == [4]


@pytest.mark.parametrize("where", [DEAD, "s3://no-such-bucket/x"])
def test_replay_does_without_a_store(
    s3_server: str, ledger: Ledger, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    one = replica()
    with caplog.at_level(logging.WARNING):
        replay(one, ledger, where)
    assert one.digest() == at(ledger, 6).digest() and one.step == 6
    assert "the snapshots of the run are passed over" in caplog.text


# ---- a run ----


def folders(tmp_path: Path, **keys: Any) -> tuple[RunFolder, RunConfig]:
    config = load(write_config(tmp_path, **keys))
    return RunFolder.create(config, "tiny"), config


def test_where_they_are_kept(tmp_path: Path) -> None:
    folder, config = folders(tmp_path)
    for given, place in (
        (None, folder.path / "snapshots"),
        ("/mnt/snapshots", Path("/mnt/snapshots/tiny")),
        ("../s", tmp_path / "runs" / "../s/tiny"),
        ("s3://b/s?region=x", "s3://b/s/tiny?region=x"),
        ("s3://b", "s3://b/tiny"),
    ):
        assert folder.snapshots_of(config.model_copy(update={"snapshot_dir": given})) == place


@pytest.mark.parametrize("far", [False, True])
def test_verify_and_restore_use_them(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str], far: bool) -> None:
    place = s3.uri("s") if far else str(tmp_path / "s")
    run = build_run(tmp_path, max_steps=4, learning_rate=1.0, snapshots=(2,), snapshot_dir=place)
    assert not any(run.folder.snapshots.iterdir()) and steps(f"{place}/tiny") == [2]
    verify("tiny", run.output_dir)
    assert f"2     snapshot     {run.digests[2]:016x}" in capsys.readouterr().out
    assert restore("tiny", 3, run.output_dir).replica.digest() == run.digests[3]


def test_verify_finds_a_damaged_one(s3: S3, tmp_path: Path) -> None:
    run = build_run(tmp_path, max_steps=4, snapshots=(2,), snapshot_dir=s3.uri("s"))
    name = ("s", "tiny", "step-2", "weights.safetensors")
    s3.write(s3.read(*name)[:-3] + b"abc", *name)
    with pytest.raises(RunError, match="snapshot of step 2 is damaged") as caught:
        verify("tiny", run.output_dir)
    assert caught.value.where == s3.uri("s", "tiny")


def test_verify_does_without_a_store(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(tmp_path, max_steps=2, snapshots=(1,), snapshot_dir=s3.uri("s"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    verify("tiny", run.output_dir)
    shown = capsys.readouterr()
    assert "verified" in shown.out and "cannot be compared" in shown.err


@pytest.mark.parametrize("where", ["store", "folder"])
def test_a_place_that_is_right_is_left_empty(s3: S3, tmp_path: Path, where: str) -> None:
    folder, config = folders(tmp_path, snapshot_dir=s3.uri("s") if where == "store" else str(tmp_path / "a" / "b"))
    check_snapshots(folder, config)
    check_snapshots(folder, config)
    assert shelf(folder.snapshots_of(config)).anything() == []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (DEAD, "cannot be reached"),
        ("s3://no-such-bucket/x", "no bucket"),
        ("/proc/snapshots", "cannot be kept there"),
        ("s4://b/x", "cannot be opened"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(s3_server: str, tmp_path: Path, where: str, words: str) -> None:
    folder, config = folders(tmp_path, snapshot_dir=where)
    with pytest.raises(RunError, match=words) as caught:
        check_snapshots(folder, config)
    assert caught.value.where == "snapshot_dir" and caught.value.advice


def test_a_place_with_anothers_snapshots_is_refused(s3: S3, tmp_path: Path, ledger: Ledger) -> None:
    folder, config = folders(tmp_path, snapshot_dir=s3.uri("s"))
    saved(ledger, s3.uri("s", "tiny"), 2)
    with pytest.raises(RunError, match="step-2") as caught:
        check_snapshots(folder, config)
    assert "run_name" in str(caught.value.advice)


def test_a_machine_says_what_it_cannot_reach(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("token")
    s3.write(b"x", "m", "config.json")
    uris = {"model": s3.uri("m"), "task.train": s3.uri("no"), "task.eval": DEAD, "snapshot_dir": s3.uri("s")}
    seen = look(str(tmp_path / "token"), [], uris)
    assert [uri for uri, _, _ in seen.unreached] == [s3.uri("no"), DEAD]
    assert all(what for _, what, _ in seen.unreached)
    with s3.strict():
        refused = look(str(tmp_path / "token"), [], {"snapshot_dir": s3.uri("s")}).unreached
    assert "refuses access" in refused[0][1]


def test_patience_with_uploads(tmp_path: Path) -> None:
    _, config = folders(tmp_path)
    far = config.model_copy(update={"snapshot_dir": "s3://b/s"})
    assert settings(far, 0).snapshot_patience == STORE_PATIENCE and settings(config, 0).snapshot_patience == 0


@pytest.fixture
def built(tmp_path: Path) -> BuiltRun:
    return build_run(tmp_path, max_steps=3, threads_per_replica=1)


def actor(run: BuiltRun, snapshots: str) -> tuple[ReplicaActor, Ledger]:
    made, there = ReplicaActor("r0", run.config, snapshots), Ledger.open(run.folder.ledger, repair=False)
    made.introduce()
    return made, there


def test_a_replica_saves_finds_and_loads(s3: S3, built: BuiltRun) -> None:
    uri = s3.uri("s", "tiny")
    one, there = actor(built, uri)
    run = header_digest(there.header)
    assert one.find_snapshots() == ({}, ())
    assert one.join(there.genesis, run, {}) == (0, ())
    one.work(encode_request(Item(Kind.SNAPSHOT, 2), there.records(0, 2)))
    other, _ = actor(built, uri)
    seen, warnings = other.find_snapshots()
    assert seen == {2: f"{built.digests[2]:016x}"} and warnings == ()
    assert other.join(there.genesis, run, usable(seen, there, agreed={2: seen[2] or ""})) == (2, ())
    assert other.catch_up(there.records(2, 3)) == 3 and other.replica.digest() == built.digests[3]


def test_a_replica_goes_on_without_the_store(
    s3: S3, built: BuiltRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = s3.uri("s", "tiny")
    one, there = actor(built, uri)
    run = header_digest(there.header)
    one.join(there.genesis, run, {})
    one.work(encode_request(Item(Kind.SNAPSHOT, 1), there.records(0, 1)))
    known = usable(found(uri), there)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    answer = decode_answer("r0", one.work(encode_request(Item(Kind.SNAPSHOT, 2), there.records(1, 2))))
    assert isinstance(answer, Failed) and "cannot be reached" in answer.reason
    assert one.catch_up(there.records(2, 3)) == 3 and one.replica.digest() == built.digests[3]
    late, _ = actor(built, uri)
    nothing, warnings = late.find_snapshots()
    assert nothing == {} and "passed over" in warnings[0]
    # The store may go between the two.
    step, warnings = late.join(there.genesis, run, known)
    assert step == 0 and "step-1" in warnings[0]


def test_a_snapshot_of_other_weights_is_not_believed_by_verify(s3: S3, tmp_path: Path) -> None:
    run = build_run(tmp_path, max_steps=3, learning_rate=1.0, snapshots=(1,), snapshot_dir=s3.uri("s"))
    shutil.rmtree(run.folder.path / "snapshots")
    save(s3.uri("s", "tiny"), _with_step(run, 2), bytes(32), "x")
    with pytest.raises(NumericsError, match=r"step 2 \(snapshot\)"):
        verify("tiny", run.output_dir)


def _with_step(run: BuiltRun, step: int) -> Any:
    """The weights of the last step, under the name of another one."""
    run.replica.step = step
    return run.replica
