"""How good an estimate of the gradient K directions give: its cosine to what backpropagation finds.

Two cases. On one batch, K directions of that batch against its own gradient: what the directions alone lose. On
batches, each direction on one of its own, as a run has it, against the gradient of 1,024 examples: what a run's
estimate is worth.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

import zoray
from benchmarks.common import commit
from benchmarks.learning import tasks
from benchmarks.learning.methods import DENSE, EPSILON, GAUSSIAN, INPUTS, RANK4
from benchmarks.learning.store import add, lines
from benchmarks.learning.tasks import Batch, Task, mean_loss, rows, sample
from benchmarks.learning.workers import settle

RESULTS = Path(__file__).parent / "fidelity.jsonl"
KINDS: dict[str, dict[str, Any]] = {
    "of inputs": INPUTS,
    "rank-1": {},
    "rank-4": RANK4,
    "Rademacher": DENSE,
    "Gaussian": GAUSSIAN,
}
Case = Literal["one batch", "batches"]
CASES: tuple[Case, ...] = ("one batch", "batches")
COUNTS = (1, 4, 16, 64, 256)
"""K: the directions of an estimate."""
_DIRECTIONS = 512
"""Directions that are tried: 512 estimates of one, 128 of four, and so on."""
_EXAMPLES = 1024
VERSION = 1


def measure_missing(seconds: float) -> None:
    """Measure the (task, kind, case) that are not in the results yet."""
    settle()
    started = time.perf_counter()
    there = {key(line) for line in lines(RESULTS)}
    for task in tasks.VERSIONS:
        for case in CASES:
            for kind in KINDS:
                line = {"task": task, "kind": kind, "case": case, "versions": [tasks.VERSIONS[task], VERSION]}
                if key(line) not in there and time.perf_counter() - started < seconds:
                    line |= {"commit": commit(), **measure(tasks.get(task), kind, case)}
                    add(line, RESULTS)
                    print(json.dumps(line), flush=True)


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a line is of."""
    return line["task"], line["kind"], line["case"], tuple(line["versions"])


def measure(task: Task, kind: str, case: Case) -> dict[str, Any]:
    """What `_DIRECTIONS` directions say.

    Returns:
        weights: d, the number of trained weights.
        cosines: for each K, E<estimate, gradient> / (|gradient| sqrt(E|estimate|^2)), each mean over the estimates:
            without bias where one alone is nearly all noise.
        single: the cosine of each estimate of 16 directions by itself.
    """
    model = task.model()
    examples = task.batch(0, 0) if case == "one batch" else sample(task.train, _EXAMPLES)
    gradient = true_gradient(model, examples)
    replica = zoray.Replica(model, 7, texts=task.texts, **KINDS[kind])
    wanted = torch.cat([gradient[spec.name].flatten() for spec in replica.layout.specs])
    wanted /= wanted.norm()
    sums = {count: torch.zeros_like(wanted) for count in COUNTS}
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in COUNTS}
    for number, z, g in directions(task, replica, case):
        for count in COUNTS:
            sums[count].add_(z, alpha=g / count)
            if (number + 1) % count == 0:
                found[count].append((float(sums[count] @ wanted), float(sums[count].norm())))
                sums[count].zero_()
    cosines = {str(count): rounded(ratio(pairs)) for count, pairs in found.items()}
    single = [rounded(along / length) for along, length in found[16]]
    return {"weights": replica.layout.numel, "cosines": cosines, "single": single}


def ratio(pairs: list[tuple[float, float]]) -> float:
    """Mean component along the gradient over the root mean square length, of (component, length) of each estimate."""
    along = sum(component for component, _ in pairs) / len(pairs)
    return along / math.sqrt(sum(length**2 for _, length in pairs) / len(pairs))


def directions(task: Task, replica: zoray.Replica, case: Case) -> Iterator[tuple[int, torch.Tensor, float]]:
    """(number, z as one vector, projected gradient) of one direction after the other."""
    specs = replica.layout.specs
    for number in range(_DIRECTIONS):
        batch = task.batch(0, 0 if case == "one batch" else number)
        found = replica.probe(0, number, batch, EPSILON)
        z = torch.cat([replica.directions.dense((0, number), spec).flatten() for spec in specs])
        yield number, z, found.projected_gradient


def true_gradient(model: torch.nn.Module, examples: Batch) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss, by name of the parameter, averaged over equal parts of the examples."""
    count = len(examples["labels"])
    parts = range(0, count, tasks.ROWS)
    for start in parts:
        (mean_loss(model, rows(examples, slice(start, start + tasks.ROWS))) / len(parts)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def rounded(value: float) -> float:
    """Five digits are enough of a cosine."""
    return float(f"{value:.5g}")
