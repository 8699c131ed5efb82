"""Which rows of a file are trained on and which are kept for evaluation: a function of what is in it, and of a seed.

Rows are taken in the order of a permutation: those to train on from its beginning, those to evaluate on from its end.
So a larger set contains the smaller one of the same seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoray.errors import DataError

_DOMAIN = 0x5A6F_7261_7903
"""Second half of the Philox key: keeps these bits apart from those of the directions and of the order of the data."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Rows of a file by their number from 0, in ascending order.

    Attributes:
        train: to train on, or to evaluate on where the file is for that.
        dev: kept for the run's evaluations.
    """

    train: tuple[int, ...]
    dev: tuple[int, ...] = ()


def choose(
    rows: int,
    seed: int,
    where: str,
    *,
    samples: int | None = None,
    dev: int = 0,
    k_shot: int | None = None,
    labels: Sequence[str] = (),
) -> Parts:
    """Divide the rows of a file.

    Args:
        rows: there are in the file.
        seed: 0 <= seed < 2^64.
        where: the file, for messages.
        samples: at most so many to train on; None for all that are left.
        dev: so many to keep.
        k_shot: so many to train on of each label, in place of `samples`.
        labels: of all rows, for that.

    Raises:
        DataError: there are too few rows, or too few of a label.
    """
    order = _order(seed, rows).tolist()
    if k_shot is not None:
        train = _shots(order, labels, k_shot, where)
        taken = set(train)
        rest = [row for row in order if row not in taken]
    else:
        count = rows - dev if samples is None else min(samples, rows - dev)
        train, rest = order[: max(0, count)], order[max(0, count) :]
    if len(rest) < dev or not train:
        raise DataError(
            f"{rows} rows are too few: {dev} are kept for evaluation.",
            where=where,
            advice="Lower task.dev_samples, or leave it out and name held-out data in task.eval.",
        )
    return Parts(tuple(sorted(train)), tuple(sorted(rest[len(rest) - dev :])))


def _order(seed: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    key = np.array([seed, _DOMAIN], dtype=np.uint64)
    words = np.random.Philox(counter=np.zeros(4, np.uint64), key=key).random_raw(rows)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def _shots(order: Sequence[int], labels: Sequence[str], k_shot: int, where: str) -> list[int]:
    """The first `k_shot` rows of each label in an order."""
    taken = Counter[str]()
    train = []
    for row in order:
        if taken[labels[row]] < k_shot:
            taken[labels[row]] += 1
            train.append(row)
    short = {label: count for label, count in sorted(taken.items()) if count < k_shot}
    if short:
        label, count = next(iter(short.items()))
        raise DataError(
            f"There are only {count} rows with the label {label}, and task.k_shot is {k_shot}.",
            where=where,
            advice="Lower task.k_shot.",
        )
    return train
