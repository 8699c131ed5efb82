from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoray.aggregate import Aggregate, ProbeResult, aggregate, commit
from zoray.commits import float32
from zoray.errors import NumericsError, ZorayError

PREVIOUS = bytes(range(32))
finite = st.floats(-1e30, 1e30)


def grid(gradients: list[list[float]], losses: list[list[float]] | None = None, step: int = 3) -> list[ProbeResult]:
    """Results with the projected gradients [direction][microbatch]."""
    return [
        ProbeResult(step, k, m, gradient, losses[k][m] if losses else 2.0)
        for k, row in enumerate(gradients)
        for m, gradient in enumerate(row)
    ]


def decide(
    results: list[ProbeResult], directions: int, microbatches: int = 1, rate: float = 0.5, **more: float
) -> Aggregate:
    return aggregate(
        3,
        results,
        directions=directions,
        microbatches=microbatches,
        learning_rate=rate,
        previous=PREVIOUS,
        **more,  # type: ignore[arg-type]
    )


def coefficients(decided: Aggregate) -> list[int]:
    return [coefficient for _, _, coefficient in decided.commit.terms]


def test_quantisation_rounds_half_to_even() -> None:
    decided = decide(grid([[127.0], [0.5], [1.5], [2.5], [-0.5], [-1.5]]), 6)
    assert decided.scale == 1.0
    assert coefficients(decided) == [127, 0, 2, 2, 0, -2]
    assert decided.commit.eta == float32(0.5 * 1.0 / 6)
    assert decided.commit.decay == 1.0
    assert [term[:2] for term in decided.commit.terms] == [(3, k) for k in range(6)]
    assert decided.commit.previous == PREVIOUS


@given(st.lists(finite, min_size=1, max_size=40))
def test_the_commit_is_the_estimate_within_half_a_scale(gradients: list[float]) -> None:
    decided = decide(grid([[g] for g in gradients]), len(gradients))
    values = coefficients(decided)
    assert all(abs(value) <= 127 for value in values)
    if decided.scale:
        assert max(map(abs, values)) == 127
        for gradient, value in zip(gradients, values, strict=True):
            assert abs(gradient - decided.scale * value) <= 0.5000001 * decided.scale
    else:
        assert not any(values) and max(map(abs, gradients)) < 1e-300


@given(st.lists(st.floats(), min_size=1, max_size=8))
def test_no_scalar_whatever_breaks_the_coordinator(gradients: list[float]) -> None:
    decided = decide(grid([[g] for g in gradients]), len(gradients), rate=1e-300)
    assert all(abs(value) <= 127 for value in coefficients(decided))
    assert decided.nonfinite == sum(not math.isfinite(g) for g in gradients)
    assert decided.commit.applied == any(map(math.isfinite, gradients))


@given(st.integers(1, 6), st.integers(1, 4), st.randoms(use_true_random=False), st.data())
def test_the_order_of_arrival_does_not_matter(k: int, m: int, shuffler: random.Random, data: st.DataObject) -> None:
    numbers = st.lists(st.lists(st.floats(width=32), min_size=m, max_size=m), min_size=k, max_size=k)
    results = grid(data.draw(numbers), data.draw(numbers))
    straight = decide(results, k, m, rate=1e-6)
    shuffler.shuffle(results)
    assert decide(results, k, m, rate=1e-6).commit.encode() == straight.commit.encode()


def test_microbatches_are_averaged_in_float64_in_their_order() -> None:
    decided = decide(grid([[1e16, 1.0, -1e16, 1.0], [0.1, 0.2, 0.3, 0.4]]), 2, 4)
    assert decided.projected_gradients == ((1e16 + 1.0 - 1e16 + 1.0) / 4, (0.1 + 0.2 + 0.3 + 0.4) / 4)


def test_the_mean_is_not_the_compensated_sum_of_newer_pythons() -> None:
    values = [0.1] * 10
    total = 0.0
    for value in values:
        total += value
    assert total != math.fsum(values)
    assert decide(grid([values]), 1, 10).projected_gradients == (total / 10,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_not_finite_is_left_out_and_counted(bad: float) -> None:
    decided = decide(grid([[4.0, 4.0], [bad, 1.0], [2.0, 2.0]], [[1.0, 3.0], [50.0, 60.0], [5.0, 7.0]]), 3, 2)
    assert coefficients(decided) == [127, 0, 64]
    assert decided.nonfinite == 1
    assert decided.commit.loss == 4.0
    assert math.isnan(decided.projected_gradients[1])
    assert decided.commit.eta == float32(0.5 * (4.0 / 127) / 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_its_direction_out(bad: float) -> None:
    decided = decide(grid([[4.0], [4.0]], [[bad], [1.0]]), 2)
    assert (coefficients(decided), decided.nonfinite, decided.commit.loss) == ([0, 127], 1, 1.0)


def test_a_step_without_a_finite_probe_is_a_null_commit() -> None:
    decided = decide(grid([[math.nan], [math.inf]]), 2, weight_decay=0.1)
    assert not decided.commit.applied
    assert (decided.commit.eta, decided.commit.decay, coefficients(decided)) == (0.0, 1.0, [0, 0])
    assert math.isnan(decided.commit.loss)
    assert decided.nonfinite == 2


def test_gradients_of_zero_still_decay_the_weights() -> None:
    decided = decide(grid([[0.0], [-0.0]]), 2, weight_decay=0.1)
    assert (decided.commit.eta, decided.commit.decay) == (0.0, float32(1 - 0.5 * 0.1))
    assert coefficients(decided) == [0, 0]
    assert decided.commit.applied and decided.nonfinite == 0


def test_gradients_of_zero_are_no_failure_even_without_decay() -> None:
    assert decide(grid([[0.0]]), 1).commit.applied


def test_clipping_bounds_the_mean_and_is_counted() -> None:
    decided = decide(grid([[300.0, 100.0], [-900.0, -900.0], [40.0, 40.0]]), 3, 2, max_projected_gradient=100.0)
    assert coefficients(decided) == [127, -127, 51]
    assert decided.clipped == 2
    assert decided.scale == 100.0 / 127
    assert decided.projected_gradients == (200.0, -900.0, 40.0)


def test_a_gradient_at_the_bound_is_not_clipped() -> None:
    assert decide(grid([[100.0]]), 1, max_projected_gradient=100.0).clipped == 0


@pytest.mark.parametrize("tiny", [5e-324, 1e-322, 1e-310])
def test_gradients_below_the_normal_numbers_count_as_zero(tiny: float) -> None:
    decided = decide(grid([[tiny], [-tiny]]), 2)
    assert (coefficients(decided), decided.scale, decided.commit.eta) == ([0, 0], 0.0, 0.0)


def test_a_mean_that_overflows_is_not_finite() -> None:
    decided = decide(grid([[1.7e308, 1.7e308], [1.0, 1.0]]), 2, 2)
    assert (decided.nonfinite, coefficients(decided)) == (1, [0, 127])


def test_an_update_too_large_for_float32_is_refused_with_advice() -> None:
    with pytest.raises(NumericsError, match="max_projected_gradient"):
        decide(grid([[1e300]]), 1)
    with pytest.raises(NumericsError):
        decide(grid([[1.0]]), 1, weight_decay=1e300)


@pytest.mark.parametrize(
    "results",
    [
        [],
        grid([[1.0]]),  # one of two missing
        grid([[1.0], [1.0], [1.0]]),  # one too many
        [*grid([[1.0], [1.0]]), ProbeResult(3, 0, 0, 1.0, 1.0)],  # one twice
        grid([[1.0], [1.0]], step=4),  # of another step
        [*grid([[1.0]]), ProbeResult(3, -1, 0, 1.0, 1.0)],
    ],
)
def test_results_that_are_not_the_probes_of_the_step_are_refused(results: list[ProbeResult]) -> None:
    with pytest.raises(ZorayError, match=r"step 3|step 4"):
        decide(results, 2)


def test_the_convenience_for_scripts_infers_the_grid() -> None:
    results = grid([[4.0, 2.0], [1.0, -1.0], [2.0, 2.0]])
    made = commit(3, reversed(results), learning_rate=0.5, weight_decay=0.1, max_projected_gradient=2.0)
    same = aggregate(
        3,
        results,
        directions=3,
        microbatches=2,
        learning_rate=0.5,
        weight_decay=0.1,
        max_projected_gradient=2.0,
        previous=bytes(32),
    )
    assert made == same.commit
    with pytest.raises(ZorayError, match="no probes"):
        commit(3, [], learning_rate=0.5)
    with pytest.raises(ZorayError):
        commit(3, results[:-1], learning_rate=0.5)


@given(st.lists(st.floats(-10, 10).filter(lambda x: abs(x) > 1e-3), min_size=4, max_size=12), st.randoms())
def test_a_step_on_a_quadratic_goes_downhill(theta: list[float], randomness: random.Random) -> None:
    directions = [[randomness.choice((-1.0, 1.0)) for _ in theta] for _ in range(8)]
    gradients = [[sum(t * z for t, z in zip(theta, direction, strict=True))] for direction in directions]
    if max(abs(row[0]) for row in gradients) < 1e-3:
        return
    made = decide(grid(gradients), 8, rate=1e-3).commit
    moved = list(theta)
    for _, k, coefficient in made.terms:
        moved = [t - made.eta * coefficient * z for t, z in zip(moved, directions[k], strict=True)]
    assert sum(t * t for t in moved) < sum(t * t for t in theta)
