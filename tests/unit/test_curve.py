"""Curves of bounded length, and how they are drawn in a terminal."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.curve import Curve
from launch.watching.braille import draw

VALUES = st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=1, max_size=300)


@given(VALUES, st.sampled_from([2, 4, 8]))
def test_a_curve_keeps_the_mean_of_everything_in_few_points(values: list[float], limit: int) -> None:
    curve = Curve.of(enumerate(values), limit)
    points = curve.points
    assert len(points) <= limit and curve.width < 2 * max(1, len(values))
    expected = []
    for start in range(0, len(values), curve.width):
        stretch = [(i, v) for i, v in enumerate(values[start : start + curve.width], start) if math.isfinite(v)]
        if stretch:
            expected.append(tuple(math.fsum(each) / len(stretch) for each in zip(*stretch, strict=True)))
    assert len(points) == len(expected)
    for point, mean in zip(points, expected, strict=True):
        assert point == pytest.approx(mean, abs=1e-9)


def test_a_short_curve_is_the_values_themselves() -> None:
    assert Curve.of([(0, 2.0), (1, math.inf), (2, 1.0)]).points == ((0.0, 2.0), (2.0, 1.0))
    assert Curve.of([]).points == ()


def test_a_run_that_is_resumed_begins_anywhere() -> None:
    curve = Curve.of([(1000, 5.0)], limit=8)
    assert curve.width == 128 and curve.points == ((1000.0, 5.0),)


POINTS = st.lists(
    st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6)), min_size=1, max_size=128, unique_by=lambda p: p[0]
)


@given(POINTS, st.integers(20, 120), st.integers(3, 20))
def test_a_drawing_fills_its_box(points: list[tuple[float, float]], width: int, height: int) -> None:
    lines = draw(sorted(points), width, height)
    assert len(lines) == height and all(len(line) <= width for line in lines)
    columns = list(zip(*(line[12:] for line in lines[:-1]), strict=True))
    touched = [any(cell != "\u2800" for cell in column) for column in columns]
    # One point is a dot, more are a line from the first column to the last.
    assert all(touched) if len(points) > 1 else sum(touched) == 1


def dots(line: str) -> list[bool]:
    return [cell != "\u2800" for cell in line[12:]]


def test_a_falling_loss_falls() -> None:
    lines = draw([(0, 4.0), (99, 2.0)], 40, 6)
    assert dots(lines[0])[0] and not dots(lines[0])[-1]
    assert dots(lines[-2])[-1] and not dots(lines[-2])[0]
    assert "4.0000" in lines[0] and "2.0000" in lines[-2]
    # Steps as people count them.
    assert lines[-1].split("└")[1].split() == ["1", "100"]


def test_a_level_curve_has_one_number() -> None:
    lines = draw([(0, 3.0), (9, 3.0)], 40, 5)
    assert sum("3.0000" in line for line in lines) == 1 and any(all(dots(line)) for line in lines[:-1])
