"""Which examples a probe sees: a pure function of its address.

The examples of a run are read epoch after epoch, each a permutation of all of them, so that every one is seen once per
epoch. Where in that sequence a probe stands follows from its address alone, never from who runs it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_DOMAIN = 0x5A6F_7261_7902
"""Second half of the Philox key: keeps these bits apart from those of the directions, whose domain ends in 01."""


def sample_ids(
    run_seed: int,
    n_examples: int,
    step: int,
    direction: int,
    microbatch: int,
    *,
    directions: int,
    microbatches: int,
    batch_size: int,
) -> npt.NDArray[np.int64]:
    """Indices of the examples of one probe, shape (batch_size,), int64 in [0, n_examples).

    A batch may straddle the border between two epochs, and holds an example more than once only if it does.

    Args:
        run_seed: 0 <= run_seed < 2^64.
        n_examples: size of the training set, at least 1.
        step: of the probe, from 0.
        direction: of the probe, 0 <= direction < directions.
        microbatch: of the probe, 0 <= microbatch < microbatches.
        directions: directions per step.
        microbatches: batches per direction.
        batch_size: examples per probe.
    """
    position = (((step * directions) + direction) * microbatches + microbatch) * batch_size
    parts = []
    missing = batch_size
    while missing:
        epoch, start = divmod(position, n_examples)
        part = permutation(run_seed, n_examples, epoch)[start : start + missing]
        parts.append(part)
        position += len(part)
        missing -= len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def permutation(run_seed: int, n_examples: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of one epoch, shape (n_examples,), int64, read-only.

    The stable order of raw Philox words: of all that NumPy draws, only the raw stream is promised never to change.
    Two are kept, for batches that straddle epochs.
    """
    counter = np.array([0, 0, epoch, 0], dtype=np.uint64)
    key = np.array([run_seed, _DOMAIN], dtype=np.uint64)
    words = np.random.Philox(counter=counter, key=key).random_raw(n_examples)
    order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order
