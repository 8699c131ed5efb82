"""The optimizers: against torch's where torch has one, and what must hold of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from zoray.aggregate import Aggregate, ProbeResult, aggregate
from zoray.aggregate import commit as committed
from zoray.commits import Commit, float32
from zoray.errors import ConfigError, LedgerError, NumericsError, ZorayError
from zoray.optim import SGD, Optimizer, Width
from zoray.optim.brake import RELEASED, BrakeState, watched
from zoray.optim.curvature import CurvatureState, added, cautious
from zoray.optim.noise import ASSUMED, LEAST, UNTOLD, heard
from zoray.optim.optimizer import FORGOTTEN, OptimizerState
from zoray.optim.shaping import SHAPINGS, shaped
from zoray.optim.width import CLEAR, NOISY, WidthState, disagreement, share_of_noise

RATE = 0.25
CURVED = Optimizer(normalize="curvature")
finite = st.floats(-1e6, 1e6, width=32)
gradient_lists = st.lists(finite, min_size=2, max_size=9)
optimizers = st.builds(
    lambda shaping, normalize, momentum, nesterov, width: Optimizer(
        shaping=shaping,
        normalize=normalize if shaping in ("none", "centered", "guided") else "none",
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        width=Width(3, 11) if width else None,
    ),
    st.sampled_from(SHAPINGS),
    st.sampled_from(["none", "loss_deviation", "second_moment", "curvature"]),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.booleans(),
    st.booleans(),
)


def decide(
    optimizer: Optimizer, state: Any, step: int, rows: Sequence[Sequence[float]], previous: bytes = bytes(32)
) -> Aggregate:
    """The commit of a step whose directions gave `rows`, one projected gradient for each microbatch."""
    addressed = [(k, m, g) for k, row in enumerate(rows) for m, g in enumerate(row)]
    results = [ProbeResult(step, k, m, float32(g), 1.0, 5.0 + step) for k, m, g in addressed]
    return aggregate(
        step, results, directions=len(rows), microbatches=len(rows[0]), learning_rate=RATE, previous=previous,
        optimizer=optimizer, state=state,
    )  # fmt: skip


def by_halves(optimizer: Optimizer, state: Any, step: int, rows: Sequence[Sequence[float]]) -> Aggregate:
    """The same where the two gradients of a direction are those of the two halves of one batch."""
    results = [
        ProbeResult(step, k, 0, float32((one + other) / 2), 1.0, 5.0 + step, float32((one - other) / 2))
        for k, (one, other) in enumerate(rows)
    ]
    return aggregate(
        step, results, directions=len(rows), microbatches=1, learning_rate=RATE, previous=bytes(32),
        optimizer=optimizer, state=state,
    )  # fmt: skip


def run(optimizer: Optimizer, steps: Sequence[Sequence[float]]) -> list[Commit]:
    """Commits of steps whose directions gave these projected gradients."""
    state, commits = optimizer.initial(), []
    for step, gradients in enumerate(steps):
        commits.append(decide(optimizer, state, step, [[g] for g in gradients]).commit)
        state = optimizer.after(state, commits[-1])
    return commits


def moves(commits: Sequence[Commit]) -> dict[tuple[int, int], float]:
    """How far the weights have gone along each direction."""
    total: dict[tuple[int, int], float] = {}
    for commit in commits:
        for step, index, c in commit.terms:
            total[step, index] = total.get((step, index), 0.0) - commit.eta * c
    return total


@given(gradient_lists)
def test_sgd_is_the_mean_of_the_estimates(gradients: list[float]) -> None:
    (commit,) = run(SGD, [gradients])
    assert commit.notes == () and commit.encode()[28] == 0
    # Below the normal numbers of float32, eta is a multiple of 2^-149.
    error = RATE / len(gradients) * max(map(abs, gradients)) / 127 + 127 * 2.0**-149
    for k, gradient in enumerate(gradients):
        assert moves([commit])[0, k] == pytest.approx(-RATE * gradient / len(gradients), abs=error)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.3, 0.9])
def test_momentum_is_that_of_torch(momentum: float, nesterov: bool) -> None:
    """Each direction is a coordinate of its own: torch's SGD on all of them has to go the same way."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(12, 4, generator=generator)
    weights = torch.zeros(12, 4, requires_grad=True)
    reference = torch.optim.SGD([weights], lr=RATE / 4, momentum=momentum, nesterov=nesterov)
    for step in range(12):
        weights.grad = torch.zeros(12, 4)
        weights.grad[step] = steps[step]
        reference.step()
    optimizer = Optimizer(momentum=momentum, nesterov=nesterov, momentum_window=12)
    commits = run(optimizer, steps.tolist())
    found = torch.tensor([[moves(commits)[s, k] for k in range(4)] for s in range(12)])
    # A coefficient is within half a step of 127 of the largest, for each of the 12 commits.
    assert torch.allclose(found, weights.detach(), atol=12 * RATE / 4 * 4 / 127)


def test_small_coefficients_do_not_break_a_record_into_too_many_runs() -> None:
    """A step is one run of indices or none, however many of its directions have come to count for nothing."""
    generator = torch.Generator().manual_seed(0)
    commits = run(Optimizer(momentum=0.9), torch.randn(40, 128, generator=generator).tolist())
    assert all(any(c == 0 for s, _, c in commits[-1].terms if s == step) for step in (20, 25))
    for commit in commits:
        assert len({step for step, *_ in commit.terms}) * 128 == len(commit.terms)


def test_momentum_reaches_back_to_what_weighs_five_per_cent() -> None:
    for momentum in (0.3, 0.5, 0.9, 0.95):
        window = Optimizer(momentum=momentum).window
        assert momentum ** (window - 1) >= FORGOTTEN > momentum**window
    commits = run(Optimizer(momentum=0.5), [[1.0, -1.0]] * 9)
    assert {step for step, *_ in commits[-1].terms} == {8, 7, 6, 5, 4}


def test_steps_of_other_widths_keep_their_own_mean() -> None:
    optimizer = Optimizer(momentum=0.5, momentum_window=2)
    commits = run(optimizer, [[1.0, 1.0], [1.0]])
    went = moves(commits)
    assert went[0, 0] == pytest.approx(-RATE / 2 * 1.5, rel=0.01)
    assert went[1, 0] == pytest.approx(-RATE, rel=0.01)


@given(gradient_lists, st.floats(1e-3, 1e3))
def test_normalised_steps_do_not_depend_on_the_scale_of_the_loss(gradients: list[float], factor: float) -> None:
    largest = max(map(abs, gradients))
    # Else float32 has too few digits for what they differ by.
    assume(largest >= 1e-3 and max(gradients) - min(gradients) >= 0.01 * largest)
    for normalize in ("loss_deviation", "second_moment"):
        optimizer = Optimizer(normalize=normalize)  # type: ignore[arg-type]
        state = optimizer.initial()
        first = decide(optimizer, state, 0, [[g] for g in gradients])
        other = decide(optimizer, state, 0, [[g * factor] for g in gradients])
        assert other.commit.eta == pytest.approx(first.commit.eta, rel=1e-4)


def test_second_moment_is_adams_with_one_number() -> None:
    optimizer = Optimizer(normalize="second_moment", beta2=0.9)
    steps = [[3.0, -1.0], [0.5, 0.25], [8.0, 8.0]]
    moment = 0.0
    for step, (commit, gradients) in enumerate(zip(run(optimizer, steps), steps, strict=True)):
        moment = 0.9 * moment + 0.1 * sum(g * g for g in gradients) / 2
        expected = max(map(abs, gradients)) / math.sqrt(moment / (1 - 0.9 ** (step + 1)))
        assert commit.eta * 127 * 2 / RATE == pytest.approx(expected, rel=1e-5)
        assert commit.notes == (float32(commit.notes[0]), step + 1)


def test_loss_deviation_is_fzoos() -> None:
    """eta / (N sigma) sum (l_i - l_0) u_i, with sigma of the losses: the epsilon of both cancels."""
    epsilon, losses = 1e-3, [2.5, 2.0, 3.25, 2.25]
    baseline = 2.25
    sigma = torch.tensor(losses, dtype=torch.float64).std().item()
    gradients = [(loss - baseline) / epsilon for loss in losses]
    (commit,) = run(Optimizer(normalize="loss_deviation"), [gradients])
    for k, loss in enumerate(losses):
        assert moves([commit])[0, k] == pytest.approx(-RATE / 4 * (loss - baseline) / sigma, abs=RATE / 4 / 127 * 2)


@given(st.integers(1, 300), st.floats(0, 0.99))
def test_a_running_curvature_is_a_mean_and_its_error(count: int, beta: float) -> None:
    samples = torch.randn(count, generator=torch.Generator().manual_seed(count)).double() * 5 + 20
    state = CurvatureState()
    assert cautious(state, beta) == 0.0
    for sample in samples.tolist():
        state = added(state, sample, beta)
    weights = torch.tensor([beta ** (count - 1 - k) for k in range(count)], dtype=torch.float64)
    mean = (weights * samples).sum() / weights.sum()
    effective = weights.sum() ** 2 / weights.square().sum()
    error = ((weights * samples.square()).sum() / weights.sum() / effective).sqrt()
    assert cautious(state, beta) == pytest.approx(float(mean + error) * (1 + 10 / count), rel=1e-4)


def test_samples_of_the_curvature_that_say_nothing() -> None:
    state = added(CurvatureState(), -3.0, 0.9)
    # At a saddle the step is small, and never upside down.
    assert cautious(state, 0.9) == pytest.approx(33.0)
    for sample in (math.nan, math.inf, -math.inf, 1e30):
        assert added(state, sample, 0.9) == state


@pytest.mark.parametrize("shaping", ["none", "centered", "guided"])
@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("halves", [False, True])
def test_two_batches_or_two_halves_tell_how_much_is_signal(halves: bool, noise: float, shaping: Any) -> None:
    """The rate is the share of signal, in units of what is assumed where nothing tells."""
    generator = torch.Generator().manual_seed(1)
    optimizer = Optimizer(normalize="curvature", shaping=shaping)
    state, moved = optimizer.initial(), 0.0
    for step in range(200):
        slopes = torch.randn(16, 1, generator=generator) * 3 + (5.0 if shaping == "centered" else 0.0)
        rows = slopes + 3 * noise**0.5 * torch.randn(16, 2, generator=generator)
        decided = (by_halves if halves else decide)(optimizer, state, step, rows.tolist())
        state = optimizer.after(state, decided.commit)
        kept = Commit.decode(decided.commit.encode(), bytes(32))
        assert optimizer.restore([kept]).signal == state.signal != OptimizerState().signal
        moved = decided.commit.eta / RATE
    # What was assumed is worth 20 steps.
    expected = (200 / (1 + noise / 2) + 20 * ASSUMED) / 220
    assert state.signal.share == pytest.approx(expected, abs=0.05)
    alone = decide(optimizer, OptimizerState(curvature=state.curvature), 200, rows.mean(1, keepdim=True).tolist())
    assert moved / (alone.commit.eta / RATE) == pytest.approx(state.signal.share / ASSUMED, rel=0.1)


def test_steps_that_tell_nothing_of_the_signal() -> None:
    assert UNTOLD.share == ASSUMED == heard(UNTOLD, 1.0, math.nan).share == heard(UNTOLD, 0.0, 0.0).share
    once = heard(UNTOLD, 1.0, 0.0)
    assert ASSUMED < once.share < 0.2
    assert heard(once, 1.0, math.inf) == once and heard(UNTOLD, 1e39, 0.0) == UNTOLD
    for _ in range(4):
        once = heard(once, 1.0, 100.0)
    assert once.share == LEAST


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_one_loud_step_does_not_say_what_is_signal(noise: float) -> None:
    """A batch that is an outlier may have a thousand times the square of others."""
    state = UNTOLD
    for _ in range(1000):
        state = heard(state, 1.0, 0.9)
    loud = heard(state, 1000.0, 1000.0 * noise)
    assert 0.4 < loud.share / state.share < 1.6
    for _ in range(200):
        loud = heard(loud, 1.0, 0.9)
    assert loud.share == pytest.approx(0.1, rel=0.4)


def test_a_loss_that_rises_halves_the_steps_and_chance_does_not() -> None:
    generator = torch.Generator().manual_seed(0)

    def factors(level: Callable[[int], float], steps: int) -> list[float]:
        noise = (0.1 * torch.randn(steps, generator=generator)).tolist()
        state, found = RELEASED, []
        for step in range(steps):
            state = watched(state, level(step) + noise[step])
            found.append(state.factor)
        return found

    for _ in range(20):
        assert factors(lambda step: 2.0, 5000)[-1] == 1
    assert factors(lambda step: 2.0 - step / 1000, 1000)[-1] == 1
    astray = factors(lambda step: 2.0 + max(0, step - 300) / 100, 2000)
    assert set(astray[:300]) == {1.0} and astray[360] < 1 and astray[-1] == 2.0**-10
    # A higher level that does not rise any more is a new one, whatever its height.
    for height in (0.2, 1.0, 10.0):
        assert factors(lambda step, height=height: 2.0 + height * (step > 300), 900)[-1] == 0.5  # type: ignore[misc]
    # The lowest is remembered: what was gained and is lost again counts too.
    assert factors(lambda step: 2.0 - min(step, 600 - step) / 300, 600)[-1] < 1
    # Without noise, rounding is no rise.
    state = RELEASED
    for step in range(200):
        state = watched(state, 2.0 + 1e-6 * (step % 7))
    assert state.factor == 1


def test_losses_that_say_nothing() -> None:
    state = watched(RELEASED, 2.0)
    assert state == BrakeState(recent=2.0, lowest=2.0, last=2.0, seen=1)
    for loss in (math.nan, math.inf, 1e30):
        assert watched(state, loss) == state


def test_a_run_whose_loss_has_risen_takes_shorter_steps() -> None:
    """Also after it was resumed."""
    state, etas = CURVED.initial(), []
    for step in range(200):
        results = [ProbeResult(step, k, 0, 1.0, 1.0 + step // 100, 1.0) for k in range(2)]
        decided = committed(step, results, learning_rate=1, optimizer=CURVED, state=state)
        state = CURVED.after(state, Commit.decode(decided.encode(), bytes(32)))
        etas.append(decided.eta)
    assert state == CURVED.restore([decided]) and state.brake.factor < 1
    assert etas[-1] == pytest.approx(etas[99] * state.brake.factor, rel=0.1)


def test_a_commit_of_a_version_that_knew_less_is_refused() -> None:
    results = [ProbeResult(0, k, 0, 1.0, 1.0, 1.0) for k in range(2)]
    decided = committed(0, results, learning_rate=1, optimizer=CURVED)
    with pytest.raises(LedgerError, match="step 0 says less of the curvature"):
        CURVED.restore([replace(decided, notes=decided.notes[:5])])


def test_a_curvature_that_was_not_measured_is_missed() -> None:
    with pytest.raises(ZorayError, match=r"(?s)has not measured it.*curved=True"):
        committed(0, [ProbeResult(0, k, 0, 1.0, 1.0) for k in range(2)], learning_rate=1, optimizer=CURVED)
    # The first probe's is enough, and one that says nothing is not one that is missing.
    first = ProbeResult(0, 0, 0, 1.0, 1.0, math.nan)
    assert committed(0, [ProbeResult(0, 1, 0, 1.0, 1.0), first], learning_rate=1, optimizer=CURVED).eta == 0


def test_one_rate_descends_quadratics_of_any_curvature() -> None:
    """Plain SGD with one rate would stand still on the flat one or leave the steep one."""
    for sharpness in (1e-3, 1.0, 1e4):
        optimizer, size = CURVED, 40
        scales = sharpness * torch.linspace(0.1, 2, size, dtype=torch.float64)
        theta, state = torch.ones(size, dtype=torch.float64), optimizer.initial()
        generator = torch.Generator().manual_seed(0)
        for step in range(150):
            signs = torch.randint(0, 2, (4, size), generator=generator).double() * 2 - 1
            slopes, curvature = signs @ (scales * theta), float(scales @ signs[0].square())
            results = [ProbeResult(step, k, 0, float32(g), 1.0, curvature) for k, g in enumerate(slopes.tolist())]
            decided = aggregate(
                step, results, directions=4, microbatches=1, learning_rate=0.5, previous=bytes(32),
                optimizer=optimizer, state=state,
            ).commit  # fmt: skip
            state = optimizer.after(state, decided)
            theta -= decided.eta * sum(c * signs[k] for _, k, c in decided.terms)
        loss = float(scales @ theta.square() / scales.sum())
        assert loss < 0.05, sharpness


@given(gradient_lists)
def test_shapes(gradients: list[float]) -> None:
    count = len(gradients)
    assert shaped(gradients, "none") == gradients
    assert all(w == (g > 0) - (g < 0) for w, g in zip(shaped(gradients, "sign"), gradients, strict=True))
    assert sum(shaped(gradients, "centered")) == pytest.approx(0, abs=1e-9 * max(1, *map(abs, gradients)) * count)
    ranks, scores, guided = (shaped(gradients, kind) for kind in ("rank", "zscore", "guided"))  # type: ignore[arg-type]
    order = sorted(range(count), key=lambda k: gradients[k])
    for kind in (ranks, scores):
        assert all(kind[a] <= kind[b] for a, b in pairwise(order))
        assert sum(kind) == pytest.approx(0, abs=1e-6 * count)
    assert max(map(abs, ranks)) <= 0.5 and len(set(ranks)) == len(set(gradients))
    if len(set(gradients)) == count:
        assert sum(w > 0 for w in guided) == sum(w < 0 for w in guided) == max(1, count // 4)
        assert guided[order[0]] < 0 < guided[order[-1]]


def test_shapes_of_equal_gradients_do_nothing() -> None:
    for kind in ("centered", "zscore", "rank", "guided"):
        assert shaped([2.0, 2.0, 2.0], kind) == [0.0, 0.0, 0.0]  # type: ignore[arg-type]


@given(optimizers, st.lists(st.lists(finite, min_size=2, max_size=2), min_size=6, max_size=6), st.integers(0, 5))
def test_state_is_a_function_of_the_last_commits(optimizer: Optimizer, steps: list[list[float]], null: int) -> None:
    """A coordinator that resumes anywhere goes on as the one that never stopped, a null step in between or not."""
    state, commits = optimizer.initial(), []
    for step, row in enumerate(steps):
        rows = [[math.nan, math.nan] if step == null else row] * 3
        commits.append(decide(optimizer, state, step, rows).commit)
        again = Commit.decode(commits[-1].encode(), commits[-1].previous)
        assert again.encode() == commits[-1].encode() and repr(again) == repr(commits[-1])
        state = optimizer.after(state, again)
        late = optimizer.restore(commits[max(0, len(commits) - optimizer.reach) :])
        assert repr(late) == repr(state)
    assert commits[null].applied is False


@given(optimizers, gradient_lists, st.randoms())
def test_left_out_directions_do_not_count(optimizer: Optimizer, gradients: list[float], rng: Any) -> None:
    missing = rng.randrange(len(gradients))
    rows = [[math.nan if k == missing else g] for k, g in enumerate(gradients)]
    decided = decide(optimizer, optimizer.initial(), 0, rows)
    assert decided.nonfinite == 1 and decided.commit.terms[missing][2] == 0


def test_disagreement_is_the_share_of_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(4000, 1, generator=generator)
    noise = torch.randn(4000, 4, generator=generator)
    assert disagreement(slopes.expand(-1, 4).tolist()) == pytest.approx(0, abs=1e-9)
    assert disagreement(noise.tolist()) == pytest.approx(1, rel=0.1)
    # The mean of 4 has a variance of 1 of slopes and of 1/4 of noise.
    assert disagreement((slopes + noise).tolist()) == pytest.approx(0.2, rel=0.1)
    assert math.isnan(disagreement([[1.0], [2.0]])) and math.isnan(disagreement([[0.0, 0.0]]))


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=9))
def test_halves_of_a_batch_and_two_batches_have_the_same_noise(rows: list[tuple[float, float]]) -> None:
    gradients, contrasts = ([(one + sign * other) / 2 for one, other in rows] for sign in (1, -1))
    found, expected = share_of_noise(gradients, contrasts), disagreement(rows)
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_noise_that_is_not_told() -> None:
    assert all(math.isnan(share_of_noise([1.0, 2.0], [3.0, untold])) for untold in (None, math.nan, math.inf))
    assert math.isnan(share_of_noise([], [])) and math.isnan(share_of_noise([0.0], [1.0]))


def test_width_follows_the_noise() -> None:
    width = Width(4, 15)
    state = width.initial()
    seen = []
    for rho in (0.9, 0.9, 0.9, (NOISY + CLEAR) / 2, 0.0, 0.0, math.nan, 0.0):
        state = width.next(state, rho)
        seen.append(state.directions)
    assert seen == [8, 15, 15, 15, 15, 15, 15, 15]
    for _ in range(20):
        state = width.next(state, 0.0)
    assert state.directions == 4
    assert width.read(WidthState(8, 0.5).notes) == WidthState(8, 0.5)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"shaping": "signed"}, "shaping"),
        ({"normalize": "adam"}, "normalize"),
        ({"momentum": 1.0}, "momentum"),
        ({"beta2": -0.1}, "beta2"),
        ({"nesterov": True}, "nesterov"),
        ({"momentum_window": 3}, "momentum_window"),
        ({"shaping": "rank", "normalize": "second_moment"}, "normalize"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Optimizer(**options)
    assert caught.value.where == where and caught.value.advice


def test_nonsense_widths_are_refused() -> None:
    for least, most in ((0, 3), (4, 3), (1, 1 << 24)):
        with pytest.raises(ConfigError):
            Width(least, most)


def test_second_moment_that_overflows_ends_the_run() -> None:
    optimizer = Optimizer(normalize="second_moment")
    with pytest.raises(NumericsError, match="too large"):
        decide(optimizer, optimizer.initial(), 0, [[1e30], [1e30]])
