"""A curve in a terminal: eight dots to a character, as the braille patterns of Unicode have them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the four rows and two columns of a character, from the top left."""

_MARGIN = 10
"""Characters of a number beside the curve."""


def draw(points: Sequence[tuple[float, float]], width: int, height: int) -> list[str]:
    """A curve through (x, y) points as lines of text, with its least and greatest values beside and below it.

    Args:
        points: in the order of x; all finite.
        width, height: characters there are for all of it; at least 20 and 3.
    """
    columns, rows = width - _MARGIN - 2, height - 1
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, low, high = xs[0], min(ys), max(ys)
    dots = [
        (_place(x - left, xs[-1] - left, 2 * columns), _place(high - y, high - low, 4 * rows, flat=2 * rows))
        for x, y in points
    ]
    cells = [[0] * columns for _ in range(rows)]
    for x, y in _connected(dots):
        cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    labels = {0: high, rows - 1: low} if high > low else {(2 * rows) // 4: high}
    lines = []
    for row, line in enumerate(cells):
        label = f"{labels[row]:.4f}"[:_MARGIN] if row in labels else ""
        lines.append(f"{label:>{_MARGIN}} │" + "".join(chr(0x2800 + bits) for bits in line))
    first, last = f"{xs[0] + 1:.0f}", f"{xs[-1] + 1:.0f}"
    room = columns - len(first)
    below = f"{first}{last:>{room}}" if first != last and len(last) < room else last
    return [*lines, (" " * _MARGIN + " └" + below)[:width]]


def _place(distance: float, whole: float, dots: int, flat: int = 0) -> int:
    """Which of so many dots a distance falls on; `flat` where there is no extent."""
    return min(dots - 1, round(distance / whole * (dots - 1))) if whole > 0 else flat


def _connected(dots: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """The dots of the straight lines from each dot to the next."""
    found = set(dots)
    for (x0, y0), (x1, y1) in pairwise(dots):
        many = max(abs(x1 - x0), abs(y1 - y0), 1)
        found |= {(x0 + round(i * (x1 - x0) / many), y0 + round(i * (y1 - y0) / many)) for i in range(many + 1)}
    return found
