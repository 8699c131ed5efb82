from __future__ import annotations

import hashlib
import math
import pickle
import struct
import zlib
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoray.commits import Commit, check_hash, float32, read_header, seal
from zoray.errors import LedgerError

PREVIOUS = bytes(range(32))
OTHER = bytes(32)

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
hashes = st.binary(min_size=32, max_size=32)
coefficients = st.integers(-127, 127)
explicit = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), coefficients), max_size=8)


def implied(step: int, values: list[int]) -> list[tuple[int, int, int]]:
    return [(step, k, c) for k, c in enumerate(values)]


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    step = draw(st.integers(0, 2**64 - 1))
    terms = draw(st.one_of(explicit, st.lists(coefficients, max_size=40).map(lambda values: implied(step, values))))
    loss, notes = draw(st.floats(width=32)), draw(st.lists(st.floats(width=32), max_size=4))
    return seal(step, draw(floats32), draw(floats32), loss, terms, draw(hashes), notes)


def bits(value: float) -> bytes:
    return struct.pack("<f", value)


@given(commits())
def test_a_record_gives_back_its_commit_bit_for_bit(commit: Commit) -> None:
    record = commit.encode()
    again = Commit.decode(record, commit.previous)
    assert again == commit
    assert again.encode() == record
    assert repr(again.notes) == repr(commit.notes)
    assert (bits(again.eta), bits(again.decay)) == (bits(commit.eta), bits(commit.decay))
    assert bits(again.loss) == bits(commit.loss) or math.isnan(again.loss) == math.isnan(commit.loss) is True


@pytest.mark.parametrize("value", [1e-45, 1.1754942e-38, 3.4028235e38, 0.1, 1 / 3, -0.0, 1 - 1e-7])
def test_float32_values_are_exact(value: float) -> None:
    value = float32(value)
    again = Commit.decode(seal(3, value, value, value, [], PREVIOUS).encode(), PREVIOUS)
    assert bits(again.eta) == bits(again.decay) == bits(again.loss) == bits(value)


@pytest.mark.parametrize("loss", [math.nan, -math.nan, struct.unpack("<f", b"\x01\x02\xc0\x7f")[0]])
def test_every_nan_is_the_same_nan(loss: float) -> None:
    commit = seal(0, 0.0, 1.0, loss, [], PREVIOUS)
    assert commit == seal(0, 0.0, 1.0, math.nan, [], PREVIOUS)
    assert math.isnan(Commit.decode(commit.encode(), PREVIOUS).loss)


def test_the_layout_is_as_documented() -> None:
    record = seal(7, 0.5, 0.75, 2.5, implied(7, [127, -127, 0]), PREVIOUS).encode()
    length, step = struct.pack("<I", len(record)), struct.pack("<Q", 7)
    expected = length + struct.pack("<I", zlib.crc32(length + step)) + step
    expected += struct.pack("<fffBI", 0.5, 0.75, 2.5, 0, 3) + b"\x7f\x81\x00"
    assert record == expected + hashlib.sha256(PREVIOUS + expected).digest()
    assert read_header(record) == (len(record), 7)


@pytest.mark.parametrize("count", [0, 1, 16, 4096, 100_000])
def test_a_record_costs_one_byte_per_direction_and_a_constant(count: int) -> None:
    record = seal(9, 1.0, 1.0, 1.0, implied(9, [count % 127] * count), PREVIOUS).encode()
    assert len(record) == count + 65 <= count + 96


def test_terms_of_earlier_steps_are_written_out() -> None:
    terms = [(5, 0, 3), (4, 2**32 - 1, -127), (2**64 - 1, 7, 1)]
    commit = seal(5, 1.0, 1.0, 1.0, terms, PREVIOUS)
    assert len(commit.encode()) == 65 + 13 * 3
    assert Commit.decode(commit.encode(), PREVIOUS).terms == tuple(terms)


def test_notes_and_runs_are_as_documented() -> None:
    """A step's own directions, and those of earlier steps, take one byte each and 16 for each step."""
    terms = [(3, 2, 5), (3, 3, -5), *implied(4, [1] * 16)]
    commit = seal(4, 0.5, 0.75, 2.5, terms, PREVIOUS, [0.25, math.nan])
    packed = struct.pack("<BffB", 2, 0.25, math.nan, 2) + struct.pack("<QIIQII", 3, 2, 2, 4, 0, 16)
    assert commit.encode()[33:-32] == packed + b"\x05\xfb" + b"\1" * 16
    assert Commit.decode(commit.encode(), PREVIOUS).terms == tuple(terms)
    assert seal(4, 0.5, 0.75, 2.5, terms, PREVIOUS, [0.25]).hash != commit.hash


def test_more_notes_and_runs_than_a_record_has_room_for_are_refused() -> None:
    for terms, notes in (([], [0.0] * 256), ([(step, 0, 1) for step in range(256)], [0.0])):
        with pytest.raises(LedgerError, match="above 255"):
            seal(300, 1.0, 1.0, 1.0, terms, PREVIOUS, notes)
    with pytest.raises(LedgerError, match="a note"):
        seal(0, 1.0, 1.0, 1.0, [], PREVIOUS, [0.1])


def test_the_order_of_terms_is_part_of_a_commit() -> None:
    forward, backward = [(1, 0, 5), (1, 1, 6)], [(1, 1, 6), (1, 0, 5)]
    assert seal(1, 1.0, 1.0, 1.0, forward, PREVIOUS).hash != seal(1, 1.0, 1.0, 1.0, backward, PREVIOUS).hash


def test_every_flipped_bit_and_every_truncation_is_refused() -> None:
    record = seal(300, 0.5, 0.25, math.nan, implied(300, [1, -2, 3]), PREVIOUS).encode()
    for at in range(len(record)):
        for bit in range(8):
            damaged = bytearray(record)
            damaged[at] ^= 1 << bit
            with pytest.raises(LedgerError):
                Commit.decode(bytes(damaged), PREVIOUS)
        with pytest.raises(LedgerError):
            Commit.decode(record[:at], PREVIOUS)
    with pytest.raises(LedgerError):
        Commit.decode(record + b"\0", PREVIOUS)


def test_a_record_fits_behind_one_hash_only() -> None:
    record = seal(0, 1.0, 1.0, 1.0, [], PREVIOUS).encode()
    with pytest.raises(LedgerError, match="wrong hash"):
        Commit.decode(record, OTHER)
    with pytest.raises(LedgerError, match="wrong hash"):
        check_hash(record, OTHER)
    assert check_hash(record, PREVIOUS) == record[-32:]


def forged(step: int, form: int, count: int, packed: bytes, loss: bytes = bits(1.0)) -> bytes:
    """A record that `seal` would not write, with true checksums."""
    length = 65 + len(packed)
    body = struct.pack("<IIQ", length, zlib.crc32(struct.pack("<IQ", length, step)), step)
    body += bits(1.0) + bits(1.0) + loss + struct.pack("<BI", form, count) + packed
    return body + hashlib.sha256(PREVIOUS + body).digest()


@pytest.mark.parametrize(
    ("form", "count", "packed", "loss"),
    [
        (0, 2, b"\1", bits(1.0)),  # fewer coefficients than said
        (1, 1, b"\1", bits(1.0)),
        (3, 1, b"\1", bits(1.0)),  # no such form
        (2, 1, b"\1", bits(1.0)),  # cut short
        (2, 1, b"\0\1" + struct.pack("<QII", 4, 0, 1) + b"\1", bits(1.0)),  # notes, and none
        (2, 1, b"\1" + bits(1.0) + b"\1" + struct.pack("<QII", 4, 0, 2) + b"\1", bits(1.0)),  # a longer run than said
        (2, 2, b"\1" + bits(1.0) + b"\2" + struct.pack("<QIIQII", 4, 0, 1, 4, 1, 1) + b"\1\1", bits(1.0)),  # two of one
        (0, 1, b"\x80", bits(1.0)),  # -128
        (1, 1, struct.pack("<QIb", 4, 0, 1), bits(1.0)),  # the long form of what the short one can say
        (0, 1, b"\1", b"\x01\x00\xc0\x7f"),  # a nan of another kind
    ],
)
def test_what_seal_cannot_write_is_refused_in_spite_of_its_hash(
    form: int, count: int, packed: bytes, loss: bytes
) -> None:
    assert Commit.decode(forged(4, 0, 1, b"\1"), PREVIOUS).terms == ((4, 0, 1),)
    with pytest.raises(LedgerError):
        Commit.decode(forged(4, form, count, packed, loss), PREVIOUS)


@pytest.mark.parametrize(
    "change",
    [
        {"eta": 0.1},
        {"decay": 1e-50},
        {"loss": 0.1},
        {"eta": math.inf},
        {"eta": math.nan},
        {"decay": math.nan},
        {"step": -1},
        {"step": 2**64},
        {"terms": [(0, 0, 128)]},
        {"terms": [(0, 0, -128)]},
        {"terms": [(0, 2**32, 1)]},
        {"terms": [(-1, 0, 1)]},
        {"previous": b"short"},
    ],
)
def test_seal_refuses_what_a_record_cannot_hold(change: dict[str, object]) -> None:
    arguments: dict[str, object] = {"step": 0, "eta": 0.5, "decay": 1.0, "loss": 2.0, "terms": [], "previous": PREVIOUS}
    seal(**arguments)  # type: ignore[arg-type]
    with pytest.raises(LedgerError):
        seal(**(arguments | change))  # type: ignore[arg-type]


def test_only_a_null_commit_is_not_applied() -> None:
    null = seal(0, 0.0, 1.0, math.nan, implied(0, [0, 0]), PREVIOUS)
    assert not null.applied
    assert not Commit.decode(null.encode(), PREVIOUS).applied
    for eta, decay, loss, coefficient in [
        (0.5, 1, math.nan, 0),
        (0, 0.5, math.nan, 0),
        (0, 1, 2, 0),
        (0, 1, math.nan, 1),
    ]:
        assert seal(0, float(eta), float(decay), float(loss), implied(0, [0, coefficient]), PREVIOUS).applied


def test_commits_and_errors_survive_pickling() -> None:
    commit = seal(0, 0.5, 1.0, math.nan, implied(0, [1]), PREVIOUS)
    assert pickle.loads(pickle.dumps(commit)) == commit
    with pytest.raises(LedgerError) as caught:
        Commit.decode(commit.encode(), OTHER)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (LedgerError, str(caught.value))


def test_a_commit_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        seal(0, 0.5, 1.0, 1.0, [], PREVIOUS).eta = 2.0  # type: ignore[misc]


@given(st.floats())
def test_float32_rounds_to_nearest_once(value: float) -> None:
    rounded = float32(value)
    assert math.isnan(rounded) if math.isnan(value) else float32(rounded) == rounded
    if abs(value) < 3.4e38:
        assert abs(rounded - value) <= max(abs(value) * 2.0**-24, 2.0**-150)
