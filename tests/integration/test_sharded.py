"""Sharded replicas on a real Ray: groups of processes that act as one replica, die as one, and change no result."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.utils import cpp_extension

from tests.integration.conftest import Inputs, Launch, Ran
from tests.integration.test_elastic import LONG, check_whole, kill, undisturbed, when
from zoray.errors import ConfigError, ResourceError
from zoray.protocol import Kind, RemoveReplica
from zoray.protocol.membership import SlotPhase

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (the extra zero3)")
pytest.importorskip("accelerate", reason="accelerate is not installed (the extra zero3)")

__all__ = ["undisturbed"]

ZERO3: dict[str, Any] = {"kind": "zero3", "shards": 2}


def pids(coordinator: Any, name: str) -> tuple[int, ...]:
    return tuple(coordinator.roster.admission.introductions[name].pids)


def test_groups_act_as_replicas_and_one_death_is_the_groups(undisturbed: Ran, inputs: Inputs, launch: Launch) -> None:
    """A group joins a resident replica in mid-run, loses one process, is replaced, and is all there is at the end."""
    seen: dict[str, Any] = {}

    def join(coordinator: Any) -> None:
        coordinator.scale(2, "{kind: zero3, shards: 3, offload: cpu}")
        _await(coordinator, {"r0", "r1"})
        seen["pids"], seen["width"] = pids(coordinator, "r1"), coordinator.state.members["r0"].width

    def break_group(coordinator: Any) -> None:
        seen["wide"] = coordinator.state.members["r1"].width
        os.kill(seen["pids"][1], signal.SIGKILL)

    def leave(coordinator: Any) -> None:
        """The resident replica is killed, and what replaces it is a group too."""
        _await(coordinator, {"r0", "r2"})
        kill("r0")(coordinator)

    ran = launch(inputs.config(replicas=1, **LONG), at=when({5: join, 12: break_group, 20: leave}))
    check_whole(ran, undisturbed)
    assert (seen["width"], seen["wide"]) == (1, 3)
    assert len(set(seen["pids"])) == 3
    for pid in seen["pids"]:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(30)
    counters = ran.coordinator.state.counters
    assert counters.lost == 2 and counters.failed == counters.diverged == 0


def _await(coordinator: Any, names: set[str]) -> None:
    """Go on taking in what happens until these replicas are ready to work (the loop stands still at this step)."""

    def active() -> set[str]:
        slots = coordinator.roster.members.slots
        return {name for name, slot in slots.items() if slot.phase is SlotPhase.ACTIVE}

    while not names <= active():
        coordinator.inbox.turn(0.1)


def test_resumed_with_another_layout(warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch) -> None:
    """From resident to sharded, from a snapshot of the one to the other, and back."""
    config = inputs.config(replicas=1, save_steps=10, **LONG)
    stop = when({14: lambda coordinator: coordinator.stop()})
    first = launch(config, at=stop)
    assert first.finish.reason == "stopped"
    sharded = config.model_copy(update={"memory": inputs.config(memory=ZERO3).memory})
    with pytest.MonkeyPatch.context() as patch:
        from actors.fleet import Fleet

        patch.setattr("actors.roster.Fleet", Fleet)
        second = launch(sharded, first.folder, at=when({25: lambda coordinator: coordinator.stop()}))
    assert second.finish.reason == "stopped" and second.finish.step >= 25
    written = sorted(path.name for path in (first.folder.path / "snapshots" / "step-20").glob("*.safetensors"))
    assert written == ["part-0-of-2.safetensors", "part-1-of-2.safetensors"]
    check_whole(launch(config, first.folder), undisturbed)


def test_streamed_replicas_join_resident_ones(
    warm: None, undisturbed: Ran, inputs: Inputs, launch: Launch, tmp_path: Path
) -> None:
    """One whose weights are in a file joins a resident one, is alone at the end, and leaves nothing with a name."""

    def join(coordinator: Any) -> None:
        coordinator.scale(2, f"{{kind: streamed, offload: nvme, nvme_path: {tmp_path}}}")
        _await(coordinator, {"r0", "r1"})

    def leave(coordinator: Any) -> None:
        coordinator.events.append(RemoveReplica("r0"))

    ran = launch(inputs.config(replicas=1, **LONG), at=when({5: join, 20: leave}))
    check_whole(ran, undisturbed)
    assert ran.coordinator.state.counters.diverged == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.skipif(
    not list(Path(cpp_extension.get_default_build_root()).rglob("async_io.so")),
    reason="not built: make nvme",
)
def test_groups_with_weights_in_files(undisturbed: Ran, inputs: Inputs, launch: Launch, tmp_path: Path) -> None:
    memory = {**ZERO3, "offload": "nvme", "nvme_path": str(tmp_path)}
    check_whole(launch(inputs.config(replicas=1, memory=memory, **LONG)), undisturbed)
    assert len(list((tmp_path / f".zoray-{os.getuid()}").iterdir())) == 2


def test_split_signs_give_the_ledger_of_two_forwards(warm: None, inputs: Inputs, launch: Launch) -> None:
    keys: dict[str, Any] = {"signs": "sequential", "microbatches": 2, "directions_per_batch": 4}
    kinds: dict[str, set[Kind]] = {"whole": set(), "split": set()}

    def note(name: str) -> Callable[[Any, Any], None]:
        return lambda coordinator, _: kinds[name].update(item.kind for item in coordinator.state.work)

    whole = launch(inputs.config(replicas=1, **keys), at=note("whole"))
    split = launch(inputs.config(replicas=3, split_signs=True, **keys), at=note("split"))
    assert whole.finish.reason == split.finish.reason == "done"
    assert whole.ledger == split.ledger
    assert kinds == {"whole": {Kind.PROBE, Kind.EVAL}, "split": {Kind.PLUS, Kind.MINUS, Kind.EVAL}}
    apart = launch(inputs.config(replicas=1, **{**keys, "directions_per_batch": 1}))
    assert apart.ledger != whole.ledger


def test_one_sided_probes_of_a_group(warm: None, inputs: Inputs, launch: Launch) -> None:
    """In a group the loss at the weights is evaluated while others are evaluated beside them."""
    keys: dict[str, Any] = {"estimator": "one_sided", "directions_per_batch": 3, "replicas": 1, "max_steps": 3}
    alone = launch(inputs.config(**keys))
    with pytest.MonkeyPatch.context() as patch:
        from actors.fleet import Fleet

        patch.setattr("actors.roster.Fleet", Fleet)
        group = launch(inputs.config(memory=ZERO3, **keys))
    assert alone.finish.reason == group.finish.reason == "done"
    assert (group.ledger, group.finish.digest) == (alone.ledger, alone.finish.digest)


def test_a_group_without_room_is_refused_with_the_numbers(inputs: Inputs, launch: Launch) -> None:
    config = inputs.config(replicas=1, memory={"kind": "zero3", "shards": 64}, start_timeout=0.0)
    with pytest.raises(ResourceError, match="needs 64 CPU") as caught:
        launch(config)
    assert "memory.shards" in str(caught.value.where)


def test_no_such_memory_is_refused(warm: None, inputs: Inputs, launch: Launch) -> None:
    refused: list[str] = []

    def ask(coordinator: Any) -> None:
        for wrong in ("{kind: zero3}", "zero3", "{kind: paged}"):
            with pytest.raises(ConfigError) as caught:
                coordinator.scale(1, wrong)
            refused.append(str(caught.value.where))

    assert launch(inputs.config(replicas=1), at=when({1: ask})).finish.reason == "done"
    assert len(refused) == 3 and all("--memory" in where for where in refused)
