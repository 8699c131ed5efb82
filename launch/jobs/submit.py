"""`zoray submit` and `zoray logs`: a run on a cluster, started and followed from a laptop over one HTTP port.

Two small files travel, the configuration as resolved and what this machine is, and the user's own code where asked for.
The driver runs on the cluster's head, so the run goes on without the laptop.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from launch.jobs.driver import CONFIG, SUBMISSION
from launch.jobs.jobserver import OUTPUT_DIR, RUN, JobServer, require_http_address
from launch.jobs.remote import jobs_of, no_zoray, relay, require_job
from launch.jobs.wire import heard, unpacked
from zoray import __version__
from zoray.config import RunConfig, dump, load
from zoray.errors import ConfigError, ResourceError, RunError
from zoray.identity import code_digest
from zoray.runs import new_name

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

_STOP_WAIT = 3600
"""Seconds that `ray job stop` lets a run have to end at its step boundary; three unless told otherwise."""

_ENDING = 30.0
"""Seconds for which a resume waits for the job of a run that was stopped just now."""

_INTERRUPTED = 130
_NOBODYS = shutil.ignore_patterns(".git", "__pycache__", "*.pyc", ".*_cache")
_LEFT_OUT = {".venv", "venv", "runs"}


def submit(
    config_path: str,
    overrides: list[str],
    address: str | None,
    follow: bool,
    working_dir: Path | None,
    any_version: bool,
) -> None:
    """Start a run on a cluster; returns once the cluster has accepted it, or, followed, when the run is over.

    Args:
        config_path, overrides: as for `zoray train`.
        address: of the job server (http://HEAD:8265).
        follow: show what the run says until it ends.
        working_dir: folder with the user's own code, to take along.
        any_version: although the cluster's Ray or Zoray is another than this machine's.

    Raises:
        ZorayError: the run cannot start; nothing of it is left behind.
        SystemExit: the exit status of the followed run, or the user has interrupted.
    """
    address = require_http_address(address, "submit")
    config = load(config_path, overrides)
    name = new_name(config, Path(config_path).stem)
    config = config.model_copy(update={"run_name": name})
    server = JobServer(address)
    _check_ray(server, any_version)
    with _parcel(config, working_dir, any_version) as folder:
        _send(server, name, folder, config.output_dir, follow)


def resume(
    run: str,
    overrides: list[str],
    address: str,
    output_dir: str | None,
    *,
    follow: bool = False,
    break_lock: bool = False,
    any_version: bool = False,
) -> None:
    """Continue a run on a cluster that has its folder; the rest is as `submit`.

    `output_dir`: the folder on the cluster that the run's folder is in; without it, as it was submitted with.

    Raises:
        ZorayError, SystemExit: as `submit`.
    """
    server = JobServer(address)
    _check_ray(server, any_version)
    before = [(job.metadata or {}).get(OUTPUT_DIR) for job in jobs_of(server.jobs(), run)]
    output_dir = output_dir or (before[-1] if before else None) or "runs"
    again = {"run": run, "overrides": overrides, "output_dir": output_dir, "break_lock": break_lock}
    with tempfile.TemporaryDirectory(prefix="zoray-") as folder:
        _write_submission(Path(folder), any_version, {}, again)
        _send(server, Path(run).name, Path(folder), output_dir, follow, patience=_ENDING)


def _send(server: JobServer, name: str, folder: Path, output_dir: str, follow: bool, patience: float = 0.0) -> None:
    """Start the job of a run, wait until the cluster has accepted it, and follow it if wanted."""
    address, job = server.address, _submission_id(server, name, patience)
    # First of all, so that the name is known whatever happens to this command.
    _say(f"run {name}")
    with _interruption(name, address):
        server.submit(
            "zoray drive",
            job,
            working_dir=folder,
            env_vars={"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT)},
            metadata={RUN: name, OUTPUT_DIR: output_dir},
        )
        _say(f"  job {job} at {address}, which checks it now")
        with closing(server.follow(job)) as lines:
            _say(f"  accepted, folder {_verdict(server, job, lines)}")
            if follow:
                _show(lines)
                _conclude(server.info(job), name, address)
                return
    for words in ("logs {} --follow", "status {}", "scale {} N", "stop {}"):
        _say(f"  zoray {words.format(name)} --address {address}")


def logs(run: str, address: str | None, follow: bool) -> None:
    """Show what a submitted run has said, and, followed, what it says until it ends.

    Raises:
        RunError: there is no such run on the cluster.
        SystemExit: the exit status of the followed run, or the user has interrupted.
    """
    address = require_http_address(address, "logs")
    server = JobServer(address)
    job = require_job(server, run)
    if not follow:
        for line in server.text(str(job.submission_id)).splitlines():
            _show_line(line)
        return
    with _interruption(run, address):
        _show(server.follow(str(job.submission_id)))
        _conclude(server.info(str(job.submission_id)), run, address)


def stop(run: str, address: str, *flags: str) -> None:
    """End a run at its next step boundary; one whose driver still starts ends at once.

    Raises:
        RunError: it is not in progress.
        ResourceError: the job server cannot be reached.
    """
    server = JobServer(address)
    going = [job for job in jobs_of(server.jobs(), run) if not job.status.is_terminal()]
    if not going:
        # Not submitted as a job, or over: the cluster knows.
        relay(address, "stop", run, *flags)
        return
    for job in going:
        server.stop(str(job.submission_id))
    _say(f"{run} stops at the next step boundary; `zoray resume {run} --address {address}` continues it")


def _check_ray(server: JobServer, any_version: bool) -> None:
    import ray

    if server.ray_version in (None, ray.__version__):
        return
    text = f"The cluster runs Ray {server.ray_version}, and this machine has {ray.__version__}"
    if any_version:
        _say(f"warning: {text}")
        return
    raise ResourceError(
        f"{text}.",
        where=server.address,
        advice=f"install ray=={server.ray_version} here, or add --any-version: only HTTP is spoken between them",
    )


def _submission_id(server: JobServer, name: str, patience: float) -> str:
    """The id of the run's next job: one that failed before its run began does not stand in its way.

    Raises:
        RunError: the run is in progress.
    """
    until = time.monotonic() + patience
    while True:
        jobs = jobs_of(server.jobs(), name)
        going = any(not job.status.is_terminal() for job in jobs)
        if not going or time.monotonic() >= until:
            break
        time.sleep(0.5)
    if going:
        raise RunError(
            f"The run {name} is in progress on this cluster.",
            where=server.address,
            advice="choose another run_name, or look at it with "
            f"`zoray logs {name} --follow --address {server.address}`",
        )
    return f"zoray-{name}" + (f"-{len(jobs) + 1}" if jobs else "")


@contextmanager
def _parcel(config: RunConfig, working_dir: Path | None, any_version: bool) -> Iterator[Path]:
    """A folder with what travels, for the time of the block."""
    config, local = _moved(config, None if working_dir is None else _folder(working_dir))
    with tempfile.TemporaryDirectory(prefix="zoray-") as made:
        folder = Path(made) / "run"
        if working_dir is None:
            folder.mkdir()
        else:
            _copy(working_dir, folder)
        (folder / CONFIG).write_text(dump(config))
        _write_submission(folder, any_version, local)
        yield folder


def _write_submission(
    folder: Path, any_version: bool, local: dict[str, str], resume: dict[str, Any] | None = None
) -> None:
    submission = {
        "version": __version__,
        "code": code_digest(),
        "any_version": any_version,
        "local": local,
        "resume": resume,
    }
    (folder / SUBMISSION).write_text(json.dumps(submission))


def _copy(working_dir: Path, folder: Path) -> None:
    """The user's own code, without what belongs to this machine; Ray leaves out what .gitignore and .rayignore name."""
    top = str(working_dir)

    def left_out(where: str, names: list[str]) -> set[str]:
        return set(_NOBODYS(where, names)) | (_LEFT_OUT & set(names) if where == top else set())

    try:
        shutil.copytree(working_dir, folder, ignore=left_out)
        for name in (".gitignore", ".rayignore"):
            if (folder / name).is_file():
                with (folder / name).open("a") as file:
                    file.write(f"\n!/{CONFIG}\n!/{SUBMISSION}\n")
    except (shutil.Error, OSError) as error:
        raise ConfigError(
            f"{working_dir} cannot be taken along: {error}.",
            where="--working-dir",
            advice="give a folder with nothing but your own code, all of which you may read",
        ) from None


def _folder(working_dir: Path) -> Path:
    if not working_dir.is_dir():
        raise ConfigError(
            f"{working_dir} is not a folder.", where="--working-dir", advice="give the folder your own code is in"
        )
    return working_dir.resolve()


def _moved(config: RunConfig, working_dir: Path | None) -> tuple[RunConfig, dict[str, str]]:
    """The configuration with paths inside the working directory made relative to it; and what else is only here.

    The second is a key and a path for each of the model and the data that exists on this machine: the cluster sees
    whether it is there too, as what is left out of the working directory is not.
    """
    local: dict[str, str] = {}
    task: dict[str, Any] = {}
    model = config.model
    for key, value in (("model", model), ("task.train", config.task.train), ("task.eval", config.task.eval)):
        if value is None or not os.path.exists(value):
            continue
        path = Path(value).resolve()
        local[key] = str(path)
        if working_dir is None or not path.is_relative_to(working_dir):
            continue
        inside = str(path.relative_to(working_dir))
        if key == "model":
            model = inside
        else:
            task[key.removeprefix("task.")] = inside
    moved = config.model_copy(update={"model": model, "task": config.task.model_copy(update=task)})
    return moved, local


def _verdict(server: JobServer, job: str, lines: Iterator[str]) -> str:
    """Wait until the cluster has accepted the run; returns the run's folder there.

    Raises:
        ZorayError: it has refused it.
    """
    for line in lines:
        message = heard(line) or {}
        if "refused" in message:
            raise unpacked(message["refused"])
        if "accepted" in message:
            return str(message["accepted"])
        _show_line(line)
    raise no_zoray(server, job)


def _show(lines: Iterator[str]) -> None:
    for line in lines:
        _show_line(line)


def _show_line(line: str) -> None:
    if heard(line) is None:
        print(line, flush=True)


def _conclude(job: JobDetails, run: str, address: str) -> None:
    """End with the run's exit status.

    Raises:
        RunError: the run has ended without one.
        SystemExit: it is not 0.
    """
    if not job.status.is_terminal():
        raise ResourceError(
            f"The cluster has ended the connection; the run {run} goes on as far as is known.",
            where=address,
            advice=f"look at it with `zoray logs {run} --follow --address {address}`",
        )
    if job.driver_exit_code:
        raise SystemExit(job.driver_exit_code)
    if job.status == "FAILED":
        said = (job.message or "nothing is known of why").strip().splitlines()[0]
        raise RunError(
            f"The job of {run} failed: {said}", where=f"job {job.submission_id} at {address}",
            advice=f"look at it with `zoray logs {run} --address {address}`",
        )  # fmt: skip
    if job.status == "STOPPED":
        raise SystemExit(_INTERRUPTED)


@contextmanager
def _interruption(run: str, address: str) -> Iterator[None]:
    """Ctrl-C ends the command and not the run, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        _say(f"\nthe run {run} goes on without this command")
        _say(f"  zoray logs {run} --follow --address {address}")
        _say(f"  zoray stop {run} --address {address}")
        raise SystemExit(_INTERRUPTED) from None


def _say(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text, markup=False)
