from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.helpers import directions_for, philox_blocks
from zoray.directions import direction_bytes
from zoray.layout import ParamSpec

TENSORS = {"a.weight": torch.zeros(40, 30), "b.weight": torch.zeros(40, 30), "a.bias": torch.zeros(40)}


def test_any_range_can_be_read_alone() -> None:
    whole = direction_bytes(5, 7, 3, 0, 4096)
    for start, stop in ((0, 32), (32, 96), (1024, 4096), (4064, 4096)):
        np.testing.assert_array_equal(direction_bytes(5, 7, 3, start, stop), whole[start:stop])


def test_the_bits_are_pinned_for_ever() -> None:
    # A change here changes what every old ledger means.
    assert direction_bytes(0, 0, 0, 0, 32).tobytes().hex() == GOLDEN


GOLDEN = "dc0d409210fa89d5132d9b6b9425ea18f9ba60a76799a91e52a4bae318383f2c"


def test_the_bits_are_philox_at_the_address() -> None:
    generator = np.random.default_rng(0)
    for run_seed in (0, 1, 2**64 - 1):
        steps, indices, blocks = (generator.integers(0, 2**bits, 60, dtype=np.uint64) for bits in (63, 32, 20))
        expected = philox_blocks(run_seed, steps, indices, blocks)
        for row, step, index, block in zip(expected, steps, indices, blocks, strict=True):
            found = direction_bytes(run_seed, int(step), int(index), 32 * int(block), 32 * int(block) + 32)
            assert found.tobytes() == row.astype("<u8").tobytes()


def test_no_two_of_a_million_addresses_collide() -> None:
    """The first 8 bytes of a million directions; the test above ties this reference to what runs."""
    seeds, steps, indices = (0, 1, 2, 7, 2**63), 2000, 101
    grid = np.meshgrid(np.arange(steps, dtype=np.uint64), np.arange(indices, dtype=np.uint64))
    step, index = (axis.reshape(-1) for axis in grid)
    first = [philox_blocks(seed, step, index, np.zeros_like(step))[:, 0] for seed in seeds]
    words = np.concatenate(first)
    assert len(words) > 10**6
    assert len(np.unique(words)) == len(words)


def test_no_two_of_a_million_blocks_collide() -> None:
    first: list[bytes] = []
    for seed in (0, 1, 2**63):
        for step in (0, 1, 2, 9_999_999):
            for index in (0, 1, 70_000):
                # One long read is a run of consecutive blocks; distinct addresses must not share any of them.
                words = direction_bytes(seed, step, index, 0, 32 * 28_000).view(np.uint64).reshape(-1, 4)
                first.append(words[:, 0].tobytes())
    words = np.concatenate([np.frombuffer(chunk, np.uint64) for chunk in first])
    assert len(words) > 10**6
    assert len(np.unique(words)) == len(words)


def test_every_step_and_index_has_its_own_first_block() -> None:
    blocks = {direction_bytes(0, step, index, 0, 32).tobytes() for step in range(100) for index in range(100)}
    assert len(blocks) == 10_000


def reference_signs(packed: bytes, first: int, count: int) -> list[int]:
    """Bit i of the string, least significant first, says the sign of element i: 0 is +1."""
    return [1 - 2 * (packed[first + i // 8] >> (i % 8) & 1) for i in range(count)]


def reference_direction(packed: bytes, spec: ParamSpec) -> np.ndarray:
    """z of one parameter times sqrt(r), from the bytes of a whole direction, as docs and layout describe it."""
    if not spec.rank:
        return np.array(reference_signs(packed, spec.offset, spec.cols)).reshape(spec.shape)
    total = np.zeros((spec.rows, spec.cols), dtype=np.int64)
    for i in range(spec.rank):
        a = reference_signs(packed, spec.offset + i * spec.row_bytes, spec.rows)
        b = reference_signs(packed, spec.offset + spec.rank * spec.row_bytes + i * spec.col_bytes, spec.cols)
        total += np.outer(a, b)
    return total.reshape(spec.shape)


@pytest.mark.parametrize(("kind", "rank"), [("rank", 1), ("rank", 4), ("rademacher", 1)])
def test_directions_are_read_from_their_own_ranges(kind: str, rank: int) -> None:
    shapes = {"a": (300, 40), "b": (7,), "c": (40, 300), "d": (4, 9, 10), "e": ()}
    directions = directions_for({n: torch.zeros(s) for n, s in shapes.items()}, kind, rank, run_seed=3)
    for step, index in ((0, 0), (5, 2)):
        packed = direction_bytes(3, step, index, 0, directions.layout.total_bytes).tobytes()
        for spec in directions.layout.specs:
            z = directions.dense((step, index), spec).numpy()
            np.testing.assert_array_equal(z, reference_direction(packed, spec) * directions.scale(spec))


def test_seed_zero_is_a_seed() -> None:
    zero, one = (direction_bytes(seed, 0, 0, 0, 1024) for seed in (0, 1))
    assert 0.45 < np.unpackbits(zero).mean() < 0.55
    assert (zero != one).mean() > 0.9


@pytest.mark.parametrize("kind", ["rank", "rademacher", "gaussian"])
def test_equal_shapes_get_different_directions(kind: str) -> None:
    directions = directions_for(TENSORS, kind)
    z = {spec.name: directions.dense((0, 0), spec) for spec in directions.layout.specs}
    assert z["a.weight"].shape == z["b.weight"].shape
    assert abs(float((z["a.weight"] * z["b.weight"]).mean())) < 0.15
    assert not torch.equal(z["a.weight"], directions.dense((0, 1), directions.layout.specs[1]))


@pytest.mark.parametrize(("kind", "rank"), [("rank", 1), ("rank", 4), ("rademacher", 1), ("gaussian", 1)])
def test_the_second_moment_is_the_identity(kind: str, rank: int) -> None:
    tensors = {"w": torch.zeros(6, 5)} if rank == 1 else {"w": torch.zeros(24, 20)}
    directions = directions_for(tensors, kind, rank)
    (spec,) = directions.layout.specs
    z = torch.stack([directions.dense((0, k), spec).flatten() for k in range(4000)]).double()
    moment = z.t() @ z / len(z)
    error = moment - torch.eye(len(moment), dtype=torch.float64)
    assert float(error.abs().max()) < 6 * 2**0.5 / len(z) ** 0.5 * 1.5
    assert float(z.mean(0).abs().max()) < 5 / len(z) ** 0.5


def test_signs_are_signs_and_rank_one_is_an_outer_product() -> None:
    directions = directions_for(TENSORS)
    spec = directions.layout.specs[1]
    z = directions.dense((3, 4), spec)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert int(torch.linalg.matrix_rank(z)) == 1
    left, right = directions.factors((3, 4), spec)
    assert left is not None and torch.equal(left.t() @ right, z)
    assert float(directions.scale(spec)) == 1.0
