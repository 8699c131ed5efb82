"""`zoray list`, `status`, `scale` and `stop`: runs in progress, seen and changed from another process."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.control import IN_PROGRESS, Known, attach, known, running, to_json
from launch.progress import clock, facts
from zoray.errors import RunError
from zoray.runs import RunFolder

if TYPE_CHECKING:
    from actors.status import ReplicaStatus, RunStatus


def show(run: str, as_json: bool, output_dir: str, address: str | None) -> None:
    """Say where a run is and what its replicas do; of one that has ended, how.

    Raises:
        RunError: there is no such run; the error lists those there are.
        ResourceError: its cluster cannot be reached.
    """
    told = ended(run, output_dir) if not address else None
    if told is not None:
        print(to_json(told)) if as_json else print_ended(told, Console(highlight=False, soft_wrap=True))
        return
    with attach(run, output_dir, address) as live:
        status = live.status()
    print(to_json(status)) if as_json else _print_live(status)


def listing(as_json: bool, output_dir: str, address: str | None) -> None:
    """Say which runs there are: those whose folders are here, and those in progress on a cluster.

    Raises:
        ResourceError: the cluster cannot be reached.
    """
    here = {folder.name: known(folder) for folder in RunFolder.all(output_dir)}
    address = address or os.environ.get("RAY_ADDRESS")
    live = running(address) if address else {}
    if as_json:
        rows = [json.loads(to_json(live.get(name) or here[name])) for name in sorted({*here, *live})]
        print(json.dumps(rows))
        return
    if not here and not live:
        Console(highlight=False).print(f"no runs in {output_dir}: start one with `zoray train CONFIG`", markup=False)
        return
    table = Table("run", "state", "step", "loss", "replicas", box=None)
    for name in sorted({*here, *live}):
        table.add_row(*(_live_row(live[name]) if name in live else _known_row(here[name])))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def scale(run: str, replicas: int, output_dir: str, address: str | None, memory: str | None = None) -> None:
    """Change how many replicas a run in progress should have, and how those started from now on are held.

    Raises:
        RunError: there is no such run in progress.
        ConfigError: fewer than its minimum or more than its maximum, or `memory` is no such section.
    """
    with attach(run, output_dir, address) as live:
        before = live.scale(replicas, memory)
    have = sum(replica.state == "active" for replica in before.replicas)
    change = "as before" if replicas == before.target else f"instead of {before.target}"
    change += "" if memory is None else f", new ones held by {memory}"
    text = f"{live.name}: {replicas} {'replica' if replicas == 1 else 'replicas'} wanted, {change}; {have} at work"
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def stop(run: str, output_dir: str, address: str | None) -> None:
    """End a run in progress at its next step boundary.

    Raises:
        RunError: there is no such run in progress.
    """
    with attach(run, output_dir, address) as live:
        live.stop()
    text = f"{live.name} stops at the next step boundary; `zoray resume {run}` continues it"
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def ended(run: str, output_dir: str) -> Known | None:
    """What is known of a run whose folder is here, unless it is in progress.

    Raises:
        RunError: there is no such folder, and no cluster to ask.
    """
    try:
        folder = RunFolder.find(run, output_dir)
    except RunError:
        if os.environ.get("RAY_ADDRESS"):
            return None
        raise
    told = known(folder)
    return None if told.state in IN_PROGRESS else told


def print_ended(told: Known, console: Console) -> None:
    """Say how a run has ended."""
    what = told.text or told.words
    if told.state == "lost":
        what += f"; `zoray resume {told.reference}` continues with step {told.step}"
    steps = f"step {told.step}" + (f" of {told.max_steps}" if told.max_steps is not None else "")
    console.print(f"{told.name}: {told.state}, {steps}: {what}", markup=False)
    console.print(f"  folder {told.path}", markup=False)


def _print_live(status: RunStatus) -> None:
    console = Console(highlight=False, soft_wrap=True)
    progress = status.progress
    console.print(f"{status.run}: {status.state}, step {progress.step} of {progress.max_steps}", markup=False)
    limits = f"at least {status.minimum}" + (f", at most {status.maximum}" if status.maximum is not None else "")
    values = [(label, value) for label, value in facts(progress) if label != "replicas"]
    for label, value in (*values, ("replicas", f"{counts(status)}; {status.target} wanted ({limits})")):
        console.print(f"  {label:<10} {value}", markup=False)
    met = [f"{kind} {count}" for kind, count in status.faults.items() if count]
    console.print(f"  {'faults':<10} {', '.join(met) or 'none'}", markup=False)
    console.print(f"  {'metrics':<10} {progress.metrics_url}", markup=False)
    (console if console.is_terminal else Console(width=160)).print(replica_table(status))


def replica_table(status: RunStatus, most: int | None = None) -> Table:
    """The replicas of a run, a row each; not more than `most` of them, and how many there are beside."""
    shown = status.replicas[:most]
    left = len(status.replicas) - len(shown)
    table = Table(box=None, caption=f"and {left} more" if left else None, caption_justify="left")
    for column in ("replica", "state", "for", "step", "lag", "does", "process", "machine"):
        # What there is no room for is taken from the other columns, and cut off.
        table.add_column(column, no_wrap=column not in ("does", "process", "machine"))
    for replica in shown:
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in _replica_row(replica)))
    return table


def _replica_row(replica: ReplicaStatus) -> tuple[str, ...]:
    process = f"{', '.join(map(str, replica.pids))} on {replica.host}" if replica.pids else "-"
    step, lag = ("-", "-") if replica.step is None else (str(replica.step), str(replica.lag))
    return (
        replica.name, replica.state, clock(replica.seconds), step, lag, replica.item or "-", process, replica.node[:8],
    )  # fmt: skip


def counts(status: RunStatus) -> str:
    """How many replicas are in which state."""
    states = [replica.state for replica in status.replicas]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none"


def _live_row(status: RunStatus) -> tuple[str, ...]:
    progress = status.progress
    loss = "-" if progress.loss is None else f"{progress.loss:.4f}"
    have = sum(replica.state == "active" for replica in status.replicas)
    return status.run, status.state, f"{progress.step}/{progress.max_steps}", loss, f"{have} of {status.target}"


def _known_row(told: Known) -> tuple[str, ...]:
    loss = "-" if told.loss is None else f"{told.loss:.4f}"
    return told.name, told.state, f"{told.step}/{told.max_steps or '?'}", loss, "-"
