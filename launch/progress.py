"""What a person sees of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from zoray.config import RunConfig
from zoray.errors import ZorayError
from zoray.runs import RunFolder

if TYPE_CHECKING:
    from actors.coordinator import Prepared
    from actors.journal import Progress
    from launch.cluster import Place
    from zoray.protocol import Evaluation, Finish


class Watcher:
    """Shows one run from its start to its end.

    Attributes:
        interval: seconds between two looks at the run.
    """

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.console = Console(highlight=False, soft_wrap=True)
        self.interval = 0.25
        self._live: Live | None = None
        self._lines = Lines(self.console, config.logging_steps)
        self._said = 0
        self._started = time.monotonic()
        self._first_step = 0

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Say that the machines are being got ready, for the time of the block."""
        minimum, maximum, wanted = self.config.replica_limits
        count = f"{wanted}" if maximum is None else f"{minimum} to {maximum}"
        text = f"starting {count} {'replica' if count == '1' else 'replicas'} of {self.config.model}"
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            self.console.print(text, markup=False)
            yield

    def begin(self, prepared: Prepared, place: Place) -> None:
        """The run is about to start."""
        self._started, self._first_step = time.monotonic(), prepared.next_step
        about = prepared.introduction
        share = "" if about.trainable == about.weights else f", {about.trainable:,} of them trained"
        config = self.config
        self.console.print(f"run {self.folder.name} on {place.words}", markup=False)
        self.console.print(f"  {about.weights:,} weights in {config.dtype}{share}", markup=False)
        probes = f"{config.directions} directions × {config.microbatches * config.per_direction_batch_size} examples"
        if config.estimator != "spsa":
            probes += f" by {config.estimator}"
        replicas = f"{prepared.replicas} {'replica' if prepared.replicas == 1 else 'replicas'}"
        self.console.print(f"  {probes} per step, {config.max_steps} steps, {replicas} to begin with", markup=False)
        self.console.print(f"  folder {self.folder.path}", markup=False)
        self.console.print(f"  metrics {prepared.metrics_url}", markup=False)
        if prepared.next_step:
            self.console.print(f"  continuing with step {prepared.next_step}", markup=False)
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8)
            self._live.start()

    def show(self, progress: Progress, stopping: bool = False) -> None:
        """Show where the run is."""
        for text in progress.warnings[self._said :]:
            self.console.print(f"warning: {text}", markup=False)
        self._said = len(progress.warnings)
        if self._live is not None:
            self._live.update(panel(progress, stopping))
        else:
            self._lines.take(progress)

    def end(self, progress: Progress, finish: Finish) -> None:
        """Show what came of the run, and what can be done with it now."""
        self.show(progress)
        if self._live is not None:
            self._live.stop()
        else:
            self._lines.rest(progress)
        seconds = time.monotonic() - self._started
        done = progress.step - self._first_step
        self.console.print(f"{finish.text}: {done} steps in {clock(seconds)}", markup=False)
        for text in closing(progress):
            self.console.print(text, markup=False)
        if finish.digest is not None:
            self.console.print(f"  digest of the weights {finish.digest:016x}, the same on every replica")
        name = self.folder.reference
        again = [] if finish.reason == "done" else [f"zoray resume {name}"]
        for command in (*again, f"zoray verify {name}", f"zoray export {name} --to DIR", f"zoray plot {name}"):
            self.console.print(f"  {command}", markup=False)

    def cut_off(self, error: ZorayError) -> None:
        """The signal that was to stop the run has ended its coordinator too."""
        if self._live is not None:
            self._live.stop()
        self.console.print("stopped by a signal to all processes of this command, before the end of the step")
        self.console.print(f"  {error.advice}", markup=False)


class Lines:
    """Where a run is, in lines: one every so many steps.

    Args:
        console: to print them on.
        every: steps from one line to the next.
    """

    def __init__(self, console: Console, every: int) -> None:
        self.console, self.every = console, every
        self._next = self._shown = 0

    def take(self, progress: Progress) -> None:
        """Print a line if one is due."""
        if progress.step >= self._next and progress.loss is not None:
            self.console.print(line(progress), markup=False)
            self._shown = progress.step
            self._next = (progress.step // self.every + 1) * self.every

    def rest(self, progress: Progress) -> None:
        """Print the last line, whether or not one is due."""
        if self._shown < progress.step:
            self._next = progress.step
            self.take(progress)


def closing(progress: Progress) -> list[str]:
    """What came of a run: the evaluations, and the bytes against what data-parallel training would have sent."""
    found = []
    if progress.last is not None and progress.first is progress.last:
        found.append(f"  held-out loss {evaluated(progress.last)} before the first step")
    elif progress.first is not None and progress.last is not None:
        found.append(f"  held-out loss {outcome(progress.first, progress.last)}")
    found.append(f"  exchanged {exchanged(progress, ' in all', 'data-parallel training would have sent')}")
    counted = ["(2 bytes per trained weight, step and replica)"] if progress.trainable else []
    ledger = [f"the ledger has {size(progress.ledger_bytes)}"] if progress.ledger_bytes else []
    return [*found, f"  {'; '.join((*counted, *ledger))}"] if counted or ledger else found


def exchanged(progress: Progress, amount: str = "", instead: str = "data parallel") -> str:
    """Bytes exchanged, and what data-parallel training would have sent for the same steps."""
    sent, gradients = progress.sent + progress.received, 2 * progress.trainable * progress.replica_steps
    text = f"{size(sent)}{amount}"
    if gradients:
        text += f"; {instead} {size(gradients)}"
    if sent and gradients > sent:
        text += f", {gradients / sent:,.0f} times as much"
    return text


def panel(progress: Progress, stopping: bool) -> RenderableType:
    """The live display."""
    bar = Bar(
        TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.completed}/{task.total}"), expand=True
    )
    bar.add_task("stopping" if stopping else "step", total=progress.max_steps, completed=progress.step)
    table = Table.grid(padding=(0, 2))
    for label, value in facts(progress):
        table.add_row(f"[dim]{label}[/dim]", exchanged(progress) if label == "exchanged" else value)
    return Group(bar, table)


def facts(progress: Progress) -> list[tuple[str, str]]:
    """Label and value of everything there is to say."""
    split = progress.split
    return [
        ("loss", "-" if progress.loss is None else f"{progress.loss:.4f}"),
        ("held-out", "-" if progress.last is None else evaluated(progress.last)),
        ("tokens/s", f"{progress.tokens_per_second:,.0f}"),
        (
            "step",
            f"{split.total:.3f} s = probe {split.probe:.3f} + commit {split.commit:.3f} + wait {split.wait:.3f}",
        ),
        ("replicas", str(progress.replicas)),
        ("exchanged", size(progress.sent + progress.received)),
        ("left", "-" if progress.remaining is None else clock(progress.remaining)),
    ]


def line(progress: Progress) -> str:
    """One plain line."""
    words = [f"step {progress.step}/{progress.max_steps}"]
    words += [f"{label} {value}" for label, value in facts(progress) if value != "-"]
    return "  ".join(words)


def evaluated(evaluation: Evaluation) -> str:
    """An evaluation in a few words; the accuracy where examples were classified, and the score where there is one."""
    text = f"{evaluation.loss:.4f} ± {evaluation.standard_error:.4f}"
    if evaluation.correct:
        text += f", accuracy {evaluation.correct / evaluation.count:.1%}"
    return f"{text}, score {evaluation.score:.4f}" if evaluation.score else text


def outcome(first: Evaluation, last: Evaluation) -> str:
    """Before, after and the difference in standard errors of the evaluation."""
    error = max(first.standard_error, last.standard_error)
    fall = (first.loss - last.loss) / error if error > 0 else float("nan")
    if fall != fall:
        return f"{evaluated(first)} before, {evaluated(last)} after"
    way = "lower" if fall >= 0 else "higher"
    return f"{evaluated(first)} before, {evaluated(last)} after ({abs(fall):.1f} standard errors {way})"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
