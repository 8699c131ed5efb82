"""The test of the test: bugs planted in the protocol, each of which the simulation has to catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.simulation.chaos import InvariantError
from tests.simulation.simulator import Simulation
from zoray.optim import Optimizer
from zoray.protocol import Item, Payload, ProbeScalars, SideLoss, State, kernel

ENOUGH = 100
_accept = kernel.accept


def accept_stale(state: State, name: str, item: Item, payload: Payload | None) -> None:
    """Take an answer of an earlier step for one of this step."""
    _accept(state, name, item._replace(step=state.step), payload)


def count_both(state: State, name: str, item: Item, payload: Payload | None) -> None:
    """A second answer to a probe counts as that of another one still missing."""
    if item in state.results and item.kind.probing:
        missing = (other for other in state.queue if other not in state.results and other.kind is item.kind)
        item = next(missing, item)
    _accept(state, name, item, payload)


def last_counts(state: State, name: str, item: Item, payload: Payload | None) -> None:
    """Forget to look whether the phase still takes results, and whether an item was counted before."""
    if item.step == state.step and item in state.work and item in state.results:
        state.missing -= 1
    _accept(state, name, item, payload)


def catch(bugs: frozenset[str] = frozenset(), saying: str = "") -> InvariantError:
    """What the simulation says about the first schedule in which a bug shows, in these words."""
    for seed in range(ENOUGH):
        try:
            Simulation(seed, bugs=bugs).run()
        except InvariantError as caught:
            assert f"ZORAY_SEED={seed} " in str(caught) and "TypeError" not in str(caught), caught
            if saying not in str(caught):
                continue
            with pytest.raises(InvariantError) as again:
                Simulation(seed, bugs=bugs).run()
            assert str(again.value) == str(caught)
            return caught
    pytest.fail(f"{ENOUGH} schedules have not found the bug")


def test_skipped_fsync_is_caught() -> None:
    catch(frozenset({"skip fsync"}))


def test_lost_commits_are_caught_on_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bug, seen by what it does to the ledger alone."""
    monkeypatch.setattr(Simulation, "check_applied", lambda *_: None)
    catch(frozenset({"skip fsync"}), "steps were committed")


def test_commit_applied_twice_is_caught() -> None:
    catch(frozenset({"apply twice"}))


@pytest.mark.parametrize("bug", [accept_stale, count_both, last_counts])
def test_wrong_answer_is_caught(bug: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "accept", bug)
    catch()


def test_run_without_a_clock_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_tick", lambda *_: None)
    catch(saying="no progress")


def test_numbers_from_the_clock_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit must not depend on who computed what: here all answers but the first replica's weigh more."""

    def partial(state: State, name: str, item: Item, payload: Payload | None) -> None:
        if isinstance(payload, ProbeScalars) and name != "r0":
            payload = replace(payload, projected_gradient=payload.projected_gradient * 1.5)
        elif isinstance(payload, SideLoss) and name != "r0":
            payload = replace(payload, loss=payload.loss * 1.5)
        _accept(state, name, item, payload)

    monkeypatch.setattr(kernel, "accept", partial)
    catch()


def test_optimizer_that_forgets_on_resume_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimizer knows has to come from the ledger, when the coordinator begins and when the run goes back."""
    monkeypatch.setattr(Optimizer, "restore", lambda self, _: self.initial())
    catch()
