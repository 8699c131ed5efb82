"""What becomes of a step: its commit, its record, the comparison of digests and the end of the run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from zoray.aggregate import MeanLoss, ProbeResult, aggregate, second_difference
from zoray.errors import NumericsError
from zoray.protocol.assign import release
from zoray.protocol.messages import (
    Action,
    AppendCommit,
    EvalSums,
    Evaluation,
    Finish,
    Item,
    Kind,
    ProbeScalars,
    Report,
    Rewind,
    SideLoss,
    StepRecord,
    Warn,
)
from zoray.protocol.state import Phase, State, counts, forget_digests, open_step

_REMEMBERED = 64
"""Steps whose digests are kept for those that come late."""


def decide(state: State, now: float, actions: list[Action]) -> None:
    """All results are in: make the commit, unless a replica that gave some of them turns out to have diverged."""
    if state.comparing and (_unheard(state) or not _compare(state, actions)):
        return
    settings, step = state.settings, state.step
    try:
        state.pending = aggregate(
            step,
            _probes(state),
            directions=state.directions,
            microbatches=settings.microbatches,
            learning_rate=settings.learning_rate(step),
            weight_decay=settings.weight_decay,
            max_projected_gradient=settings.max_projected_gradient,
            previous=state.previous,
            optimizer=settings.optimizer,
            state=state.optimizer,
        )
    except NumericsError as error:
        state.phase = Phase.FINISHED
        actions.append(Finish("numerics", step, error.what, error.advice))
        return
    state.phase, state.decided = Phase.COMMITTING, now
    actions.append(AppendCommit(state.pending.commit))


def _probes(state: State) -> list[ProbeResult]:
    """The step's probes, those of two evaluations put together."""
    found: list[ProbeResult] = []
    settings, one_sided = state.settings, state.settings.one_sided
    put_together = ProbeResult.of_one_side if one_sided else ProbeResult.of_losses
    for item, result in state.results.items():
        payload, address = result.payload, (item.step, item.direction, item.microbatch)
        if isinstance(payload, ProbeScalars):
            scalars = payload.projected_gradient, payload.loss
            found.append(ProbeResult(*address, *scalars, contrast=payload.contrast))
        elif isinstance(payload, SideLoss) and item.kind is Kind.PLUS:
            centre = item._replace(kind=Kind.CENTRE, part=settings.first_on_batch(item.direction))
            other = state.results[centre if one_sided else item._replace(kind=Kind.MINUS)].payload
            assert isinstance(other, SideLoss)
            plus, base = (MeanLoss(each.loss, each.contrast) for each in (payload, other))
            found.append(put_together(*address, plus, base, settings.epsilon))
    if settings.optimizer.wants_curvature:
        found = [replace(p, curvature=_curvature(state, p)) if p.direction == p.microbatch == 0 else p for p in found]
    return found


def _curvature(state: State, first: ProbeResult) -> float:
    """z'Hz along the first direction, from its losses on both sides and the one at the weights themselves."""

    def loss(kind: Kind) -> float:
        payload = state.results[Item(kind, state.step)].payload
        assert isinstance(payload, SideLoss)
        return payload.loss

    mean = (loss(Kind.PLUS) + loss(Kind.MINUS)) / 2 if state.settings.one_sided else first.loss
    return second_difference(mean, loss(Kind.CENTRE), state.settings.epsilon)


def _effort(state: State) -> list[ProbeScalars | SideLoss]:
    """Where the seconds of the step's probes went."""
    return [r.payload for r in state.results.values() if isinstance(r.payload, ProbeScalars | SideLoss)]


def _processes(state: State) -> int:
    return sum(member.width for member in state.members.values())


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
    state.replay += math.fsum(p.apply_seconds for p in _effort(state)) / max(1, _processes(state))
    if state.comparing:
        state.past[step] = state.digests
        while len(state.past) > _REMEMBERED:
            del state.past[next(iter(state.past))]
    state.step, state.previous = step + 1, commit.hash
    state.optimizer = state.settings.optimizer.after(state.optimizer, commit)
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
    if not state.digests:
        return True
    right = _quorum(state, state.step, state.digests)
    if not right and any(n not in state.digests and not m.draining for n, m in state.members.items()):
        # Before anybody is sent away, all are heard.
        state.thorough = True
        return False
    if len(right) > 1 or (right and (len(state.members) == 1 or state.phase is Phase.CLOSING)):
        state.agreed = state.digests[right[0]]
    wrong = [name for name in state.digests if name not in right]
    if wrong:
        _expel(state, state.step, {name: state.digests[name] for name in wrong}, len(right), actions)
    return state.phase in (Phase.PROBING, Phase.CLOSING) and state.missing == 0


def _unheard(state: State) -> bool:
    """Whether a snapshot's step still needs digests: newcomers start from a snapshot only if two agree on it."""
    saving = any(item.kind is Kind.SNAPSHOT for item in state.work)
    return saving and len(state.digests) < min(2, sum(not member.draining for member in state.members.values()))


def _quorum(state: State, step: int, digests: dict[str, int]) -> list[str]:
    """The replicas whose digest at a step more than half of the given ones are.

    Two or more of them have proved each other, and what they did before that step.
    """
    winner, count = Counter(digests.values()).most_common(1)[0]
    if count * 2 <= len(digests):
        return []
    right = [name for name, digest in digests.items() if digest == winner]
    if len(right) > 1:
        state.rewinds = 0
        for name in right:
            if state.unproven.get(name, step) < step:
                del state.unproven[name]
                if step < state.step:
                    state.unproven[name] = step
            if (member := state.members.get(name)) is not None:
                state.members[name] = replace(member, proven=True)
    return right


def settle_past(state: State, step: int, actions: list[Action]) -> None:
    """A digest of an earlier step has come: a slow replica proves itself by it as well, or is found to be wrong."""
    digests = state.past[step]
    right = _quorum(state, step, digests)
    wrong = {name: digest for name, digest in digests.items() if name not in right and name in state.members}
    if len(right) > 1 and wrong:
        _expel(state, step, wrong, len(right), actions)


def _expel(state: State, step: int, wrong: dict[str, int], right: int, actions: list[Action]) -> None:
    """Release replicas whose digests are wrong, and undo what they took part in since they were last right.

    Without a majority nobody knows who is wrong: all go, and replicas built anew from the ledger take their place.
    """
    first = min((state.unproven[name] for name in wrong if name in state.unproven), default=state.step)
    state.rewinds += 1
    if not right:
        said = ", ".join(f"{name}: {digest:016x}" for name, digest in sorted(wrong.items()))
        actions.append(Warn(f"replicas disagree on the weights at step {step}, without a majority ({said})"))
    if first < state.step:
        # Before anything else is done about it: it must not be forgotten in a crash.
        text = f"steps {first} to {state.step - 1} are computed again: a replica that had diverged took part in them"
        state.count("rewinds")
        actions += [Warn(text), Rewind(first)]
    for name in wrong:
        forget_digests(state, name)
        state.count("diverged")
        if name in state.members:
            others = f"that of {right} others" if right else "another's, and no majority says whose is right"
            release(state, name, "diverged", f"its digest at step {step} differs from {others}", actions)
        _disregard(state, name)
    if state.rewinds > state.settings.max_rewinds:
        state.phase = Phase.FINISHED
        text = f"replicas disagreed on the weights {state.rewinds} times in a row, last at step {step}"
        advice = "a machine computes wrongly: find out which by `zoray verify` on each, then resume without it"
        actions.append(Finish("numerics", min(first, state.step), text, advice))
    elif first < state.step:
        state.phase = Phase.REWINDING
        for name in tuple(state.members):
            release(state, name, "rewound", f"the run goes back to step {first}", actions)


def _disregard(state: State, name: str) -> None:
    """Throw away what a replica gave in this step."""
    for item in [item for item, result in state.results.items() if result.replica == name]:
        del state.results[item]
        state.missing += counts(state, item)
        if item not in state.flights:
            state.again = (*state.again, item)


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
    probes = _effort(state)
    # Evaluation sums are added in the order of shards, so that they do not depend on who answered first.
    sums = [r.payload for _, r in sorted(state.results.items()) if isinstance(r.payload, EvalSums)]
    return StepRecord(
        step=state.step,
        aggregate=state.pending,
        learning_rate=state.settings.learning_rate(state.step) if state.pending else 0.0,
        evaluation=evaluation(sums) if sums else None,
        digest=state.agreed,
        replicas=len(state.members),
        processes=_processes(state),
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
    return Evaluation(mean, error, count, correct, math.fsum(s.score_sum for s in sums) / count)
