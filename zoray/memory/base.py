"""What a memory is: the part of a replica's trainable weights that one process holds, updated and digested in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from zoray.commits import Commit
from zoray.digest import tensor_digest
from zoray.directions import Directions
from zoray.layout import ParamSpec
from zoray.update import Shard, apply_commits

Reader = Callable[[ParamSpec, int, int], torch.Tensor]
"""(parameter, start, stop) -> its elements [start, stop) in row-major order, as a 1-D tensor."""

ELSEWHERE = "another of the replica's processes failed at it"
"""What a process says that has nothing to say itself."""

_MASK = (1 << 64) - 1
_T = TypeVar("_T")


class Memory(ABC):
    """The trainable weights of one replica, as far as this process holds them.

    Which parameters there are, with their shapes and dtypes, is the layout of `directions`. The shards of all of the
    replica's processes are disjoint and make up the whole.

    Args:
        directions: the run's directions.

    Attributes:
        rank, size: number of this process among those that hold the replica together, and how many they are.
        fleeting: whether a shard is gone from memory once the next is asked for.
    """

    rank: int = 0
    size: int = 1
    fleeting: bool = False

    def __init__(self, directions: Directions) -> None:
        self.directions = directions

    @abstractmethod
    def shards(self, writing: bool = False) -> Iterator[Shard]:
        """What this process holds, parameter by parameter in the order of the layout; views, not copies.

        Args:
            writing: the shards will be written to.
        """

    def total(self, part: int) -> int:
        """Sum of all processes' parts modulo 2^64. Each of the replica's processes must call it."""
        return part & _MASK

    def together(self, work: Callable[[], _T]) -> _T:
        """Do something that may fail in each of the replica's processes; if it fails in one, all raise.

        None of them then waits for ever for one that has given up.
        """
        fault: Exception | None = None
        try:
            done = work()
        except Exception as error:
            fault = error
        if self.total(int(fault is not None)):
            raise fault or OSError(ELSEWHERE)
        return done

    @abstractmethod
    def settle(self) -> None:
        """Let go of copies of weights: after this the shards are all there is of them, and may be written to."""

    @contextmanager
    def forwards(self, first: bool = False) -> Iterator[None]:
        """For forwards of the model: the copies that one which is broken off leaves behind are let go of.

        Args:
            first: they are the model's first, in which a memory may have to learn which modules use which parameters.
        """
        try:
            yield
        except BaseException as error:
            try:
                self.settle()
            except RuntimeError as second:
                # The first says why. What cannot be let go of now stops the next update as well.
                error.add_note(f"copies of weights are left behind: {second}")
            raise

    def apply(self, commits: Sequence[Commit]) -> None:
        """Apply consecutive commits in place, to what this process holds."""
        self.settle()
        apply_commits(self.directions, _ToWrite(self), commits)

    def digest(self) -> int:
        """Digest (64 bits) of what this process holds; the digest of the replica is the `total` of them."""
        return sum(tensor_digest(shard.spec.name, shard.values, shard.start) for shard in self.shards()) & _MASK

    def load(self, read: Reader) -> None:
        """Overwrite what this process holds with the same elements of other weights of the same layout."""
        self.settle()
        for shard in self.shards(writing=True):
            shard.values.copy_(read(shard.spec, shard.start, shard.stop))


class _ToWrite:
    """A memory's shards, to be gone through and written to any number of times."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __iter__(self) -> Iterator[Shard]:
        return self._memory.shards(writing=True)
