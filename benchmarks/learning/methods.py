"""The methods that are compared: each is one line of `METHODS`.

What they share, where nothing else is said: the batches, their size, and epsilon. A forward pass is one of `tasks.ROWS`
rows; a backward pass counts as two. Rates are relative: a method's `rate` is how many times larger than for one
direction per step the middle of its grid lies (for AdamW: than the task's own for AdamW).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

import zoray
from benchmarks.learning.tasks import ROWS, Batch, Task, mean_loss
from benchmarks.mezo import descend, normals
from zoray.aggregate import ProbeResult
from zoray.optim import SGD, Optimizer

EPSILON = 1e-3
BatchOf = Callable[[int], Batch]
"""Batch number n of a run."""
Step = Callable[[int, float], float]
"""(number of the step, its learning rate) -> training loss; moves the weights."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to train.

    Attributes:
        title: what a reader is told.
        rate: middle of the grid of learning rates, relative to that of one direction per step.
        schedule: "constant", or "linear" to 0.
        fixed: the one learning rate it is run with, untuned; None: it is tuned like the others.
        rows: of a batch.
        share: of the task's budget.
        adapters: those that begin as inputs are trained in place of what the task trains (`Task.adapted`).
        version: raised whenever the method changes; results of other versions do not count.
    """

    title: str
    rate: float = 1.0
    schedule: Literal["constant", "linear"] = "constant"
    fixed: float | None = None
    rows: int = ROWS
    share: float = 1.0
    adapters: bool = False
    version: int = 1

    @property
    def forwards(self) -> float:
        """Forward passes of a step, of `ROWS` rows each."""
        return self.evaluations * self.rows / ROWS

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Forward passes of a step, of `rows` rows each."""

    @abstractmethod
    def start(self, model: nn.Module, batch_of: BatchOf, seed: int, texts: Batch | None = None) -> Step:
        """Begin a run on a model, which the steps will change in place.

        Args:
            texts: what tells the inputs of layers, where random tokens cannot.
        """

    def middle(self, task: Task) -> float:
        """Middle of the grid of learning rates."""
        return task.rate * self.rate


@dataclass(frozen=True, kw_only=True)
class MeZO(Method):
    """Algorithm 1 of Malladi et al. 2023, as published (`benchmarks.mezo`)."""

    dtype: torch.dtype = torch.float32
    evaluations: int = 2

    def start(self, model: nn.Module, batch_of: BatchOf, seed: int, texts: Batch | None = None) -> Step:
        """The weights are perturbed in place, and updated in their own dtype."""
        model.to(self.dtype)

        def step(number: int, rate: float) -> float:
            batch = batch_of(number)
            # Kept for the time of the step: sooner done than made four times over, with the same bits.
            kept = list(normals(model, (seed << 32) + number))
            return descend(lambda: kept, lambda: float(mean_loss(model, batch)), EPSILON, rate)[1]

        return step


@dataclass(frozen=True, kw_only=True)
class Zoray(Method):
    """The library, as a cluster runs it.

    Attributes:
        directions: K.
        per_batch: directions that are on the same batch, one after another.
        replica: arguments of `zoray.Replica`.
        estimator: "spsa" or "one_sided".
        scalars: what of a projected gradient counts: int8 as in a commit, or all its bits.
        optimizer: what turns the results of a step into its commit.
        epsilon: distance of the evaluations from the weights.
        unit: middle of the grid where the optimizer's rates do not scale with the task's.
    """

    directions: int = 16
    per_batch: int = 1
    replica: Mapping[str, Any] = field(default_factory=dict)
    estimator: Literal["spsa", "one_sided"] = "spsa"
    scalars: Literal["int8", "float32"] = "int8"
    dtype: torch.dtype = torch.float32
    optimizer: Optimizer = SGD
    epsilon: float = EPSILON
    unit: float | None = None

    @property
    def batches(self) -> int:
        """Batches of a step."""
        return -(-self.directions // self.per_batch)

    @property
    def evaluations(self) -> int:
        """As many as the library really makes: two for each direction; one-sided, one for each and for each batch.

        The curvature takes two, since both signs go through one forward there too; one-sided, three losses of its own.
        """
        if self.estimator == "spsa":
            return 2 * self.directions + 2 * self.optimizer.wants_curvature
        return self.directions + self.batches + 3 * self.optimizer.wants_curvature

    def middle(self, task: Task) -> float:
        """Of the task, or the optimizer's own."""
        return super().middle(task) if self.unit is None else self.unit

    def start(self, model: nn.Module, batch_of: BatchOf, seed: int, texts: Batch | None = None) -> Step:
        """A replica of the model, with the run's seed."""
        replica = zoray.Replica(model.to(self.dtype), seed, estimator=self.estimator, texts=texts, **self.replica)
        state, curved = self.optimizer.initial(), self.optimizer.wants_curvature

        def step(number: int, rate: float) -> float:
            nonlocal state
            batches = [batch_of(number * self.batches + n) for n in range(self.batches)]
            results = [
                replica.probe(number, k, batches[k // self.per_batch], self.epsilon, curved=curved and k == 0)
                for k in range(self.directions)
            ]
            if self.scalars == "float32":
                add_exactly(replica, results, rate)
            else:
                commit = zoray.commit(number, results, learning_rate=rate, optimizer=self.optimizer, state=state)
                replica.apply(commit)
                state = self.optimizer.after(state, commit)
            return sum(result.loss for result in results) / len(results)

        return step


@dataclass(frozen=True, kw_only=True)
class AdamW(Method):
    """Backpropagation with AdamW: what forward passes alone are measured against from above."""

    evaluations: int = 3

    def middle(self, task: Task) -> float:
        """The task's own."""
        return task.adamw_rate * self.rate

    def start(self, model: nn.Module, batch_of: BatchOf, seed: int, texts: Batch | None = None) -> Step:
        """torch's AdamW without weight decay."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)

        def step(number: int, rate: float) -> float:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss = mean_loss(model, batch_of(number))
            loss.backward()
            optimizer.step()
            return loss.item()

        return step


@torch.no_grad()
def add_exactly(replica: zoray.Replica, results: Sequence[ProbeResult], rate: float) -> None:
    """theta <- theta - rate/K sum_k g_k z_k in float32, with g as the probes found it: no commit can say that."""
    parameters = dict(replica.model.named_parameters())
    for spec in replica.layout.specs:
        total = torch.zeros(spec.shape)
        for result in results:
            z = replica.directions.dense((result.step, result.direction), spec)
            total.add_(z, alpha=result.projected_gradient)
        parameters[spec.name].sub_(total, alpha=rate / len(results))


RANK4 = {"direction": "rank", "rank": 4}
DENSE = {"direction": "rademacher"}
GAUSSIAN = {"direction": "gaussian"}
HALF = torch.bfloat16
MOMENT = Optimizer(normalize="second_moment")
CURVED = Optimizer(normalize="curvature")
ONE_SIDED = Optimizer(normalize="curvature", shaping="centered")
INPUTS = {"direction": "inputs"}
DEFAULT: dict[str, Any] = {
    "fixed": 0.1,
    "rows": 4,
    "optimizer": CURVED,
    "schedule": "linear",
    "replica": INPUTS,
    "version": 7,
}
"""What `zoray train` does where nothing is said (`zoray.config`); on docstrings the inputs are those of examples."""
GROUPS: dict[str, Any] = {**DEFAULT, "estimator": "one_sided", "per_batch": 4, "optimizer": ONE_SIDED}
SIGNS: dict[str, Any] = {"replica": {}, "version": 5}
ADAPTERS: dict[str, Any] = {"replica": {}, "adapters": True, "version": 5}
ALL_ON_ONE: dict[str, Any] = {"estimator": "one_sided", "per_batch": 16}
THIRD = 1 / 3

METHODS: dict[str, Method] = {
    "mezo": MeZO(title="MeZO as published: Gaussian, float32, one direction"),
    "rank1": Zoray(title="rank-1, K = 16, int8", rate=10),
    "dense": Zoray(title="dense Rademacher, K = 16, int8", rate=10, replica=DENSE),
    "default": Zoray(title="zoray's defaults: of inputs, K = 16, 4 rows, curvature, rate 0.1, linear", **DEFAULT),
    "default-third": Zoray(title="zoray's defaults, a third of the passes", **DEFAULT, share=THIRD),
    "groups": Zoray(title="zoray's defaults, one-sided, 4 on each batch", **GROUPS),
    "groups-third": Zoray(
        title="zoray's defaults, one-sided, 4 on each batch, a third of the passes", **GROUPS, share=THIRD
    ),
    "signs": Zoray(title="zoray's defaults, rank-1 of signs", **{**DEFAULT, **SIGNS}),
    "signs-third": Zoray(
        title="zoray's defaults, rank-1 of signs, a third of the passes", **{**DEFAULT, **SIGNS}, share=THIRD
    ),
    "signs-groups-third": Zoray(
        title="zoray's defaults, rank-1 of signs, one-sided, 4 on each batch, a third of the passes",
        **{**GROUPS, **SIGNS}, share=THIRD,
    ),
    "adapters-third": Zoray(
        title="zoray's defaults, adapters of inputs, a third of the passes", **{**DEFAULT, **ADAPTERS}, share=THIRD
    ),
    "adapters-groups-third": Zoray(
        title="zoray's defaults, one-sided, 4 on each batch, adapters of inputs, a third of the passes",
        **{**GROUPS, **ADAPTERS}, share=THIRD,
    ),
    "rank1-rows": Zoray(title="rank-1, K = 16, 4 rows", rate=10, rows=4),
    "adamw": AdamW(title="AdamW by backpropagation"),
    "moment": Zoray(title="rank-1, K = 16, second moment (MEAZO)", unit=0.005, optimizer=MOMENT),
    "fzoo": Zoray(
        title="one-sided, K = 16, loss deviation (FZOO)",
        unit=0.005, **ALL_ON_ONE, optimizer=Optimizer(normalize="loss_deviation"), version=2,
    ),
    "fzoo-third": Zoray(
        title="one-sided, 4 on each batch of 4 rows, loss deviation, linear schedule, a third of the passes",
        unit=0.006, rows=4, estimator="one_sided", per_batch=4, schedule="linear", share=THIRD,
        optimizer=Optimizer(normalize="loss_deviation", shaping="centered"),
    ),
    "momentum": Zoray(title="rank-1, K = 16, momentum 0.9", optimizer=Optimizer(momentum=0.9)),
    "nesterov": Zoray(title="rank-1, K = 16, Nesterov 0.9", optimizer=Optimizer(momentum=0.9, nesterov=True)),
    "rank1-float": Zoray(title="rank-1, K = 16, float32 scalars", rate=10, scalars="float32"),
    "rank1-bf16": Zoray(title="rank-1, K = 16, bfloat16 rounded stochastically", rate=10, dtype=HALF),
    "rank1-bf16-wide": Zoray(
        title="rank-1, K = 16, bfloat16 rounded stochastically, epsilon 0.003", rate=10, dtype=HALF, epsilon=3e-3
    ),
    "mezo-bf16": MeZO(title="MeZO in bfloat16, in place", dtype=HALF),
    "rank4": Zoray(title="rank-4, K = 16", rate=10, replica=RANK4),
    "rank1-sign": Zoray(title="rank-1, K = 16, sign only", rate=10, optimizer=Optimizer(shaping="sign")),
    "zscore": Zoray(title="rank-1, K = 16, z-scores", unit=0.005, optimizer=Optimizer(shaping="zscore")),
    "ranks": Zoray(title="rank-1, K = 16, centred ranks", unit=0.015, optimizer=Optimizer(shaping="rank")),
    "guided": Zoray(title="rank-1, K = 16, guided (MeZO-GV)", rate=10, optimizer=Optimizer(shaping="guided")),
}  # fmt: skip
"""By name, the most wanted first."""
