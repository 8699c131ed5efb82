"""`zoray verify`: is the ledger whole, and does replaying it give the weights the replicas had?"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from launch.restore import base_replica, open_run
from zoray.errors import LedgerError, NumericsError, RunError
from zoray.identity import check_base
from zoray.ledger import Ledger
from zoray.memory.pieces import Pieces
from zoray.replica import Replica
from zoray.runs import RunFolder
from zoray.snapshot import steps

Records = dict[int, dict[str, str]]
"""By step and by who recorded it (`replicas`, `snapshot`): a digest in hexadecimal, or _DAMAGED."""

_DAMAGED = "damaged"


def verify(run: str, output_dir: str) -> None:
    """Check the hash chain, then replay from the base model, without snapshots, to every recorded digest.

    Raises:
        LedgerError: the ledger is damaged (with the offset), belongs to another model, or has lost its last commits.
        NumericsError: replay gives other weights than were recorded.
        RunError: there is no such run, or a snapshot of it is damaged.
    """
    console = Console(highlight=False, soft_wrap=True)
    # Before the ledger: a run in progress must not have recorded digests of steps that are not read any more.
    records = recorded_digests(RunFolder.find(run, output_dir))
    folder, config, ledger = open_run(run, output_dir)
    count = ledger.next_step
    console.print(f"hash chain: {count} commits, whole, head {ledger.head.hex()[:16]}", markup=False)
    replica = base_replica(config, ledger)
    check_base(ledger.header, replica, str(ledger.path))
    replayed = _replay(replica, ledger, sorted({*(step for step in records if step <= count), count}))
    console.print(_table(records, replayed))
    _judge(folder, ledger, records, replayed)
    if not records:
        console.print("no digest was recorded (the run did not end in order): nothing to compare with", markup=False)
    console.print(f"verified: the weights at step {count} have digest {replayed[count]}", markup=False)


def recorded_digests(folder: RunFolder) -> Records:
    """The digests the replicas agreed on, and those of the weights in the snapshots."""
    found: Records = {}
    for row in folder.rows("digests"):
        found.setdefault(int(row["step"]), {})["replicas"] = row["digest"]
    for step in steps(folder.snapshots):
        found.setdefault(step, {})["snapshot"] = _snapshot_digest(folder.snapshots / f"step-{step}")
    return found


def _snapshot_digest(place: Path) -> str:
    """Digest of a snapshot's weights; _DAMAGED if they cannot be read, or are not what it says itself."""
    try:
        said = json.loads((place / "snapshot.json").read_text())["digest"]
        with Pieces(place) as pieces:
            found = f"{pieces.whole_digest():016x}"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return _DAMAGED
    return found if found == said else _DAMAGED


def _replay(replica: Replica, ledger: Ledger, goals: list[int]) -> dict[int, str]:
    """Digests (hexadecimal) of the weights at some steps, ascending."""
    found = {}
    for step in goals:
        replica.apply(list(ledger.commits(replica.step, step)))
        found[step] = f"{replica.digest():016x}"
    return found


def _table(records: Records, replayed: dict[int, str]) -> Table:
    table = Table("step", "recorded by", "digest", "replayed", box=None)
    for step in sorted({*records, *replayed}):
        again = replayed.get(step, "not in the ledger")
        for who, recorded in records.get(step, {"nobody": "-"}).items():
            differs = step in replayed and recorded not in (again, "-", _DAMAGED)
            table.add_row(str(step), who, recorded, f"{again} DIFFERS" if differs else again)
    return table


def _judge(folder: RunFolder, ledger: Ledger, records: Records, replayed: dict[int, str]) -> None:
    """Raise the gravest of what is wrong."""
    rows = [(step, who, recorded) for step, by in sorted(records.items()) for who, recorded in by.items()]
    wrong = [
        f"step {step} ({who})"
        for step, who, recorded in rows
        if recorded != _DAMAGED and step in replayed and recorded != replayed[step]
    ]
    if wrong:
        raise NumericsError(
            f"Replay gives other weights than were recorded at {', '.join(wrong)}.",
            where=str(folder.path),
            advice="a replica had other weights than the ledger says, or that record was changed",
        )
    last = max(records, default=0)
    if last > ledger.next_step:
        raise LedgerError(
            f"A digest was recorded at step {last}, but the ledger ends at step {ledger.next_step}: commits are lost.",
            where=str(ledger.path),
            advice=f"restore the file from a copy, or compute them again with `zoray resume {folder.name}`",
        )
    damaged = [str(step) for step, _, recorded in rows if recorded == _DAMAGED]
    if damaged:
        raise RunError(
            f"The snapshot of step {', '.join(damaged)} is damaged; the ledger is whole.",
            where=str(folder.snapshots),
            advice="delete it: replay makes up for it",
        )
