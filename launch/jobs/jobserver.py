"""The job server of a Ray cluster, over plain HTTP: one port, and Ray's own client behind it.

Every command with `--address http://HEAD:8265` goes through this and nothing else, so a port-forward is enough.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoray.errors import ConfigError, ResourceError, RunError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ray.job_submission import JobDetails

RUN = "zoray_run"
"""In a job's metadata: the run it is for."""

OUTPUT_DIR = "zoray_output_dir"
"""In a job's metadata: the folder its run's folder is in, as the configuration says it."""

_PATIENCE = 60.0
_SCHEMES = ("http://", "https://")
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def require_http_address(address: str | None, command: str) -> str:
    """The address of the job server.

    Raises:
        ConfigError: it is none.
    """
    found = (address or os.environ.get("RAY_ADDRESS") or "").rstrip("/")
    if not found.startswith(_SCHEMES):
        raise ConfigError(
            f"zoray {command} needs the address of Ray's job server, and {found or 'nothing'} was given.",
            where="--address",
            advice="give --address http://HEAD:8265 (the dashboard's port), or set RAY_ADDRESS to it",
        )
    return found


class JobServer:
    """A connection to a job server.

    Attributes:
        address: of it.
        ray_version: that it runs.

    Raises:
        ResourceError: nobody answers there, it is not Ray, or it wants another token.
    """

    def __init__(self, address: str) -> None:
        if any(os.environ.get(name) for name in _TOKENS):
            # Ray reads it when it is first imported, and sends no token without it.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        self.address = address
        with self._spoken():
            _knock(address)
            try:
                # Ray's client prefers them to the address it is given.
                with _without(_OVERRIDES):
                    self._client: Any = _client(address)
            except (RuntimeError, KeyError, ValueError) as error:
                raise ResourceError(
                    f"What answers there is not the job server of a Ray that Zoray can use: {_first_line(error)}.",
                    where=address,
                    advice="give the address of the head's dashboard, as http://HEAD:8265",
                ) from None
        self.ray_version: str | None = getattr(self._client, "_server_ray_version", None)

    def submit(
        self,
        entrypoint: str,
        submission_id: str,
        *,
        working_dir: Path | None = None,
        env_vars: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Start a job; only the files of `working_dir` travel.

        Raises:
            RunError: there is a job of that id already.
            ResourceError: the job server does not take it.
        """
        runtime_env: dict[str, Any] = {"env_vars": dict(env_vars)} if env_vars else {}
        if working_dir is not None:
            runtime_env["working_dir"] = str(working_dir)
        job = {"entrypoint": entrypoint, "submission_id": submission_id, "metadata": dict(metadata or {})}
        until = time.monotonic() + _PATIENCE
        with self._spoken():
            while True:
                try:
                    self._client.submit_job(**job, runtime_env=runtime_env)
                    return
                except RuntimeError as error:
                    if "already exists" in str(error):
                        raise RunError(
                            f"The cluster has a job {submission_id} already.",
                            where=self.address,
                            advice="choose another run_name",
                        ) from None
                    # A head that has just started takes jobs a little later than it answers.
                    if "No available agent" not in str(error) or time.monotonic() > until:
                        raise
                time.sleep(1.0)

    def jobs(self) -> list[JobDetails]:
        """The submitted jobs that the cluster knows, the oldest first."""
        with self._spoken():
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def info(self, submission_id: str) -> JobDetails:
        """What the cluster knows of a job."""
        with self._spoken():
            return self._client.get_job_info(submission_id)  # type: ignore[no-any-return]

    def text(self, submission_id: str) -> str:
        """All that a job has said so far, Ray's own words before it taken off."""
        with self._spoken():
            return "".join(f"{line}\n" for line in _own(iter(self._client.get_job_logs(submission_id).splitlines())))

    def follow(self, submission_id: str) -> Generator[str, None, None]:
        """What a job says, line by line, until it ends.

        Raises:
            ResourceError: the connection is lost; the job goes on.
        """
        with self._spoken():
            yield from _own(_lines(self._client.tail_job_logs(submission_id)))

    def stop(self, submission_id: str) -> None:
        """Send a job the signal to end."""
        with self._spoken():
            self._client.stop_job(submission_id)

    def forget(self, submission_id: str) -> None:
        """Remove a job that has ended from the cluster's list."""
        with self._spoken():
            self._client.delete_job(submission_id)

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        """Say what went wrong on the way to the job server in the user's terms."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ResourceError(_token_fault(str(error)), where=self.address, advice=_TOKEN_ADVICE) from None
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise ResourceError(_token_fault(""), where=self.address, advice=_TOKEN_ADVICE) from None
            raise ResourceError(f"The job server refuses: {error}.", where=self.address) from None
        except (requests.RequestException, aiohttp.ClientError, OSError) as error:
            nobody = isinstance(error, requests.ConnectionError)
            why = "nobody answers" if nobody else _first_line(error)
            raise ResourceError(
                f"Ray's job server cannot be reached: {why}.",
                where=self.address,
                advice="check the address and the port-forward; a run that was submitted goes on meanwhile",
            ) from None
        except (RuntimeError, ValueError) as error:
            raise ResourceError(
                f"The job server did not do what it was asked: {_first_line(error)}", where=self.address
            ) from None


_TOKEN_ADVICE = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"


def _token_fault(text: str) -> str:
    if "invalid" in text.lower():
        return "The cluster refuses this token."
    return "The cluster wants a token, and none was sent."


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    # It tells of its uploads, which are as small as they are unasked for.
    for name in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
        "ray._private.runtime_env.packaging",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """Ray's client, which would wait for ever where a port-forward has died."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": _PATIENCE, **options})

    return Client(address)


def _knock(address: str) -> None:
    """See that something answers; Ray's client itself would try for minutes."""
    import requests

    requests.get(f"{address}/api/authentication_mode", timeout=10)


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Take variables out of the environment for the time of the block."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _lines(chunks: AsyncIterator[str]) -> Iterator[str]:
    """Whole lines of an asynchronous stream of text."""
    loop, rest = asyncio.new_event_loop(), ""
    try:
        while True:
            try:
                rest += loop.run_until_complete(_next(chunks))
            except StopAsyncIteration:
                break
            *whole, rest = rest.split("\n")
            yield from whole
        if rest:
            yield rest
    finally:
        # After Ctrl-C one is still waiting for the next words.
        for task in (left := asyncio.all_tasks(loop)):
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _next(chunks: AsyncIterator[str]) -> str:
    # Called within the loop, which thereby learns of the generator, and can close it.
    return await anext(chunks)


def _own(lines: Iterator[str]) -> Iterator[str]:
    """A job's lines after what Ray says before it begins."""
    for line in lines:
        if line.startswith("Running entrypoint for job "):
            break
    yield from lines


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
    return text if len(text) <= 300 else text[:297] + "..."
