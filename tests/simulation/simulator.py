"""One schedule: a coordinator, its replicas, a network and a disk in a single thread with a logical clock.

Everything random comes from the seed, so a schedule is repeated by its seed alone. The coordinator is the real kernel,
the real wire format and the real ledger on a simulated disk; only the actor around them is written again here.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.simulation.actors import Saved, SimulatedCoordinator, SimulatedReplica
from tests.simulation.chaos import Chaos, InvariantError, draw
from tests.simulation.disk import Disk
from tests.simulation.model import Golden, Problem, base, digest, golden
from zoray.commits import Commit
from zoray.ledger import Ledger
from zoray.protocol import Finish, Item, Kind, RemoveReplica, ReplicaLost, ReplicaReady, State, StopRequested

CALM_AFTER = 60.0
"""Time (about that of 60 probes) after which nothing crashes any more and the run has to come to its end."""
LIMIT = 20000.0


@dataclass
class Simulation:
    """One schedule; `run` returns when the run has ended as the undisturbed one does.

    Once weights were changed the run is `tainted`: until it goes back, its commits need not be those of the undisturbed
    run.

    Besides what the seed draws: `change` alters it, `bugs` are planted in the actors, `flips` says at which step whose
    weights change, `disk_fault` is the system call of the coordinator's first life that fails and how, and
    `cut_before_action` the action of the kernel that is not carried out. `met` counts what happened.

    Raises:
        InvariantError: anything else happened; the message says how to replay it.
    """

    seed: int
    bugs: frozenset[str] = frozenset()
    check_purity: bool = False
    change: Callable[[Problem, Chaos, int], tuple[Problem, Chaos, int]] = lambda *drawn: drawn
    now: float = 0.0
    acknowledged: int = 0
    finished: bool = False
    disk_fault: tuple[int, str] | None = None
    cut_before_action: int = 0
    flips: dict[str, int] = field(default_factory=dict)
    tainted: bool = False
    agreed: dict[int, int] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)
    met: Counter[str] = field(default_factory=Counter)
    replicas: dict[str, SimulatedReplica] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.problem, self.chaos, count = self.change(*draw(self.rng))
        self.golden: Golden = golden(self.problem)
        self.disk = Disk(self.rng, fsync_works="skip fsync" not in self.bugs)
        self.trace = hashlib.sha256()
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        head = self.golden.commits[0].previous if self.golden.commits else self.golden.ledger[-32:]
        self.saved = [Saved(0, base(), head)]
        self.coordinator = SimulatedCoordinator(self)
        for _ in range(count):
            self._join()
        self._arrange()

    @property
    def stormy(self) -> bool:
        return self.now < CALM_AFTER

    def run(self) -> Simulation:
        """Play the schedule to its end."""
        try:
            self.coordinator.boot()
            while not self.finished:
                if not self._heap or self.now > LIMIT:
                    raise InvariantError(f"no progress: still at step {self.acknowledged} at time {self.now:.0f}")
                self.now, _, call = heapq.heappop(self._heap)
                call()
        except Exception as error:
            replay = f"ZORAY_SEED={self.seed} python -m pytest tests/simulation replays this"
            raise InvariantError(f"{replay}: {type(error).__name__}: {error}") from error
        return self

    def at(self, when: float, call: Callable[[], object]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), call))

    def send(self, deliver: Callable[[], object]) -> None:
        """A message: lost, delivered, or delivered twice; delays reorder."""
        if self.rng.random() < self.chaos.loss:
            self.met["messages lost"] += 1
            return
        for _ in range(1 + (self.rng.random() < self.chaos.duplication)):
            self.at(self.now + self.rng.uniform(0, self.chaos.delay), deliver)

    def handshake(self, replica: SimulatedReplica) -> None:
        """A replica makes itself known to the coordinator, again and again until there is one."""
        life, at = replica.life, self.coordinator.life
        later = self.now + self.rng.uniform(0.01, 2.0)

        def meet() -> None:
            coordinator = self.coordinator
            if not replica.alive or life != replica.life or at != coordinator.life:
                return
            if coordinator.up:
                assert coordinator.ledger is not None
                # Either the carrier brings a joiner up to date first, or its first request does.
                if self.rng.random() < 0.5 and not replica.busy and replica.held <= coordinator.ledger.next_step:
                    replica.catch_up(coordinator.ledger.commits(replica.held))
                coordinator.feed(ReplicaReady(replica.name, replica.held, replica.width))

        self.at(later, meet)

    def crash(self, replica: SimulatedReplica, *, silent: bool = False, returns: bool = True) -> None:
        """kill -9; the fleet starts it again."""
        if not replica.alive:
            return
        self.met["crashes"] += 1
        replica.alive, life = False, replica.life
        if not silent:
            lost = ReplicaLost(replica.name, "killed")
            notice = self.now + self.rng.uniform(0, 1.0)
            self.at(notice, lambda: self.coordinator.feed(lost) if replica.life == life else None)
        if returns:
            self.at(self.now + self.rng.uniform(0.5, 6.0), lambda: self._start(replica) if not self.finished else None)

    def released(self, replica: SimulatedReplica, cause: str) -> None:
        self.met[f"released: {cause}"] += 1
        excused = self.tainted or replica.name in self.excused
        if cause == "violation" or (cause in ("diverged", "rewound") and not excused):
            raise InvariantError(f"a healthy replica is released: {cause}")
        self.crash(replica, silent=True, returns=cause != "drained" or not self.stormy)

    def rewinding(self, step: int) -> None:
        """The commits from `step` on are cut away: nothing that has seen them may come back."""
        self.met["rewinds to a step"] += 1
        if not self.tainted:
            raise InvariantError("the run goes back though nothing diverged")
        self.acknowledged = min(self.acknowledged, step)
        self.agreed = {at: value for at, value in self.agreed.items() if at <= step}
        self.saved = [saved for saved in self.saved if saved.step < max(step, 1)]
        for replica in self.replicas.values():
            self.crash(replica, silent=True)
        self.excused = set(self.replicas)

    def rewound(self) -> None:
        """The commits are gone for good, and with them whatever a wrong replica had to do with."""
        self.tainted = any(replica.flipped for replica in self.replicas.values() if replica.alive)

    def finishing(self, finish: Finish) -> None:
        """Judge the end of one life of the coordinator; the run is over when it is done (or gives up as it should)."""
        self.met[f"finished: {finish.reason}"] += 1
        if finish.reason in ("stopped", "storage", "failed"):
            if not self.stormy and finish.reason != "stopped":
                raise InvariantError(f"the run ends without a cause: {finish.text}")
            return
        expected = self.golden
        if finish.reason != expected.reason:
            raise InvariantError(f"the run ends as {finish.reason!r} ({finish.text}), not {expected.reason!r}")
        if self.disk.durable["commits.bin"] != expected.ledger:
            raise InvariantError("the ledger differs from that of the undisturbed run")
        if finish.reason == "done" and finish.digest != digest(expected.weights[-1]):
            raise InvariantError("the digest differs from that of the undisturbed run")
        self.finished = True

    def check_applied(self, replica: SimulatedReplica, commit: Commit) -> None:
        """Exactly once, in order, and never before it is durable."""
        step = commit.step
        if self.tainted:
            return
        if replica.held != step + 1 or commit != self.golden.commits[step]:
            raise InvariantError(f"{replica.name} applies another commit of step {step} than the undisturbed run")
        if replica.weights.tobytes() != self.golden.weights[step + 1].tobytes():
            raise InvariantError(f"{replica.name} has other weights after step {step}: not exactly once, in order")
        if len(self.disk.durable["commits.bin"]) < self.golden.sizes[step + 1]:
            raise InvariantError(f"{replica.name} applies step {step}, which a power cut would lose")

    def check_resumed(self, ledger: Ledger) -> None:
        if ledger.next_step < self.acknowledged:
            raise InvariantError(f"{self.acknowledged} steps were committed, {ledger.next_step} are left")

    def usable(self, saved: Saved) -> bool:
        """Whether newcomers may start from a snapshot: the replicas must have agreed on its digest."""
        return saved.step == 0 or self.agreed.get(saved.step) == digest(saved.weights)

    def check_bundle(self, replica: SimulatedReplica, item: Item, beside: tuple[Item, ...]) -> None:
        """What runs at the same time takes the same path, and no more than there are processes."""
        everything = (item, *beside)
        self.met["bundles"] += bool(beside)
        self.met["losses at the weights"] += any(each.kind is Kind.CENTRE for each in everything)
        kinds = {Kind.PROBE if each.kind.probing else each.kind for each in everything}
        alone = len(everything) == 1 or kinds in ({Kind.PROBE}, {Kind.EVAL})
        fits = len(everything) == len(set(everything)) <= replica.width
        if not (alone and fits and {each.step for each in everything} == {item.step}):
            raise InvariantError(f"{replica.name}, {replica.width} wide, is given {', '.join(map(str, everything))}")

    def check_report(self, step: int, evaluation: object, agreed: int | None) -> None:
        if agreed is not None:
            self.agreed[step] = agreed
        if not self.tainted and evaluation != self.golden.evaluations.get(step):
            raise InvariantError(f"the evaluation of step {step} differs from that of the undisturbed run")

    def freeze(self, state: State) -> tuple[State, State] | None:
        return (state, state.copy()) if self.check_purity else None

    def check_pure(self, before: tuple[State, State] | None) -> None:
        if before is not None and before[0] != before[1]:
            raise InvariantError("transition changed the state it was given")

    def _join(self) -> None:
        replica = SimulatedReplica(self, f"r{len(self.replicas)}")
        self.replicas[replica.name] = replica
        self._start(replica)

    def _start(self, replica: SimulatedReplica) -> None:
        if not replica.alive:
            self.excused.discard(replica.name)
            replica.boot(self.rng.choice([saved for saved in self.saved if self.usable(saved)]))
            self.handshake(replica)

    def _arrange(self) -> None:
        """Lay out the faults: each at a random time, until the storm is over."""
        chaos, rng = self.chaos, self.rng

        def anyone() -> SimulatedReplica:
            return rng.choice(list(self.replicas.values()))

        def freeze() -> None:
            anyone().thaw = self.now + rng.uniform(1.0, 20.0)

        def scale() -> None:
            if rng.random() < 0.5 and len(self.replicas) < 12:
                self._join()
            elif sum(r.alive for r in self.replicas.values()) > 1:
                self.coordinator.feed(RemoveReplica(anyone().name))

        faults: list[tuple[float, Callable[[], object]]] = [
            (chaos.crash_every, lambda: self.crash(anyone(), silent=rng.random() < chaos.silent)),
            (chaos.freeze_every, freeze),
            (chaos.scale_every, scale),
            (chaos.stop_every, lambda: self.coordinator.feed(StopRequested())),
        ]
        for every, fault in faults:
            when = rng.expovariate(1 / every)
            while when < CALM_AFTER:
                self.at(when, fault)
                when += rng.expovariate(1 / every)
        self.at(CALM_AFTER, self._calm)

    def _calm(self) -> None:
        """The storm is over: one replica lives at least, in a lone run exactly one."""
        self.disk.fault_in = None
        survivors = list(self.replicas.values())
        if self.chaos.lone:
            for replica in survivors[1:]:
                self.crash(replica, silent=True, returns=False)
        self._start(survivors[0])
