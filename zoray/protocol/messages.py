"""What goes in and out of the kernel: work items, payloads, events and actions.

A *work item* of step t is run on the weights at step t (base + commits 0..t-1) and its result depends on nothing else,
so any replica may run it, twice or late, without consequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from zoray.aggregate import Aggregate
    from zoray.commits import Commit


Cause = Literal["drained", "diverged", "rewound", "violation", "silent", "failing"]
"""Why a replica is put out of the run."""


class Kind(IntEnum):
    """What a replica is asked to do; the value is the one on the wire."""

    PROBE = 0
    EVAL = 1
    SNAPSHOT = 2
    DIGEST = 3
    PLUS = 4
    MINUS = 5
    CENTRE = 6

    @property
    def probing(self) -> bool:
        """Whether it is a probe, or one of the two evaluations that make one."""
        return self in _PROBING


_PROBING = frozenset((Kind.PROBE, Kind.PLUS, Kind.MINUS, Kind.CENTRE))


class Item(NamedTuple):
    """One unit of work. `part` is the direction of a probe or the shard of an evaluation, else 0.

    The evaluation of a batch at the weights themselves (CENTRE) is that of all directions on it; its part is the first.
    """

    kind: Kind
    step: int
    part: int = 0
    microbatch: int = 0

    @property
    def direction(self) -> int:
        """Index of the direction of a probe."""
        return self.part

    @property
    def shard(self) -> int:
        """Index of the shard of an evaluation."""
        return self.part

    def __str__(self) -> str:
        text = f"{self.kind.name.lower()} of step {self.step}"
        if self.kind.probing:
            return f"{text}, direction {self.direction}, microbatch {self.microbatch}"
        return f"{text}, shard {self.shard}" if self.kind is Kind.EVAL else text


@dataclass(frozen=True, slots=True)
class ProbeScalars:
    """Result of a probe: projected gradient, mean loss and contrast (float32 values), and where the seconds went."""

    projected_gradient: float
    loss: float
    apply_seconds: float
    probe_seconds: float
    contrast: float | None = None


@dataclass(frozen=True, slots=True)
class SideLoss:
    """Result of one evaluation of a probe: the mean loss and its contrast (float64) at theta +- epsilon z, or theta."""

    loss: float
    apply_seconds: float
    probe_seconds: float
    contrast: float | None = None


@dataclass(frozen=True, slots=True)
class EvalSums:
    """Result of one evaluation shard: sums of the losses and of their squares, examples, correct ones, and scores."""

    loss_sum: float
    square_sum: float
    count: int
    correct: int
    score_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class DigestValue:
    """Digest (unsigned, at most 128 bits) of the weights at the item's step: the answer to a digest and a snapshot."""

    digest: int


Payload = ProbeScalars | SideLoss | EvalSums | DigestValue
PAYLOAD_TYPE: dict[Kind, type[Payload]] = {
    Kind.PROBE: ProbeScalars,
    Kind.EVAL: EvalSums,
    Kind.SNAPSHOT: DigestValue,
    Kind.DIGEST: DigestValue,
    Kind.PLUS: SideLoss,
    Kind.MINUS: SideLoss,
    Kind.CENTRE: SideLoss,
}


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica passed the handshake and holds the weights at `step`. It is idle, whatever it did before.

    Where a name is used again for a new process, the loss of the old one must be told before this, or never. `width`:
    how many items it runs at the same time, one in each of its processes.
    """

    replica: str
    step: int
    width: int = 1


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica died or can no longer be reached."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A replica ran `item`."""

    replica: str
    item: Item
    payload: Payload


@dataclass(frozen=True, slots=True)
class Refused:
    """A replica cannot run `item` at the step it holds: it lacks a commit before the ones sent, or is past the item."""

    replica: str
    item: Item
    held: int
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Running `item` raised; the replica itself is well."""

    replica: str
    item: Item
    reason: str


@dataclass(frozen=True, slots=True)
class CommitDurable:
    """The commit of `step` is on disk (fsync returned)."""

    step: int


@dataclass(frozen=True, slots=True)
class AppendFailed:
    """The commit of `step` could not be written (disk full, storage gone); the reason is a whole sentence."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Rewound:
    """The ledger was cut: it ends before `step`, with the hash `previous`, and `skipped` null commits at its end.

    `recent`: its last commits, as many as `initial_state` is given.
    """

    step: int
    previous: bytes
    skipped: int
    recent: tuple[Commit, ...] = ()


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. Lateness is looked at here only, so the carrier sends it several times per late deadline."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """End at this step boundary: nothing more of the step in flight is awaited. Asked twice: end without digests."""


@dataclass(frozen=True, slots=True)
class RemoveReplica:
    """Drain a replica: it finishes what it runs, takes nothing new and leaves."""

    replica: str


Event = (
    Answer | Tick | CommitDurable | ReplicaReady | ReplicaLost | Refused | Failed | AppendFailed
    | StopRequested | RemoveReplica | Rewound
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Assign:
    """Send `item` to `replica` together with the commits of steps `commits_from` .. `item.step` - 1.

    A replica that is wide runs those `beside` it at the same time; there are some only of probes and of evaluations.
    """

    replica: str
    item: Item
    commits_from: int
    beside: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class AppendCommit:
    """Append to the ledger, fsync, then send `CommitDurable` (or `AppendFailed`) to the kernel."""

    commit: Commit


@dataclass(frozen=True, slots=True)
class Rewind:
    """Cut the ledger: `step` is the first one to be computed again. Then send `Rewound` (or `AppendFailed`).

    Every replica is released after it: none may be let in again with weights of a step that is cut away.
    """

    step: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss over `count` examples, its standard error, the number of correct ones, and the mean score.

    The score is that of the task beside the loss (F1 of generated text), or of the user's function; 0 without any.
    """

    loss: float
    standard_error: float
    count: int
    correct: int
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Counters:
    """Faults met so far in this life of the coordinator."""

    lost: int = 0
    late: int = 0
    overdue: int = 0
    duplicates: int = 0
    stale: int = 0
    refused: int = 0
    failed: int = 0
    diverged: int = 0
    rewinds: int = 0
    violations: int = 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What happened in one step, in the clock's seconds; `aggregate` is None for the step after the last commit.

    `replicas` were live at its end, with so many `processes` in all; `probe_seconds` and `apply_seconds` are sums over
    the probes.
    """

    step: int
    aggregate: Aggregate | None
    learning_rate: float
    evaluation: Evaluation | None
    digest: int | None
    replicas: int
    processes: int
    opened: float
    decided: float
    durable: float
    probe_seconds: float
    apply_seconds: float
    counters: Counters


@dataclass(frozen=True, slots=True)
class Report:
    """A step is committed (or the final evaluation is in): log it, show it."""

    record: StepRecord


@dataclass(frozen=True, slots=True)
class Release:
    """This replica is out of the run: end its process. Any later `ReplicaReady` of that name is a new one."""

    replica: str
    reason: str
    cause: Cause


@dataclass(frozen=True, slots=True)
class Warn:
    """Something a person should read."""

    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over at `step` (commits 0..step-1 are durable); `digest` is that of the weights there, if known."""

    reason: Literal["done", "stopped", "numerics", "failed", "storage"]
    step: int
    text: str
    advice: str | None = None
    digest: int | None = None


Action = Assign | AppendCommit | Rewind | Report | Release | Warn | Finish
