"""`zoray watch`: look at a run until it ends. Whoever watches changes nothing, and may leave at any time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from launch.control import IN_PROGRESS, Known, known
from launch.progress import Lines, closing, facts
from launch.status import ended, print_ended
from launch.watching.looking import HasEnded, Look, looking, looking_over_http
from launch.watching.view import Changes, curve, split_bar, view
from zoray.errors import ResourceError, RunError, ZorayError
from zoray.runs import RunFolder

if TYPE_CHECKING:
    from actors.journal import Progress
    from actors.status import RunStatus

_HEIGHT = 12
"""Lines of the curve of a run that has ended."""

_PATIENCE = 40.0
"""Seconds after which the lock of a coordinator that died is free, on any volume."""


def watch(run: str, output_dir: str, address: str | None, http: str | None = None) -> None:
    """Show a run in progress until it ends; of one that has ended, what it was when it did.

    Args:
        run, output_dir, address: as for `launch.control.attach`.
        http: address of a job server; the run and its folder are on the cluster then.

    Raises:
        RunError: there is no such run, or its coordinator died.
        ResourceError: its cluster cannot be reached.
    """
    console = Console(highlight=False, soft_wrap=True)
    if http is not None:
        _follow(console, run, None, looking_over_http(run, output_dir, http))
        return
    told = ended(run, output_dir) if not address else None
    if told is not None:
        _show_ended(console, told)
        return
    # Its folder need not be here.
    _follow(console, run, RunFolder.here(run, output_dir), looking(run, output_dir, address))


def _follow(console: Console, run: str, folder: RunFolder | None, source: AbstractContextManager[Look]) -> None:
    try:
        with source as look:
            Watch(console, run, folder).until_it_ends(look)
    except KeyboardInterrupt:
        console.print(f"{run} goes on; `zoray watch {run}` looks at it again", markup=False)


class Watch:
    """Follows one run.

    Args:
        console: to show it on; a terminal has a live display, anything else gets lines.
        run: what the user calls it.
        folder: of the run, if it is here.
    """

    def __init__(self, console: Console, run: str, folder: RunFolder | None) -> None:
        self.console, self.run, self.folder = console, run, folder
        self.changes = Changes()
        self.last: RunStatus | None = None
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        every = 10
        if folder is not None:
            with suppress(ZorayError):
                every = folder.config().logging_steps
        self._lines = Lines(console, every)

    def until_it_ends(self, look: Look) -> None:
        """Show what `look` says until it says that the run is over, or its folder does.

        Raises:
            ZorayError: it cannot be looked at, or its coordinator died.
        """
        told: Known | None = None
        if self._live is not None:
            self._live.update(Text(f"looking for {self.run}", style="dim"))
            self._live.start()
        try:
            while self._over() is None:
                if (status := look()) is not None:
                    self._show(status)
                elif (told := self._ended_meanwhile()) is not None:
                    break
        except ZorayError as error:
            told = self._how_it_ended(error)
        finally:
            if self._live is not None:
                self._live.stop()
        self._conclude(told)

    def _show(self, status: RunStatus) -> None:
        self.last = status
        changes = self.changes.take(status)
        if self._live is not None:
            self._live.update(view(status, self.changes, self.console.width, self.console.height))
            return
        for text in changes:
            self.console.print(text, markup=False)
        self._lines.take(status.progress)

    def _over(self) -> RunStatus | None:
        """The last status, if it says that the run is over."""
        return self.last if self.last is not None and self.last.text is not None else None

    def _ended_meanwhile(self) -> Known | None:
        told = known(self.folder) if self.folder is not None else None
        return told if told is not None and told.state not in IN_PROGRESS else None

    def _how_it_ended(self, error: ZorayError) -> Known:
        """What the run's folder says once the coordinator cannot be asked any more.

        Raises:
            ZorayError: it says nothing, or that the run goes on.
        """
        if isinstance(error, HasEnded):
            return error.known
        if self.folder is None or (self.last is None and self._ended_meanwhile() is None):
            raise self._unheard(error)
        deadline = time.monotonic() + _PATIENCE
        while (told := self._ended_meanwhile()) is None:
            if time.monotonic() > deadline:
                raise self._unheard(error)
            time.sleep(0.1)
        return told

    def _unheard(self, error: ZorayError) -> ZorayError:
        if self.last is None:
            return error
        progress = self.last.progress
        return ResourceError(
            f"Nothing is heard of {self.last.run} any more, after step {progress.step} of {progress.max_steps}: "
            f"{error.what}",
            where=error.where,
            advice=f"`zoray status {self.run}` says whether it goes on; if it does not, `zoray resume {self.run}`",
        )

    def _conclude(self, told: Known | None) -> None:
        """Say how it ended.

        Raises:
            RunError: its coordinator died.
        """
        if told is not None and told.state == "lost":
            raise RunError(
                f"The coordinator of {told.name} died after step {told.step}.",
                where=told.path,
                advice=f"nothing that was committed is lost: continue with `zoray resume {told.reference}`",
            )
        if self.last is not None:
            if self._live is None:
                self._lines.rest(self.last.progress)
            for text in closing(self.last.progress):
                self.console.print(text, markup=False)
        if told is not None:
            print_ended(told, self.console)
        elif self.last is not None:
            self.console.print(f"{self.last.run}: {self.last.state}, {self.last.text}", markup=False)
            if self.last.state != "done":
                self.console.print(f"  zoray resume {self.run}", markup=False)


def _show_ended(console: Console, told: Known) -> None:
    progress = remembered(RunFolder(Path(told.path)))
    if progress.curve:
        if console.is_terminal:
            console.print(curve(progress, console.width, _HEIGHT))
            console.print(split_bar(progress.split, console.width))
        for label, value in facts(progress):
            if label in ("loss", "tokens/s", "step"):
                console.print(f"  {label:<10} {value}", markup=False)
        for text in closing(progress):
            console.print(text, markup=False)
    print_ended(told, console)


def remembered(folder: RunFolder) -> Progress:
    """What the tables in a run's folder tell of it, over all lives of its coordinator."""
    from actors.curve import Curve
    from actors.journal import RECENT, Progress, Split
    from zoray.protocol import Evaluation

    rows = list(folder.rows("steps"))
    told, state = known(folder), folder.read_state()
    recent = rows[-RECENT:]
    names = {"total": "seconds", "probe": "probe_seconds", "commit": "commit_seconds", "wait": "wait_seconds"}
    split = Split(**{name: _mean(row[key] for row in recent) for name, key in names.items()}) if rows else Split()
    tokens = _mean(row.get("tokens", 0.0) for row in recent) if rows else 0.0
    evaluations = [
        Evaluation(row["loss"], row["standard_error"], row["count"], row["correct"])
        for row in folder.rows("evaluations")
    ]
    return Progress(
        step=told.step or 0,
        max_steps=told.max_steps or 0,
        loss=told.loss,
        first=evaluations[0] if evaluations else None,
        last=evaluations[-1] if evaluations else None,
        tokens_per_second=tokens / split.total if split.total else 0.0,
        split=split,
        sent=_counted(rows, "sent"),
        received=_counted(rows, "received"),
        replica_steps=sum(int(row.get("replicas", 0)) for row in rows),
        trainable=int(state.get("trainable", 0)),
        curve=Curve.of((int(row["step"]), row["loss"]) for row in rows).points,
        ledger_bytes=sum(path.stat().st_size for path in folder.ledger.glob("*")),
        finished=True,
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _counted(rows: list[dict[str, Any]], key: str) -> int:
    """How far a counter came that begins again at 0 with every life of the coordinator."""
    counts = [int(row.get(key, 0)) for row in rows]
    return counts[-1] + sum(a for a, b in pairwise(counts) if b < a) if counts else 0
