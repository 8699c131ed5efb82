"""Too little memory on a real Ray: what the user is told, and what becomes of the run."""

from __future__ import annotations

import resource
from typing import Any

import psutil
import pytest

from actors.fleet import Fleet
from actors.replica import Introduction, ReplicaActor
from tests.integration.conftest import Inputs, Launch
from tests.integration.test_elastic import when
from zoray.errors import ResourceError

WIDE: dict[str, Any] = {"per_direction_batch_size": 2048, "directions": 2, "max_steps": 4, "eval_steps": None}
"""Activations of tens of megabytes, for which the allocator has to ask the kernel."""


class StarvedReplica(ReplicaActor):
    """One whose process gets no more memory from some moment on."""

    def starve(self, room: int = 0) -> None:
        enough = psutil.Process().memory_info().vms + room
        resource.setrlimit(resource.RLIMIT_AS, (enough, resource.RLIM_INFINITY))


class StarvedFromTheStart(StarvedReplica):
    """Its process has memory for the model, but not for a forward."""

    def _load(self) -> Any:
        loaded = super()._load()
        # What is small, as a thread's stack, is not what is to fail; nothing of a forward has been kept yet.
        self.starve(16 << 20)
        return loaded

    def introduce(self, meeting: str | None = None) -> Introduction:
        try:
            return super().introduce(meeting)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class StarvingFleet(Fleet):
    kind: type[ReplicaActor] = StarvedReplica

    def _create(self, name: str, rank: int, node: str) -> Any:
        import ray

        remote: Any = ray.remote(self.kind)
        return remote.options(num_cpus=0).remote(name, self.config, self._snapshots, rank)


@pytest.fixture
def starving(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("actors.roster.Fleet", StarvingFleet)
    return monkeypatch


def starve(name: str, rank: int) -> Any:
    return lambda coordinator: coordinator.roster.fleet._actors[name][rank].starve.remote()


def test_a_run_whose_first_forward_has_no_memory_says_what_it_would_take(
    starving: pytest.MonkeyPatch, inputs: Inputs, launch: Launch
) -> None:
    starving.setattr(StarvingFleet, "kind", StarvedFromTheStart)
    starving.setattr("actors.roster._ATTEMPTS", 1)
    with pytest.raises(ResourceError) as caught:
        launch(inputs.config(replicas=1, **WIDE))
    assert "its first forwards" in caught.value.what and "GiB more were asked for" in caught.value.what


def test_a_forward_without_memory_ends_a_run_that_has_nobody_else(
    starving: pytest.MonkeyPatch, inputs: Inputs, launch: Launch
) -> None:
    ran = launch(inputs.config(replicas=1, **WIDE), at=when({2: starve("r0", 0)}))
    assert ran.finish.reason == "failed" and ran.finish.step == 2
    for words in ("on every replica that had it", "GiB more were asked for", "signs: sequential", "shards: 2"):
        assert words in ran.finish.text


def test_a_process_without_memory_is_its_groups_end_and_not_the_runs(
    starving: pytest.MonkeyPatch, inputs: Inputs, launch: Launch
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (the extra zero3)")
    memory = {"kind": "zero3", "shards": 2}
    ran = launch(inputs.config(replicas=1, memory=memory, **WIDE), at=when({2: starve("r0", 1)}))
    assert ran.finish.reason == "done"
    assert ran.coordinator.state.counters.failed == ran.coordinator.state.counters.lost == 1
    log = ran.folder.log.read_text()
    assert "replica r0, process 1 of 2" in log and "GiB more were asked for" in log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.roster.Fleet", Fleet)
        assert launch(inputs.config(replicas=1, **WIDE)).ledger == ran.ledger
