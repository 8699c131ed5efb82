from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.helpers import bits, commit_of, directions_for
from zoray import product
from zoray.directions import Directions
from zoray.inputs import LARGEST_MIXED
from zoray.product import integer_product
from zoray.rounding import rounding_key, stochastic_round
from zoray.update import Shard, apply_commits, whole

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [("rank", 1), ("rank", 4), ("inputs", 1), ("inputs", 4), ("rademacher", 1)]
SHAPES = {"matrix": (70, 33), "wide": (3, 301), "vector": (130,), "cube": (4, 9, 8), "scalar": ()}


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def coefficients(count: int, seed: int = 0) -> list[int]:
    values = np.random.default_rng(seed).integers(-127, 128, count)
    values[:2] = (127, -127)[: len(values[:2])]
    return [int(v) for v in values]


def reference(directions: Directions, tensors: dict[str, torch.Tensor], commits: list) -> dict[str, torch.Tensor]:
    """The definition, element by element: integers in int64, then separately rounded float32 operations."""
    out = {}
    for spec in directions.layout.specs:
        value = tensors[spec.name].float()
        for commit in commits:
            total = torch.zeros(spec.shape, dtype=torch.int64)
            for step, index, c in commit.terms:
                z = directions.dense((step, index), spec).double() / float(directions.scale(spec))
                total += c * z.round().long()
            eta = np.float32(commit.eta) * directions.scale(spec)
            delta = torch.from_numpy(np.asarray(np.float32(eta) * total.numpy().astype(np.float32)))
            if commit.decay != 1.0:
                value = torch.from_numpy(np.asarray(value.numpy() * np.float32(commit.decay)))
            value = torch.from_numpy(np.asarray(value.numpy() - delta.numpy()))
            dtype = tensors[spec.name].dtype
            if dtype != torch.float32:
                key = rounding_key(directions.run_seed, commit.step, spec.name)
                value = stochastic_round(value.contiguous(), dtype, key, 0).float()
        out[spec.name] = value.to(tensors[spec.name].dtype)
    return out


def apply(directions: Directions, tensors: dict[str, torch.Tensor], commits: list, **options: int) -> dict:
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    apply_commits(directions, whole(copies, directions), commits, **options)
    return copies


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name in left:
        assert torch.equal(bits(left[name]), bits(right[name])), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rank"), [("rank", 1), ("rank", 3), ("inputs", 1), ("inputs", 3), ("rademacher", 1)])
def test_the_update_is_its_definition(dtype: torch.dtype, kind: str, rank: int) -> None:
    tensors = weights(dtype)
    directions = directions_for(tensors, kind, rank, run_seed=11)
    commits = [
        commit_of(0, coefficients(5), eta=float(np.float32(1.1e-5))),
        commit_of(1, coefficients(1), eta=float(np.float32(3e-6)), decay=float(np.float32(0.999))),
        commit_of(2, [0, 0, 3], eta=float(np.float32(2e-4))),
    ]
    assert_same(apply(directions, tensors, commits), reference(directions, tensors, commits))


@pytest.mark.parametrize("kind", ["rank", "inputs"])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_any_number_of_terms_at_full_swing(count: int, kind: str) -> None:
    tensors = {"w": torch.randn(24, 40), "matrix": torch.randn(40, 24), "b": torch.randn(50)}
    directions = directions_for(tensors, kind)
    for values in ([127] * count, [-127] * count, coefficients(count)):
        commits = [commit_of(3, values, eta=float(np.float32(1e-7)))]
        assert_same(apply(directions, tensors, commits), reference(directions, tensors, commits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_four_thousand_terms_in_every_dtype_however_they_are_cut(dtype: torch.dtype, kind: str, rank: int) -> None:
    tensors = {"w": torch.randn(24, 20).to(dtype), "b": torch.randn(50).to(dtype)}
    directions = directions_for(tensors, kind, rank)
    commits = [commit_of(3, [127, -127] * 2 + coefficients(4092), eta=float(np.float32(1e-6)), decay=0.5)]
    found = apply(directions, tensors, commits)
    assert_same(found, reference(directions, tensors, commits))
    assert_same(found, apply(directions, tensors, commits, block_elements=70))


def test_the_largest_sum_is_still_exact() -> None:
    left = torch.full((2, product.MAX_TERMS), 127, dtype=torch.int8)
    for sign in (1, -1):
        found = integer_product(left, torch.full((product.MAX_TERMS, 3), sign, dtype=torch.int8))
        assert set(found.flatten().tolist()) == {sign * 127 * product.MAX_TERMS}
    assert 127 * product.MAX_TERMS < 2**24


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_the_largest_sum_of_mixed_factors_is_exact_too(dtype: torch.dtype) -> None:
    """It is no integer of float32, so it comes as int32."""
    if dtype == torch.int8 and not product.int8_product_is_exact():
        pytest.skip("this processor's int8 product saturates")
    terms = product.MAX_TERMS
    left = torch.full((2, terms), 127, dtype=dtype)
    for value in (LARGEST_MIXED, -LARGEST_MIXED):
        right = torch.full((terms, 3), value, dtype=dtype)
        found = integer_product(left, right, 127 * LARGEST_MIXED)
        assert found.dtype == torch.int32 and set(found.flatten().tolist()) == {127 * value * terms}


def test_sums_beyond_the_integers_of_float32_are_rounded_once() -> None:
    """With either product, and however they are cut."""
    tensors = {"w": torch.randn(24, 40), "matrix": torch.randn(40, 24)}
    directions = directions_for(tensors, "inputs")
    commit = commit_of(3, [127] * 6000, eta=float(np.float32(1e-7)))
    # All along one direction, so that nothing cancels.
    object.__setattr__(commit, "terms", ((3, 0, 127),) * 6000)
    expected = reference(directions, tensors, [commit])
    largest = max(float(directions.dense((3, 0), s).abs().max() / directions.scale(s)) for s in directions.layout.specs)
    assert 127 * 6000 * largest >= 2**24
    assert_same(apply(directions, tensors, [commit]), expected)
    assert_same(apply(directions, tensors, [commit], block_elements=1), expected)
    assert_same(apply(directions, tensors, [commit], block_elements=100), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [-0.0, -1e-45])
@pytest.mark.parametrize("kind", ["rank", "inputs"])
def test_negative_zeros_are_the_same_on_every_path(
    dtype: torch.dtype, kind: str, zero: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor of inputs may be 0, and then so is S, whose sign no product may tell: pruned weights are -0.0."""
    tensors = {name: torch.full(shape, zero, dtype=dtype) for name, shape in SHAPES.items()}
    directions = directions_for(tensors, kind)
    # In a group with the second, which has no direction, the first is no outer product; by itself it is one.
    # The first makes -0.0 of the smallest weights.
    commits = [commit_of(0, [], 0.0, 0.5), commit_of(1, [-3], 2.0**-9), commit_of(2, [], 0.0, 0.5)]
    found = []
    for product_dtype in (torch.float32, *([torch.int8] if product.int8_product_is_exact() else [])):
        monkeypatch.setattr("zoray.update.factor_dtype", lambda device, dtype=product_dtype: dtype)
        found.append(apply(directions, tensors, commits))
        found.append(apply(directions, tensors, commits, block_elements=7))
        alone = {name: tensor.clone() for name, tensor in tensors.items()}
        for commit in commits:
            apply_commits(directions, whole(alone, directions), [commit])
        found.append(alone)
    for each in found[1:]:
        assert_same(each, found[0])
    if kind == "inputs":
        assert any(bool((tensor == 0).any()) for tensor in found[0].values()), "or nothing is shown"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("threads")
def test_threads_do_not_matter(dtype: torch.dtype) -> None:
    tensors = {"w": torch.randn(700, 900).to(dtype)}
    directions = directions_for(tensors)
    commits = [commit_of(0, coefficients(48))]
    torch.set_num_threads(1)
    one = apply(directions, tensors, commits)
    torch.set_num_threads(2)
    assert_same(one, apply(directions, tensors, commits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_terms_does_not_matter(dtype: torch.dtype) -> None:
    tensors = weights(dtype)
    directions = directions_for(tensors)
    commit = commit_of(4, coefficients(33))
    shuffled = commit_of(4, coefficients(33))
    order = np.random.default_rng(1).permutation(33)
    object.__setattr__(shuffled, "terms", tuple(commit.terms[i] for i in order))
    assert_same(apply(directions, tensors, [commit]), apply(directions, tensors, [shuffled]))


@settings(max_examples=25)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 400),
    st.sampled_from(KINDS),
)
def test_row_blocks_do_not_matter(dtype: torch.dtype, block: int, kind: tuple[str, int]) -> None:
    tensors = weights(dtype)
    directions = directions_for(tensors, *kind)
    commits = [commit_of(0, coefficients(6)), commit_of(1, coefficients(2))]
    assert_same(apply(directions, tensors, commits), apply(directions, tensors, commits, block_elements=block))


@settings(max_examples=25)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.data(),
)
def test_flat_shards_do_not_matter(dtype: torch.dtype, kind: tuple[str, int], data: st.DataObject) -> None:
    tensors = weights(dtype)
    directions = directions_for(tensors, *kind)
    commits = [commit_of(0, coefficients(6)), commit_of(1, coefficients(2))]
    expected = apply(directions, tensors, commits)
    for spec in directions.layout.specs:
        borders = sorted({0, spec.numel, *data.draw(st.lists(st.integers(0, spec.numel), max_size=3))})
        parts = []
        for start, stop in itertools.pairwise(borders):
            part = tensors[spec.name].reshape(-1)[start:stop].clone()
            apply_commits(directions, [Shard(spec, part, start)], commits)
            parts.append(part)
        assert torch.equal(bits(torch.cat(parts)), bits(expected[spec.name].reshape(-1))), spec.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_replay_equals_one_commit_after_the_other(dtype: torch.dtype) -> None:
    tensors = weights(dtype)
    directions = directions_for(tensors)
    # More terms than a group holds, so that groups are cut, with null commits between.
    eta = float(np.float32(1e-5))
    commits = [commit_of(s, coefficients(150, s), eta) if s % 5 else commit_of(s, [0] * 150, 0.0) for s in range(20)]
    stepwise = {name: tensor.clone() for name, tensor in tensors.items()}
    for commit in commits:
        apply_commits(directions, whole(stepwise, directions), [commit])
    assert_same(stepwise, apply(directions, tensors, commits))


def test_a_null_commit_changes_nothing() -> None:
    tensors = {"w": torch.tensor([[0.0, -0.0, 1.0, -1e-40]]).repeat(8, 8)}
    directions = directions_for(tensors)
    assert_same(apply(directions, tensors, [commit_of(0, [0, 0], eta=0.0)]), tensors)


@pytest.mark.skipif(not product.int8_product_is_exact(), reason="this processor's int8 product saturates")
def test_the_int8_product_equals_the_float_product() -> None:
    for rows, terms, cols in ((1, 64, 50), (50, 64, 1), (33, 1, 17), (129, 4096, 65), (2, 2, 2), (5, 0, 7)):
        left = torch.randint(-127, 128, (terms, rows), dtype=torch.int8).t()
        right = (torch.randint(0, 2, (terms, cols)) * 2 - 1).to(torch.int8)
        fast, slow = integer_product(left, right), integer_product(left.float(), right.float())
        assert torch.equal(fast.long(), left.long() @ right.long())
        assert slow.dtype == torch.float32 and torch.equal(slow.long(), fast.long())


@pytest.mark.parametrize("terms", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_of_the_product_changes_no_bit(
    dtype: torch.dtype, terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights(dtype)
    directions = directions_for(tensors)
    commits = [commit_of(s, coefficients(terms, s)) for s in range(4)]
    monkeypatch.setattr(product, "_int8_product_is_better", lambda: False)
    slow = apply(directions, tensors, commits)
    monkeypatch.setattr(product, "_int8_product_is_better", product.int8_product_is_exact)
    assert_same(slow, apply(directions, tensors, commits))


def test_single_terms_give_the_bits_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one-term commits takes a pass of its own; beside a commit of two terms the same take the product."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = weights(dtype)
        directions = directions_for(tensors)
        singles = [commit_of(s, coefficients(1, s)) for s in range(3)]
        alone = apply(directions, tensors, singles)
        monkeypatch.setattr("zoray.update._Sums._outer", None)
        beside = apply(directions, tensors, [*singles, commit_of(3, [0, 1, -1], eta=0.0, decay=0.5)])
        monkeypatch.undo()
        assert_same(apply(directions, alone, [commit_of(3, [0, 1, -1], eta=0.0, decay=0.5)]), beside)


def test_gaussian_directions_are_applied_in_order() -> None:
    tensors = {"w": torch.zeros(20, 30)}
    directions = directions_for(tensors, "gaussian")
    commit = commit_of(0, [3, -5], eta=0.5)
    z = [directions.dense((0, k), directions.layout.specs[0]) for k in range(2)]
    moved = apply(directions, tensors, [commit])["w"]
    torch.testing.assert_close(moved, -0.5 * (3 * z[0] - 5 * z[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_updates_survive_half_precision(dtype: torch.dtype) -> None:
    """Where round-to-nearest stands still, stochastic rounding moves the weights by what float32 does, on average."""
    shape, steps, eta = (64, 512), 40, float(np.float32(3e-7))
    start = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 1.0
    tensors = {"w": start.to(dtype)}
    directions = directions_for(tensors)
    z = directions.dense((0, 0), directions.layout.specs[0])
    # The same direction at every step, so that the expected move adds up.
    commits = [commit_of(s, [], eta) for s in range(steps)]
    for commit in commits:
        object.__setattr__(commit, "terms", ((0, 0, 100),))
    exact = apply(directions_for({"w": tensors["w"].float()}), {"w": tensors["w"].float()}, commits)["w"]
    moved = apply(directions, tensors, commits)["w"].float()
    nearest = tensors["w"].clone()
    for commit in commits:
        nearest = (nearest.float() - commit.eta * 100 * z).to(dtype)
    expected = float(((exact - tensors["w"].float()) * z).mean())
    found = float(((moved - tensors["w"].float()) * z).mean())
    assert torch.equal(nearest, tensors["w"])
    assert expected == pytest.approx(-steps * eta * 100, rel=0.05)
    assert found == pytest.approx(expected, rel=0.15)
