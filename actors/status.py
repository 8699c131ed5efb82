"""What a run says of itself to another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from actors.journal import Progress
from zoray.protocol import Finish, State
from zoray.protocol.membership import Membership

if TYPE_CHECKING:
    # It comes with torch, which whoever looks at a run from outside can do without.
    from actors.replica import Introduction


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica.

    Attributes:
        name: r0, r1, ...; never used twice in a run.
        state: "starting" (loads the model, replays), "active" or "leaving".
        node: id of its machine, hexadecimal.
        host, pid: of its (first) process, once it has introduced itself.
        pids: of all its processes.
        step: the step its weights are known to be at; None while it starts.
        lag: committed steps it has not been seen to hold.
        item: what it runs, in words.
        seconds: how long it has been in this state.
    """

    name: str
    state: str
    node: str
    host: str | None
    pid: int | None
    pids: tuple[int, ...]
    step: int | None
    lag: int | None
    item: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run in progress.

    Attributes:
        run: its name.
        state: "starting", "running", "stopping" or how it ended.
        target: replicas there should be.
        minimum, maximum: between which the target can be set; None: no upper limit.
        replicas: those there are.
        progress: step, losses, speed, bytes, time left.
        faults: counters by kind.
        text: how it ended; None while it goes on.
    """

    run: str
    state: str
    target: int
    minimum: int
    maximum: int | None
    replicas: tuple[ReplicaStatus, ...]
    progress: Progress
    faults: dict[str, int]
    text: str | None = None


def describe(
    run: str,
    finish: Finish | None,
    members: Membership,
    state: State | None,
    introductions: Mapping[str, Introduction],
    progress: Progress,
    now: float,
) -> RunStatus:
    """Put together what both kernels know; `now` is the time of their clock, in seconds."""
    replicas = []
    for name, slot in members.slots.items():
        member = state.members.get(name) if state is not None else None
        known = introductions.get(name)
        replicas.append(
            ReplicaStatus(
                name=name,
                state=slot.phase.value,
                node=slot.node,
                host=known.host if known else None,
                pid=known.pid if known else None,
                pids=known.pids if known else (),
                step=member.held if member else None,
                lag=state.step - member.held if state and member else None,
                item=str(member.item) if member and member.item else None,
                seconds=now - slot.since,
            )
        )
    phase = finish.reason if finish else "starting" if state is None else "stopping" if state.stopping else "running"
    return RunStatus(
        run=run,
        state=phase,
        target=members.target,
        minimum=members.policy.minimum,
        maximum=members.policy.maximum,
        replicas=tuple(replicas),
        progress=progress,
        faults=asdict(state.counters) if state else {},
        text=finish.text if finish else None,
    )
