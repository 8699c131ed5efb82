"""Snapshots: what was saved comes back exactly, what is damaged or foreign is passed over, replay makes up for it."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.unit.helpers import bits
from zoray.commits import seal
from zoray.errors import LedgerError, RunError
from zoray.identity import header_digest
from zoray.ledger import Ledger
from zoray.replica import Replica, base_digest
from zoray.snapshot import found, head_at, load_newest, replay, save, steps, sweep, usable

RUN = "run"


def replica(dtype: torch.dtype = torch.float32) -> Replica:
    torch.manual_seed(0)
    return Replica(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)).to(dtype), 3)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    base = replica()
    identity = {"base": f"{base_digest(base.model):016x}", "layout": base.layout.identity}
    made = Ledger.create(tmp_path / "ledger", {"identity": identity})
    for step in range(6):
        made.append(seal(step, 2.0**-9, 1.0, 1.0, tuple((step, k, 40 * k - 50) for k in range(3)), made.head))
    return made


def at(ledger: Ledger, step: int) -> Replica:
    there = replica()
    there.apply(list(ledger.commits(0, step)))
    return there


def saved(ledger: Ledger, folder: Path, *places: int, run: str | None = None) -> None:
    for step in places:
        save(folder, at(ledger, step), head_at(ledger, step), run or header_digest(ledger.header))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    one, other = replica(dtype), replica(dtype)
    one.apply(seal(0, 2.0**-7, 1.0, 1.0, ((0, 0, 99),), bytes(32)))
    assert save(tmp_path, one, b"\1" * 32, RUN) == one.digest()
    assert load_newest(tmp_path, other, RUN, {1: b"\1" * 32}) == b"\1" * 32
    assert other.step == 1
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(bits(mine), bits(theirs))


def test_the_newest_in_time_is_taken(tmp_path: Path, ledger: Ledger) -> None:
    saved(ledger, tmp_path / "s", 2, 4, 6)
    (tmp_path / "s" / "step-x").mkdir()
    assert steps(tmp_path / "s") == [2, 4, 6]
    for most, expected in ((6, 6), (5, 4), (2, 2), (1, 0)):
        one = replica()
        known = usable(found(tmp_path / "s"), ledger, most)
        head = load_newest(tmp_path / "s", one, header_digest(ledger.header), known)
        assert one.step == expected
        assert head == (head_at(ledger, expected) if expected else None)
        assert one.digest() == at(ledger, expected).digest()


def test_old_ones_are_deleted(tmp_path: Path, ledger: Ledger) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / "s", at(ledger, step), b"\0" * 32, RUN, keep=2)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["step-3", "step-4"]


def test_one_that_exists_stays(tmp_path: Path, ledger: Ledger) -> None:
    saved(ledger, tmp_path / "s", 2)
    before = (tmp_path / "s" / "step-2" / "snapshot.json").stat().st_mtime_ns
    saved(ledger, tmp_path / "s", 2, run="another")
    assert (tmp_path / "s" / "step-2" / "snapshot.json").stat().st_mtime_ns == before


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("zoray.memory.pieces.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "s", replica(), b"\0" * 32, RUN)
    assert list((tmp_path / "s").iterdir()) == []


def flip(place: Path) -> None:
    path = place / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(place: Path, **keys: object) -> None:
    path = place / "snapshot.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one bit": flip,
    "cut": lambda place: (place / "weights.safetensors").write_bytes(b"\0" * 9),
    "no weights": lambda place: (place / "weights.safetensors").unlink(),
    "no facts": lambda place: (place / "snapshot.json").unlink(),
    "not json": lambda place: (place / "snapshot.json").write_text("{"),
    "other keys": lambda place: edit(place, more=1),
    "another run": lambda place: edit(place, run="another"),
    "other commits": lambda place: edit(place, head="7" * 64),
    "digest": lambda place: edit(place, digest="0" * 16),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_passed_over_with_a_warning(
    tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    saved(ledger, tmp_path / "s", 2, 4)
    damage(tmp_path / "s" / "step-4")
    one = replica()
    with caplog.at_level(logging.WARNING):
        load_newest(tmp_path / "s", one, header_digest(ledger.header), usable(found(tmp_path / "s"), ledger))
    assert one.step == 2
    assert one.digest() == at(ledger, 2).digest()
    assert "step-4 of" in caplog.text


def cut(place: Path, *starts: int, last: int = 5) -> None:
    """The weights in files of so many processes, whose parts of every parameter begin at these elements."""
    whole = load_file(place / "weights.safetensors")
    (place / "weights.safetensors").unlink()
    for rank, (start, stop) in enumerate(itertools.pairwise((*starts, last))):
        values = {
            name: tensor.view(-1)[start : None if stop == last else stop].clone() for name, tensor in whole.items()
        }
        note = {"starts": json.dumps(dict.fromkeys(values, start))}
        save_file(values, place / f"part-{rank}-of-{len(starts)}.safetensors", note)


PARTS: dict[str, Callable[[Path], object]] = {
    "one is missing": lambda place: (place / "part-1-of-3.safetensors").unlink(),
    "the last is missing": lambda place: (place / "part-2-of-3.safetensors").unlink(),
    "one is another": lambda place: shutil.copy(place / "part-0-of-3.safetensors", place / "part-1-of-3.safetensors"),
    "one is cut": lambda place: (place / "part-0-of-3.safetensors").write_bytes(b"{}"),
}


@pytest.mark.parametrize("damage", PARTS.values(), ids=PARTS)
def test_parts_are_read_if_all_are_there(
    tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    saved(ledger, tmp_path / "s", 2, 4)
    known = usable(found(tmp_path / "s"), ledger)
    for step in (2, 4):
        cut(tmp_path / "s" / f"step-{step}", 0, 1, 3)
    good = replica()
    load_newest(tmp_path / "s", good, header_digest(ledger.header), known)
    assert good.digest() == at(ledger, 4).digest()
    damage(tmp_path / "s" / "step-4")
    one = replica()
    with caplog.at_level(logging.WARNING):
        load_newest(tmp_path / "s", one, header_digest(ledger.header), known)
    assert one.digest() == at(ledger, 2).digest()
    assert "the snapshot step-4 of" in caplog.text and "is passed over" in caplog.text


def test_one_of_another_layout_is_passed_over(tmp_path: Path) -> None:
    one = replica(torch.bfloat16)
    one.apply(seal(0, 2.0**-7, 1.0, 1.0, ((0, 0, 99),), bytes(32)))
    save(tmp_path, one, b"\1" * 32, RUN)
    other = replica()
    assert load_newest(tmp_path, other, RUN, {1: b"\1" * 32}) is None
    assert (other.step, other.digest()) == (0, replica().digest())


@pytest.mark.parametrize("step", [0, 1, 3, 4, 6, None])
@pytest.mark.parametrize("with_snapshots", [False, True])
def test_replay_reaches_any_step(tmp_path: Path, ledger: Ledger, step: int | None, with_snapshots: bool) -> None:
    saved(ledger, tmp_path / "s", 2, 4)
    one = replica()
    replay(one, ledger, tmp_path / "s" if with_snapshots else None, step)
    assert one.digest() == at(ledger, 6 if step is None else step).digest()


@pytest.mark.parametrize("step", [-1, 7])
def test_a_step_that_is_not_there(ledger: Ledger, step: int) -> None:
    with pytest.raises(RunError, match=f"no step {step}") as caught:
        replay(replica(), ledger, None, step)
    assert "0 to 6" in str(caught.value.advice)


def test_one_of_other_commits_is_passed_over(tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "s", at(ledger, 4), b"\7" * 32, header_digest(ledger.header))
    one = replica()
    with caplog.at_level(logging.WARNING):
        replay(one, ledger, tmp_path / "s")
    assert one.digest() == at(ledger, 6).digest() and "other commits" in caplog.text


def test_only_known_ones_are_used(tmp_path: Path, ledger: Ledger) -> None:
    saved(ledger, tmp_path / "s", 2, 4)
    known = usable(found(tmp_path / "s"), ledger, 3)
    assert known == {2: head_at(ledger, 2)}
    one = replica()
    assert load_newest(tmp_path / "s", one, header_digest(ledger.header), known) == known[2] and one.step == 2


def test_sweep_deletes_what_is_half_written_or_too_late(tmp_path: Path, ledger: Ledger) -> None:
    saved(ledger, tmp_path / "s", 2, 4)
    (tmp_path / "s" / ".step-6.4711").mkdir()
    sweep(tmp_path / "s")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["step-2", "step-4"]
    sweep(tmp_path / "s", after=2)
    assert steps(tmp_path / "s") == [2]


def test_another_base_model_is_refused(ledger: Ledger) -> None:
    other = replica()
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1
    with pytest.raises(LedgerError, match="another model"):
        replay(other, ledger, None)


def test_heads(ledger: Ledger) -> None:
    assert head_at(ledger, 0) == ledger.genesis
    assert head_at(ledger, 6) == ledger.head
