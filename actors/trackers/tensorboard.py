"""TensorBoard: event files in the run's folder, where `tensorboard --logdir runs` finds them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from zoray.runs import RunFolder


class TensorBoard:
    """Event files; each life of the coordinator writes one of its own, and TensorBoard shows them as one run.

    The writer is that of single records: `EventFileWriter`, around it, has a thread of its own, in which a disk that is
    full would go unnoticed.
    """

    def __init__(self, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        folder.tensorboard.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names, and knows them by the middle part.
        stem = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter((folder.tensorboard / stem).open("xb"))
        self._settings: Mapping[str, Any] | None = settings
        self._write(Event(file_version="brain.Event:2"), time.time())

    def begin(self, step: int) -> None:
        """TensorBoard forgets what it has read of later steps when it reads that a session starts."""
        now = time.time()
        # It forgets from a step on, that one included, and an evaluation of these weights stays true.
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)), now)
        if self._settings is not None:
            rows = "".join(f"| {key} | {value} |\n" for key, value in self._settings.items())
            text = text_pb("configuration", f"| key | value |\n|---|---|\n{rows}")
            self._write(Event(step=step, summary=text), now)
            self._settings = None

    def log(self, step: int, values: Mapping[str, float], time: float) -> None:
        """One event with all values."""
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=found)), time)

    def close(self, reason: str | None) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event, time: float) -> None:
        event.wall_time = time
        self._file.write(event.SerializeToString())
        self._file.flush()
