"""The actors around the kernel, written again for the simulation: one replica, one coordinator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from tests.simulation.chaos import InvariantError
from tests.simulation.disk import FOLDER, PowerCutError
from tests.simulation.model import Weights, apply
from zoray.commits import Commit
from zoray.errors import LedgerError
from zoray.ledger import Ledger
from zoray.protocol import (
    Action,
    Answer,
    AppendCommit,
    AppendFailed,
    Assign,
    CommitDurable,
    Event,
    Failed,
    Finish,
    Item,
    Kind,
    Refused,
    Release,
    Report,
    Rewind,
    Rewound,
    State,
    Tick,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    initial_state,
    kernel,
    lacking,
)

if TYPE_CHECKING:
    from tests.simulation.simulator import Simulation


@dataclass(frozen=True)
class Saved:
    """A snapshot, or the base weights."""

    step: int
    weights: Weights
    head: bytes


class SimulatedReplica:
    """What an actor does: apply what it lacks, run one item, answer; requests wait in line.

    One that is wide is a group of actors: each has an item, and a failure of one of them is the end of all.
    """

    def __init__(self, world: Simulation, name: str) -> None:
        self.world, self.name, self.life, self.alive = world, name, 0, False
        self.speed = world.rng.choice([1.0, 1.0, 1.3, 5.0])
        self.width = world.rng.choice([1, 1, 2, 4])
        self.inbox: list[tuple[bytes, ...]] = []
        self.busy, self.thaw = False, 0.0

    def boot(self, saved: Saved) -> None:
        self.life, self.alive, self.busy = self.life + 1, True, False
        self.inbox.clear()
        self.flipped = False
        self.held, self.weights, self.head = saved.step, saved.weights, saved.head

    def receive(self, requests: tuple[bytes, ...], life: int) -> None:
        if self.alive and life == self.life:
            self.inbox.append(requests)
            self._next()

    def catch_up(self, commits: Iterable[Commit]) -> None:
        for commit in commits:
            self.weights = apply(self.weights, commit)
            self.held, self.head = self.held + 1, commit.hash
            if not self.flipped:
                self.world.check_applied(self, commit)
            if self.world.flips.get(self.name) == self.held:
                del self.world.flips[self.name]
                self.flipped, self.weights = True, -self.weights
                self.world.tainted = True

    def _next(self) -> None:
        if self.busy or not self.inbox:
            return
        world, rng = self.world, self.world.rng
        work = [decode_request(request) for request in self.inbox.pop(0)]
        item, records = work[0]
        self.catch_up(lacking(records, self.held, self.head))
        if "apply twice" in world.bugs and records and self.held == item.step:
            self.weights = apply(self.weights, world.golden.commits[item.step - 1])
        seconds, answers = 0.01, [self._run(each) for each, _ in work]
        if isinstance(answers[0], Answer):
            seconds = self.speed * rng.uniform(0.5, 1.5) * (1.0 if item.kind.probing else 2.0)
        self.busy, life = True, self.life
        # What keeps a group from an item, or breaks it, is told once.
        other = [answer for answer in answers if not isinstance(answer, Answer)][:1]
        data = tuple(encode_answer(answer) for answer in other or answers)
        world.at(max(world.now, self.thaw) + seconds, lambda: self._answered(data, life))

    def _run(self, item: Item) -> Answer | Refused | Failed:
        if self.held != item.step:
            return Refused(self.name, item, self.held, "not at that step")
        if self.world.stormy and self.world.rng.random() < self.world.chaos.failing:
            return Failed(self.name, item, "out of memory")
        return Answer(self.name, item, self.world.problem.run(self.weights, item))

    def _answered(self, data: tuple[bytes, ...], life: int) -> None:
        if not self.alive or life != self.life:
            return
        if self.thaw > self.world.now:
            self.world.at(self.thaw, lambda: self._answered(data, life))
            return
        self.busy = False
        for event in [decode_answer(self.name, each) for each in data]:
            if isinstance(event, Answer) and event.item.kind is Kind.SNAPSHOT:
                self.world.saved.append(Saved(self.held, self.weights, self.head))
            self.world.send(partial(self.world.coordinator.feed, event))
            if isinstance(event, Failed) and self.width > 1:
                self.world.met["groups torn down"] += 1
                self.world.crash(self)
        self._next()


class SimulatedCoordinator:
    """What the coordinator's actor does: carry out the kernel's actions in order."""

    def __init__(self, world: Simulation) -> None:
        self.world, self.life = world, 0
        self.ledger: Ledger | None = None
        self.state: State | None = None

    @property
    def up(self) -> bool:
        return self.state is not None

    def boot(self) -> None:
        """Start or resume from the ledger alone."""
        world = self.world
        self.life += 1
        world.met["coordinator lives"] += 1
        if self.life == 1 and world.disk_fault is not None:
            world.disk.fault_in, world.disk.fault = world.disk_fault
        elif world.stormy and world.rng.random() < world.chaos.cut:
            world.disk.fault_in = world.rng.randint(1, 40)
            world.disk.fault = world.rng.choice(["cut", "torn", "full"])
        try:
            self.ledger = Ledger.open(FOLDER, repair=True, files=world.disk.files())
        except PowerCutError:
            self.crash()
            return
        except LedgerError as error:
            if "No space" not in str(error):
                raise InvariantError(f"the ledger cannot be opened again: {error}") from error
            self.halt()
            return
        world.check_resumed(self.ledger)
        skipped = 0
        for commit in self.ledger.commits():
            skipped = 0 if commit.applied else skipped + 1
        self.state = initial_state(
            world.problem.settings, self.ledger.next_step, self.ledger.head, skipped=skipped, recent=self._recent(),
            now=world.now,
        )  # fmt: skip
        for replica in world.replicas.values():
            world.handshake(replica)
        self.tick(self.life)

    def tick(self, life: int) -> None:
        if self.up and life == self.life:
            self.feed(Tick())
            self.world.at(self.world.now + 1.0, lambda: self.tick(life))

    def crash(self) -> None:
        """Lose the process and what the disk had not synced."""
        self.world.met["power cuts"] += 1
        self.world.disk.power_cut()
        self.halt()

    def halt(self) -> None:
        """Be gone; somebody resumes later."""
        if self.ledger is not None and self.up:
            self.ledger.close()
        self.ledger = self.state = None
        self.world.disk.fault_in = None
        life, later = self.life, self.world.now + self.world.rng.uniform(0.1, 5.0)
        self.world.at(later, lambda: self.boot() if life == self.life and not self.world.finished else None)

    def feed(self, event: Event) -> None:
        """Hand an event to the kernel and do what it says; a power cut may come between any two actions."""
        try:
            while self.state is not None:
                before = self.world.freeze(self.state)
                self.state, actions = kernel.transition(self.state, event, self.world.now)
                self.world.check_pure(before)
                self.world.trace.update(repr((round(self.world.now, 6), event)).encode())
                follow: Event | None = None
                for action in actions:
                    follow = self._carry_out(action) or follow
                if follow is None:
                    return
                event = follow
        except PowerCutError:
            self.crash()

    def _carry_out(self, action: Action) -> Event | None:
        world = self.world
        world.met["actions"] += 1
        due = world.met["actions"] == world.cut_before_action
        if due or (world.stormy and world.rng.random() < world.chaos.between_actions):
            raise PowerCutError
        match action:
            case Assign(name, item, start, beside):
                assert self.ledger is not None and self.state is not None
                world.check_bundle(world.replicas[name], item, beside)
                if name in self.state.members and self.state.members[name].ahead == item:
                    world.met["lined up"] += 1
                records = b"".join(c.encode() for c in self.ledger.commits(start, item.step))
                requests = tuple(encode_request(each, records) for each in (item, *beside))
                life = world.replicas[name].life
                world.send(lambda: world.replicas[name].receive(requests, life))
            case AppendCommit(commit):
                return self._append(commit)
            case Rewind(step):
                return self._cut(step)
            case Report(record):
                world.check_report(record.step, record.evaluation, record.digest)
            case Release(name, _, cause):
                world.released(world.replicas[name], cause)
            case Finish():
                self._finish(action)
        return None

    def _append(self, commit: Commit) -> Event:
        assert self.ledger is not None
        try:
            self.ledger.append(commit)
        except LedgerError as error:
            return AppendFailed(commit.step, error.what)
        self.world.acknowledged = max(self.world.acknowledged, commit.step + 1)
        return CommitDurable(commit.step)

    def _cut(self, step: int) -> Event:
        assert self.ledger is not None
        self.world.rewinding(step)
        try:
            self.ledger.cut(step)
        except LedgerError as error:
            return AppendFailed(step, error.what)
        self.world.rewound()
        skipped = 0
        for commit in self.ledger.commits():
            skipped = 0 if commit.applied else skipped + 1
        return Rewound(step, self.ledger.head, skipped, self._recent())

    def _recent(self) -> tuple[Commit, ...]:
        assert self.ledger is not None
        reach = self.world.problem.settings.optimizer.reach
        return tuple(self.ledger.commits(max(0, self.ledger.next_step - reach)))

    def _finish(self, finish: Finish) -> None:
        assert self.state is not None
        self.world.met.update(asdict(self.state.counters))
        self.world.finishing(finish)
        self.halt()
