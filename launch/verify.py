"""`zoray verify`: is the ledger whole, and does replaying it give the weights the replicas had?"""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from launch.restore import base_replica, open_run
from zoray.errors import NumericsError
from zoray.identity import check_base
from zoray.runs import RunFolder
from zoray.snapshot import steps


def verify(run: str, output_dir: str) -> None:
    """Check the hash chain, then replay from the base model, without snapshots, to every recorded digest.

    Raises:
        LedgerError: the ledger is damaged (with the offset) or belongs to another model.
        NumericsError: replay gives other weights than were recorded.
    """
    console = Console(highlight=False, soft_wrap=True)
    folder, config, ledger = open_run(run, output_dir)
    count = ledger.next_step
    console.print(f"hash chain: {count} commits, whole, head {ledger.head.hex()[:16]}", markup=False)
    replica = base_replica(config, ledger)
    check_base(ledger.header, replica, str(ledger.path))
    expected = recorded_digests(folder)
    table = Table("step", "recorded by", "digest", "replayed", box=None)
    wrong = []
    for step in sorted({*(s for s in expected if s <= count), count}):
        replica.apply(list(ledger.commits(replica.step, step)))
        replayed = f"{replica.digest():016x}"
        for who, digest in expected.get(step, {"nobody": "-"}).items():
            agrees = digest in (replayed, "-")
            table.add_row(str(step), who, digest, replayed if agrees else f"{replayed} DIFFERS")
            if not agrees:
                wrong.append(f"step {step} ({who})")
    console.print(table)
    if wrong:
        raise NumericsError(
            f"Replay gives other weights than were recorded at {', '.join(wrong)}.",
            where=str(folder.path),
            advice="a replica had other weights than the ledger says, or the base model changed in a frozen part",
        )
    if not any(step <= count for step in expected):
        console.print("no digest was recorded (the run did not end in order): nothing to compare with", markup=False)
    console.print(f"verified: the weights at step {count} have digest {replica.digest():016x}", markup=False)


def recorded_digests(folder: RunFolder) -> dict[int, dict[str, str]]:
    """Digests by step and by who recorded them: the replicas, or a snapshot."""
    found: dict[int, dict[str, str]] = {}
    for row in folder.rows("digests"):
        found.setdefault(int(row["step"]), {})["replicas"] = row["digest"]
    for step in steps(folder.snapshots):
        info = json.loads((folder.snapshots / f"step-{step}" / "snapshot.json").read_text())
        found.setdefault(step, {})["snapshot"] = info["digest"]
    return found
