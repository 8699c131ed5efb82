"""The folder of a run: what a person, and a coordinator that resumes, finds of it on disk.

config.yaml      the configuration as resolved
ledger/          the run itself: the commits
metrics/         steps.jsonl, evaluations.jsonl, digests.jsonl: one JSON object a line
snapshots/       step-N/: weights at a step, to shorten replay; elsewhere by `snapshot_dir`
log.txt          what happened, in words
state.json       who runs it and where, or how it ended
tensorboard/     event files, where `report_to` asks for them
trackers/        NAME.json: under which id an experiment tracker knows the run
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zoray.config import RunConfig, dump, load
from zoray.errors import RunError
from zoray.stores import is_uri, join

Table = Literal["steps", "evaluations", "digests"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run. `create` makes a new one, `find` opens one that exists."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return self.path.name

    @property
    def reference(self) -> str:
        """What to call the run by in a command typed here: its name, or its path where the name would not be found."""
        return self.name if self.path == Path("runs").absolute() / self.name else str(self.path)

    @property
    def config_path(self) -> Path:
        """The configuration as resolved."""
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        """Folder of the ledger."""
        return self.path / "ledger"

    def is_at(self, handle: int) -> bool:
        """Whether the folder of that name is the one that `handle` (a file descriptor) was opened on."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(handle), self.path.stat())
        return False

    def set_aside(self) -> Path:
        """Give the folder another name, which is returned, so that it can be deleted while others make a new one.

        On NFS a folder with an open file, its lock, cannot be deleted, but it can be renamed.
        """
        return self.path.rename(self.path.with_name(f".{self.name}.{secrets.token_hex(4)}"))

    @property
    def snapshots(self) -> Path:
        """Folder of the snapshots, unless the configuration says otherwise (`snapshots_of`)."""
        return self.path / "snapshots"

    def snapshots_of(self, config: RunConfig) -> Path | str:
        """Where the run keeps its snapshots: the folder, or, by `snapshot_dir`, another one or a URI."""
        if config.snapshot_dir is None:
            return self.snapshots
        if is_uri(config.snapshot_dir):
            return join(config.snapshot_dir, self.name)
        # From the folder of the runs, and not from where a process happens to be: many look for it.
        return self.path.parent / config.snapshot_dir / self.name

    @property
    def log(self) -> Path:
        """The log, in words."""
        return self.path / "log.txt"

    @property
    def state_path(self) -> Path:
        """Who runs it and where, or how it ended."""
        return self.path / "state.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @staticmethod
    def create(config: RunConfig, stem: str) -> RunFolder:
        """A new folder under `output_dir`, named `run_name`, or `stem` and four hexadecimal digits.

        Raises:
            RunError: a folder of that name exists, or it cannot be made.
        """
        name = new_name(config, stem)
        path = Path(config.output_dir).absolute() / name
        try:
            path.mkdir(parents=True)
            for part in ("metrics", "snapshots"):
                (path / part).mkdir()
        except FileExistsError:
            raise RunError(
                f"The run {name} exists already.",
                where=str(path),
                advice=f"continue it with `zoray resume {RunFolder(path).reference}`, or choose another run_name",
            ) from None
        except OSError as error:
            raise RunError(f"The folder of the run cannot be made: {error}.", where=str(path)) from error
        folder = RunFolder(path)
        folder.write_config(config)
        return folder

    @staticmethod
    def find(run: str, output_dir: str = "runs") -> RunFolder:
        """The folder of a run, given by its path or by its name under `output_dir`.

        Raises:
            RunError: there is no such run; the error lists those there are.
        """
        if (folder := RunFolder.here(run, output_dir)) is not None:
            return folder
        known = [folder.name for folder in RunFolder.all(output_dir)]
        raise RunError(
            f"There is no run {run!r}.",
            where=str(Path(output_dir).absolute()),
            advice="give one of: " + ", ".join(known) if known else "start one with `zoray train CONFIG`",
        )

    @staticmethod
    def here(run: str, output_dir: str = "runs") -> RunFolder | None:
        """As `find`; None if there is no such run."""
        for path in (Path(run), Path(output_dir) / run):
            if (path / "config.yaml").is_file():
                return RunFolder(path.absolute())
        return None

    @staticmethod
    def all(output_dir: str = "runs") -> list[RunFolder]:
        """The runs under `output_dir`, by name: the folders with a configuration."""
        found = sorted(path.parent for path in Path(output_dir).absolute().glob("*/config.yaml") if path.is_file())
        return [RunFolder(path) for path in found]

    def require_ledger(self) -> None:
        """See that the run has begun.

        Raises:
            RunError: it has no ledger.
        """
        if not (self.ledger / "commits.bin").exists():
            raise RunError(
                "The run has no ledger: it ended before its first step.",
                where=str(self.path),
                advice="remove that folder, and start it anew with `zoray train`",
            )

    def write_config(self, config: RunConfig) -> None:
        """Write the configuration as resolved."""
        _replace(self.config_path, dump(config).encode())

    def config(self, overrides: list[str] | None = None) -> RunConfig:
        """The run's configuration, with overrides of the form `key=value`."""
        return load(self.config_path, overrides or [])

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Say who runs it and where, or how it ended, in place of what was said before."""
        _replace(self.state_path, json.dumps(state, indent=2).encode() + b"\n")

    def read_state(self) -> dict[str, Any]:
        """What `write_state` said last; empty if nothing, or nothing that can be read."""
        return _read(self.state_path)

    def write_tracker(self, name: str, known: Mapping[str, Any]) -> None:
        """Note under which id an experiment tracker knows the run."""
        self._tracker(name).parent.mkdir(exist_ok=True)
        _replace(self._tracker(name), json.dumps(known, indent=2).encode() + b"\n")

    def read_tracker(self, name: str) -> dict[str, Any]:
        """What `write_tracker` noted; empty if nothing, or nothing that can be read."""
        return _read(self._tracker(name))

    def append(self, table: Table, row: Mapping[str, Any]) -> None:
        """Add one line to a table of metrics; one that a crash cut off does not swallow it."""
        with self._table(table).open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")

    def rows(self, table: Table) -> Iterator[dict[str, Any]]:
        """The rows of a table in order; a step that was run again after a crash counts once, the last time.

        A last line that was cut off by a crash is passed over.
        """
        found = {step: row for step, row, _ in self._lines(table)}
        yield from (found[step] for step in sorted(found))

    def forget(self, table: Table, after: int) -> None:
        """Remove the rows of the steps after `after`: their commits were thrown away and will be computed again."""
        kept, gone = [], False
        for step, _, line in self._lines(table):
            if step <= after:
                kept.append(line + b"\n")
            else:
                gone = True
        if gone:
            _replace(self._table(table), b"".join(kept))

    def _tracker(self, name: str) -> Path:
        return self.path / "trackers" / f"{name}.json"

    def _table(self, table: Table) -> Path:
        return self.path / "metrics" / f"{table}.jsonl"

    def _lines(self, table: Table) -> Iterator[tuple[int, dict[str, Any], bytes]]:
        path = self._table(table)
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            yield int(row["step"]), row, line


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def new_name(config: RunConfig, stem: str) -> str:
    """The name of a new run: `run_name`, or `stem` (the configuration file's) and four hexadecimal digits."""
    return config.run_name or f"{re.sub(r'[^A-Za-z0-9._-]+', '-', stem).strip('-.') or 'run'}-{secrets.token_hex(2)}"


def _replace(path: Path, content: bytes) -> None:
    # A name of its own: the process that ends and the one that says so may write at the same time.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            # Or the new name may reach the disk before what it names, and a power cut leaves neither content.
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
