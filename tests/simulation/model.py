"""A model small enough for thousands of runs, and the run it should give, computed without the kernel."""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from tests.simulation.disk import empty_ledger
from zoray.aggregate import MeanLoss, ProbeResult, aggregate, second_difference
from zoray.commits import HASH_SIZE, Commit
from zoray.protocol import DigestValue, EvalSums, Evaluation, Item, Kind, Payload, ProbeScalars, Settings, SideLoss
from zoray.protocol.decide import evaluation

Weights = npt.NDArray[np.float32]
SIZE = 4


def base() -> Weights:
    return np.array([1.0, -0.5, 0.25, 3.0], dtype=np.float32)


@functools.cache
def direction(step: int, index: int) -> Weights:
    bits = hashlib.sha256(struct.pack("<QI", step, index)).digest()
    return np.array([1.0 if bits[i] & 1 else -1.0 for i in range(SIZE)], dtype=np.float32)


def apply(weights: Weights, commit: Commit) -> Weights:
    total = np.zeros(SIZE, dtype=np.float32)
    for step, index, coefficient in commit.terms:
        total += np.float32(coefficient) * direction(step, index)
    return np.float32(commit.decay) * weights - np.float32(commit.eta) * total


def digest(weights: Weights) -> int:
    return int.from_bytes(hashlib.sha256(weights.tobytes()).digest()[:8], "little")


@functools.lru_cache(maxsize=4096)
def _sides(weights: bytes, step: int, index: int, microbatch: int, epsilon: float) -> tuple[float, float]:
    """The losses at the weights plus and minus epsilon times the direction."""
    theta = np.frombuffer(weights, dtype=np.float32)
    noise = hashlib.sha256(struct.pack("<QII", step, index, microbatch)).digest()[0] / 256
    g = float(theta @ direction(step, index) * (1 + noise) + noise)
    loss = float(theta @ theta + noise)
    return loss + epsilon * g, loss - epsilon * g


@dataclass(frozen=True)
class Problem:
    """What a replica computes: `settings`, and every how many addresses a loss is not finite (0: never)."""

    settings: Settings
    broken_every: int = 0
    broken_steps: range = range(0)

    def run(self, weights: Weights, item: Item) -> Payload:
        """The result of an item: a pure function of the weights and the address."""
        if item.kind in (Kind.SNAPSHOT, Kind.DIGEST):
            return DigestValue(digest(weights))
        epsilon = self.settings.epsilon
        plus, minus = _sides(weights.tobytes(), item.step, item.part, item.microbatch, epsilon)
        if item.kind is Kind.EVAL:
            loss = (plus + minus) / 2
            return EvalSums(loss * 3, loss * loss * 3, 3, int(loss * 10) % 4)
        address = (item.step * 7 + item.direction) * 3 + item.microbatch
        if item.step in self.broken_steps or (self.broken_every and address % self.broken_every == 0):
            plus = math.inf
        sides = {Kind.PLUS: plus, Kind.CENTRE: (plus + minus) / 2 - 0.01 * epsilon, Kind.MINUS: minus}
        if item.kind in sides:
            return SideLoss(sides[item.kind], 0.5, 0.5, _told(sides[item.kind]).contrast)
        both = ProbeResult.of_losses(item.step, item.direction, item.microbatch, _told(plus), _told(minus), epsilon)
        return ProbeScalars(both.projected_gradient, both.loss, 0.5, 1.0, both.contrast)


def _told(loss: float) -> MeanLoss:
    """A loss with a contrast, another for every loss."""
    return MeanLoss(loss, loss * loss - 3)


@dataclass
class Golden:
    """The undisturbed run: its commits, the weights at each step, evaluations, the ledger's bytes."""

    commits: list[Commit] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=lambda: [base()])
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    reason: str = "done"
    ledger: bytes = b""
    sizes: list[int] = field(default_factory=list)


def _probe(problem: Problem, weights: Weights, step: int, index: int, microbatch: int) -> ProbeResult:
    result = _plain_probe(problem, weights, step, index, microbatch)
    if not problem.settings.optimizer.wants_curvature or index or microbatch:
        return result
    kinds = (Kind.PLUS, Kind.CENTRE, Kind.MINUS)
    sides = [problem.run(weights, Item(kind, step)) for kind in kinds]
    plus, centre, minus = (side.loss for side in sides if isinstance(side, SideLoss))
    mean = (plus + minus) / 2 if problem.settings.one_sided else result.loss
    return replace(result, curvature=second_difference(mean, centre, problem.settings.epsilon))


def _plain_probe(problem: Problem, weights: Weights, step: int, index: int, microbatch: int) -> ProbeResult:
    if problem.settings.one_sided:
        first = index // problem.settings.directions_per_batch * problem.settings.directions_per_batch
        items = Item(Kind.PLUS, step, index, microbatch), Item(Kind.CENTRE, step, first, microbatch)
        sides = (side for item in items if isinstance(side := problem.run(weights, item), SideLoss))
        plus, centre = (MeanLoss(side.loss, side.contrast) for side in sides)
        return ProbeResult.of_one_side(step, index, microbatch, plus, centre, problem.settings.epsilon)
    scalars = problem.run(weights, Item(Kind.PROBE, step, index, microbatch))
    assert isinstance(scalars, ProbeScalars)
    gradient, loss = scalars.projected_gradient, scalars.loss
    return ProbeResult(step, index, microbatch, gradient, loss, contrast=scalars.contrast)


def golden(problem: Problem) -> Golden:
    """Run the problem one probe after the other."""
    settings, run = problem.settings, Golden(ledger=empty_ledger()["commits.bin"])
    optimizer = settings.optimizer
    state = optimizer.initial()
    skipped, previous = 0, run.ledger[-HASH_SIZE:]
    run.sizes.append(len(run.ledger))
    for step in range(settings.max_steps + 1):
        weights = run.weights[-1]
        if settings.evaluates(step):
            shards = [problem.run(weights, Item(Kind.EVAL, step, shard)) for shard in range(settings.eval_shards)]
            run.evaluations[step] = evaluation([sums for sums in shards if isinstance(sums, EvalSums)])
        if step == settings.max_steps:
            return run
        results = []
        directions = state.width.directions if state.width else settings.directions
        for index in range(directions):
            for microbatch in range(settings.microbatches):
                results.append(_probe(problem, weights, step, index, microbatch))
        commit = aggregate(
            step, results, directions=directions, microbatches=settings.microbatches,
            learning_rate=settings.learning_rate(step), weight_decay=settings.weight_decay,
            max_projected_gradient=settings.max_projected_gradient, previous=previous, optimizer=optimizer, state=state,
        ).commit  # fmt: skip
        previous, state = commit.hash, optimizer.after(state, commit)
        run.commits.append(commit)
        run.weights.append(apply(weights, commit))
        run.ledger += commit.encode()
        run.sizes.append(len(run.ledger))
        skipped = 0 if commit.applied else skipped + 1
        if skipped == settings.max_skipped_steps:
            run.reason = "numerics"
            return run
    return run
