from __future__ import annotations

import itertools
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit.test_architectures import MODELS
from zoray.errors import ConfigError
from zoray.replica import Replica
from zoray.selection import Rotation, SmallWeights, divide, magnitude_limit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Holder(nn.Module):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)


def limit_of(values: torch.Tensor, sparsity: float) -> float | None:
    memory = Replica(Holder(values)).memory
    (shard,) = memory.shards()
    return magnitude_limit(shard, memory, sparsity)


@given(
    dtype=st.sampled_from(DTYPES),
    values=st.lists(
        st.floats(-1e4, 1e4, width=16) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 6e-8, 65504.0]), min_size=1, max_size=80
    ),
    sparsity=st.floats(0.01, 0.99),
)
@settings(max_examples=300)
def test_the_limit_is_an_order_statistic(dtype: torch.dtype, values: list[float], sparsity: float) -> None:
    tensor = torch.tensor(values).to(dtype)
    magnitudes = tensor.abs().float().sort().values
    expected = float(magnitudes[len(values) - floor(sparsity * len(values)) - 1])
    none = expected == 0 or expected == float(magnitudes[-1])
    assert limit_of(tensor, sparsity) == (None if none else expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_limit_of_many_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(200_000) * 0.02).to(dtype)
    limit = limit_of(tensor, 0.75)
    assert limit == float(tensor.abs().float().kthvalue(50_000).values)
    assert abs(int((tensor.abs() <= limit).sum()) / 200_000 - 0.25) < 0.01


@pytest.mark.parametrize("values", [torch.zeros(9), torch.ones(9), -torch.ones(9), torch.tensor([0.0, 0, 0, 0, 5])])
def test_what_tells_no_small_weights_from_large_ones_is_no_limit(values: torch.Tensor) -> None:
    assert limit_of(values, 0.5) is None


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 1.5])
def test_a_share_out_of_range(sparsity: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Replica(nn.Linear(9, 9), selection=SmallWeights(sparsity))


@given(sizes=st.lists(st.integers(1, 50), min_size=2, max_size=9), data=st.data())
@settings(max_examples=200)
def test_the_largest_part_is_as_small_as_can_be(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    numbers = divide(sizes, count)
    assert numbers == sorted(numbers) and set(numbers) == set(range(count))
    largest = max(sum(s for s, n in zip(sizes, numbers, strict=True) if n == part) for part in range(count))
    best = sum(sizes)
    for cuts in itertools.combinations(range(1, len(sizes)), count - 1):
        edges = [0, *cuts, len(sizes)]
        best = min(best, max(sum(sizes[a:b]) for a, b in itertools.pairwise(edges)))
    assert largest == best


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "mixtral"])
def test_blocks_are_of_whole_layers_in_the_order_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name][0]()
    coverage = Replica(model, selection=Rotation(3, 5)).directions.coverage
    assert (coverage.count, coverage.steps) == (3, 5)
    order = [coverage.groups[n] for n, _ in model.named_parameters()]
    assert order == sorted(order) and set(order) == {0, 1, 2}
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.count(".") <= 2]
    for layer in layers:
        for child, _ in model.get_submodule(layer).named_children():
            inside = {g for n, g in coverage.groups.items() if n.startswith(f"{layer}.{child}.")}
            assert len(inside) == 1, (layer, child)


def test_a_turn_comes_round() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    replica = Replica(model, selection=Rotation(3, 2))
    coverage = replica.directions.coverage
    turns = [[s for s in range(14) if coverage.touches(coverage.group(spec), s)] for spec in replica.layout.specs]
    assert turns == [[0, 1, 6, 7, 12, 13]] * 2 + [[2, 3, 8, 9]] * 2 + [[4, 5, 10, 11]] * 2


@pytest.mark.parametrize(
    ("blocks", "steps", "said"), [(4, 1, "3 layers, which do not make 4"), (1, 1, "cannot take"), (2, 0, "cannot take")]
)
def test_blocks_that_cannot_be(blocks: int, steps: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Replica(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), selection=Rotation(blocks, steps))
