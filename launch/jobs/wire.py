"""What a job on the cluster says to the laptop that has sent it: one JSON object on a marked line of its output.

A job's output is all that Ray's job server gives back; the mark tells Zoray's own words from everything else in it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from zoray import errors
from zoray.errors import ZorayError

MARK = "@zoray "

VOLUME = "ZORAY_VOLUME"
"""Names, in the environment of the cluster, the folder that relative paths of a submitted run are below."""


def say(message: dict[str, Any]) -> None:
    """Print a message to the laptop."""
    print(f"{MARK}{json.dumps(message)}", flush=True)


def heard(line: str) -> dict[str, Any] | None:
    """The message in a line of output, if there is one."""
    if not line.startswith(MARK):
        return None
    try:
        message = json.loads(line.removeprefix(MARK))
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def packed(error: ZorayError) -> dict[str, Any]:
    """An error as JSON."""
    return {"kind": type(error).__name__, "what": error.what, "where": error.where, "advice": error.advice}


def unpacked(fields: dict[str, Any]) -> ZorayError:
    """The error that `packed` was given; of a kind that is not known here, a plain one."""
    kind = getattr(errors, str(fields["kind"]), ZorayError)
    if not (isinstance(kind, type) and issubclass(kind, ZorayError)):
        kind = ZorayError
    return kind(fields["what"], where=fields["where"], advice=fields["advice"])


def enter_volume() -> bool:
    """Make the cluster's volume the working directory; whether one is named.

    Raises:
        ResourceError: it is not there.
    """
    volume = os.environ.get(VOLUME)
    if not volume:
        return False
    try:
        os.chdir(volume)
    except OSError as error:
        raise errors.ResourceError(
            f"The cluster's volume cannot be entered: {error}.",
            where=f"{VOLUME}={volume} on the head",
            advice=f"mount it there, or set {VOLUME} to where it is mounted",
        ) from error
    return True
