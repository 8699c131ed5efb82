"""A replica: one copy of the weights at some step, a deterministic state machine with `probe`, `apply` and `digest`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from zoray.aggregate import MeanLoss, ProbeResult, second_difference
from zoray.commits import Commit
from zoray.digest import tensor_digest
from zoray.directions import Directions
from zoray.errors import ConfigError, NumericsError
from zoray.estimators import ESTIMATORS, Estimator, EstimatorName
from zoray.inputs import find_mixtures, input_sides, random_texts
from zoray.layout import DirectionKind, make_layout, trainable_parameters
from zoray.loss import Batch, LossFunction, RowLosses
from zoray.memory import Memory, Resident
from zoray.memory.base import Reader
from zoray.objective import Objective
from zoray.partitioned import holds_buffers, is_partitioned, own_part
from zoray.probe import BESIDE, Prober, Sign
from zoray.proof import HeadChoice, SignsChoice, Verdict, prove
from zoray.selection import Selection, cover

_MASK = (1 << 64) - 1


class Replica:
    """One copy of a model that is trained by forward passes alone.

    Without any cluster::

        replica = zoray.Replica(model, run_seed=0)
        for step in range(1000):
            probes = [replica.probe(step, k, batch(step, k), epsilon=1e-3) for k in range(4)]
            replica.apply(zoray.commit(step, probes, learning_rate=1e-4))

    Args:
        model: any module whose parameters that require a gradient are float32, bfloat16 or float16; put in eval mode.
        run_seed: seed of the directions and of stochastic rounding, 0 <= run_seed < 2^64.
        direction: "rank" (z = a b^T on matrices), "inputs" (the same, with the factors on the input side of linear
            layers mixed from inputs, see `zoray.inputs`), "rademacher" or "gaussian" (dense). With "inputs", the model
            must have the weights the run begins with; where it does not say that it is a language model
            (`get_output_embeddings`), inputs are taken without their mean (see `find_mixtures`).
        rank: r of the first two kinds.
        texts: of direction "inputs", the arguments of the forward that tells the inputs, of `zoray.inputs.POOL` rows;
            by default of random tokens.
        signs: both signs in one forward ("batched"), in two ("sequential"), or as proved on the first batch ("auto").
        head: the language-model head in slices of the vocabulary ("chunked"), whole ("full"), or as proved ("auto").
        estimator: how a probe finds the slope along its direction: "spsa", "one_sided", "forward_gradient", "backprop"
            (see `zoray.estimators`). All but the first have no two signs, and the last two need all weights here.
        loss: a loss of your own, (model, batch) -> `RowLosses`; by default that of the model's labels.
        objective: what probes minimise and evaluations measure (see `zoray.objective`); by default that loss.
        selection: move some of the trained weights only: `SmallWeights` (Sparse-MeZO) or `Rotation` (block coordinate
            descent). It is made from the weights that the model has now, which must be those the run begins with.
        memory: what holds the weights, made of the model and the run's directions. With `Streamed`, of
            `zoray.memory.streamed`, they are brought to the device block by block. With `Zero3`, of
            `zoray.memory.zero3`, each of several processes holds a part of them; all of them must then call the same
            methods in the same order, but for `probe`'s address and batch, of which each has its own.

    Attributes:
        step: of the weights.
        torn: an update, or the loading of a snapshot, was broken off, and the weights are those of no step.

    Raises:
        ModelError: nothing to train, or a parameter that cannot be trained.
        ConfigError: the estimator does not go with the memory, `signs` or the objective, or the selection does not suit
            the model.
    """

    def __init__(
        self,
        model: nn.Module,
        run_seed: int = 0,
        *,
        direction: DirectionKind = "rank",
        rank: int = 1,
        texts: Mapping[str, torch.Tensor] | None = None,
        signs: SignsChoice = "auto",
        head: HeadChoice = "auto",
        estimator: EstimatorName = "spsa",
        loss: LossFunction | None = None,
        objective: Objective | None = None,
        selection: Selection | None = None,
        memory: Callable[[nn.Module, Directions], Memory] = Resident,
    ) -> None:
        self.model = model.eval()
        sides = input_sides(model) if direction == "inputs" else {}
        self.layout = make_layout(trainable_parameters(model), direction, rank, sides)
        self.directions = Directions(self.layout, run_seed)
        self.memory = memory(model, self.directions)
        # Both may look at the weights, which the memory has by now.
        mixed = [spec.name for spec in self.layout.specs if spec.mixed]
        if mixed:
            with self.memory.forwards(first=True):
                self.directions.inputs = find_mixtures(model, texts or random_texts(model, run_seed), run_seed, mixed)
            self.memory.settle()
        self.directions.coverage = cover(selection, model, self.memory)
        self.step = 0
        self.torn = False
        self.objective = objective or Objective()
        self._choices: tuple[SignsChoice, HeadChoice] = (signs if estimator == "spsa" else "sequential", head)
        self._loss = loss
        self._prober: Prober | None = None
        self._estimator: Estimator | None = None
        self._kind = ESTIMATORS[estimator]
        if estimator != "spsa" and signs == "batched":
            raise ConfigError(f"Estimator {estimator} has no two signs for one forward.", where="signs")
        if self._kind.differentiates and not isinstance(self.memory, Resident):
            raise ConfigError(
                f"Estimator {estimator} needs all weights in one place, and {type(self.memory).__name__} has not.",
                where="estimator",
                advice="use spsa or one_sided, or a resident replica",
            )
        if self._kind.differentiates and self.objective.score is not None:
            raise ConfigError(
                f"Estimator {estimator} takes derivatives, and {self.objective.identity} has none.",
                where="estimator",
                advice="use spsa or one_sided",
            )

    def prove(self, batch: Batch, epsilon: float = 1e-3) -> Verdict:
        """Find out on one batch which of the faster paths are right for this model (see `zoray.proof`).

        Called by the first probe; a run calls it with the batch of address (0, 0), so that every replica, whenever it
        joins, takes the same paths.

        Raises:
            ModelError: a path that was asked for is not right, or the estimator cannot differentiate the model.
        """
        signs, head = self._choices
        if self.objective.separate:
            signs = "sequential"
        if self.objective.whole:
            head = "full"
        rows = len(batch["labels"])
        with self.memory.forwards(first=True):
            verdict = prove(
                self.model, self.directions, batch, rows, signs=signs, head=head, epsilon=epsilon, loss=self._loss
            )
        self._prober = Prober(self.model, self.directions, verdict, self._loss, self.objective)
        self._estimator = self._kind(self._prober)
        if self._kind.differentiates:
            # Whether the model can be differentiated, and in this memory, shows only when it is; all of it, whatever
            # the first steps move.
            whole = Prober(self.model, self.directions.all_groups(), verdict, self._loss, self.objective)
            self._kind(whole).probe(0, 0, batch, epsilon)
        if self.objective.score is not None and self.objective.score.function is not None:
            # A function that does not fit the task is found out here, and not in the middle of a step.
            with self.memory.forwards():
                self._prober.evaluate(batch)
        return verdict

    @property
    def verdict(self) -> Verdict | None:
        """The paths in use; None before the first probe."""
        return None if self._prober is None else self._prober.verdict

    def probe(
        self,
        step: int,
        direction: int,
        batch: Batch,
        epsilon: float,
        microbatch: int = 0,
        *,
        curved: bool = False,
    ) -> ProbeResult:
        """Projected gradient, loss and contrast along one direction at the current weights, which are not touched.

        Args:
            step, direction, microbatch: the probe's address.
            batch: inputs of the model with `labels`, B rows.
            epsilon: distance of the evaluations from the weights; estimators that differentiate do not use it.
            curved: measure the curvature along the direction too, as `Optimizer(normalize="curvature")` wants it of a
                step's first probe. Takes L(theta) as well; of "one_sided", the loss on the other side.

        Raises:
            ConfigError: the curvature is asked of an estimator that differentiates.
        """
        self._require_whole()
        if self._estimator is None:
            self.prove(batch, epsilon)
        assert self._estimator is not None
        with self.memory.forwards():
            result = self._estimator.probe(step, direction, batch, epsilon, microbatch)
        if not curved:
            return result
        if self._kind.differentiates:
            raise ConfigError("There are no losses beside the weights to find the curvature from.", where="estimator")
        mean = result.loss
        if self._kind is not ESTIMATORS["spsa"]:
            plus, minus = (self.side(step, direction, batch, epsilon, sign).loss for sign in BESIDE)
            mean = (plus + minus) / 2
        centre = self.side(step, direction, batch, epsilon, 0).loss
        return replace(result, curvature=second_difference(mean, centre, epsilon))

    def side(self, step: int, direction: int, batch: Batch, epsilon: float, sign: Sign) -> MeanLoss:
        """Mean loss at theta + sign epsilon z: half of a `probe` of two forwards (`signs` sequential).

        With sign 0, at theta: half of a one-sided probe.

        Raises:
            ModelError: the replica's probes take one forward for both signs.
        """
        self._require_whole()
        if self._prober is None:
            self.prove(batch, epsilon)
        assert self._prober is not None
        with self.memory.forwards():
            return self._prober.side(step, direction, batch, epsilon, sign)

    def apply(self, commits: Commit | Sequence[Commit]) -> None:
        """theta <- decay theta - eta sum_k c_k z_k for each commit in order; one already applied is ignored.

        Raises:
            NumericsError: a commit between the replica's step and the given ones is missing, or an update before was
                broken off.
        """
        missing = [c for c in ([commits] if isinstance(commits, Commit) else commits) if c.step >= self.step]
        expected = list(range(self.step, self.step + len(missing)))
        if [c.step for c in missing] != expected:
            raise NumericsError(
                f"The replica is at step {self.step} and was given the commits of steps {[c.step for c in missing]}.",
                advice="give it every commit, in order",
            )
        self._require_whole()
        if missing:
            self._forget()
        try:
            self.memory.apply(missing)
        except BaseException:
            self.torn = bool(missing)
            raise
        self.step += len(missing)

    def evaluate(self, batch: Batch) -> RowLosses:
        """Losses of each row at the current weights."""
        self._require_whole()
        if self._prober is None:
            self.prove(batch)
        assert self._prober is not None
        with self.memory.forwards():
            return self._prober.evaluate(batch)

    def digest(self) -> int:
        """Digest of the trainable weights: equal on two replicas if and only if they agree (up to 2^-64)."""
        self._require_whole()
        return self.memory.total(self.memory.digest())

    def base_digest(self) -> int:
        """Digest of everything the model computes with now, trained or not (see `base_digest`)."""
        return self.memory.total(base_digest(self.model))

    def load(self, read: Reader, step: int) -> None:
        """Jump to the weights of a snapshot at `step`."""
        self._forget()
        self.torn = True
        self.memory.load(read)
        self.step, self.torn = step, False

    def _require_whole(self) -> None:
        if self.torn:
            raise NumericsError(
                "An update of this replica was broken off, and its weights are those of no step.",
                advice="make it anew, or load a snapshot",
            )

    def _forget(self) -> None:
        if self._estimator is not None:
            self._estimator.forget()


def base_digest(model: nn.Module) -> int:
    """Digest of everything the model computes with, trained or not: its parameters and persistent buffers.

    Of a partitioned model it is the part of this process; the parts add up modulo 2^64.
    """
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    first = holds_buffers(state.values())
    total = 0
    for name, tensor in state.items():
        if first or is_partitioned(tensor):
            with own_part(tensor) as part:
                total += tensor_digest(name, *part)
    return total & _MASK
