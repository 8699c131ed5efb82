"""Which trials a study has, and how many steps each rung of successive halving gives them.

Jamieson and Talwalkar 2016 (arXiv 1502.07943): all trials get a small budget, the best 1/eta of them eta times as much,
and so on, so that every rung costs about the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from zoray.errors import ConfigError

LEARNING_RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The default grid, as multiples of the configuration's learning rate."""

SMALLER, LARGER = 0.1, 10.0
"""The second epsilon of the default grid: a smaller one has less bias; in a short data type it drowns in rounding, and
so does the curvature in any."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One pair of what is searched; everything else is the configuration's."""

    learning_rate: float
    epsilon: float

    @property
    def name(self) -> str:
        """Its name, and that of its folder."""
        return f"lr{self.learning_rate:g}-eps{self.epsilon:g}".replace("+", "")


@dataclass(frozen=True, slots=True)
class Plan:
    """A study, as it is decided before it begins.

    Attributes:
        trials: all of them, in the order of the table.
        rungs: steps that a trial has done at the end of each rung, rising.
        eta: one of so many goes on to the next rung.
    """

    trials: tuple[Trial, ...]
    rungs: tuple[int, ...]
    eta: int

    def entering(self, rung: int) -> int:
        """How many trials begin a rung, if none has diverged."""
        return kept(len(self.trials), self.eta, rung)

    @property
    def steps(self) -> int:
        """Steps of all trials together, if none diverges."""
        return cost(len(self.trials), self.rungs, self.eta)


def kept(trials: int, eta: int, times: int) -> int:
    """How many are left after so many halvings; rounded up, so that two remain to be compared where it is close."""
    for _ in range(times):
        trials = -(-trials // eta)
    return trials


def cost(trials: int, rungs: Sequence[int], eta: int) -> int:
    """Steps of all trials together."""
    before = [0, *rungs]
    return sum(kept(trials, eta, i) * (steps - before[i]) for i, steps in enumerate(rungs))


def grid(
    learning_rate: float,
    epsilon: float,
    learning_rates: Sequence[float] | None = None,
    epsilons: Sequence[float] | None = None,
    *,
    larger: bool = False,
) -> tuple[Trial, ...]:
    """All pairs, by epsilon and then by learning rate.

    Args:
        learning_rate, epsilon: the configuration's; the default grid lies around them.
        learning_rates, epsilons: what to try instead.
        larger: the second epsilon of the default grid is the larger one.

    Raises:
        ConfigError: a value is not positive or is given twice, or there are fewer than two trials.
    """
    rates = _values(learning_rates, "--learning-rates") or tuple(_rounded(learning_rate * f) for f in LEARNING_RATES)
    distances = _values(epsilons, "--epsilons") or (epsilon, _rounded(epsilon * (LARGER if larger else SMALLER)))
    if not learning_rate and learning_rates is None:
        raise ConfigError(
            "The configuration's learning_rate is 0, so there is nothing to lay a grid around.",
            where="learning_rate",
            advice="Give one, or say --learning-rates 0.03,0.1,0.3.",
        )
    trials = tuple(Trial(rate, distance) for distance in sorted(distances) for rate in sorted(rates))
    if len(trials) < 2:
        raise ConfigError(
            "One trial is nothing to choose from.",
            where="--learning-rates",
            advice="Give two or more, as in 0.03,0.1.",
        )
    return trials


def make_plan(trials: Sequence[Trial], longest: int, rungs: int, eta: int) -> Plan:
    """Rungs of `longest / eta^i` steps, the last one of `longest`.

    Raises:
        ConfigError: there are fewer steps than the rungs need, or more rungs than the trials allow.
    """
    if eta < 2 or rungs < 1:
        what = f"eta is {eta}, it must be at least 2" if eta < 2 else f"There must be a rung, not {rungs}"
        raise ConfigError(f"{what}.", where="--eta" if eta < 2 else "--rungs", advice="Leave it out for the default.")
    if rungs > 1 and kept(len(trials), eta, rungs - 1) < 2 and kept(len(trials), eta, rungs - 2) < 2:
        raise ConfigError(
            f"{len(trials)} trials, of which one in {eta} goes on, are down to one before the last of {rungs} rungs.",
            where="--rungs",
            advice="Use fewer rungs, a smaller eta or more trials.",
        )
    steps = _rung_steps(longest, rungs, eta)
    if any(a >= b for a, b in pairwise(steps)) or steps[0] < 1:
        raise ConfigError(
            f"{longest} steps are too few for {rungs} rungs that grow by {eta}: they would end at {list(steps)}.",
            where="--steps",
            advice=f"Give at least {eta ** (rungs - 1)} steps or a larger --budget, or fewer rungs.",
        )
    return Plan(tuple(trials), steps, eta)


def longest_within(budget: int, trials: int, rungs: int, eta: int) -> int:
    """The most steps the last rung can have, for a study of at most `budget` steps; 0 if there are none."""
    low, high = 0, budget
    while low < high:
        middle = (low + high + 1) // 2
        if cost(trials, _rung_steps(middle, rungs, eta), eta) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _rung_steps(longest: int, rungs: int, eta: int) -> tuple[int, ...]:
    return tuple(-(-longest // eta**i) for i in reversed(range(rungs)))


def _values(given: Sequence[float] | None, option: str) -> tuple[float, ...]:
    for value in given or ():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{value:g} is not a positive number.", where=option, advice="Write it as in 0.03,0.1.")
        if sum(f"{value:g}" == f"{other:g}" for other in given or ()) > 1:
            raise ConfigError(f"{value:g} is given twice.", where=option, advice="Give each value once.")
    return tuple(given or ())


def _rounded(value: float) -> float:
    # As a person would write it: 3e-07 and not 2.9999999999999997e-07.
    return float(f"{value:.6g}")
