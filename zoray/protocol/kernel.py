"""The coordinator's decisions: `transition(state, event, now) -> (state, actions)`, pure and single-threaded.

Time only decides who runs what; which numbers make a commit never depends on it. So every schedule of crashes, delays
and losses ends in the same ledger, which `tests/simulation` checks over thousands of them.
"""

from __future__ import annotations

from dataclasses import replace

from zoray.protocol.assign import (
    assign,
    deadline,
    drop,
    free,
    give_late,
    observe,
    proceed,
    release,
    take_back,
    unassign,
)
from zoray.protocol.decide import close, conclude, decide, give_up, settle_past
from zoray.protocol.messages import (
    PAYLOAD_TYPE,
    Action,
    Answer,
    AppendFailed,
    CommitDurable,
    DigestValue,
    Event,
    Failed,
    Finish,
    Item,
    Kind,
    Payload,
    Refused,
    Release,
    RemoveReplica,
    ReplicaLost,
    ReplicaReady,
    Rewound,
    StopRequested,
    Tick,
    Warn,
)
from zoray.protocol.state import Contribution, Member, Phase, State, counts, forget_digests, newcomers, open_step


def transition(state: State, event: Event, now: float) -> tuple[State, tuple[Action, ...]]:
    """What the coordinator does about one event.

    Args:
        state: the state before, which is left as it was.
        event: what happened. After `Finish` nothing has any effect.
        now: the carrier's clock in seconds; it must not go backwards.

    Cost: O(1) Python work for an answer, O(replicas) for a tick and a commit, and copies of dictionaries in C.
    """
    if state.phase is Phase.FINISHED:
        return state, ()
    state, actions = state.copy(), list[Action]()
    match event:
        case Answer():
            _answer(state, event, now, actions)
        case Tick():
            _tick(state, now, actions)
        case CommitDurable():
            conclude(state, event.step, now, actions)
        case ReplicaReady():
            _ready(state, event, actions)
        case ReplicaLost():
            if drop(state, event.replica):
                state.count("lost")
                actions.append(Warn(f"replica {event.replica} is lost: {event.reason}"))
        case Refused():
            _refused(state, event, actions)
        case Failed():
            _failed(state, event, now, actions)
        case AppendFailed():
            state.phase = Phase.FINISHED
            advice = "make room or repair the storage, then resume; everything before this step is intact"
            actions.append(Finish("storage", state.step, event.reason, advice))
        case StopRequested():
            _stop(state, now, actions)
        case RemoveReplica():
            _remove(state, event.replica, actions)
        case Rewound():
            _rewound(state, event, now, actions)
    _settle(state, now, actions)
    return state, tuple(actions)


def _settle(state: State, now: float, actions: list[Action]) -> None:
    """Decide what can be decided, then give idle replicas what there is."""
    if state.skipped >= state.settings.max_skipped_steps and state.phase in (Phase.PROBING, Phase.CLOSING):
        give_up(state, actions)
    elif state.phase is Phase.PROBING and state.missing == 0:
        decide(state, now, actions)
    elif state.phase is Phase.CLOSING:
        close(state, now, actions)
    if state.phase in (Phase.PROBING, Phase.CLOSING):
        assign(state, now, actions)


def _answer(state: State, event: Answer, now: float, actions: list[Action]) -> None:
    name, item = event.replica, event.item
    member = state.members.get(name)
    if member is None:
        # Lost or released: what it was doing has been given to another, and a divergent one must not be believed.
        state.count("stale")
        return
    if item.step > state.step or not isinstance(event.payload, PAYLOAD_TYPE[item.kind]):
        state.count("violations")
        what = f"answered the {item} with {type(event.payload).__name__} while the run is at step {state.step}"
        release(state, name, "violation", what, actions)
        return
    accept(state, name, item, event.payload)
    if item.kind is Kind.DIGEST and item.step in state.past and state.phase in (Phase.PROBING, Phase.CLOSING):
        settle_past(state, item.step, actions)
        if name not in state.members:
            return
        member = state.members[name]
    if item in member.items:
        left = tuple(other for other in member.items if other != item)
        state.members[name] = replace(member, items=left, held=max(member.held, item.step), misses=0)
        if not left:
            seconds = now - member.since
            observe(state, item.kind, seconds)
            if item.kind.probing:
                state.members[name] = replace(state.members[name], took=seconds)
            proceed(state, name, now, actions)
    elif member.misses or member.ahead == item:
        # What was before it in line has an answer that is lost, or comes yet.
        state.members[name] = replace(member, misses=0, ahead=None if member.ahead == item else member.ahead)


def accept(state: State, name: str, item: Item, payload: Payload | None) -> None:
    """Count a result if it is the first for an item of the step in hand; anything else is harmless."""
    if item.step != state.step or state.phase not in (Phase.PROBING, Phase.CLOSING):
        if item.step in state.past and isinstance(payload, DigestValue) and item.kind is Kind.DIGEST:
            state.past[item.step] = {**state.past[item.step], name: payload.digest}
        else:
            state.count("stale")
    elif item.kind is Kind.DIGEST and isinstance(payload, DigestValue):
        if state.comparing:
            state.digests[name] = payload.digest
    elif item not in state.work:
        state.count("stale")
    elif item in state.results:
        state.count("duplicates")
    else:
        state.results[item] = Contribution(name, payload)
        state.missing -= counts(state, item)
        state.flights.pop(item, None)


def _ready(state: State, event: ReplicaReady, actions: list[Action]) -> None:
    drop(state, event.replica)
    forget_digests(state, event.replica)
    if state.phase is Phase.REWINDING:
        actions.append(Release(event.replica, "it joined with commits that are being cut away", "rewound"))
        return
    if not 0 <= event.step <= _durable(state):
        state.count("violations")
        reason = f"it holds step {event.step}, the run is at step {state.step}"
        actions.append(Release(event.replica, reason, "violation"))
        return
    state.members[event.replica] = Member(held=event.step, width=event.width)
    state.idle[event.replica] = None
    state.comparing = state.comparing or (state.phase is Phase.PROBING and newcomers(state))


def _durable(state: State) -> int:
    """The last step a replica can hold: while a commit is written its bytes may be on disk, where a joiner reads."""
    return state.step + (state.phase is Phase.COMMITTING)


def _refused(state: State, event: Refused, actions: list[Action]) -> None:
    name, member = event.replica, state.members.get(event.replica)
    if member is None or event.item not in member.items:
        return
    state.count("refused")
    what = f"refused the {event.item}, holding step {event.held}: {event.reason}"
    if event.held > _durable(state):
        state.count("violations")
        release(state, name, "violation", what, actions)
        return
    if member.misses + 1 >= state.settings.max_misses:
        release(state, name, "failing", what, actions)
        return
    # What it runs beside it, or has in line, it will refuse for the same reason.
    take_back(state, name)
    state.members[name] = replace(member, held=event.held, misses=member.misses + 1)
    free(state, name, actions)


def _failed(state: State, event: Failed, now: float, actions: list[Action]) -> None:
    name, item, member = event.replica, event.item, state.members.get(event.replica)
    if member is None or item not in member.items:
        return
    state.count("failed")
    actions.append(Warn(f"replica {name} failed in the {item}: {event.reason}"))
    unassign(state, item, name)
    left = tuple(other for other in member.items if other != item)
    state.members[name] = replace(member, items=left, misses=member.misses + 1)
    if not left:
        proceed(state, name, now, actions)
    if item.step == state.step and item not in state.results:
        if item.kind is Kind.SNAPSHOT:
            # Only an optimisation of replay: the next one will do.
            accept(state, name, item, None)
            return
        # One bad machine must not end the run: an item is hopeless when no live replica is left that can run it.
        failed = state.failures[item] = (*state.failures.get(item, ()), name)
        # A sharded replica does not outlive its failure, so those that failed are hardly ever among the living.
        everyone = all(member in failed for member in state.members)
        if len(failed) >= state.settings.max_failures + (0 if everyone else len(state.members)):
            state.phase = Phase.FINISHED
            text = f"the {item} failed {len(failed)} times, on every replica that had it: {event.reason}"
            actions.append(Finish("failed", state.step, text, "remove the cause, then resume: nothing is lost"))
            return
    if member.misses + 1 >= state.settings.max_misses and name in state.members:
        what = f"it failed {member.misses + 1} times in a row, last in the {item}"
        release(state, name, "failing", what, actions)


def _tick(state: State, now: float, actions: list[Action]) -> None:
    settings = state.settings
    deadlines = {kind: deadline(state, kind) for kind in Kind}
    for name, member in tuple(state.members.items()):
        if member.item is None:
            continue
        patience = settings.overdue_factor * deadlines[member.item.kind] * 2**member.misses
        if now - member.since <= patience:
            continue
        state.count("overdue")
        if member.misses + 1 >= settings.max_misses:
            what = f"no answer to {member.misses + 1} assignments, the last one the {member.item}"
            release(state, name, "silent", what, actions)
            continue
        # Its request or its answer may be lost: for all we know it is idle.
        take_back(state, name)
        state.members[name] = replace(member, misses=member.misses + 1)
        free(state, name, actions)
    if state.phase not in (Phase.PROBING, Phase.CLOSING):
        return
    assign(state, now, actions)
    # Flights are in the order in which they were last given; replicas are idle here only if nothing else is left.
    again = (item for item in state.flights if item.kind.probing or item.kind is Kind.EVAL) if state.idle else ()
    give_late(state, [item for item in again if now - state.flights[item].since > deadlines[item.kind]], now, actions)


def _stop(state: State, now: float, actions: list[Action]) -> None:
    if state.stopping:
        state.phase = Phase.FINISHED
        actions.append(Finish("stopped", state.step, f"stopped at step {state.step}, without comparing digests"))
        return
    state.stopping = True
    if state.phase in (Phase.PROBING, Phase.CLOSING):
        open_step(state, now)


def _rewound(state: State, event: Rewound, now: float, actions: list[Action]) -> None:
    if state.phase is not Phase.REWINDING:
        actions.append(Warn(f"the ledger is said to be cut back to step {event.step} though nobody asked for it"))
        return
    state.step, state.previous, state.skipped = event.step, event.previous, event.skipped
    state.optimizer = state.settings.optimizer.restore(event.recent)
    state.replay, state.past = 0.0, {}
    open_step(state, now)


def _remove(state: State, name: str, actions: list[Action]) -> None:
    if (member := state.members.get(name)) is None:
        actions.append(Warn(f"replica {name} cannot be removed: it is not in the run"))
        return
    unassign(state, member.ahead, name)
    state.members[name] = replace(member, draining=True, ahead=None)
    if member.item is None:
        free(state, name, actions)
