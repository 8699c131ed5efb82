"""Successive halving over learning rate and epsilon: every decision of `zoray tune`, as pure functions.

A *trial* is a ledger: the commits that a run with that learning rate and that epsilon begins with. So it takes a few
kilobytes, any replica can go on with it after a replay, and its result does not depend on which replicas did the work.
`zoray.tuning.kernel` says what becomes of the trials and which replica works on which.
"""

from __future__ import annotations

from zoray.tuning.evaluated import Evaluated
from zoray.tuning.grid import Plan, Trial, cost, grid, longest_within, make_plan
from zoray.tuning.kernel import begin, transition
from zoray.tuning.messages import (
    Action,
    Answered,
    AppendCommit,
    Assign,
    CommitDurable,
    Event,
    Finish,
    Note,
    ReplicaLost,
    ReplicaReady,
    Share,
    ShareFailed,
    StopRequested,
)
from zoray.tuning.race import BASE, Phase, Race, Rules, Study
from zoray.tuning.standing import Standing, stand

__all__ = [
    "BASE",
    "Action",
    "Answered",
    "AppendCommit",
    "Assign",
    "CommitDurable",
    "Evaluated",
    "Event",
    "Finish",
    "Note",
    "Phase",
    "Plan",
    "Race",
    "ReplicaLost",
    "ReplicaReady",
    "Rules",
    "Share",
    "ShareFailed",
    "Standing",
    "StopRequested",
    "Study",
    "Trial",
    "begin",
    "cost",
    "grid",
    "longest_within",
    "make_plan",
    "stand",
    "transition",
]
