"""Asking a cluster over HTTP: a short job runs a command of Zoray there, and what it says is read back.

`ask` is one question, `asks` one that is put again and again to a single job, for a live view::

    text = ask("http://head:8265", "status", "sst2-7f3a", "--json")
    for text in asks("http://head:8265", "status", "sst2-7f3a", "--json", every=1.0):
        status = json.loads(text)

Both give what the command prints on the cluster, and raise the `ZorayError` it raises there.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.jobs.jobserver import OUTPUT_DIR, RUN, JobServer
from launch.jobs.wire import heard, unpacked
from zoray.errors import ResourceError, RunError, ZorayError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

_QUESTION = "zoray-ask-"
_PATIENCE = 120.0
_POLL = 0.2
_KEPT = 600.0
"""Seconds an answered question is kept."""

_LEASE = 300.0
"""Seconds after which a job that answers again and again ends by itself: nobody tells it that the laptop is gone."""


def ask(address: str, *words: str) -> str:
    """Run a command (`status`, `list`, `scale` or `stop` with its arguments) on the cluster; returns what it prints.

    A run is found by its name, wherever its configuration put its folder, if it was submitted to this cluster.

    Raises:
        ZorayError: what the command raises there.
        ResourceError: the cluster does not answer, or has no Zoray that understands the question.
    """
    server = JobServer(address)
    job = _put(server, words)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            # In this order: what it said last is there once it has ended.
            ended = server.info(job).status.is_terminal()
            for line in server.text(job).splitlines():
                if (message := heard(line)) is not None:
                    return _answer(message)
            if ended:
                raise no_zoray(server, job)
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"The cluster did not answer within {_PATIENCE:.0f} s.",
                    where=f"job {job} at {address}",
                    advice="its head may be busy; look at the job in Ray's dashboard",
                )
            time.sleep(_POLL)
        except BaseException:
            # Nothing may be done later that was said to have failed.
            with suppress(ZorayError):
                server.stop(job)
            raise


def asks(address: str, *words: str, every: float = 1.0) -> Generator[str, None, None]:
    """The same question every so many seconds, answered by one job; ends with the question's first error.

    Close the iterator when the answers are no longer wanted; the job ends then, or by itself within five minutes.

    Raises:
        ZorayError, ResourceError: as `ask`.
    """
    server = JobServer(address)
    while True:
        job, answered = _put(server, words, "--every", f"{every:g}", "--lasting", f"{_LEASE:g}"), False
        try:
            for line in server.follow(job):
                if (message := heard(line)) is not None:
                    answered = True
                    yield _answer(message)
        finally:
            with suppress(ZorayError):
                server.stop(job)
        if not answered:
            raise no_zoray(server, job)


def relay(address: str, *words: str) -> None:
    """Print what a command says on the cluster."""
    print(ask(address, *words), end="")


def jobs_of(jobs: list[JobDetails], run: str) -> list[JobDetails]:
    """The jobs that a run was submitted by, the oldest first; also those that others than `zoray submit` have made."""
    named = [job for job in jobs if (job.metadata or {}).get(RUN) == run]
    return named or [job for job in jobs if not _is_question(job) and _names(job.entrypoint, run)]


def require_job(server: JobServer, run: str) -> JobDetails:
    """The newest job of a run.

    Raises:
        RunError: none is known; the error lists the runs that are.
    """
    jobs = server.jobs()
    found = jobs_of(jobs, run)
    if found:
        return found[-1]
    runs = sorted({name for job in jobs if (name := (job.metadata or {}).get(RUN))})
    raise RunError(
        f"No job of the run {run} is known to this cluster.",
        where=server.address,
        advice=f"give one of: {', '.join(runs)}" if runs else "start one with `zoray submit CONFIG`",
    )


def no_zoray(server: JobServer, job: str) -> ResourceError:
    """That a job of ours ended without a word of Zoray's."""
    lines = [line for line in server.text(job).splitlines() if line.strip()]
    said = lines[-1].strip() if lines else (server.info(job).message or "nothing").strip().splitlines()[-1]
    return ResourceError(
        f"The job ended on the cluster's head without an answer; the last it said is: {said}",
        where=f"job {job} at {server.address}",
        advice="the head must have the same version of Zoray as this machine, with `zoray` on its PATH",
    )


def _put(server: JobServer, words: tuple[str, ...], *options: str) -> str:
    """Submit a question, and remove those that were answered before; returns its job."""
    jobs = server.jobs()
    now = 1000 * time.time()
    for job in jobs:
        # Whoever has asked may not have read it yet.
        if _is_question(job) and job.status.is_terminal() and now - (job.end_time or now) > 1000 * _KEPT:
            with suppress(ZorayError):
                server.forget(str(job.submission_id))
    submission_id = f"{_QUESTION}{secrets.token_hex(4)}"
    command = ["zoray", "answer", *options, "--", *_placed(jobs, words)]
    server.submit(shlex.join(command), submission_id, metadata={"zoray_question": words[0]})
    return submission_id


def _placed(jobs: list[JobDetails], words: tuple[str, ...]) -> tuple[str, ...]:
    """The question, with the folder that the run was submitted with."""
    if "--output-dir" in words or len(words) < 2:
        return words
    folders = [(job.metadata or {}).get(OUTPUT_DIR) for job in jobs_of(jobs, words[1])]
    if not folders or not folders[-1]:
        return words
    # Before a `--` that words may have.
    return (*words[:2], "--output-dir", folders[-1], *words[2:])


def _is_question(job: JobDetails) -> bool:
    return str(job.submission_id).startswith(_QUESTION)


def _names(entrypoint: str, run: str) -> bool:
    try:
        words = shlex.split(entrypoint)
    except ValueError:
        return False
    if len(words) < 2 or Path(words[0]).name != "zoray" or words[1] not in ("train", "resume"):
        return False
    return run in words or f"run_name={run}" in words


def _answer(message: dict[str, Any]) -> str:
    if message.get("error"):
        raise unpacked(message["error"])
    return str(message["output"])
