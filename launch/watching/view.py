"""What `zoray watch` shows: a run's status as something to look at, and what has changed since the last look."""

from __future__ import annotations

from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from launch.progress import clock, panel
from launch.status import counts, replica_table
from launch.watching.braille import draw

if TYPE_CHECKING:
    from actors.journal import Progress, Split
    from actors.status import RunStatus

_PARTS = (("probe", "█", "blue"), ("commit", "▓", "yellow"), ("wait", "░", "bright_black"))
_CHANGES = 5


class Changes:
    """Tells what is different between a status and the one before: replicas, faults, warnings, the target.

    Attributes:
        recent: the last few differences, each with the time of day.
    """

    def __init__(self) -> None:
        self.recent: deque[str] = deque(maxlen=_CHANGES)
        self._before: RunStatus | None = None

    def take(self, status: RunStatus) -> list[str]:
        """The differences to the last status, in words; of the first status, its warnings."""
        before, self._before = self._before, status
        found = [] if before is None else [*_replicas(before, status), *_counts(before, status)]
        said = 0 if before is None else len(before.progress.warnings)
        found += [f"warning: {text}" for text in status.progress.warnings[said:]]
        now = datetime.now().strftime("%H:%M:%S")
        self.recent.extend(f"{now} {text}" for text in found)
        return found


def _replicas(before: RunStatus, after: RunStatus) -> list[str]:
    old, new = ({replica.name: replica for replica in status.replicas} for status in (before, after))
    found = [f"{name} is gone, it was {old[name].state}" for name in old if name not in new]
    for name, replica in new.items():
        if name not in old:
            found.append(f"{name} is {replica.state} on machine {replica.node[:8]}")
        elif replica.state != old[name].state:
            found.append(f"{name} is {replica.state}, it was {old[name].state} for {clock(old[name].seconds)}")
    return found


def _counts(before: RunStatus, after: RunStatus) -> list[str]:
    found = [f"{after.target} replicas wanted, instead of {before.target}"] if after.target != before.target else []
    for kind, count in after.faults.items():
        more = count - before.faults.get(kind, 0)
        if more > 0:
            found.append(f"fault: {more} {kind}")
    return found


def view(status: RunStatus, changes: Changes, width: int, height: int) -> RenderableType:
    """The whole display, in so many columns and, if the terminal has them, not more than so many lines."""
    progress = status.progress
    limits = f"at least {status.minimum}" + (f", at most {status.maximum}" if status.maximum is not None else "")
    head = f"{status.run}: {status.state}; {counts(status)}, {status.target} wanted ({limits})"
    faults = ", ".join(f"{kind} {count}" for kind, count in status.faults.items() if count) or "none"
    below = [f"faults {faults}"]
    if progress.metrics_url:
        below.append(f"metrics {progress.metrics_url}")
    # Title, bar, facts, step time, a head over the replicas, and the lines below.
    room = height - 13 - len(below) - len(changes.recent)
    shown = max(1, min(len(status.replicas), room - 5))
    return Group(
        Text(head, style="bold", no_wrap=True, overflow="ellipsis"),
        panel(progress, stopping=status.state == "stopping"),
        split_bar(progress.split, width),
        curve(progress, width, max(4, min(12, room - shown))),
        replica_table(status, shown),
        *(Text(text, style="dim", no_wrap=True, overflow="ellipsis") for text in (*below, *changes.recent)),
    )


def curve(progress: Progress, width: int, height: int) -> RenderableType:
    """The training loss over the steps so far."""
    if not progress.curve:
        return Text("no step yet", style="dim")
    lines = draw(progress.curve, max(20, width), height)
    return Text("\n".join(lines), style="cyan", no_wrap=True, overflow="crop")


def split_bar(split: Split, width: int) -> Text:
    """Where the time of recent steps went, as a bar."""
    bar = Text(no_wrap=True, overflow="crop")
    if split.total <= 0:
        return bar
    shares = [(name, sign, style, getattr(split, name) / split.total) for name, sign, style in _PARTS]
    room = max(10, min(60, width - 40))
    for _, sign, style, share in shares:
        bar.append(sign * round(share * room), style)
    for name, _, style, share in shares:
        bar.append(f"  {name} {share:.0%}", style)
    return bar
