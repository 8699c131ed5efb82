"""Thousands of schedules of crashes, delays, losses and duplications: each ends as the undisturbed run does.

ZORAY_SCHEDULES=20000 runs more of them, ZORAY_SEED=7 that one alone.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace

import pytest

from tests.simulation.actors import SimulatedCoordinator
from tests.simulation.chaos import NEVER, Chaos, InvariantError
from tests.simulation.model import Problem
from tests.simulation.simulator import Simulation
from zoray.protocol import Event, Rewound, Settings

BLOCK = 125
SCHEDULES = int(os.environ.get("ZORAY_SCHEDULES", "2000"))
SEEDS = [int(os.environ["ZORAY_SEED"])] if "ZORAY_SEED" in os.environ else range(SCHEDULES)


BLOCKS = [SEEDS[i : i + BLOCK] for i in range(0, len(SEEDS), BLOCK)]


def calm(problem: Problem, chaos: Chaos, _: int) -> tuple[Problem, Chaos, int]:
    """Five replicas of a run in which nothing goes wrong by itself, with digests compared at every step."""
    optimizer = replace(problem.settings.optimizer, width=None)
    settings = replace(problem.settings, max_steps=6, directions=7, microbatches=2, digest_every=1, optimizer=optimizer)
    quiet = Chaos(0.0, 0.0, 0.01, NEVER, 0.0, NEVER, 0.0, 0.0, 0.0, NEVER, NEVER, False)
    return Problem(settings), quiet, 5


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"seed {block[0]} on")
def test_schedule_ends_like_undisturbed_run(block: list[int]) -> None:
    for seed in block:
        Simulation(seed, check_purity=seed % 10 == 0).run()


def test_every_fault_is_met() -> None:
    met: Counter[str] = Counter()
    for seed in range(200):
        met += Simulation(seed).run().met
    expected = {
        "coordinator lives", "power cuts", "messages lost", "crashes", "released: drained", "released: silent",
        "finished: done", "finished: stopped", "finished: numerics", "finished: storage",
        "lost", "late", "overdue", "duplicates", "stale", "refused", "failed", "lined up", "bundles",
        "groups torn down", "losses at the weights",
    }  # fmt: skip
    assert expected <= set(+met), expected - set(+met)
    assert met["power cuts"] > 150


@pytest.mark.parametrize("fault", ["cut", "torn", "full"])
def test_fault_in_every_system_call(fault: str) -> None:
    call = 0
    while True:
        call += 1
        if not Simulation(call, change=calm, disk_fault=(call, fault)).run().disk.faults:
            break
    assert call > 6 * 3


def test_power_cut_before_every_action() -> None:
    action = 0
    while True:
        action += 1
        simulation = Simulation(action, change=calm, cut_before_action=action).run()
        if not simulation.met["power cuts"]:
            break
    assert action > 6 * 7 * 2


def test_seed_replays_exactly() -> None:
    traces = {Simulation(seed).run().trace.hexdigest() for seed in (3, 4, 3, 4)}
    assert len(traces) == 2


@pytest.mark.parametrize("step", range(1, 7))
def test_flipped_weights_are_found_and_do_not_change_the_run(step: int) -> None:
    for seed in range(5):
        simulation = Simulation(seed, change=calm, flips={"r2": step}).run()
        assert not simulation.flips
        assert simulation.met["released: diverged"] == simulation.met["diverged"] == 1


@pytest.mark.parametrize("seed", range(60))
def test_flipped_weights_are_found_later_and_the_run_goes_back(seed: int) -> None:
    """Whatever was committed with the help of a wrong replica is computed again, also when only two can be compared."""
    rng = random.Random(seed)

    def seldom(problem: Problem, chaos: Chaos, count: int) -> tuple[Problem, Chaos, int]:
        problem, chaos, _ = calm(problem, chaos, count)
        every, saves = rng.choice([2, 3, 5, None]), rng.choice([None, 2])
        settings = replace(problem.settings, max_steps=9, digest_every=every, save_steps=saves)
        chaos = replace(chaos, delay=rng.choice([0.01, 0.5]), duplication=rng.choice([0.0, 0.3]))
        return Problem(settings), chaos, rng.choice([2, 3, 5])

    simulation = Simulation(seed, change=seldom, flips={rng.choice(["r0", "r1"]): rng.randint(1, 9)}).run()
    assert not simulation.flips and simulation.met["diverged"] >= 1


def every_third(problem: Problem, chaos: Chaos, count: int) -> tuple[Problem, Chaos, int]:
    problem, chaos, count = calm(problem, chaos, count)
    return Problem(replace(problem.settings, digest_every=3)), chaos, count


def test_going_back_is_met() -> None:
    met = Counter(Simulation(step, change=every_third, flips={"r1": step}).run().met["rewinds"] for step in range(1, 7))
    assert met[1] >= 3


def ends_as_undisturbed(simulation: Simulation) -> bool:
    """It may end otherwise only if the coordinator died, or its disk failed, with what it knew of a wrong replica."""
    try:
        simulation.run()
    except InvariantError as error:
        assert simulation.tainted and "the ledger differs" in str(error), error
        assert simulation.met["power cuts"] or simulation.met["finished: storage"]
        return False
    return True


@pytest.mark.parametrize("fault", ["cut", "torn", "full"])
def test_fault_in_every_system_call_of_a_run_that_goes_back(fault: str) -> None:
    ends = list[bool]()
    while True:
        simulation = Simulation(0, change=every_third, flips={"r1": 2}, disk_fault=(len(ends) + 1, fault))
        ends.append(ends_as_undisturbed(simulation))
        if not simulation.disk.faults:
            break
    assert ends.count(False) <= 6 * 4, "more is lost than what was not compared yet"
    assert ends.count(True) > len(ends) / 2


def test_power_cut_before_every_action_of_a_run_that_goes_back() -> None:
    ends = list[bool]()
    while True:
        simulation = Simulation(0, change=every_third, flips={"r1": 2}, cut_before_action=len(ends) + 1)
        ends.append(ends_as_undisturbed(simulation))
        if not simulation.met["power cuts"]:
            break
    assert ends[-1] and ends.count(True) > len(ends) / 2


def _pretend(coordinator: SimulatedCoordinator, step: int) -> Event:
    """Say that the ledger was cut, and leave it as it is."""
    assert coordinator.ledger is not None
    coordinator.world.rewinding(step)
    return Rewound(coordinator.ledger.next_step, coordinator.ledger.head, 0)


def test_flipped_weights_change_the_run_if_it_does_not_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_at_the_end(problem: Problem, chaos: Chaos, count: int) -> tuple[Problem, Chaos, int]:
        problem, chaos, count = calm(problem, chaos, count)
        never = {"digest_every": None, "digest_share": 0.0, "save_steps": None, "snapshot_after": None}
        return Problem(replace(problem.settings, **never)), chaos, count

    monkeypatch.setattr(SimulatedCoordinator, "_cut", _pretend)
    with pytest.raises(InvariantError, match="undisturbed run"):
        Simulation(0, change=only_at_the_end, flips={"r2": 2}).run()


@pytest.mark.parametrize("seed", range(10))
def test_a_machine_five_times_slower_costs_no_more_than_its_share_of_the_tail(seed: int) -> None:
    """Sixteen probes pulled by three replicas and one that takes five times as long.

    Divided evenly each would get four, and the slow one would need the time of twenty. Pulled, the work is done at the
    rate of 3.2 replicas; what remains is the last probe of the slow one, until it is late and given to another as well.
    """
    settings = Settings(
        max_steps=20, directions=16, learning_rate=lambda step: 0.01, late_minimum=0.5,
    )  # fmt: skip

    def even(_: Problem, __: Chaos, ___: int) -> tuple[Problem, Chaos, int]:
        return Problem(settings), Chaos(0.0, 0.0, 0.01, NEVER, 0.0, NEVER, 0.0, 0.0, 0.0, NEVER, NEVER, False), 4

    simulation = Simulation(seed, change=even)
    for name, replica in simulation.replicas.items():
        replica.speed, replica.width = 5.0 if name == "r3" else 1.0, 1
    simulation.run()
    each, longest = simulation.now / settings.max_steps, 1.5
    fair, late = 16 / 3.2, settings.late_factor * 1.0
    assert each <= fair + late + longest
    assert each < 20 / 2
