"""The update of weights of which a step moves some: its definition, and that it depends on nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.helpers import bits, commit_of, directions_for
from tests.unit.test_update import DTYPES, apply, assert_same, coefficients, weights
from zoray.commits import Commit, seal
from zoray.coverage import EVERYTHING, Coverage
from zoray.directions import Directions
from zoray.rounding import rounding_key, stochastic_round
from zoray.update import Group, Shard, apply_commits

Tensors = dict[str, torch.Tensor]

GROUPS = {"matrix": 0, "wide": 1, "vector": 2, "cube": 0, "scalar": 1}
ROTATING = Coverage(groups=GROUPS, count=3, steps=2)


def limited(tensors: Tensors) -> Coverage:
    """Half of the weights of every parameter but one are small."""
    limits = {name: float(tensor.abs().float().median()) for name, tensor in tensors.items() if name != "wide"}
    return Coverage(limits=limits)


def both(tensors: Tensors) -> Coverage:
    return Coverage(limits=limited(tensors).limits, groups={"matrix": 1, "vector": 0}, count=2, steps=1)


COVERAGES = {"limits": limited, "groups": lambda tensors: ROTATING, "both": both}


def directions_of(tensors: Tensors, coverage: Coverage, kind: str = "rank", rank: int = 1) -> Directions:
    return directions_for(tensors, kind, rank, 11, coverage)


def window(step: int, reach: int, decay: float = 1.0, eta: float = 3e-3) -> Commit:
    """A commit with terms of earlier steps, as momentum makes them."""
    terms = [(s, k, (37 * s + 11 * k) % 255 - 127) for s in range(max(0, step - reach), step + 1) for k in range(2)]
    return seal(step, float(np.float32(eta)), float(np.float32(decay)), 1.0, terms, bytes(32))


def commits_of(eta: float = 1e-2) -> list[Commit]:
    """Large enough for weights to cross their limits, in both directions."""
    rounded = float(np.float32(eta))
    return [
        commit_of(0, coefficients(5), eta=rounded),
        commit_of(1, coefficients(1), eta=rounded, decay=float(np.float32(0.9))),
        window(2, 2),
        commit_of(3, [0, 0, 3], eta=rounded),
        window(4, 3, decay=0.97),
        commit_of(5, [], eta=rounded, decay=0.5),
        commit_of(6, coefficients(2, 3), eta=0.0),
        window(7, 0),
    ]


def reference(directions: Directions, tensors: Tensors, commits: Sequence[Commit]) -> Tensors:
    """The definition, weight by weight: integers in int64, then separately rounded float32 operations."""
    out, coverage = {}, directions.coverage
    for spec in directions.layout.specs:
        value = tensors[spec.name].float().numpy()
        limit, group = coverage.limits.get(spec.name, math.inf), coverage.groups.get(spec.name)
        for commit in commits:
            total = np.zeros(spec.shape, dtype=np.int64)
            for step, index, c in commit.terms:
                if group is None or (step // coverage.steps) % coverage.count == group:
                    z = directions.dense((step, index), spec).double() / float(directions.scale(spec))
                    total += c * z.round().long().numpy()
            total[np.abs(value) > np.float32(limit)] = 0
            delta = np.float32(commit.eta) * directions.scale(spec) * total.astype(np.float32)
            value = np.asarray(np.asarray(value * np.float32(commit.decay)) - np.asarray(delta), dtype=np.float32)
            if tensors[spec.name].dtype != torch.float32:
                key = rounding_key(directions.run_seed, commit.step, spec.name)
                value = stochastic_round(torch.from_numpy(value), tensors[spec.name].dtype, key, 0).float().numpy()
        out[spec.name] = torch.from_numpy(value).to(tensors[spec.name].dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covers", COVERAGES)
@pytest.mark.parametrize(("kind", "rank"), [("rank", 1), ("rank", 3), ("inputs", 1), ("inputs", 2), ("rademacher", 1)])
def test_the_update_is_its_definition(dtype: torch.dtype, covers: str, kind: str, rank: int) -> None:
    tensors = weights(dtype)
    directions = directions_of(tensors, COVERAGES[covers](tensors), kind, rank)
    for commits in (commits_of(), commits_of(0.1)[:4]):
        assert_same(apply(directions, tensors, commits), reference(directions, tensors, commits))


def test_weights_cross_their_limits() -> None:
    """Or the tests here would not tell a mask of the base weights from one of those at the step."""
    tensors = weights(torch.float32)
    coverage = limited(tensors)
    after = apply(directions_of(tensors, coverage), tensors, commits_of())
    before, now = (t["matrix"].abs() <= coverage.limits["matrix"] for t in (tensors, after))
    assert int((before & ~now).sum()) > 50 and int((~before & now).sum()) > 50


@given(
    covers=st.sampled_from(sorted(COVERAGES)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([("rank", 1), ("rank", 3), ("inputs", 1), ("inputs", 2)]),
    block=st.sampled_from([7, 64, 301, 1 << 19]),
    cuts=st.lists(st.integers(0, 2309), max_size=4),
    borders=st.lists(st.integers(0, 8), max_size=4),
)
@settings(max_examples=25)
def test_any_split_of_weights_and_commits_gives_the_same_bits(
    covers: str, dtype: torch.dtype, kind: tuple[str, int], block: int, cuts: list[int], borders: list[int]
) -> None:
    """Blocks, the shards of several processes, and replay in groups or step by step."""
    tensors = weights(dtype)
    directions = directions_of(tensors, COVERAGES[covers](tensors), *kind)
    commits = commits_of()
    expected = reference(directions, tensors, commits)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    shards = []
    for spec in directions.layout.specs:
        edges = sorted({0, spec.numel, *(cut for cut in cuts if cut < spec.numel)})
        flat = copies[spec.name].view(-1)
        shards += [Shard(spec, flat[a:b], a) for a, b in pairwise(edges)]
    steps = sorted({0, len(commits), *borders})
    for first, last in pairwise(steps):
        apply_commits(directions, shards, commits[first:last], block)
    assert_same(copies, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_moved_keeps_its_bits(dtype: torch.dtype) -> None:
    tiny = torch.tensor([-0.0, 3e-5]).to(dtype)
    tensors = {name: torch.cat([tensor.flatten(), tiny]) for name, tensor in weights(dtype).items()}
    directions = directions_of(tensors, ROTATING)
    for step in range(12):
        after = apply(directions, tensors, [commit_of(step, [100, -3], eta=0.5)])
        moved = {name for name in tensors if not torch.equal(bits(after[name]), bits(tensors[name]))}
        assert moved == {name for name, group in GROUPS.items() if group == step // 2 % 3}
    coverage = limited(tensors)
    after = apply(directions_of(tensors, coverage), tensors, [commit_of(0, [100, -3], eta=0.5)])
    for name, limit in coverage.limits.items():
        same = bits(after[name]) == bits(tensors[name])
        assert torch.equal(same, tensors[name].abs() > limit), name


def test_gaussian_directions_move_the_same_weights() -> None:
    tensors = weights(torch.float32)
    for coverage in (limited(tensors), ROTATING):
        directions = directions_of(tensors, coverage, "gaussian")
        commit = commit_of(4, [100, -3], eta=2.0**-9)
        after = apply(directions, tensors, [commit])
        for spec in directions.layout.specs:
            z = sum(c * directions.dense((4, k), spec) for k, c in enumerate([100, -3]))
            z = z * (tensors[spec.name].abs() <= coverage.limits.get(spec.name, math.inf))
            z = z * (coverage.groups.get(spec.name) in (None, 4 // 2 % 3))
            torch.testing.assert_close(after[spec.name], tensors[spec.name] - 2.0**-9 * z)


def test_a_group_of_commits_knows_what_it_changes() -> None:
    tensors = weights(torch.float32)
    directions = directions_of(tensors, ROTATING)
    specs = {spec.name: spec for spec in directions.layout.specs}
    group = Group(directions, [commit_of(0, [1]), commit_of(1, [2]), commit_of(4, [0, 0])])
    assert {name for name in specs if group.changes(specs[name])} == {"matrix", "cube"}
    assert all(Group(directions, [commit_of(0, [1], decay=0.5)]).changes(spec) for spec in specs.values())
    assert not Group(directions, [commit_of(0, [1], eta=0.0)]).changes(specs["matrix"])


def test_what_tells_replicas_apart() -> None:
    tensors = weights(torch.float32)
    everything = directions_of(tensors, EVERYTHING)
    assert everything.identity == everything.layout.identity
    limits = limited(tensors).limits
    others = [
        Coverage(limits=limits),
        Coverage(limits={**limits, "cube": math.nextafter(limits["cube"], 2)}),
        ROTATING,
        Coverage(groups=GROUPS, count=3, steps=3),
        Coverage(groups={**GROUPS, "cube": 1}, count=3, steps=2),
    ]
    assert len({directions_of(tensors, each).identity for each in (EVERYTHING, *others)}) == 6
    assert Coverage(limits=dict(reversed(limits.items()))).identity == others[0].identity
    assert ROTATING.all_groups() == EVERYTHING and others[0].all_groups() == others[0]
