"""What becomes of a step: its commit, its record, the comparison of digests and the end of the run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from zoray.aggregate import ProbeResult, aggregate
from zoray.errors import NumericsError
from zoray.protocol.assign import release
from zoray.protocol.messages import (
    Action,
    AppendCommit,
    EvalSums,
    Evaluation,
    Finish,
    ProbeScalars,
    Report,
    Rewind,
    StepRecord,
    Warn,
)
from zoray.protocol.state import Phase, State, counts, open_step


def decide(state: State, now: float, actions: list[Action]) -> None:
    """All results are in: make the commit, unless a replica that gave some of them turns out to have diverged."""
    if state.comparing and not _compare(state, actions):
        return
    settings, step = state.settings, state.step
    probes = [
        ProbeResult(step, item.direction, item.microbatch, result.payload.projected_gradient, result.payload.loss)
        for item, result in state.results.items()
        if isinstance(result.payload, ProbeScalars)
    ]
    try:
        state.pending = aggregate(
            step,
            probes,
            directions=settings.directions,
            microbatches=settings.microbatches,
            learning_rate=settings.learning_rate(step),
            weight_decay=settings.weight_decay,
            max_projected_gradient=settings.max_projected_gradient,
            previous=state.previous,
        )
    except NumericsError as error:
        state.phase = Phase.FINISHED
        actions.append(Finish("numerics", step, error.what, error.advice))
        return
    state.phase, state.decided = Phase.COMMITTING, now
    actions.append(AppendCommit(state.pending.commit))


def conclude(state: State, step: int, now: float, actions: list[Action]) -> None:
    """The pending commit is durable: report the step and open the next one. Said twice, it counts once."""
    if state.phase is not Phase.COMMITTING or state.pending is None or step != state.step:
        actions.append(Warn(f"step {step} is said to be durable while no commit of it is being written"))
        return
    commit = state.pending.commit
    actions.append(Report(_record(state, now)))
    for result in state.results.values():
        if result.replica in state.members and len(state.members) > 1:
            state.unproven.setdefault(result.replica, step)
    state.skipped = 0 if commit.applied else state.skipped + 1
    if state.skipped:
        text = f"step {step} is skipped: none of its losses is finite"
        actions.append(Warn(f"{text} ({state.skipped} in a row, {state.settings.max_skipped_steps} end the run)"))
    seconds = (r.payload.apply_seconds for r in state.results.values() if isinstance(r.payload, ProbeScalars))
    state.replay += math.fsum(seconds) / max(1, len(state.members))
    state.step, state.previous = step + 1, commit.hash
    state.unproven = {name: since for name, since in state.unproven.items() if name in state.members}
    open_step(state, now)


def close(state: State, now: float, actions: list[Action]) -> None:
    """End the run once the last results and the digest of every replica are in."""
    if state.stopping and not state.members:
        state.phase = Phase.FINISHED
        actions.append(Finish("stopped", state.step, f"stopped at step {state.step}: no replica is left to compare"))
        return
    awaited = [name for name, member in state.members.items() if name not in state.digests and not member.draining]
    if state.missing or awaited or not state.digests or not _compare(state, actions) or not state.digests:
        return
    state.decided = now
    record = _record(state, now)
    if not state.stopping:
        actions.append(Report(record))
    state.phase = Phase.FINISHED
    if state.stopping:
        actions.append(Finish("stopped", state.step, f"stopped at step {state.step}", digest=record.digest))
    else:
        actions.append(Finish("done", state.step, f"all {state.step} steps are committed", digest=record.digest))


def _compare(state: State, actions: list[Action]) -> bool:
    """Settle whose weights are right, by majority; whether the step can go on as it is."""
    votes = Counter(state.digests.values()).most_common()
    if not votes:
        return True
    winner, count = votes[0]
    agreed = count * 2 > len(state.digests)
    right = [name for name, digest in state.digests.items() if agreed and digest == winner]
    if len(right) > 1:
        state.rewinds = 0
        for name in right:
            state.unproven.pop(name, None)
            if (member := state.members.get(name)) is not None:
                state.members[name] = replace(member, proven=True)
    if len(right) < len(state.digests):
        _expel(state, [name for name in state.digests if name not in right], len(right), actions)
    return state.phase in (Phase.PROBING, Phase.CLOSING) and state.missing == 0


def _expel(state: State, wrong: list[str], right: int, actions: list[Action]) -> None:
    """Release replicas whose digests are wrong, and undo what they took part in since they were last right.

    Without a majority nobody knows who is wrong: all go, and replicas built anew from the ledger take their place.
    """
    first = min((state.unproven[name] for name in wrong if name in state.unproven), default=state.step)
    if not right:
        said = ", ".join(f"{name}: {state.digests[name]:016x}" for name in sorted(wrong))
        actions.append(Warn(f"replicas disagree on the weights at step {state.step}, without a majority ({said})"))
    for name in wrong:
        del state.digests[name]
        state.count("diverged")
        if name in state.members:
            others = f"that of {right} others" if right else "another's, and no majority says whose is right"
            release(state, name, "diverged", f"its digest at step {state.step} differs from {others}", actions)
        _disregard(state, name)
    state.rewinds += 1
    if state.rewinds > state.settings.max_rewinds:
        state.phase = Phase.FINISHED
        text = f"replicas disagreed on the weights {state.rewinds} times in a row, last at step {state.step}"
        advice = "a machine computes wrongly: `zoray verify` on another one says what the weights are; then resume"
        actions.append(Finish("numerics", state.step, text, advice))
    elif first < state.step:
        _rewind(state, first, actions)


def _disregard(state: State, name: str) -> None:
    """Throw away what a replica gave in this step."""
    for item in [item for item, result in state.results.items() if result.replica == name]:
        del state.results[item]
        state.missing += counts(state, item)
        if item not in state.flights:
            state.again = (*state.again, item)


def _rewind(state: State, step: int, actions: list[Action]) -> None:
    """Go back to the weights at `step`: the commits from there on were made with a replica that had diverged."""
    state.phase = Phase.REWINDING
    state.count("rewinds")
    for name in tuple(state.members):
        release(state, name, "rewound", f"the run goes back to step {step}", actions)
    text = f"steps {step} to {state.step - 1} are computed again: a replica that had diverged took part in them"
    actions += [Warn(text), Rewind(step, text)]


def give_up(state: State, actions: list[Action]) -> None:
    """End a run whose losses are not finite any more, or never were."""
    step, skipped = state.step, state.skipped
    state.phase = Phase.FINISHED
    if skipped >= step:
        text = f"no loss was finite from the first step on ({skipped} steps)"
        advice = "the model gives NaN before any update: try dtype float32 or a smaller epsilon, and check the data"
    else:
        text = f"no loss was finite in the {skipped} steps from step {step - skipped} on"
        advice = (
            "the run has diverged: lower learning_rate or set max_projected_gradient in a new run; "
            f"`zoray export --step {step - skipped - 1}` gives the last weights that had a finite loss"
        )
    actions.append(Finish("numerics", step, text, advice))


def _record(state: State, now: float) -> StepRecord:
    probes = [r.payload for r in state.results.values() if isinstance(r.payload, ProbeScalars)]
    # Evaluation sums are added in the order of shards, so that they do not depend on who answered first.
    sums = [r.payload for _, r in sorted(state.results.items()) if isinstance(r.payload, EvalSums)]
    return StepRecord(
        step=state.step,
        aggregate=state.pending,
        learning_rate=state.settings.learning_rate(state.step) if state.pending else 0.0,
        evaluation=evaluation(sums) if sums else None,
        digest=Counter(state.digests.values()).most_common(1)[0][0] if state.digests else None,
        replicas=len(state.members),
        opened=state.opened,
        decided=state.decided,
        durable=now,
        probe_seconds=math.fsum(p.probe_seconds for p in probes),
        apply_seconds=math.fsum(p.apply_seconds for p in probes),
        counters=state.counters,
    )


def evaluation(sums: list[EvalSums]) -> Evaluation:
    """Put the shards of one evaluation together. The standard error is that of the mean over examples."""
    count, correct = sum(s.count for s in sums), sum(s.correct for s in sums)
    if count == 0:
        return Evaluation(math.nan, math.nan, 0, 0)
    mean = math.fsum(s.loss_sum for s in sums) / count
    spread = max(0.0, math.fsum(s.square_sum for s in sums) - count * mean**2)
    error = math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan
    return Evaluation(mean, error, count, correct)
