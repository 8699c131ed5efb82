"""The coordinator's state: plain data, rebuilt from the ledger alone after a crash."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import median
from typing import TYPE_CHECKING

from zoray.errors import ConfigError
from zoray.optim import SGD, Optimizer, OptimizerState
from zoray.protocol.messages import Counters, Item, Kind, Payload

if TYPE_CHECKING:
    from zoray.aggregate import Aggregate
    from zoray.commits import Commit


@dataclass(frozen=True, slots=True)
class Settings:
    """What the kernel needs of the configuration. Times are in seconds of the carrier's clock.

    Args:
        directions: per step, unless the optimizer says how many.
        learning_rate: pure function of the step (see `zoray.schedule`).
        optimizer: what makes an update of projected gradients.
        eval_shards: pieces one evaluation is divided into; 0: no evaluation at all.
        digest_every: compare digests every so many steps; None: as often as takes `digest_share` of the time.
            Where a replica is found to have diverged, the steps it took part in since it last agreed with others are
            computed again. At the end digests are always compared.
        prove_newcomers: compare the digest of a replica that joins with that of others in the step it joins in.
        max_rewinds: after so many disagreements in a row, without an agreement between them, the run ends.
        snapshot_after: where `save_steps` is None, a snapshot is due when replaying the commits since the last one
            would take so many seconds, or twice as long as saving one does; None: never.
        late_factor, late_minimum: an item is late after max(factor * recent median of its kind, minimum).
        first_deadline: the same while no item of that kind has been answered yet (first calls compile and warm up).
        overdue_factor: a replica is sent work again after this many deadlines without an answer, doubling each time.
        snapshot_patience: a snapshot is not late before so many seconds, whatever others took: one on an object store
            takes as long as the network makes it, and gives up by itself where that is dead.
        max_misses: after this many unanswered, refused or failed assignments in a row the replica is released.
        max_failures: an item that raised this often, and on every live replica, ends the run.
        split_signs: the two evaluations of a probe are items of their own, which different replicas may run.
        one_sided: a probe is the evaluation on one side of the weights beside that at the weights, an item of its own,
            which the directions on one batch share.
        directions_per_batch: neighbouring directions that are probed on the same batch.
        epsilon: distance of the evaluations on a side from the weights.
        by_batch: what a replica found out for a probe serves it for those of other directions on the same batch, which
            then take a fraction of the time: they are handed out one behind the other.
        short_probe: where a probe usually takes no longer, a replica has another one in line while it runs one, so
            that it need not wait for a round trip; 0: never.

    Raises:
        ConfigError: a count is out of range.
    """

    max_steps: int
    directions: int
    learning_rate: Callable[[int], float]
    microbatches: int = 1
    weight_decay: float = 0.0
    max_projected_gradient: float | None = None
    optimizer: Optimizer = SGD
    eval_steps: int | None = None
    eval_shards: int = 0
    eval_on_start: bool = True
    save_steps: int | None = None
    digest_every: int | None = None
    digest_share: float = 0.01
    prove_newcomers: bool = True
    max_rewinds: int = 3
    snapshot_after: float | None = None
    max_skipped_steps: int = 5
    late_factor: float = 2.0
    late_minimum: float = 1.0
    first_deadline: float = 60.0
    overdue_factor: float = 2.0
    snapshot_patience: float = 0.0
    max_misses: int = 5
    max_failures: int = 3
    split_signs: bool = False
    one_sided: bool = False
    directions_per_batch: int = 1
    by_batch: bool = False
    epsilon: float = 1e-3
    short_probe: float = 0.1

    def __post_init__(self) -> None:
        limits: dict[str, tuple[int, int]] = {
            "directions": (1, 2**32), "microbatches": (1, 2**16), "max_steps": (0, 2**63), "eval_shards": (0, 2**32),
            "max_skipped_steps": (1, 2**63), "max_misses": (1, 32), "max_failures": (1, 2**31),
            "max_rewinds": (1, 2**31), "directions_per_batch": (1, 2**63),
        }  # fmt: skip
        for key in ("eval_steps", "save_steps", "digest_every"):
            if getattr(self, key) is not None:
                limits[key] = (1, 2**63)
        for key, (low, high) in limits.items():
            if not low <= (value := getattr(self, key)) < high:
                raise ConfigError(f"{key} = {value}", where=key, advice=f"use a value from {low} to {high - 1}")

    def first_on_batch(self, direction: int) -> int:
        """The first of the directions that are probed on the same batch as this one; it stands for all of them."""
        return direction - direction % self.directions_per_batch

    def evaluates(self, step: int) -> bool:
        """Whether the weights at `step` are evaluated."""
        if self.eval_shards == 0:
            return False
        if step >= self.max_steps:
            return True
        return self.eval_on_start if step == 0 else self.eval_steps is not None and step % self.eval_steps == 0


class Phase(Enum):
    """Where the step is: collecting results, waiting for the disk (twice), taking final digests, over."""

    PROBING = "probing"
    COMMITTING = "committing"
    REWINDING = "rewinding"
    CLOSING = "closing"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Member:
    """A live replica.

    Attributes:
        held: the step it is known to hold.
        items, since: what it runs at the same time and has not answered, and since when.
        ahead: what it has in line behind that.
        width: how many items it can run at the same time.
        took: seconds its last probe took.
        misses: unanswered assignments in a row.
        draining: whether it was asked to leave.
        proven: whether its digest has agreed with another's since it joined.
    """

    held: int
    items: tuple[Item, ...] = ()
    ahead: Item | None = None
    since: float = 0.0
    took: float = math.inf
    misses: int = 0
    draining: bool = False
    proven: bool = False
    width: int = 1

    @property
    def item(self) -> Item | None:
        """What it runs, or the first of it: all are of one step, and either probes or all of one kind."""
        return self.items[0] if self.items else None


@dataclass(frozen=True, slots=True)
class Flight:
    """An unanswered item of the current step: when it was last given, and who runs it."""

    since: float
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contribution:
    """A counted result and who gave it; the payload is None for a snapshot that failed."""

    replica: str
    payload: Payload | None


@dataclass(slots=True)
class State:
    """Everything the coordinator knows. `transition` never changes the one it is given.

    Of the step in hand: `work` (all its items), `queue` (the same in order; those before `cursor` were given once),
    `again` (to be given again), `missing` (results still awaited before the step is decided); `comparing`: digests are
    taken in it, of all replicas if `thorough`, else of newcomers and of some others to compare with.

    Replicas without an item are `idle`; those of one process whose only one is a probe, `single`.

    `agreed` is what at least two of them said, or the only one there is. `past` has the digests of recent steps, for
    those that come after their step.

    Over the steps: `unproven` (the first step a replica has taken part in since its digest last agreed with another's),
    `compared` (when all digests were last asked for), `replay` (seconds that applying the commits since the last
    snapshot took), `rewinds` (disagreements since the last agreement).
    """

    settings: Settings
    step: int
    previous: bytes
    skipped: int
    optimizer: OptimizerState
    phase: Phase = Phase.PROBING
    stopping: bool = False
    opened: float = 0.0
    decided: float = 0.0
    pending: Aggregate | None = None
    queue: tuple[Item, ...] = ()
    work: frozenset[Item] = frozenset()
    cursor: int = 0
    again: tuple[Item, ...] = ()
    missing: int = 0
    comparing: bool = False
    thorough: bool = False
    agreed: int | None = None
    past: dict[int, dict[str, int]] = field(default_factory=dict)
    compared: float = 0.0
    replay: float = 0.0
    rewinds: int = 0
    unproven: dict[str, int] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    results: dict[Item, Contribution] = field(default_factory=dict)
    digests: dict[str, int] = field(default_factory=dict)
    failures: dict[Item, tuple[str, ...]] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    idle: dict[str, None] = field(default_factory=dict)
    single: dict[str, None] = field(default_factory=dict)
    flights: dict[Item, Flight] = field(default_factory=dict)
    durations: dict[Kind, tuple[float, ...]] = field(default_factory=dict)

    @property
    def directions(self) -> int:
        """How many directions the step in hand has."""
        return self.settings.directions if self.optimizer.width is None else self.optimizer.width.directions

    def copy(self) -> State:
        """A state that can be changed without touching this one: O(replicas + results of the step), all in C."""
        return replace(
            self, results=self.results.copy(), digests=self.digests.copy(), failures=self.failures.copy(),
            members=self.members.copy(), idle=self.idle.copy(), single=self.single.copy(), flights=self.flights.copy(),
            durations=self.durations.copy(), unproven=self.unproven.copy(), past=self.past.copy(),
        )  # fmt: skip

    def count(self, name: str) -> None:
        """Add one to a fault counter."""
        self.counters = replace(self.counters, **{name: getattr(self.counters, name) + 1})


def open_step(state: State, now: float) -> None:
    """Lay out the work of `state.step`, in place: evaluation and snapshot first, they can be the longest.

    After the last step, or on a stop, there are no probes and every replica gives its digest.
    """
    settings, step = state.settings, state.step
    closing = state.stopping or step >= settings.max_steps
    items: list[Item] = []
    if not state.stopping:
        if settings.evaluates(step):
            items += [Item(Kind.EVAL, step, shard) for shard in range(settings.eval_shards)]
        if _saves(state):
            state.replay = 0.0
            items.append(Item(Kind.SNAPSHOT, step))
    if not closing:
        items += _probing(state)
    state.phase = Phase.CLOSING if closing else Phase.PROBING
    saving = any(item.kind is Kind.SNAPSHOT for item in items)
    state.thorough = closing or _compares(state, now, saving)
    state.comparing = state.thorough or newcomers(state)
    state.agreed = None
    state.compared = now if state.thorough else state.compared
    state.opened, state.pending = now, None
    state.queue, state.work, state.cursor, state.again = tuple(items), frozenset(items), 0, ()
    state.missing = sum(counts(state, item) for item in items)
    state.results, state.digests, state.failures, state.flights = {}, {}, {}, {}


def _probing(state: State) -> list[Item]:
    """What a step's probes are made of, in the order in which it is handed out."""
    settings, step = state.settings, state.step
    directions, batches = range(state.directions), range(settings.microbatches)
    if settings.one_sided:
        firsts = directions[:: settings.directions_per_batch]
        centres = [Item(Kind.CENTRE, step, first, m) for first in firsts for m in batches]
        other = [Item(Kind.MINUS, step)] if settings.optimizer.wants_curvature else []
        return [*centres, *other, *(Item(Kind.PLUS, step, k, m) for k in directions for m in batches)]
    centre = [Item(Kind.CENTRE, step)] if settings.optimizer.wants_curvature else []
    if settings.by_batch:
        probes = (Item(Kind.PROBE, step, k, m) for k in directions for m in batches)
        return sorted(probes, key=lambda probe: (settings.first_on_batch(probe.direction), probe.microbatch))
    kinds = (Kind.PLUS, Kind.MINUS) if settings.split_signs else (Kind.PROBE,)
    return [*centre, *(Item(kind, step, k, m) for k in directions for m in batches for kind in kinds)]


def _saves(state: State) -> bool:
    """Whether a snapshot of the weights at the step is due; while one is being written, only at the end of the run."""
    settings, step = state.settings, state.step
    writing = any(member.item is not None and member.item.kind is Kind.SNAPSHOT for member in state.members.values())
    if writing and step < settings.max_steps:
        return False
    if settings.save_steps is not None:
        return step > 0 and step % settings.save_steps == 0
    if settings.snapshot_after is None:
        return False
    saving = median(state.durations.get(Kind.SNAPSHOT, (0.0,)))
    return state.replay >= max(settings.snapshot_after, 2 * saving)


def _compares(state: State, now: float, saving: bool) -> bool:
    """Whether the digests of all replicas are compared at the step while the run goes on.

    Those of a snapshot's step are: newcomers will start from it, so it must not be a wrong replica's alone.
    """
    settings, step = state.settings, state.step
    if saving:
        return True
    if settings.digest_every is not None:
        return step > 0 and step % settings.digest_every == 0
    seconds = state.durations.get(Kind.DIGEST, ())
    if len(state.members) < 2 or not seconds:
        return False
    return (now - state.compared) * settings.digest_share > median(seconds)


def forget_digests(state: State, name: str) -> None:
    """What a replica said of its weights counts no more."""
    state.digests.pop(name, None)
    for step, digests in state.past.items():
        if name in digests:
            state.past[step] = {other: digest for other, digest in digests.items() if other != name}


def newcomers(state: State) -> bool:
    """Whether there is a replica whose weights no other one has confirmed yet, though there are others."""
    if not state.settings.prove_newcomers or len(state.members) < 2:
        return False
    # One that is still at the digest of an earlier step is not asked for another.
    return any(
        not member.proven and (member.item is None or member.item.kind is not Kind.DIGEST)
        for member in state.members.values()
    )


def counts(state: State, item: Item) -> bool:
    """Whether the step waits for this item. A snapshot only optimises replay, so just the end of a run waits for it."""
    return item.kind is not Kind.SNAPSHOT or state.phase is Phase.CLOSING


def initial_state(
    settings: Settings,
    next_step: int,
    previous_hash: bytes,
    *,
    skipped: int = 0,
    recent: Sequence[Commit] = (),
    now: float = 0.0,
) -> State:
    """The state of a coordinator that starts or resumes.

    Args:
        settings: what of the configuration decides.
        next_step: the first step not in the ledger.
        previous_hash: hash of the last commit (of the header, when there is none), 32 bytes.
        skipped: null commits in a row at the end of the ledger, so that a resumed run gives up where it would have.
        recent: the last `settings.optimizer.reach` commits of the ledger, or all of a shorter one, oldest first.
        now: the carrier's clock, seconds.
    """
    state = State(settings, next_step, previous_hash, skipped, settings.optimizer.restore(recent))
    open_step(state, now)
    return state
