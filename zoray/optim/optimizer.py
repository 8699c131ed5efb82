"""The optimizer: a pure function from the state after some commits and a step's projected gradients to its update.

In a plain script::

    state = optimizer.initial()
    ...
    commit = zoray.commit(step, probes, learning_rate=1e-4, optimizer=optimizer, state=state)
    state = optimizer.after(state, commit)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

from zoray.commits import Commit, float32
from zoray.errors import ConfigError, LedgerError, NumericsError
from zoray.optim.brake import RELEASED, BrakeState, watched
from zoray.optim.curvature import UNKNOWN, CurvatureState, added, cautious
from zoray.optim.noise import ASSUMED, UNTOLD, SignalState, heard
from zoray.optim.shaping import SHAPINGS, Shaping, deviation, mean_square, shaped
from zoray.optim.width import Width, WidthState

Normalize = Literal["none", "loss_deviation", "second_moment", "curvature"]

_REMEMBERING = ("second_moment", "curvature")

_CURVED_NOTES = 12
"""Numbers in a commit that tell the curvature, the share of signal and the brake."""

FORGOTTEN = 0.05
"""A step that weighs less than this beside the newest is out of the momentum window, unless its length is given."""


@dataclass(frozen=True, slots=True)
class Past:
    """A step whose directions still count: weights w_k of all its directions, as its commit remembers them."""

    step: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What an optimizer knows of the steps before.

    Attributes:
        second_moment: running mean of the squared weights, not corrected for its start at 0.
        seen: steps in that mean.
        past: the steps of the momentum window, oldest first.
        width: how many directions the next step has, where that is adaptive.
        curvature: the curvature of the loss, where it is measured.
        signal: how much of the projected gradients is signal, where the curvature is measured.
        brake: whether the loss has risen, where the curvature is measured.
    """

    second_moment: float = 0.0
    seen: int = 0
    curvature: CurvatureState = UNKNOWN
    signal: SignalState = UNTOLD
    brake: BrakeState = RELEASED
    past: tuple[Past, ...] = ()
    width: WidthState | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What a step comes to: the update is -learning_rate / K * sum of weight * direction, with K of the step itself.

    Attributes:
        terms: (step, index, weight) of each direction: those of this step last, all of them, in order.
        moment, seen, curvature, signal, brake, width: the state of the same names after this step.
    """

    terms: tuple[tuple[int, int, float], ...]
    moment: float
    seen: int
    curvature: CurvatureState
    signal: SignalState
    brake: BrakeState
    width: WidthState | None


@dataclass(frozen=True, slots=True)
class Optimizer:
    """How projected gradients become an update.

    First each is clipped (`aggregate` does that), then they are shaped, then normalised; momentum comes last.

    Args:
        shaping: what a projected gradient counts for (see `zoray.optim.shaping`).
        normalize: what the weights are divided by, so that one learning rate serves losses of any scale:
            "loss_deviation", the standard deviation of the step's own projected gradients, which is that of its losses
            over epsilon (FZOO, arXiv 2506.09034); "second_moment", the root of a running mean of their squares (a
            scalar where Adam has one for each parameter, as in MEAZO); "curvature", the curvature of the loss over K,
            which makes the learning rate a number without a unit, below 1 (`zoray.optim.curvature`), and, where a
            direction is probed on two rows or more, over the share of signal that these tell, in units of 0.1
            (`zoray.optim.noise`); there, a loss that rises halves all further steps (`zoray.optim.brake`). "none",
            nothing.
        beta2: decay of the running means, which are corrected for their start at 0 as in Adam.
        momentum: mu of heavy-ball momentum, m <- mu m + g (as `torch.optim.SGD` has it, without dampening).
        nesterov: look ahead: the update is g + mu m.
        momentum_window: steps the momentum reaches back, this one included; by default those that weigh 5 % or more.
        width: adaptive number of directions per step; None: it is fixed.

    Raises:
        ConfigError: a value is out of range, or two do not go together.
    """

    shaping: Shaping = "none"
    normalize: Normalize = "none"
    beta2: float = 0.9
    momentum: float = 0.0
    nesterov: bool = False
    momentum_window: int | None = None
    width: Width | None = None

    def __post_init__(self) -> None:
        known: dict[str, tuple[str, ...]] = {"shaping": SHAPINGS, "normalize": get_args(Normalize)}
        for key, values in known.items():
            if (given := getattr(self, key)) not in values:
                raise ConfigError(f"unknown {key} {given!r}", where=key, advice=f"one of {', '.join(values)}")
        for key, value in (("beta2", self.beta2), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise ConfigError(f"{key} = {value}", where=key, advice="use a value from 0 to below 1")
        if self.nesterov and not self.momentum:
            raise ConfigError("Nesterov's momentum has no momentum", where="nesterov", advice="give a momentum")
        if self.momentum_window is not None and not (self.momentum and self.momentum_window >= 1):
            advice = "give a momentum and a window of one step or more, or leave both out"
            raise ConfigError(f"momentum_window = {self.momentum_window}", where="momentum_window", advice=advice)
        if self.normalize != "none" and self.shaping not in ("none", "centered", "guided"):
            what = f"the weights of shaping {self.shaping} have no scale that could be normalised"
            raise ConfigError(what, where="normalize", advice="leave normalize or shaping out")

    @property
    def window(self) -> int:
        """Steps whose directions an update has, the step's own included."""
        if not self.momentum:
            return 1
        return self.momentum_window or 1 + math.floor(math.log(FORGOTTEN) / math.log(self.momentum))

    @property
    def reach(self) -> int:
        """How many of the last commits `restore` needs."""
        return max(self.window - 1, int(self.normalize in _REMEMBERING or self.width is not None))

    @property
    def wants_curvature(self) -> bool:
        """Whether the first probe of each step also has to measure the curvature along its direction."""
        return self.normalize == "curvature"

    def initial(self) -> OptimizerState:
        """The state before the first step."""
        return OptimizerState(width=self.width.initial() if self.width else None)

    def restore(self, commits: Iterable[Commit]) -> OptimizerState:
        """The state after the last `reach` commits of a ledger, or after all of a shorter one, oldest first."""
        state = self.initial()
        for commit in commits:
            state = self.after(state, commit)
        return state

    def update(
        self,
        state: OptimizerState,
        step: int,
        gradients: Sequence[float],
        disagreement: float = math.nan,
        curvature: float | None = None,
        loss: float = math.nan,
    ) -> Update:
        """What the projected gradients of `step` come to.

        Args:
            state: the state after the commit before.
            step: number of the step.
            gradients: of each direction; nan for one that is left out, whose weight is 0. One at least is finite.
            disagreement: see `zoray.optim.width`.
            curvature: z'Hz as the step's first probe measured it; None if it has not.
            loss: mean over the step's probes.

        Raises:
            NumericsError: the projected gradients are too large to be squared.
        """
        finite = [k for k, gradient in enumerate(gradients) if not math.isnan(gradient)]
        counted = shaped([gradients[k] for k in finite], self.shaping)
        moment, seen = self._moment(state, counted)
        curved, signal, brake = state.curvature, state.signal, state.brake
        if self.wants_curvature and curvature is not None:
            curved = added(curved, curvature, self.beta2)
        divisor = self._divisor(counted, moment, seen)
        if self.wants_curvature:
            brake = watched(brake, loss)
            square = mean_square([gradients[k] for k in finite])
            noise = disagreement * square
            if self.shaping == "centered":
                # What the mean took away is neither.
                square, noise = mean_square(counted), noise * (1 - 1 / len(finite))
            signal = heard(signal, square, noise)
            divisor = cautious(curved, self.beta2) / len(gradients) * (ASSUMED / signal.share) / brake.factor
        weights = [0.0] * len(gradients)
        for k, weight in zip(finite, counted, strict=True):
            weights[k] = weight / divisor if divisor else 0.0
        older = self.momentum if self.nesterov else 1.0
        terms = [
            # Each step's sum is over its own number of directions.
            (past.step, k, older * self.momentum ** (step - past.step) * weight * len(gradients) / len(past.weights))
            for past in state.past
            if step - past.step < self.window
            for k, weight in enumerate(past.weights)
        ]
        terms += [(step, k, self._own * weight) for k, weight in enumerate(weights)]
        width = state.width
        if self.width is not None and width is not None:
            width = self.width.next(width, disagreement)
        return Update(tuple(terms), moment, seen, curved, signal, brake, width)

    def idle(self, state: OptimizerState, step: int, directions: int) -> Update:
        """A step without a finite probe: no direction counts, and everything stays as it was."""
        terms = tuple((step, k, 0.0) for k in range(directions))
        return Update(terms, state.second_moment, state.seen, state.curvature, state.signal, state.brake, state.width)

    def notes(self, update: Update, scale: float) -> tuple[float, ...]:
        """What the commit of an update keeps for `after`, beside its terms; float32 each.

        Args:
            scale: weight of a coefficient of 1 in that commit.
        """
        notes: tuple[float, ...] = (float32(scale / self._own),) if self.momentum else ()
        if self.normalize == "second_moment":
            notes += (update.moment, float(update.seen))
        if self.wants_curvature:
            notes += update.curvature.notes + update.signal.notes + update.brake.notes
        return notes + (update.width.notes if update.width is not None else ())

    def after(self, state: OptimizerState, commit: Commit) -> OptimizerState:
        """The state after `commit`, from what the commit says alone: live and resumed runs go on alike."""
        notes = iter(commit.notes)
        moment, seen, past, width = state.second_moment, state.seen, state.past, state.width
        curvature, signal, brake = state.curvature, state.signal, state.brake
        if self.momentum:
            unit = next(notes, 0.0)
            weights = tuple(unit * c for step, _, c in commit.terms if step == commit.step)
            past = (*past, Past(commit.step, weights))[-max(1, self.window - 1) :]
        if self.normalize == "second_moment":
            moment, seen = next(notes, moment), int(next(notes, seen))
        if self.wants_curvature:
            if len(commit.notes) < _CURVED_NOTES:
                what = f"step {commit.step} says less of the curvature than is needed to go on from it"
                raise LedgerError(
                    what, where="ledger", advice="go on with the version of Zoray that made it, or start a new run"
                )
            mean, square, count = islice(notes, 3)
            curvature, signal = CurvatureState(mean, square, int(count)), SignalState(*islice(notes, 2))
            recent, lowest, last, spread, count, changes, factor = islice(notes, 7)
            brake = BrakeState(recent, lowest, last, spread, int(count), int(changes), factor)
        if self.width is not None:
            width = self.width.read(tuple(islice(notes, 2)))
        return OptimizerState(moment, seen, curvature, signal, brake, past, width)

    @property
    def _own(self) -> float:
        """Factor of a step's own weights: Nesterov's update is g + mu m = (1 + mu) g + mu^2 (m before)."""
        return 1.0 + self.momentum if self.nesterov else 1.0

    def _moment(self, state: OptimizerState, weights: Sequence[float]) -> tuple[float, int]:
        """The running mean with this step in it, rounded as a commit keeps it."""
        if self.normalize != "second_moment":
            return 0.0, 0
        moment = float32(self.beta2 * state.second_moment + (1 - self.beta2) * mean_square(weights))
        if math.isinf(moment):
            what = "the squares of the projected gradients are too large for float32"
            raise NumericsError(what, where="learning_rate", advice="lower it, or set max_projected_gradient")
        # Counted as long as it matters, and float32 can count.
        return moment, min(state.seen + 1, 1 << 20)

    def _divisor(self, weights: Sequence[float], moment: float, seen: int) -> float:
        if self.normalize == "loss_deviation":
            return deviation(weights)
        if self.normalize == "second_moment":
            return math.sqrt(moment / (1 - self.beta2**seen))
        return 1.0


SGD = Optimizer()
"""theta <- theta - learning_rate / K * sum_k g_k z_k, and no memory."""
