"""Snapshots: the trainable weights at a step, to shorten replay; and how a replica gets to any step of a run.

A snapshot is never the truth: it is bound to its run, carries the digest of its weights, is there as a whole or not at
all (`zoray.shelf`), and is passed over with a warning if anything about it is wrong, or if it cannot be reached.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from zoray.errors import ResourceError, RunError
from zoray.identity import check_base, header_digest
from zoray.ledger import Ledger
from zoray.memory.pieces import Pieces, write
from zoray.replica import Replica
from zoray.shelf import MARK, Shelf, shelf
from zoray.stores import StoreError, shown

_log = logging.getLogger(__name__)
_PREFIX = "step-"
_AT_ONCE = 8

Where = Path | str
"""A folder, or a URI on an object store."""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What stands beside the weights: step, hash of the last commit applied (hex), digest (hex), run (hex)."""

    step: int
    head: str
    digest: str
    run: str


def save(folder: Where, replica: Replica, head: bytes, run: str, keep: int | None = None) -> int:
    """Write the replica's weights to folder/step-N and return their digest; an existing snapshot of that step stays.

    Args:
        folder: the run's snapshots.
        head: hash of the last commit applied.
        run: `header_digest` of the run's ledger.
        keep: delete all but the newest so many.

    Raises:
        OSError: the storage is full or gone.
    """
    memory, value = replica.memory, replica.digest()
    place, name = shelf(folder), f"{_PREFIX}{replica.step}"
    missing = memory.together(lambda: memory.rank == 0 and _is_missing(place, name, value))
    if number := memory.total(os.getpid() if missing else 0):
        info = SnapshotInfo(replica.step, head.hex(), f"{value:016x}", run)
        mark = (json.dumps(asdict(info), indent=1) + "\n").encode()
        try:
            memory.together(lambda: place.add(name, number, lambda made: write(made, memory)))
            memory.together(lambda: place.finish(name, number, mark) if memory.rank == 0 else None)
        finally:
            place.discard(name, number)
    if keep and memory.rank == 0:
        try:
            for old in steps(folder)[:-keep]:
                place.remove(f"{_PREFIX}{old}")
        except StoreError as error:
            _log.warning("old snapshots stay where they are: %s", error)
    return value


def _is_missing(place: Shelf, name: str, value: int) -> bool:
    """Whether there is no such snapshot; one that is damaged, or was written with other weights, is deleted."""
    if name not in place.names():
        return True
    if _digest_of(place, name) == f"{value:016x}":
        return False
    place.remove(name)
    return True


def steps(folder: Where) -> list[int]:
    """Steps there are snapshots of, ascending.

    Raises:
        OSError: the storage is gone.
    """
    names = (name.removeprefix(_PREFIX) for name in shelf(folder).names() if name.startswith(_PREFIX))
    return sorted(int(name) for name in names if name.isdecimal())


def found(folder: Where, newest: int | None = None) -> dict[int, str | None]:
    """By step, the digest (hex) each snapshot says its weights have; None if it says nothing.

    If the storage is gone there are none, with a warning: replay makes up for them.

    Args:
        folder: the run's snapshots.
        newest: look at the newest so many only.
    """
    place = shelf(folder)
    try:
        there = steps(folder)[-(newest or 0) :]
    except OSError as error:
        _log.warning("the snapshots of the run are passed over: %s", error)
        return {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        said = list(pool.map(lambda step: _digest_of(place, f"{_PREFIX}{step}"), there))
    return dict(zip(there, said, strict=True))


def weights_digest(folder: Where, step: int) -> str | None:
    """The digest (hex) of the weights in a snapshot; None if they cannot be read, or are not what it says itself.

    Raises:
        StoreError: it cannot be reached.
    """
    name = f"{_PREFIX}{step}"
    try:
        with shelf(folder).taken(name) as place:
            said = json.loads((place / MARK).read_text())["digest"]
            with Pieces(place) as pieces:
                found = f"{pieces.whole_digest():016x}"
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return found if found == said else None


def _digest_of(place: Shelf, name: str) -> str | None:
    try:
        return str(json.loads(place.read(name, MARK))["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def usable(
    there: Mapping[int, str | None],
    ledger: Ledger,
    at_most: int | None = None,
    agreed: Mapping[int, str] | None = None,
) -> dict[int, bytes]:
    """Steps whose snapshots may be used, with the hash the ledger's last commit before each has.

    Args:
        there: the snapshots there are, as they are `found`.
        ledger: of the run.
        at_most: none later than this.
        agreed: digests (hex) the replicas agreed on, by step: a snapshot of other weights, or of a step without one, is
            perhaps that of a replica that had diverged. None: take all there are.
    """
    last = ledger.next_step if at_most is None else at_most
    taken = [step for step in there if step <= last]
    if agreed is not None:
        taken = [step for step in taken if step in agreed and agreed[step] == there[step]]
    return {step: head_at(ledger, step) for step in taken}


def sweep(folder: Where, after: int | None = None) -> None:
    """Delete what killed processes left half written, and the snapshots of steps later than `after`.

    Only while nobody else uses the folder.

    Raises:
        OSError: the storage is gone.
    """
    place = shelf(folder)
    place.sweep()
    for step in steps(folder) if after is not None else []:
        if after is not None and step > after:
            place.remove(f"{_PREFIX}{step}")


def load_newest(folder: Where, replica: Replica, run: str, known: Mapping[int, bytes]) -> bytes | None:
    """Bring the replica to the newest usable snapshot.

    Args:
        folder: the run's snapshots.
        replica: at a step before it.
        run: `header_digest` of the run's ledger.
        known: the steps whose snapshots may be used, with the hash each must have been made at (see `usable`).

    Returns:
        The hash of the last commit in it; None if there is none, and then the replica is as it was.

    Raises:
        ResourceError: one that was found to be right could not be read to its end; the replica is of no use any more.
    """
    place = shelf(folder)
    for step in sorted(known, reverse=True):
        name = f"{_PREFIX}{step}"
        if replica.step < step:
            try:
                return _load(place, name, replica, run, known[step])
            except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
                _log.warning("the snapshot %s of %s is passed over: %s", name, shown(str(folder)), error)
    return None


def _load(place: Shelf, name: str, replica: Replica, run: str, head: bytes) -> bytes:
    memory = replica.memory
    with ExitStack() as opened:
        info, pieces = memory.together(lambda: _open(opened, place, name, replica, run, head))
        found = f"{memory.total(memory.together(lambda: pieces.digest(memory.shards()))):016x}"
        if found != info.digest:
            raise ValueError(f"its digest is {found}, not {info.digest}")
        try:
            replica.load(pieces, info.step)
        except Exception as error:
            raise ResourceError(
                f"The snapshot of step {info.step} broke off while it was loaded, and left the weights spoilt: {error}",
                where=shown(name),
                advice="look at the storage it is read from, and at that of the weights",
            ) from error
    return head


def _open(
    opened: ExitStack, place: Shelf, name: str, replica: Replica, run: str, head: bytes
) -> tuple[SnapshotInfo, Pieces]:
    """What a snapshot says of itself and its weights, which are there until `opened` is left."""
    info = SnapshotInfo(**json.loads(place.read(name, MARK)))
    if info.run != run:
        raise ValueError("it belongs to another run")
    if info.head != head.hex():
        raise ValueError("it was made with other commits than the ledger has")
    pieces = opened.enter_context(Pieces(opened.enter_context(place.taken(name))))
    pieces.check(replica.layout.specs)
    return info, pieces


def replay(replica: Replica, ledger: Ledger, snapshots: Where | None, step: int | None = None) -> None:
    """Bring a replica of the base model to a step of a run: the newest usable snapshot, then the commits behind it.

    Args:
        replica: at step 0.
        ledger: the run's ledger.
        snapshots: where its snapshots are; None to replay from the base model.
        step: the step to reach; by default the last one.

    Raises:
        LedgerError: the ledger belongs to another model.
        RunError: the step is not in the ledger.
    """
    check_base(ledger.header, replica, str(ledger.path))
    goal = ledger.next_step if step is None else step
    if not 0 <= goal <= ledger.next_step:
        raise RunError(
            f"The run has no step {goal}.", where=str(ledger.path), advice=f"give a step from 0 to {ledger.next_step}"
        )
    if snapshots is not None:
        load_newest(snapshots, replica, header_digest(ledger.header), usable(found(snapshots), ledger, goal))
    replica.apply(list(ledger.commits(replica.step, goal)))


def head_at(ledger: Ledger, step: int) -> bytes:
    """Hash of the last commit before a step: of the header for step 0."""
    if step == 0:
        return ledger.genesis
    return next(iter(ledger.commits(step - 1, step))).hash
