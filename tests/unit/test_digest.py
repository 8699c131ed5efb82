from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoray.digest import digest, tensor_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def some(dtype: torch.dtype, count: int = 37) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(0, 200, (count,), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_is_seen(dtype: torch.dtype) -> None:
    values = some(dtype)
    raw = values.view(torch.uint8)
    expected = tensor_digest("w", values)
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert tensor_digest("w", values) != expected, (byte, bit)
            raw[byte] ^= 1 << bit
    assert tensor_digest("w", values) == expected


@given(st.lists(st.integers(0, 37), max_size=5), st.sampled_from(DTYPES))
def test_the_digests_of_shards_add_up(cuts: list[int], dtype: torch.dtype) -> None:
    values = some(dtype)
    borders = sorted({0, 37, *cuts})
    parts = (tensor_digest("w", values[a:b], a) for a, b in itertools.pairwise(borders))
    assert sum(parts) % 2**64 == tensor_digest("w", values)


def test_a_tensor_longer_than_a_chunk() -> None:
    values = torch.randn((1 << 20) + 5)
    whole = tensor_digest("w", values)
    assert (tensor_digest("w", values[:99]) + tensor_digest("w", values[99:], 99)) % 2**64 == whole


def test_place_and_name_count() -> None:
    values = torch.arange(10.0)
    swapped = values[[1, 0, *range(2, 10)]]
    digests = {tensor_digest("w", values), tensor_digest("w", swapped), tensor_digest("v", values)}
    assert len(digests) == 3
    assert digest([("a", values), ("b", swapped)]) == digest([("b", swapped), ("a", values)])
    assert digest([("a", values), ("b", swapped)]) != digest([("a", swapped), ("b", values)])
    assert tensor_digest("w", torch.tensor([0.0])) != tensor_digest("w", torch.tensor([-0.0]))
