"""A run whose model, data and snapshots are on a real S3 server: its ledger is that of a run with all of them here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.export import export
from tests.conftest import S3
from tests.integration.conftest import Inputs, Launch, Ran
from zoray.config import RunConfig
from zoray.protocol.membership import SlotPhase
from zoray.snapshot import steps

pytestmark = pytest.mark.usefixtures("warm")

LONG = {"max_steps": 12, "eval_steps": 6}


@pytest.fixture
def snapshots(s3: S3) -> S3:
    """A bucket of its own, which can be lost without the model and the data."""
    made = replace(s3, bucket=f"{s3.bucket}-snapshots")
    made.client.create_bucket(Bucket=made.bucket)
    return made


@pytest.fixture
def stored(s3: S3, snapshots: S3, inputs: Inputs) -> RunConfig:
    model = s3.put(Path(inputs.base["model"]), "models", "gpt2")
    task = dict(inputs.base["task"])
    for part in ("train", "eval"):
        task[part] = s3.write(Path(task[part]).read_bytes(), "data", f"{part}.jsonl")
    keys = {"model": model, "task": task, "replicas": 1, "save_steps": 2, "snapshot_dir": snapshots.uri("kept")}
    return inputs.config(**keys, **LONG)


def grow(coordinator: Any) -> None:
    """A second replica joins, and takes part, before the next step begins."""
    coordinator.scale(2)
    members = coordinator.roster.members
    while sum(slot.phase is SlotPhase.ACTIVE for slot in members.slots.values()) < 2:
        coordinator.inbox.turn(0.1)
        members = coordinator.roster.members


def lose(bucket: S3) -> None:
    for name in bucket.names():
        bucket.delete(name)
    for marker in bucket.client.list_objects_v2(Bucket=bucket.bucket).get("Contents", []):
        bucket.delete(marker["Key"])
    bucket.client.delete_bucket(Bucket=bucket.bucket)


def test_the_ledger_is_that_of_a_run_here(
    s3: S3, stored: RunConfig, inputs: Inputs, launch: Launch, joined: list[int], tmp_path: Path
) -> None:
    here = launch(inputs.config(replicas=1, **LONG))
    joined.clear()

    def late(coordinator: Any, record: Any) -> None:
        if record.aggregate is not None and record.step == 6:
            grow(coordinator)

    there = launch(stored, at=late)
    assert (there.ledger, there.finish) == (here.ledger, here.finish)
    assert joined == [0, 6] or joined == [0, 4]
    where = there.folder.snapshots_of(stored)
    # While the other replica goes on, none is due as long as one is on its way to the store.
    assert {2, 4, 6, 12} <= set(steps(where)) <= {2, 4, 6, 8, 10, 12} and not any(there.folder.snapshots.iterdir())
    assert there.coordinator.progress().warnings == here.coordinator.progress().warnings
    export(str(there.folder.path), s3.uri("exports", "one"), None, False, "runs")
    export(str(here.folder.path), tmp_path / "one", None, False, "runs")
    assert s3.read("exports", "one", "model.safetensors") == (tmp_path / "one" / "model.safetensors").read_bytes()


def test_a_run_goes_on_without_its_snapshots(
    snapshots: S3, stored: RunConfig, inputs: Inputs, launch: Launch, joined: list[int]
) -> None:
    """The bucket is lost: nothing can be saved or loaded any more, and a joiner replays from the base model."""

    def lost(coordinator: Any, record: Any) -> None:
        if record.aggregate is not None and record.step == 6:
            lose(snapshots)
            grow(coordinator)

    ran: Ran = launch(stored, at=lost)
    assert ran.ledger == launch(inputs.config(replicas=1, **LONG)).ledger
    assert joined[:2] == [0, 0]
    told = ran.coordinator.progress().warnings
    assert any("failed in the snapshot" in text and "no bucket" in text for text in told)
    assert any("passed over" in text for text in told)
    assert ran.finish.reason == "done"
