from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoray.errors import ConfigError, ModelError
from zoray.layout import BLOCK_BYTES, make_layout, matrix_view

SHAPES = st.lists(st.integers(1, 12), min_size=0, max_size=4).map(tuple)


@given(SHAPES)
def test_matrix_view_is_the_most_nearly_square_grouping(shape: tuple[int, ...]) -> None:
    rows, cols = matrix_view(shape)
    assert rows * cols == math.prod(shape)
    for split in range(len(shape) + 1):
        assert rows + cols <= math.prod(shape[:split]) + math.prod(shape[split:])


@given(st.lists(SHAPES, min_size=1, max_size=8), st.integers(1, 4), st.sampled_from(["rank", "rademacher", "gaussian"]))
def test_ranges_are_aligned_and_do_not_overlap(shapes: list[tuple[int, ...]], rank: int, kind: str) -> None:
    layout = make_layout({f"p{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}, kind, rank)
    position = 0
    for spec in layout.specs:
        assert spec.offset == position and spec.offset % BLOCK_BYTES == 0
        needed = spec.rank * (spec.rows + spec.cols) if spec.rank else spec.cols
        assert 8 * (spec.end - spec.offset) >= needed
        position = spec.end
    assert layout.total_bytes == position
    assert layout.numel == sum(math.prod(shape) for shape in shapes)


def test_identity_sees_names_shapes_dtypes_kind_and_rank() -> None:
    base = {"a": torch.zeros(40, 30), "b": torch.zeros(7)}
    identities = {
        make_layout(base).identity,
        make_layout({"a": base["a"], "c": base["b"]}).identity,
        make_layout({"a": base["a"].t(), "b": base["b"]}).identity,
        make_layout({"a": base["a"].bfloat16(), "b": base["b"]}).identity,
        make_layout(base, rank=2).identity,
        make_layout(base, "rademacher").identity,
    }
    assert len(identities) == 6
    assert make_layout(dict(reversed(base.items()))).identity in identities


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(ModelError, match="no trainable"):
        make_layout({})
    with pytest.raises(ModelError, match="float64"):
        make_layout({"w": torch.zeros(3, dtype=torch.float64)})
    with pytest.raises(ConfigError, match="rank"):
        make_layout({"w": torch.zeros(3, 3)}, rank=0)
