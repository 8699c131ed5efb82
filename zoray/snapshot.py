"""Snapshots: the trainable weights at a step, to shorten replay; and how a replica gets to any step of a run.

A snapshot is never the truth: it is bound to its run, carries the digest of its weights, is written beside its place
and renamed into it, and is passed over with a warning if anything about it is wrong.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from zoray.errors import RunError
from zoray.identity import check_base, header_digest
from zoray.ledger import Ledger
from zoray.memory import Memory
from zoray.memory.pieces import Pieces, write
from zoray.replica import Replica

_log = logging.getLogger(__name__)
_PREFIX = "step-"


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What stands beside the weights: step, hash of the last commit applied (hex), digest (hex), run (hex)."""

    step: int
    head: str
    digest: str
    run: str


def save(folder: Path, replica: Replica, head: bytes, run: str, keep: int | None = None) -> int:
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
    place = folder / f"{_PREFIX}{replica.step}"
    if memory.rank == 0 and place.exists() and digest_of(place) != f"{value:016x}":
        # One that is damaged, or was written with other weights.
        shutil.rmtree(place)
    if number := memory.total(os.getpid() if memory.rank == 0 and not place.exists() else 0):
        temporary = folder / f".{place.name}.{number}"
        info = SnapshotInfo(replica.step, head.hex(), f"{value:016x}", run)
        try:
            memory.together(lambda: _write(temporary, memory))
            memory.together(lambda: _publish(temporary, place, info) if memory.rank == 0 else None)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in steps(folder)[:-keep] if keep else []:
        shutil.rmtree(folder / f"{_PREFIX}{old}", ignore_errors=True)
    return value


def _write(temporary: Path, memory: Memory) -> None:
    temporary.mkdir(parents=True, exist_ok=True)
    _fsync(write(temporary, memory))


def _publish(temporary: Path, place: Path, info: SnapshotInfo) -> None:
    """Put a snapshot whose weights are written in its place."""
    (temporary / "snapshot.json").write_text(json.dumps(asdict(info), indent=1) + "\n")
    for path in (temporary / "snapshot.json", temporary):
        _fsync(path)
    temporary.rename(place)
    _fsync(place.parent)


def steps(folder: Path) -> list[int]:
    """Steps there are snapshots of, ascending."""
    names = (path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*"))
    return sorted(int(name) for name in names if name.isdecimal())


def digest_of(place: Path) -> str | None:
    """The digest (hex) a snapshot says its weights have; None if it says nothing."""
    try:
        return str(json.loads((place / "snapshot.json").read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def heads(
    folder: Path, ledger: Ledger, at_most: int | None = None, agreed: Mapping[int, str] | None = None
) -> dict[int, bytes]:
    """Steps whose snapshots may be used, with the hash the ledger's last commit before each has.

    Args:
        folder, ledger: of the run.
        at_most: none later than this.
        agreed: digests (hex) the replicas agreed on, by step: a snapshot of other weights, or of a step without one, is
            perhaps that of a replica that had diverged. None: take all there are.
    """
    last = ledger.next_step if at_most is None else at_most
    found = [step for step in steps(folder) if step <= last]
    if agreed is not None:
        found = [step for step in found if step in agreed and agreed[step] == digest_of(folder / f"{_PREFIX}{step}")]
    return {step: head_at(ledger, step) for step in found}


def sweep(folder: Path, after: int | None = None) -> None:
    """Delete what killed processes left half written, and the snapshots of steps later than `after`.

    Only while nobody else uses the folder.
    """
    for path in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    for step in steps(folder) if after is not None else []:
        if after is not None and step > after:
            shutil.rmtree(folder / f"{_PREFIX}{step}", ignore_errors=True)


def load_newest(folder: Path, replica: Replica, run: str, known: Mapping[int, bytes]) -> bytes | None:
    """Bring the replica to the newest usable snapshot.

    Args:
        folder: the run's snapshots.
        replica: at a step before it.
        run: `header_digest` of the run's ledger.
        known: the steps whose snapshots may be used, with the hash each must have been made at (see `heads`).

    Returns:
        The hash of the last commit in it; None if there is none, and then the replica is as it was.
    """
    for step in sorted(known, reverse=True):
        place = folder / f"{_PREFIX}{step}"
        if replica.step < step and replica.memory.total(int(place.exists())):
            try:
                return _load(place, replica, run, known[step])
            except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
                _log.warning("the snapshot %s is passed over: %s", place, error)
    return None


def _load(place: Path, replica: Replica, run: str, head: bytes) -> bytes:
    memory = replica.memory
    info, pieces = memory.together(lambda: _open(place, replica, run, head))
    with pieces:
        found = f"{memory.total(memory.together(lambda: pieces.digest(memory.shards()))):016x}"
        if found != info.digest:
            raise ValueError(f"its digest is {found}, not {info.digest}")
        replica.load(pieces, info.step)
    return head


def _open(place: Path, replica: Replica, run: str, head: bytes) -> tuple[SnapshotInfo, Pieces]:
    info = SnapshotInfo(**json.loads((place / "snapshot.json").read_text()))
    if info.run != run:
        raise ValueError("it belongs to another run")
    if info.head != head.hex():
        raise ValueError("it was made with other commits than the ledger has")
    pieces = Pieces(place)
    pieces.check(replica.layout.specs)
    return info, pieces


def replay(replica: Replica, ledger: Ledger, snapshots: Path | None, step: int | None = None) -> None:
    """Bring a replica of the base model to a step of a run: the newest usable snapshot, then the commits behind it.

    Args:
        replica: at step 0.
        ledger: the run's ledger.
        snapshots: folder of its snapshots; None to replay from the base model.
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
        load_newest(snapshots, replica, header_digest(ledger.header), heads(snapshots, ledger, goal))
    replica.apply(list(ledger.commits(replica.step, goal)))


def head_at(ledger: Ledger, step: int) -> bytes:
    """Hash of the last commit before a step: of the header for step 0."""
    if step == 0:
        return ledger.genesis
    return next(iter(ledger.commits(step - 1, step))).hash


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
