"""Stops at every step, damaged files, lost replicas and foreign exceptions: what a run makes of them.

Most of these tests keep replica processes and let each load the model anew.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.inbox import receive
from launch.cluster import Place
from launch.restore import base_replica
from tests.integration.conftest import Inputs, Launch, Ran
from tests.integration.warm import WarmFleet
from zoray.errors import LedgerError, ResourceError, RunError
from zoray.ledger import Ledger
from zoray.protocol import decode_request
from zoray.runs import RunFolder
from zoray.snapshot import replay

STEPS = 6


@pytest.fixture(scope="module")
def undisturbed(processes: list[Any], inputs: Inputs) -> Ran:
    """One replica, nothing happens."""
    from actors.coordinator import Coordinator

    config = inputs.config(replicas=1)
    folder = RunFolder.create(config, "undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WarmFleet, "idle", processes, raising=False)
        patch.setattr("actors.roster.Fleet", WarmFleet)
        coordinator = Coordinator(config, str(folder.path))
        coordinator.prepare(False)
        return Ran(folder, coordinator.run(), coordinator)


def after(step: int, act: Callable[[Any], object]) -> Callable[[Any, Any], None]:
    """Act when so many steps are committed, in the coordinator's own loop: never a matter of time."""

    def at(coordinator: Any, record: Any) -> None:
        if record.aggregate is not None and record.step + 1 == step:
            act(coordinator)

    return at


def stopping(step: int) -> Callable[[Any, Any], None]:
    return after(step, lambda coordinator: coordinator.stop())


def test_the_digest_is_that_of_a_replay(undisturbed: Ran) -> None:
    ledger = Ledger.open(undisturbed.folder.ledger, repair=False)
    replica = base_replica(undisturbed.folder.config(), ledger)
    base = replica.digest()
    replay(replica, ledger, None)
    assert base != replica.digest() == undisturbed.finish.digest


@pytest.mark.parametrize("step", range(1, STEPS))
def test_stopped_at_each_step(
    step: int, warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch, joined: list[int]
) -> None:
    first = launch(inputs.config(replicas=1 + step % 2, save_steps=2), at=stopping(step))
    assert (first.finish.reason, first.finish.step) == ("stopped", step)
    assert undisturbed.ledger.startswith(first.ledger)
    joined.clear()
    again = launch(inputs.config(replicas=3 - step % 2), first.folder)
    # A snapshot is written by one replica while a stop may already have been asked for.
    assert set(joined) == {max([0, *(s for s in (2, 4) if (first.folder.snapshots / f"step-{s}").exists())])}
    assert (again.ledger, again.finish) == (undisturbed.ledger, undisturbed.finish)


def test_stopped_twice_ends_at_once(warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch) -> None:
    def twice(coordinator: Any) -> None:
        coordinator.stop()
        coordinator.stop()

    first = launch(inputs.config(replicas=1), at=after(2, twice))
    assert (first.finish.reason, first.finish.step, first.finish.digest) == ("stopped", 2, None)
    assert launch(inputs.config(replicas=1), first.folder).ledger == undisturbed.ledger


def test_damaged_snapshots_are_passed_over_with_a_warning(
    warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch, joined: list[int]
) -> None:
    first = launch(inputs.config(replicas=1, save_steps=2), at=stopping(5))
    weights = first.folder.snapshots / "step-4" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    joined.clear()
    again = launch(inputs.config(replicas=2), first.folder)
    assert joined == [2, 2]
    assert again.ledger == undisturbed.ledger
    told = [text for text in again.coordinator.progress().warnings if "step-4" in text]
    assert len(told) == 1 and "passed over" in told[0]
    assert "passed over" in again.folder.log.read_text()


def test_a_torn_ledger_is_repaired_with_a_warning(warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch) -> None:
    first = launch(inputs.config(replicas=1), at=stopping(4))
    path = first.folder.ledger / "commits.bin"
    path.write_bytes(path.read_bytes()[:-7])
    again = launch(inputs.config(replicas=1), first.folder)
    assert again.ledger == undisturbed.ledger
    assert any("step 3" in text for text in again.coordinator.progress().warnings)


def test_damage_before_the_end_is_refused_with_the_offset(warm: None, inputs: Inputs, launch: Launch) -> None:
    first = launch(inputs.config(replicas=1), at=stopping(4))
    path, damaged = first.folder.ledger / "commits.bin", bytearray(first.ledger)
    with Ledger.open(first.folder.ledger, repair=False) as ledger:
        behind = sum(len(commit.encode()) for commit in ledger.commits(1))
    damaged[len(damaged) - behind + 20] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(LedgerError, match="byte"):
        launch(inputs.config(replicas=1), first.folder)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("directions", [1, 16])
def test_bytes_of_a_probe_and_of_a_step(
    directions: int, warm: None, inputs: Inputs, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: dict[str, int] = {}
    bare: list[int] = []
    work = WarmFleet.work

    def counted(self: Any, name: str, requests: list[bytes]) -> Any:
        for request in requests:
            records = len(decode_request(request)[1])
            carried[name] = carried.get(name, 0) + records
            bare.append(len(request) - records)
        return work(self, name, requests)

    monkeypatch.setattr(WarmFleet, "work", counted)
    got = launch(inputs.config(replicas=2, directions=directions, eval_steps=None, eval_on_start=False))
    received = got.coordinator.progress().received
    sent = got.coordinator.progress().sent
    assert sent == sum(bare) + sum(carried.values())
    # Every answer but those of the last evaluation and the digests is a probe's 35 bytes.
    assert max(bare) + received / len(bare) <= 128
    records = sum(len(c.encode()) for c in Ledger.open(got.folder.ledger, repair=False).commits())
    assert records <= STEPS * (directions + 96)
    assert set(carried.values()) == {records}


def test_a_replica_that_raises_anything_is_a_clean_error(local_ray: None) -> None:
    import ray

    def fail() -> None:
        raise KeyError("odd")

    with pytest.raises(RunError, match="replica r0 failed: KeyError") as caught:
        receive(ray.remote(fail).options(num_cpus=0).remote(), "replica r0")
    assert "Traceback" not in str(caught.value)


def test_a_replica_that_dies_while_loading_is_a_clean_error(local_ray: None) -> None:
    import ray

    class Dies:
        def introduce(self) -> None:
            import os

            os._exit(1)

    actor = ray.remote(Dies).options(num_cpus=0).remote()
    with pytest.raises(ResourceError, match="replica r0 died") as caught:
        receive(actor.introduce.remote(), "replica r0")
    assert "memory" in str(caught.value.advice)


def test_a_taken_port_ends_the_command_and_leaves_no_folder(
    local_ray: None, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import train

    monkeypatch.setattr(train, "connect", lambda config: Place("the Ray of the tests", embedded=False))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**inputs.base, "run_name": "taken", "output_dir": str(tmp_path / "runs")}))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"Port {port} is already in use") as caught:
            train.train(str(path), [f"metrics_port={port}"])
    assert caught.value.exit_code == 7
    assert not (tmp_path / "runs" / "taken").exists()
