"""How good an estimate of the gradient K directions give: its cosine to what backpropagation finds.

Two cases. On one batch, K directions of that batch against its own gradient: what the directions alone lose. On
batches, each direction on one of its own, as a run has it, against the gradient of 1,024 examples: what a run's
estimate is worth.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

import zoray
from benchmarks.common import commit
from benchmarks.learning import tasks
from benchmarks.learning.methods import DENSE, EPSILON, GAUSSIAN, RANK4
from benchmarks.learning.store import add, lines
from benchmarks.learning.tasks import Batch, Task, mean_loss, rows, sample
from benchmarks.learning.workers import settle

RESULTS = Path(__file__).parent / "fidelity.jsonl"
KINDS: dict[str, dict[str, Any]] = {"rank-1": {}, "rank-4": RANK4, "Rademacher": DENSE, "Gaussian": GAUSSIAN}
Case = Literal["one batch", "batches"]
CASES: tuple[Case, ...] = ("one batch", "batches")
COUNTS = (1, 4, 16, 64, 256)
"""K; of 256 directions there are 256 estimates of one, 64 of four, and so on."""
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
    """Number of weights, and for each K the cosines of the estimates that `COUNTS[-1]` directions give."""
    model = task.model()
    examples = task.batch(0, 0) if case == "one batch" else sample(task.train, _EXAMPLES)
    gradient = true_gradient(model, examples)
    replica = zoray.Replica(model, 7, **KINDS[kind])
    names = [spec.name for spec in replica.layout.specs]
    wanted = torch.cat([gradient[name].flatten() for name in names])
    sums = {count: torch.zeros_like(wanted) for count in COUNTS}
    cosines: dict[int, list[float]] = {count: [] for count in COUNTS}
    for number, z, g in directions(task, replica, case):
        for count in COUNTS:
            sums[count].add_(z, alpha=g)
            if (number + 1) % count == 0:
                cosines[count].append(float(torch.nn.functional.cosine_similarity(sums[count], wanted, dim=0)))
                sums[count].zero_()
    return {
        "weights": replica.layout.numel,
        "cosines": {str(count): rounded(found) for count, found in cosines.items()},
    }


def directions(task: Task, replica: zoray.Replica, case: Case) -> Iterator[tuple[int, torch.Tensor, float]]:
    """(number, z as one vector, projected gradient) of one direction after the other."""
    specs = replica.layout.specs
    for number in range(COUNTS[-1]):
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


def rounded(values: list[float]) -> list[float]:
    """Five digits are enough of a cosine."""
    return [float(f"{value:.5g}") for value in values]
