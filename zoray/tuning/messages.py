"""What goes in and out of the kernel of a study: shares of work, events and actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zoray.aggregate import ProbeResult
from zoray.commits import Commit
from zoray.tuning.evaluated import Evaluated


@dataclass(frozen=True, slots=True)
class Share:
    """Some of the probes of a trial's step, or some shards of its evaluation, for one replica.

    Attributes:
        trial: its name; that of the model as it is, which is only evaluated, is `BASE`.
        step: of the weights.
        evaluating: the parts are shards of the evaluation; else each is `direction * microbatches + microbatch`.
        parts: what is to be done.
    """

    trial: str
    step: int
    evaluating: bool
    parts: tuple[int, ...]

    def __str__(self) -> str:
        what = "evaluation" if self.evaluating else "probes"
        return f"{what} {self.parts[0]} to {self.parts[-1]} of {self.trial}, step {self.step}"


Value = ProbeResult | Evaluated
"""What comes of one part of a share."""


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica holds the base weights."""

    replica: str


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica is no more; what it had to do is for others."""

    replica: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A replica has done its share; one value for each part, in their order."""

    replica: str
    share: Share
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class ShareFailed:
    """A replica could not do its share, and is no more; so many of the same end the study."""

    replica: str
    share: Share
    reason: str


@dataclass(frozen=True, slots=True)
class CommitDurable:
    """The commit of an `AppendCommit` is on disk."""

    trial: str
    step: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """A person wants the study to end; it can be continued."""


Event = ReplicaReady | ReplicaLost | Answered | ShareFailed | CommitDurable | StopRequested


@dataclass(frozen=True, slots=True)
class Assign:
    """Let a replica do a share.

    Attributes:
        fresh: it must go back to the base weights first, for it has those of another trial.
        held: step of the weights it then has; it lacks the commits from there to the share's step.
    """

    replica: str
    share: Share
    fresh: bool
    held: int


@dataclass(frozen=True, slots=True)
class AppendCommit:
    """Make a commit durable, then say `CommitDurable`."""

    trial: str
    commit: Commit


@dataclass(frozen=True, slots=True)
class Note:
    """Something happened to a trial; an `evaluated` one is what a study that is continued has to know.

    Attributes:
        kind: `kept` and `cut` are the two ways to come out of a rung.
        rung: from 0; -1 for the model as it is.
        evaluated: the evaluation, of that kind of note.
        text: the reason, in words.
    """

    kind: Literal["evaluated", "diverged", "kept", "cut"]
    trial: str
    rung: int
    step: int
    evaluated: Evaluated | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Finish:
    """The study is over, or stopped.

    Attributes:
        reason: `diverged`: all trials have; `failed`: a share fails on whatever replica.
    """

    reason: Literal["done", "stopped", "diverged", "failed"]
    text: str


Action = Assign | AppendCommit | Note | Finish
