"""The cluster's side of `zoray submit` and of questions over HTTP; runs on the head, as the entrypoint of a Ray job."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from actors.lock import RunLock
from launch.jobs.wire import VOLUME, enter_volume, packed, say
from zoray import __version__
from zoray.config import RunConfig, load
from zoray.errors import ConfigError, ResourceError, ZorayError
from zoray.identity import code_digest
from zoray.runs import RunFolder

CONFIG, SUBMISSION = ".zoray-config.yaml", ".zoray-submission.json"
"""The two files that travel; beside the user's own, so under names that are nobody else's."""


def answer(words: list[str], every: float, lasting: float) -> None:
    """Run a command of Zoray here and say what it prints, once, or again and again for some time (seconds)."""
    from launch.cluster import NAMESPACE

    ends = time.monotonic() + lasting
    if every:
        import ray

        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), namespace=NAMESPACE, log_to_driver=False)
    while True:
        said = _run(words)
        say(said)
        if not every or said["error"] or time.monotonic() + every > ends:
            return
        time.sleep(every)


def _run(words: list[str]) -> dict[str, Any]:
    from launch.cli import app

    printed = io.StringIO()
    try:
        enter_volume()
        with redirect_stdout(printed):
            app(words, standalone_mode=False)
    except ZorayError as error:
        return {"error": packed(error), "output": ""}
    return {"error": None, "output": printed.getvalue()}


def drive() -> None:
    """Check a submitted run, say whether it is accepted, and see it to its end.

    Raises:
        SystemExit: it is refused; nothing of it is left behind. Or as `train`.
        ZorayError: as `train`.
    """
    from launch.train import begin, proceed

    # Or nothing would be taken back when the job is stopped before the run has begun.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(130))
    here = Path.cwd()
    try:
        submission = json.loads((here / SUBMISSION).read_text())
        check_versions(submission)
        again = submission.get("resume")
        folder, config = _resumed(again) if again else _new(here / CONFIG, submission["local"])
    except ZorayError as error:
        say({"refused": packed(error)})
        raise SystemExit(error.exit_code) from None
    say({"accepted": str(folder.path)})
    if again:
        proceed(folder, config, again["break_lock"])
    else:
        begin(folder, config)


def _new(path: Path, local: dict[str, str]) -> tuple[RunFolder, RunConfig]:
    """A new run that has passed all checks; what was refused leaves no folder behind."""
    from launch.preflight import check_snapshots
    from launch.train import nothing_left_behind

    config = _config(path, local)
    folder = RunFolder.create(config, "run")
    with nothing_left_behind(folder), RunLock(folder.path):
        check_snapshots(folder, config)
        _check(config, folder)
    return folder, config


def _resumed(again: dict[str, Any]) -> tuple[RunFolder, RunConfig]:
    """A run that can go on, and has passed all checks."""
    from launch.train import resumable

    enter_volume()
    folder, config = resumable(again["run"], again["overrides"], again["output_dir"], again["break_lock"])
    _check(config, folder)
    return folder, config


def check_versions(submission: dict[str, Any]) -> None:
    """Refuse a run that was submitted with another Zoray, or warn of it where that was wanted.

    Raises:
        ResourceError: with both versions and the digests of both codes.
    """
    theirs, ours = (submission["version"], submission["code"]), (__version__, code_digest())
    if theirs == ours:
        return
    differs = "version" if theirs[0] != ours[0] else "code"
    text = (
        f"The cluster has another {differs} of Zoray: {ours[0]} (code {ours[1]}), and this machine has "
        f"{theirs[0]} (code {theirs[1]})"
    )
    if submission["any_version"]:
        print(f"warning: {text}")
        return
    raise ResourceError(
        f"{text}.",
        where="handshake",
        advice="install the same here as in the cluster's image, or submit with --any-version to run the cluster's",
    )


def _config(path: Path, local: dict[str, str]) -> RunConfig:
    """The configuration, as it is to be understood on the cluster.

    Raises:
        ConfigError: it names what only the laptop has, or a folder for the run that would not last.
    """
    volume = enter_volume()
    config = load(path)
    for key, there in local.items():
        section: Any = config
        for name in key.split("."):
            section = getattr(section, name)
        if not os.path.exists(section):
            raise ConfigError(
                f"{key} is {section}, which exists on the machine you submit from ({there}), and not on the cluster.",
                where=key,
                advice="put it on a volume that all machines of the cluster mount and give that path, or an object "
                "store's; small files of your own travel with --working-dir",
            )
    if not volume and not os.path.isabs(config.output_dir):
        raise ConfigError(
            f"output_dir is {config.output_dir!r}, and the cluster does not say where relative paths are.",
            where="output_dir",
            advice=f"give an absolute path on a volume that all machines mount, or set {VOLUME} to such a volume in "
            "the environment of the head and the workers",
        )
    return config


def _check(config: RunConfig, folder: RunFolder) -> None:
    from actors.trackers import require
    from launch.cluster import connect
    from launch.jobs.machines import check_machines, check_offers
    from launch.preflight import check_objective, check_paths, check_port

    check_port(config)
    require(config, socket.gethostname())
    connect(config)
    check_offers(config)
    for warning in check_machines(config, folder):
        print(f"warning: {warning}")
    check_paths(config)
    check_objective(config)
