"""`zoray train --or-resume`: one command that begins a run or continues it, for whatever starts jobs again."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from actors.lock import STALE_AFTER, RunLock, held_by
from launch.train import Stopped, resume, train
from zoray.config import RunConfig, changed, load
from zoray.errors import ConfigError, RunError
from zoray.runs import RunFolder

PATIENCE = 180.0
"""Seconds to wait for whoever had the run before: a pod that is being ended, then for its lock to be free."""

_OURS = {"config.yaml", "ledger", "metrics", "snapshots", "log.txt", "state.json", "lock"}


def train_or_resume(config_path: str, overrides: list[str]) -> None:
    """Continue the run of the configuration's `run_name`, or begin it where it has no first step yet.

    What the configuration says anew (replicas, evaluation, more steps) counts from then on; another computation under
    the same name is refused.

    Raises:
        ZorayError: the run cannot begin or continue, or ended with a fault.
        Stopped: it was stopped at a step boundary by a signal. One that was stopped by `zoray stop` has ended as it
            should: whoever repeats a command that fails must not start it again.
    """
    config = load(config_path, overrides)
    folder = _named(config, config_path)
    _await_end(folder)
    try:
        if (folder.ledger / "commits.bin").exists():
            _renew(folder, config, config_path)
            resume(str(folder.path), [])
            return
        if _is_unborn(folder):
            # What a kill before the first step left, down to the lock file.
            with RunLock(folder.path):
                aside = folder.set_aside()
            shutil.rmtree(aside, ignore_errors=True)
        train(config_path, overrides)
    except Stopped as stopped:
        if stopped.by_signal:
            raise


def _named(config: RunConfig, config_path: str) -> RunFolder:
    if config.run_name is None:
        raise ConfigError(
            "--or-resume cannot tell which run to continue: run_name is not given.",
            where=f"{config_path}, run_name",
            advice="name the run: run_name=...",
        )
    return RunFolder(Path(config.output_dir).absolute() / config.run_name)


def _renew(folder: RunFolder, config: RunConfig, config_path: str) -> None:
    """Let the run have the configuration, if it is the same computation."""
    for key, old, new in changed(folder.config(), config):
        raise RunError(
            f"{key} was {old!r} and would become {new!r}; that would be another computation under the same name.",
            where=f"{config_path}, {key}",
            advice=f"give it another run_name, or continue as it was: `zoray resume {folder.reference}`",
        )
    with RunLock(folder.path):
        folder.write_config(config)


def _is_unborn(folder: RunFolder) -> bool:
    """Whether there is a folder, and nothing in it but what a run has before its first step."""
    if not folder.path.is_dir():
        return False
    # A kill may have come in the middle of writing one of them.
    names = {path.name for path in folder.path.iterdir() if not path.name.startswith(".") and path.suffix != ".tmp"}
    return names <= _OURS


def _await_end(folder: RunFolder) -> None:
    """Wait while another process has the run.

    Raises:
        RunError: it still has it after `PATIENCE`.
    """
    deadline, told = time.monotonic() + PATIENCE, False
    while (owner := held_by(folder.path)) is not None:
        if time.monotonic() >= deadline:
            # It refuses, and says why, unless the other has just ended.
            RunLock(folder.path).acquire().release()
            return
        if not told:
            told = True
            print(
                f"{folder.name} is, or was less than {STALE_AFTER:g} s ago, written by process {owner['pid']} on "
                f"{owner['host']}: waiting up to {PATIENCE:g} s for it to end",
                flush=True,
            )
        time.sleep(1.0)
