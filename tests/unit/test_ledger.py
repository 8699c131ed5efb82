from __future__ import annotations

import errno
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from zoray.commits import Commit, seal
from zoray.errors import LedgerError
from zoray.files import Files
from zoray.ledger import Ledger

HEADER = {"model": "tiny", "seed": 0, "learning_rate": 1e-6}
UNSYNCED = Files(fsync=lambda fd: None)  # a fuzz of thousands of files need not wait for the disk


def sealed(step: int, previous: bytes, salt: int = 0) -> Commit:
    """A commit of every kind by turns: one byte per direction, null, explicit terms."""
    if step % 4 == 1:
        return seal(step, 0.0, 1.0, math.nan, [(step, 0, 0)], previous)
    if step % 4 == 2:
        return seal(step, 0.25, 0.5, 3.5, [(step - 1, 7, -127), (step, 0, 1 + salt)], previous)
    return seal(step, 0.125, 1.0, 2.5, [(step, k, (k + step + salt) % 255 - 127) for k in range(5)], previous)


def fill(ledger: Ledger, count: int, salt: int = 0) -> list[Commit]:
    made = []
    for _ in range(count):
        made.append(sealed(ledger.next_step, ledger.head, salt))
        ledger.append(made[-1])
    return made


class Sample:
    """A small undisturbed ledger: its bytes, its commits, and where each record begins and the last one ends."""

    def __init__(self, folder: Path, count: int = 5, header: dict[str, Any] | None = None, salt: int = 0) -> None:
        with Ledger.create(folder, header or HEADER, files=UNSYNCED) as ledger:
            start = ledger.path.stat().st_size
            self.commits = fill(ledger, count, salt)
            self.genesis = ledger.genesis
        self.data, self.head = (folder / "commits.bin").read_bytes(), (folder / "head").read_bytes()
        self.borders = [start]
        for commit in self.commits:
            self.borders.append(self.borders[-1] + len(commit.encode()))
        assert self.borders[-1] == len(self.data)

    def whole(self, size: int) -> int:
        """How many records the first `size` bytes hold."""
        return sum(border <= size for border in self.borders[1:])

    def prefix(self, count: int) -> bytes:
        return self.data[: self.borders[count]]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(tmp_path_factory.mktemp("sample") / "ledger")


def lay(folder: Path, data: bytes, head: bytes | None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "commits.bin").write_bytes(data)
    (folder / "head").unlink(missing_ok=True)
    if head is not None:
        (folder / "head").write_bytes(head)
    return folder


def look(folder: Path, repair: bool) -> tuple[list[Commit], list[str]]:
    with Ledger.open(folder, repair=repair, files=UNSYNCED) as ledger:
        return list(ledger.commits()), list(ledger.warnings)


def expect_repair(folder: Path, sample: Sample, count: int) -> None:
    """Reading leaves the files alone and warns; repairing cuts back to `count` records, warns, and is then clean."""
    before = (folder / "commits.bin").read_bytes()
    found, warnings = look(folder, repair=False)
    assert found == sample.commits[:count] and warnings
    assert (folder / "commits.bin").read_bytes() == before
    found, warnings = look(folder, repair=True)
    assert found == sample.commits[:count] and warnings
    assert (folder / "commits.bin").read_bytes() == sample.prefix(count)
    assert look(folder, repair=True) == (sample.commits[:count], [])


def expect_refusal(folder: Path, offset: int | None) -> LedgerError:
    """Both ways of opening refuse at `offset`, and change nothing."""
    before = (folder / "commits.bin").read_bytes()
    for repair in (False, True):
        with pytest.raises(LedgerError) as caught:
            look(folder, repair)
        if offset is not None:
            found = re.search(r"commits\.bin, byte (\d+)$", caught.value.where or "")
            assert found and int(found[1]) == offset, caught.value
        assert caught.value.advice
    assert (folder / "commits.bin").read_bytes() == before
    return caught.value


def test_what_is_appended_is_read_back_after_reopening(tmp_path: Path, sample: Sample) -> None:
    with Ledger.create(tmp_path / "new" / "ledger", HEADER) as ledger:
        assert (ledger.next_step, ledger.head) == (0, ledger.genesis)
        assert fill(ledger, 2) == sample.commits[:2]
    with Ledger.open(tmp_path / "new" / "ledger", repair=True) as ledger:
        assert fill(ledger, 3) == sample.commits[2:]
        assert list(ledger.commits()) == sample.commits
    with Ledger.open(tmp_path / "new" / "ledger", repair=False) as ledger:
        assert (ledger.header, ledger.genesis) == (HEADER, sample.genesis)
        assert (ledger.next_step, ledger.head, ledger.warnings) == (5, sample.commits[-1].hash, [])
        assert list(ledger.commits(1, 3)) == sample.commits[1:3]
        assert list(ledger.commits(4)) == sample.commits[4:]
        assert list(ledger.commits(5)) == []
        for start, stop in [(-1, 2), (0, 6), (3, 2)]:
            with pytest.raises(LedgerError, match="there are 5"):
                list(ledger.commits(start, stop))
    assert (tmp_path / "new" / "ledger" / "commits.bin").read_bytes() == sample.data


@pytest.mark.parametrize("with_head", [True, False])
def test_every_truncation_is_repaired_or_refused(tmp_path: Path, sample: Sample, with_head: bool) -> None:
    for size in range(len(sample.data)):
        folder = lay(tmp_path / "cut", sample.data[:size], sample.head if with_head else None)
        if size < sample.borders[0]:
            expect_refusal(folder, 0 if size < 16 else 16)
        else:
            expect_repair(folder, sample, sample.whole(size))


@pytest.mark.parametrize(
    ("pattern", "with_head"), [*((1 << bit, True) for bit in range(8)), (0xFF, True), (0xFF, False), (None, True)]
)
def test_every_flipped_byte_is_repaired_or_refused(
    tmp_path: Path, sample: Sample, pattern: int | None, with_head: bool
) -> None:
    for at, byte in enumerate(sample.data):
        damaged = bytearray(sample.data)
        damaged[at] = 0 if pattern is None else byte ^ pattern
        if damaged == sample.data:
            continue
        folder = lay(tmp_path / "flip", bytes(damaged), sample.head if with_head else None)
        if at < sample.borders[0]:
            expect_refusal(folder, 0 if at < 16 else 16)
            continue
        record = sample.whole(at)
        if record == len(sample.commits) - 1 and at >= sample.borders[record] + 16:
            expect_repair(folder, sample, record)
        else:
            expect_refusal(folder, sample.borders[record])


def test_a_damaged_length_is_never_taken_for_a_torn_tail(tmp_path: Path, sample: Sample) -> None:
    for record in range(len(sample.commits)):
        for length in (0, 64, 65, 2**16, 2**32 - 1):
            damaged = bytearray(sample.data)
            damaged[sample.borders[record] : sample.borders[record] + 4] = length.to_bytes(4, "little")
            if damaged != sample.data:
                expect_refusal(lay(tmp_path / "length", bytes(damaged), sample.head), sample.borders[record])


@pytest.mark.parametrize("zeros", [1, 15, 16, 40, 500, 3 << 20])
def test_a_tail_of_zeros_is_a_torn_record(tmp_path: Path, sample: Sample, zeros: int) -> None:
    sizes = range(sample.borders[3], len(sample.data) + 1) if zeros < 1000 else [len(sample.data), len(sample.data) - 9]
    for size in sizes:
        data = sample.data[:size] + bytes(zeros)
        count = sample.whole(size) + (data[: len(sample.data)] == sample.data and size < len(sample.data))
        expect_repair(lay(tmp_path / "zeros", data, sample.head), sample, count)


@pytest.mark.parametrize("tail", [b"\1" * 40, bytes(100) + b"\1", b"\1" * 17])
def test_a_tail_that_no_append_leaves_is_refused(tmp_path: Path, sample: Sample, tail: bytes) -> None:
    expect_refusal(lay(tmp_path / "tail", sample.data + tail, sample.head), len(sample.data))


def test_records_cut_off_at_a_border_are_counted(tmp_path: Path, sample: Sample) -> None:
    folder = lay(tmp_path / "border", sample.prefix(2), sample.head)
    assert look(folder, repair=False)[1] == ["3 commits are missing: they will be computed again"]
    with Ledger.open(folder, repair=True, files=UNSYNCED) as ledger:
        assert fill(ledger, 3, salt=1) != sample.commits[2:]
    assert look(folder, repair=True)[1] == []


def test_a_torn_record_is_named_with_its_step_and_offset(tmp_path: Path, sample: Sample) -> None:
    folder = lay(tmp_path / "torn", sample.data[:-1], None)
    read, repaired = look(folder, repair=False)[1][0], look(folder, repair=True)[1][0]
    for warning, did in ((read, "left out"), (repaired, "cut off")):
        assert f"step 4 {did}" in warning and f"byte {sample.borders[4]}" in warning


def test_every_damage_to_the_head_file_is_survived_with_a_warning(tmp_path: Path, sample: Sample) -> None:
    for size in range(len(sample.head)):
        expect_repair(lay(tmp_path / "head", sample.data, sample.head[:size]), sample, 5)
        for bit in range(8):
            damaged = bytearray(sample.head)
            damaged[size] ^= 1 << bit
            found, warnings = look(lay(tmp_path / "head", sample.data, bytes(damaged)), repair=False)
            assert found == sample.commits and len(warnings) == 1
    for head in (sample.head + b"\0", sample.head * 2, None):
        expect_repair(lay(tmp_path / "head", sample.data, head), sample, 5)


def test_a_head_that_is_behind_is_no_fault(tmp_path: Path, sample: Sample) -> None:
    older = Sample(tmp_path / "older", count=3)
    assert look(lay(tmp_path / "behind", sample.data, older.head), repair=False) == (sample.commits, [])


@pytest.mark.parametrize("count", [0, 2, 5, 7])
def test_a_ledger_swapped_for_another_is_refused(tmp_path: Path, sample: Sample, count: int) -> None:
    other = Sample(tmp_path / "other", count, {"model": "another"})
    expect_refusal(lay(tmp_path / "swap", other.data, sample.head), None)
    if count:
        branch = Sample(tmp_path / "branch", 5 + count, salt=1)
        expect_refusal(lay(tmp_path / "swap", branch.data, sample.head), None)
        expect_refusal(lay(tmp_path / "swap", branch.data[:-1], sample.head), None)


def test_a_record_of_another_ledger_is_refused(tmp_path: Path, sample: Sample) -> None:
    for other in (Sample(tmp_path / "model", header={"model": "another"}), Sample(tmp_path / "salt", salt=1)):
        for record in range(4):
            moved = other.data[other.borders[record] : other.borders[record + 1]]
            data = sample.prefix(record) + moved + sample.data[sample.borders[record + 1] :]
            # A first record of a ledger with the same header does belong here; then its successor does not.
            at = record + 1 if (record, other.genesis) == (0, sample.genesis) else record
            expect_refusal(lay(tmp_path / "moved", data, sample.head), sample.borders[at])
        last = sample.prefix(4) + other.data[other.borders[4] :]
        expect_repair(lay(tmp_path / "last", last, sample.head), sample, 4)


def test_records_dropped_repeated_or_exchanged_are_refused(tmp_path: Path, sample: Sample) -> None:
    records = [sample.data[a:b] for a, b in zip(sample.borders, sample.borders[1:], strict=False)]
    for order, at in [([1, 2, 3, 4], 0), ([0, 2, 3, 4], 1), ([0, 1, 1, 2, 3, 4], 2), ([0, 2, 1, 3, 4], 1), ([0, 3], 1)]:
        data = sample.prefix(0) + b"".join(records[k] for k in order)
        expect_refusal(lay(tmp_path / "order", data, None), sample.borders[at])


def test_append_takes_only_the_next_commit_of_this_ledger(tmp_path: Path, sample: Sample) -> None:
    with Ledger.create(tmp_path / "ledger", HEADER, files=UNSYNCED) as ledger:
        fill(ledger, 2)
        genuine = sealed(2, ledger.head)
        forged = Commit(2, 0.5, 1.0, 1.0, genuine.terms, genuine.previous, genuine.hash)
        for wrong in (sealed(3, ledger.head), sealed(1, ledger.head), sealed(2, sample.genesis), forged):
            with pytest.raises(LedgerError):
                ledger.append(wrong)
        assert fill(ledger, 3) == sample.commits[2:]
    assert (tmp_path / "ledger" / "commits.bin").read_bytes() == sample.data
    with Ledger.open(tmp_path / "ledger", repair=False) as reader, pytest.raises(LedgerError, match="repair=True"):
        reader.append(sealed(5, reader.head))
    with pytest.raises(LedgerError):
        ledger.append(sealed(5, ledger.head))
    ledger.close()


def test_two_writers_do_not_interleave(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger", HEADER) as first, Ledger.open(tmp_path / "ledger", repair=True) as second:
        made = fill(first, 1)
        with pytest.raises(LedgerError, match="other writer"):
            second.append(sealed(0, second.head, salt=1))
        made += fill(first, 1)
    assert look(tmp_path / "ledger", repair=False) == (made, [])


def test_a_reader_beside_a_live_writer_sees_whole_commits(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger", HEADER) as writer:
        for count in range(1, 4):
            fill(writer, 1)
            with Ledger.open(tmp_path / "ledger", repair=False) as reader:
                assert (reader.next_step, reader.warnings) == (count, [])


def test_damage_after_opening_is_found_while_reading(tmp_path: Path, sample: Sample) -> None:
    folder = lay(tmp_path / "late", sample.data, sample.head)
    with Ledger.open(folder, repair=False) as ledger:
        damaged = bytearray(sample.data)
        damaged[sample.borders[2] + 20] ^= 1
        (folder / "commits.bin").write_bytes(damaged)
        reader = ledger.commits()
        assert [next(reader), next(reader)] == sample.commits[:2]
        with pytest.raises(LedgerError, match=f"byte {sample.borders[2]}"):
            next(reader)


def test_create_and_open_say_what_is_in_the_way(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "ledger", HEADER).close()
    before = (tmp_path / "ledger" / "commits.bin").read_bytes()
    with pytest.raises(LedgerError, match="there is a ledger already"):
        Ledger.create(tmp_path / "ledger", HEADER)
    assert (tmp_path / "ledger" / "commits.bin").read_bytes() == before
    for header in ({"value": object()}, {"value": math.nan}):
        with pytest.raises(LedgerError, match="must be JSON"):
            Ledger.create(tmp_path / "new", header)
    with pytest.raises(LedgerError, match="No such file"):
        Ledger.open(tmp_path / "nowhere", repair=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot create the ledger"):
        Ledger.create(tmp_path / "file", HEADER)


@pytest.mark.parametrize("step", range(6))
def test_commits_thrown_away_are_computed_again(tmp_path: Path, sample: Sample, step: int) -> None:
    folder = lay(tmp_path / "cut", sample.data, sample.head)
    with Ledger.open(folder, repair=True, files=UNSYNCED) as ledger:
        assert ledger.cut(step) == 5 - step
        assert (ledger.next_step, list(ledger.commits())) == (step, sample.commits[:step])
        assert ledger.head == (sample.commits[step - 1].hash if step else ledger.genesis)
        assert look(folder, repair=False) == (sample.commits[:step], [])
        assert (folder / "commits.bin").read_bytes() == sample.prefix(step)
        made = fill(ledger, 6 - step, salt=1)
        # Step 1 is the null commit, whatever the salt.
        assert not {commit.hash for commit in made[1:]} & {commit.hash for commit in sample.commits}
        assert list(ledger.commits()) == sample.commits[:step] + made
    assert look(folder, repair=True) == (sample.commits[:step] + made, [])


def test_cut_refuses_what_it_cannot_do(tmp_path: Path, sample: Sample) -> None:
    folder = lay(tmp_path / "cut", sample.data, sample.head)
    with Ledger.open(folder, repair=False) as reader, pytest.raises(LedgerError, match="repair=True"):
        reader.cut(2)
    with Ledger.open(folder, repair=True, files=UNSYNCED) as ledger:
        for step in (-1, 6):
            with pytest.raises(LedgerError, match="there are 5"):
                ledger.cut(step)
        (folder / "commits.bin").write_bytes(sample.data + b"!")
        with pytest.raises(LedgerError, match="other writer"):
            ledger.cut(2)
        (folder / "commits.bin").write_bytes(sample.data)
    with pytest.raises(LedgerError, match="Bad file descriptor"):
        ledger.cut(2)
    assert look(folder, repair=False) == (sample.commits, [])


def test_a_ledger_is_not_cut_back_to_a_damaged_record(tmp_path: Path, sample: Sample) -> None:
    folder = lay(tmp_path / "cut", sample.data, sample.head)
    with Ledger.open(folder, repair=True, files=UNSYNCED) as ledger:
        damaged = bytearray(sample.data)
        damaged[sample.borders[2] - 1] ^= 1
        (folder / "commits.bin").write_bytes(damaged)
        with pytest.raises(LedgerError, match=f"byte {sample.borders[1]}"):
            ledger.cut(2)
    assert (folder / "commits.bin").read_bytes() == damaged


def test_records_are_the_bytes_of_the_commits(tmp_path: Path, sample: Sample) -> None:
    reads = []

    def count(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        reads.extend([name] if name == "read" else [])
        return call(*arguments)

    folder = lay(tmp_path / "records", sample.data, sample.head)
    with Ledger.open(folder, repair=False, files=layer(count)) as ledger:
        for start, stop in [(a, b) for a in range(6) for b in range(a, 6)]:
            reads.clear()
            found = ledger.records(start, stop)
            assert len(reads) == (stop > start)
            assert found == b"".join(commit.encode() for commit in ledger.commits(start, stop))
        for start, stop in [(-1, 2), (0, 6), (3, 2)]:
            with pytest.raises(LedgerError, match="there are 5"):
                ledger.records(start, stop)
        (folder / "commits.bin").write_bytes(sample.data[:-1])
        assert ledger.records(0, 4) == sample.data[sample.borders[0] : sample.borders[4]]
        with pytest.raises(LedgerError, match="ends before step 5") as caught:
            ledger.records(3, 5)
        assert f"byte {sample.borders[3]}" in str(caught.value)
    with pytest.raises(LedgerError, match="cannot read"):
        ledger.records(0, 4)


def test_the_header_is_the_same_whatever_the_order_of_its_keys(tmp_path: Path, sample: Sample) -> None:
    with Ledger.create(tmp_path / "ledger", dict(reversed(HEADER.items()))) as ledger:
        assert ledger.genesis == sample.genesis


def test_errors_survive_pickling(tmp_path: Path, sample: Sample) -> None:
    damaged = bytearray(sample.data)
    damaged[sample.borders[1]] ^= 1
    error = expect_refusal(lay(tmp_path / "pickle", bytes(damaged), sample.head), sample.borders[1])
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (LedgerError, str(error), 5)


def test_floats_of_a_run_come_back_exactly(tmp_path: Path) -> None:
    values = [1e-45, 3.4028234663852886e38, 0.10000000149011612, -0.0, 1.1754943508222875e-38]
    with Ledger.create(tmp_path / "ledger", HEADER) as ledger:
        for step, value in enumerate(values):
            value = float.fromhex(value.hex()) if step != 0 else 2.0**-149
            ledger.append(seal(step, value, value, value, [], ledger.head))
        ledger.append(seal(5, 0.0, 1.0, math.nan, [], ledger.head))
        found = list(ledger.commits())
    values[0] = 2.0**-149
    for value, commit in zip(values, found, strict=False):
        assert [x.hex() for x in (commit.eta, commit.decay, commit.loss)] == [value.hex()] * 3
    assert math.isnan(found[5].loss) and not found[5].applied


# --- faults between and inside the system calls ---------------------------------------------------------------------


class Crash(BaseException):
    """The process dies here: nothing of the ledger's own code may run as a consequence."""


Hook = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]


def layer(hook: Hook) -> Files:
    """A file layer that hands every system call (its name, itself, its arguments) to `hook`."""

    def called(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        return hook(name, call, arguments)

    return Files(**{f.name: partial(called, f.name, getattr(UNSYNCED, f.name)) for f in fields(Files)})


class Disk:
    """Counts the changing calls, dies before, half-way through or after a chosen one, and knows what fsyncs saved."""

    def __init__(self, fatal: int, moment: str) -> None:
        self.fatal, self.moment = fatal, moment
        self.calls: list[str] = []
        self.names: dict[int, Path] = {}
        self.saved: dict[Path, bytes] = {}
        self.files = layer(self.call)

    def call(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name in ("size", "read", "close"):
            return call(*arguments)
        fatal, _ = len(self.calls) == self.fatal, self.calls.append(name)
        if fatal and self.moment == "before":
            raise Crash
        if fatal and self.moment == "half-way" and name == "write":
            fd, data, offset = arguments
            arguments = (fd, data[: len(data) // 2], offset)
        result = call(*arguments)
        self.note(name, arguments, result)
        if fatal:
            raise Crash
        return result

    def note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self.names[result] = arguments[0]
        elif name == "fsync" and self.names[arguments[0]].is_file():
            self.saved[self.names[arguments[0]]] = self.names[arguments[0]].read_bytes()
        elif name == "rename":
            self.saved[arguments[1]] = self.saved.pop(arguments[0])


def run_until_crash(folder: Path, disk: Disk) -> int | None:
    """Make a ledger of 5 commits; how many `append`s returned before the crash, or None if there was none."""
    done = 0
    try:
        ledger = Ledger.create(folder, HEADER, files=disk.files)
        for _ in range(5):
            fill(ledger, 1)
            done += 1
    except Crash:
        return done
    return None


def crashes(folder: Path, moment: str) -> Iterator[tuple[int, Disk]]:
    """Runs that die at their first, second, ... changing call, each with how many commits were acknowledged."""
    fatal = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        disk = Disk(fatal, moment)
        done = run_until_crash(folder, disk)
        if done is None:
            assert fatal > 5 * 3  # at least write, fsync and head of each append
            return
        yield done, disk
        fatal += 1


def resume(folder: Path, sample: Sample, done: int) -> None:
    """Continue after a crash: nothing acknowledged is lost, and the end is that of the undisturbed run."""
    if not (folder / "commits.bin").exists():
        assert done == 0
        Ledger.create(folder, HEADER, files=UNSYNCED).close()
    with Ledger.open(folder, repair=True, files=UNSYNCED) as ledger:
        assert ledger.next_step in (done, done + 1)
        assert not any("missing:" in warning for warning in ledger.warnings)
        assert list(ledger.commits()) == sample.commits[: ledger.next_step]
        fill(ledger, 5 - ledger.next_step)
    assert (folder / "commits.bin").read_bytes() == sample.data
    assert look(folder, repair=False) == (sample.commits, [])


@pytest.mark.parametrize("moment", ["before", "half-way", "after"])
def test_a_process_killed_at_any_call_loses_nothing(tmp_path: Path, sample: Sample, moment: str) -> None:
    for done, _ in crashes(tmp_path / "ledger", moment):
        resume(tmp_path / "ledger", sample, done)


@pytest.mark.parametrize("moment", ["before", "half-way", "after"])
def test_a_power_cut_at_any_call_loses_nothing(tmp_path: Path, sample: Sample, moment: str) -> None:
    folder = tmp_path / "ledger"
    for done, disk in crashes(folder, moment):
        records = folder / "commits.bin"
        if records.exists():
            # What was synced is there; of the rest, any beginning may be.
            written, saved = records.read_bytes(), disk.saved[records]
            assert written.startswith(saved)
            head = (folder / "head").read_bytes()
            for size in (len(saved), (len(saved) + len(written)) // 2, len(written)):
                for survivor in (head, disk.saved[folder / "head"]):
                    lay(folder, written[:size], survivor)
                    resume(folder, sample, done)


@pytest.mark.parametrize("moment", ["before", "half-way", "after"])
def test_a_crash_while_repairing_is_repaired(tmp_path: Path, sample: Sample, moment: str) -> None:
    head = Sample(tmp_path / "before", count=4).head
    for fatal in range(20):
        folder = lay(tmp_path / "ledger", sample.data[:-3], head)
        try:
            Ledger.open(folder, repair=True, files=Disk(fatal, moment).files).close()
        except Crash:
            resume(folder, sample, 4)
        else:
            assert fatal > 3
            return
    raise AssertionError("the repair never came to its end")


def test_a_record_is_synced_before_the_head_is_written(tmp_path: Path) -> None:
    disk = Disk(-1, "never")
    with Ledger.create(tmp_path / "ledger", HEADER, files=disk.files) as ledger:
        before = len(disk.calls)
        fill(ledger, 1)
    assert disk.calls[before:] == ["write", "fsync", "write"]


def test_a_record_found_by_a_writer_is_synced_before_it_is_built_on(tmp_path: Path, sample: Sample) -> None:
    folder, disk = lay(tmp_path / "ledger", sample.data, sample.head), Disk(-1, "never")
    Ledger.open(folder, repair=True, files=disk.files).close()
    assert disk.saved[folder / "commits.bin"] == sample.data


def test_a_head_that_is_ahead_is_replaced_for_good(tmp_path: Path, sample: Sample) -> None:
    folder, disk = lay(tmp_path / "ledger", sample.prefix(2), sample.head), Disk(-1, "never")
    Ledger.open(folder, repair=True, files=disk.files).close()
    assert disk.saved[folder / "head"] == Sample(tmp_path / "two", count=2).head


def cut_and_go_on(folder: Path, disk: Disk, fatal: int) -> int | None:
    """Cut a ledger of 5 commits to 2, append 4 others, and die at a call; how many are acknowledged (None: 5 or 2)."""
    ledger = Ledger.open(folder, repair=True, files=disk.files)
    disk.fatal, done = len(disk.calls) + fatal, None
    with suppress(Crash):
        ledger.cut(2)
        for done in range(2, 7):
            if done < 6:
                fill(ledger, 1, salt=1)
    ledger.close()
    return done


@pytest.mark.parametrize("power", ["stays", "is cut"])
@pytest.mark.parametrize("moment", ["before", "half-way", "after"])
def test_a_crash_at_any_call_of_a_cut_and_after(tmp_path: Path, sample: Sample, moment: str, power: str) -> None:
    folder, seen = tmp_path / "ledger", set()
    with Ledger.create(tmp_path / "branch", HEADER, files=UNSYNCED) as ledger:
        branch = fill(ledger, 2) + fill(ledger, 4, salt=1)
    for fatal in range(100):
        disk = Disk(-1, moment)
        done = cut_and_go_on(lay(folder, sample.data, sample.head), disk, fatal)
        names = (folder / "commits.bin", folder / "head")
        # Without power, of each file there is what was synced last, or what was written since, or a part of that.
        written, synced = [name.read_bytes() for name in names], [disk.saved[name] for name in names]
        records, heads = [written[0]], [written[1]]
        if power == "is cut":
            records += [synced[0], written[0][: (len(synced[0]) + len(written[0])) // 2]]
            heads += [synced[1], written[1][:40] + synced[1][40:]]
        for data, head in [(data, head) for data in records for head in heads]:
            with Ledger.open(lay(folder, data, head), repair=True, files=UNSYNCED) as ledger:
                assert not any("missing:" in warning for warning in ledger.warnings)
                found = list(ledger.commits())
                seen.add((done is None, len(found)))
                if done is None and found == sample.commits:
                    assert ledger.cut(2) == 3
                elif done is None:
                    assert found == sample.commits[:2]
                else:
                    assert found == branch[: len(found)] and len(found) in (done, done + 1)
                fill(ledger, 6 - ledger.next_step, salt=1)
            assert look(folder, repair=True) == (branch, [])
        if done == 6:
            break
    assert fatal == 4 + 4 * 3 and {(True, 5), (True, 2), (False, 3), (False, 6)} <= seen


def test_a_cut_syncs_the_head_before_the_records_go(tmp_path: Path, sample: Sample) -> None:
    folder, disk = lay(tmp_path / "ledger", sample.data, sample.head), Disk(-1, "never")
    with Ledger.open(folder, repair=True, files=disk.files) as ledger:
        before = len(disk.calls)
        ledger.cut(2)
    assert disk.calls[before:] == ["write", "fsync", "truncate", "fsync"]
    assert disk.saved[folder / "commits.bin"] == sample.prefix(2)
    assert disk.saved[folder / "head"] == Sample(tmp_path / "two", count=2).head


class Failing:
    """A layer whose calls of the given names raise while `on`; writes first take `taken` bytes."""

    def __init__(self, *names: str, code: int = errno.ENOSPC, taken: int = 0) -> None:
        self.names, self.code, self.taken, self.on = names, code, taken, False
        self.files = layer(self.call)

    def call(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if not self.on or name not in self.names:
            return call(*arguments)
        if name == "write" and self.taken:
            fd, data, offset = arguments
            taken, self.taken = self.taken, 0
            return call(fd, data[:taken], offset)
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (Failing("write"), "No space left"),
        (Failing("write", taken=1), "No space left"),
        (Failing("write", taken=30), "No space left"),
        (Failing("write", code=errno.EDQUOT, taken=69), "quota"),
        (Failing("fsync", code=errno.EIO), "Input/output error"),
        (Failing("size", code=errno.ESTALE), "Stale file handle"),
    ],
)
def test_an_append_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, sample: Sample, failing: Failing, reason: str
) -> None:
    path = tmp_path / "ledger" / "commits.bin"
    with Ledger.create(path.parent, HEADER, files=failing.files) as ledger:
        fill(ledger, 3)
        failing.on = True
        with pytest.raises(LedgerError, match=f"step 3 is not committed.*{reason}") as caught:
            fill(ledger, 1)
        assert caught.value.where == str(path) and "free space" in str(caught.value)
        assert (path.read_bytes(), ledger.next_step) == (sample.prefix(3), 3)
        assert look(path.parent, repair=False) == (sample.commits[:3], [])
        failing.on = False
        assert fill(ledger, 2) == sample.commits[3:]
    assert path.read_bytes() == sample.data


@pytest.mark.parametrize(
    "failing", [Failing("size"), Failing("write"), Failing("write", taken=40), Failing("fsync"), Failing("truncate")]
)
def test_a_cut_that_fails_leaves_the_records(tmp_path: Path, sample: Sample, failing: Failing) -> None:
    folder = lay(tmp_path / "ledger", sample.data, sample.head)
    with Ledger.open(folder, repair=True, files=failing.files) as ledger:
        failing.on = True
        with pytest.raises(LedgerError, match=r"from step 2 on are not thrown away.*No space left") as caught:
            ledger.cut(2)
        assert caught.value.where == str(folder / "commits.bin")
        failing.on = False
        assert look(folder, repair=False)[0] == list(ledger.commits()) == sample.commits
        more = fill(ledger, 1)
        assert look(folder, repair=False) == (sample.commits + more, [])
        assert ledger.cut(2) == 4
    assert look(folder, repair=False) == (sample.commits[:2], [])


def test_a_cut_that_may_not_be_durable_is_not_built_on(tmp_path: Path, sample: Sample) -> None:
    calls: list[str] = []

    def fail(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        calls.append(name)
        if calls[-2:] == ["truncate", "fsync"]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*arguments)

    folder = lay(tmp_path / "ledger", sample.data, sample.head)
    with Ledger.open(folder, repair=True, files=layer(fail)) as ledger:
        with pytest.raises(LedgerError, match="Input/output error"):
            ledger.cut(2)
        for act in (partial(fill, ledger, 1), partial(ledger.cut, 2)):
            with pytest.raises(LedgerError, match="open the ledger again"):
                act()
    with Ledger.open(folder, repair=True, files=UNSYNCED) as ledger:
        assert (list(ledger.commits()), ledger.warnings) == (sample.commits[:2], [])
        fill(ledger, 4, salt=1)
    assert look(folder, repair=False)[1] == []


@pytest.mark.parametrize("taken", [1, 30, 69])
def test_a_tail_that_cannot_be_cut_off_is_not_built_on(tmp_path: Path, sample: Sample, taken: int) -> None:
    failing = Failing("write", "truncate", "fsync", taken=taken)
    with Ledger.create(tmp_path / "ledger", HEADER, files=failing.files) as ledger:
        fill(ledger, 3)
        failing.on = True
        with pytest.raises(LedgerError, match="No space left"):
            fill(ledger, 1)
        failing.on = False
        with pytest.raises(LedgerError, match="not as this ledger left it"):
            fill(ledger, 1)
    expect_repair(tmp_path / "ledger", sample, 3)


def test_short_writes_are_completed_and_refused_writes_reported(tmp_path: Path, sample: Sample) -> None:
    short = Files(write=lambda fd, data, offset: os.pwrite(fd, data[:7], offset), fsync=lambda fd: None)
    with Ledger.create(tmp_path / "short", HEADER, files=short) as ledger:
        fill(ledger, 5)
    assert (tmp_path / "short" / "commits.bin").read_bytes() == sample.data
    assert look(tmp_path / "short", repair=False) == (sample.commits, [])
    with pytest.raises(LedgerError, match="took none of the bytes"):
        Ledger.create(tmp_path / "none", HEADER, files=Files(write=lambda fd, data, offset: 0))
    with pytest.raises(LedgerError, match="No such file"):
        Ledger.open(tmp_path / "none", repair=True)


def test_short_reads_are_completed(tmp_path: Path, sample: Sample) -> None:
    folder = lay(tmp_path / "reads", sample.data, sample.head)
    short = Files(read=lambda fd, count, offset: os.pread(fd, min(count, 100), offset))
    with Ledger.open(folder, repair=False, files=short) as ledger:
        assert (list(ledger.commits()), ledger.warnings) == (sample.commits, [])


def test_a_head_that_cannot_be_written_does_not_undo_a_commit(tmp_path: Path, sample: Sample) -> None:
    def write(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if armed and name == "write" and arguments[2] == 0:
            raise OSError(errno.EIO, "Input/output error")
        return call(*arguments)

    armed = False
    with Ledger.create(tmp_path / "ledger", HEADER, files=layer(write)) as ledger:
        armed = True
        assert fill(ledger, 5) == sample.commits
        assert "step 0 is committed" in ledger.warnings[0]
    assert look(tmp_path / "ledger", repair=False) == (sample.commits, [])


def test_no_descriptor_is_left_open(tmp_path: Path, sample: Sample) -> None:
    opened: set[int] = set()

    def follow(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = call(*arguments)
        if name == "open":
            opened.add(result)
        elif name == "close":
            opened.remove(arguments[0])
        return result

    Ledger.create(tmp_path / "ledger", HEADER, files=layer(follow)).close()
    for size in (10, sample.borders[0], len(sample.data) - 1):
        folder = lay(tmp_path / "cut", sample.data[:size], sample.head)
        for repair in (False, True):
            try:
                Ledger.open(folder, repair=repair, files=layer(follow)).close()
            except LedgerError:
                assert size == 10
    assert not opened
