"""The commit: the record of one step, as a value and as bytes.

A commit means `theta <- decay * theta - eta * sum_k c_k z_k` and nothing else. Learning-rate schedules, clipping and
quantisation have all happened before it, so a replica that can add small integers needs no optimizer (the idea of one
byte per gradient: Zelikman et al. 2023, arXiv 2306.10015).

The record, little endian:

    u32 length of the whole record | u32 crc32 of (length, step) | u64 step | f32 eta | f32 decay | f32 loss |
    u8 form | u32 count | terms | sha256(previous hash, everything before)

Form 0 holds the directions 0..count-1 of this very step, one int8 each: a record of K directions takes K + 65 bytes.
Form 1 holds (u64 step, u32 index, i8) per term. Form 2 is that of an optimizer that remembers:

    u8 count of notes | f32 each | u8 count of runs | (u64 step, u32 first index, u32 length) each | i8 per term

where a run is as many consecutive indices of one step as there are. The coordinator goes on from the notes; they mean
nothing to a replica.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from zoray.errors import LedgerError

Term = tuple[int, int, int]
"""(step, index, coefficient): the address of a direction and its int8 coefficient, |coefficient| <= 127."""

HASH_SIZE = 32
HEADER_SIZE = 16
COEFFICIENT_LIMIT = 127
MOST_RUNS = 255
"""Runs of indices, and notes, that a record has room for."""

_HEADER = struct.Struct("<IIQ")
_FIELDS = struct.Struct("<fffBI")
_EXPLICIT = struct.Struct("<QIb")
_RUN = struct.Struct("<QII")
_SMALLEST = HEADER_SIZE + _FIELDS.size + HASH_SIZE


@dataclass(frozen=True, slots=True)
class Commit:
    """One step of a run. Made by `seal` or `decode`, which are what keeps `hash` true.

    Two commits are equal when everything the hash covers is: a loss of nan does not make a commit differ from itself.

    Attributes:
        step: number of the step, from 0.
        eta: factor of the sum of directions, exactly representable in float32.
        decay: factor of the weights, exactly representable in float32.
        loss: mean loss of the finite probes, exactly representable in float32; nan if there was none.
        terms: the directions and their coefficients, in the order of the record.
        notes: what the optimizer remembers of this step and those before, exactly representable in float32 (see
            `zoray.optim`); none of an optimizer without memory.
        previous: hash of the commit before, or of the ledger's header (32 bytes).
        hash: sha256 over `previous` and the record (32 bytes).
    """

    step: int
    eta: float
    decay: float
    loss: float = field(compare=False)
    terms: tuple[Term, ...]
    previous: bytes
    hash: bytes
    notes: tuple[float, ...] = field(default=(), compare=False)

    @property
    def applied(self) -> bool:
        """False for a null commit, the record of a step without one finite probe: it leaves the weights alone."""
        return self.eta != 0 or self.decay != 1 or not math.isnan(self.loss) or any(term[2] for term in self.terms)

    def encode(self) -> bytes:
        """The record. It leaves out `previous`, which its position in the ledger implies and its hash covers."""
        return _body(self.step, self.eta, self.decay, self.loss, self.terms, self.notes) + self.hash

    @staticmethod
    def decode(data: bytes, previous: bytes) -> Commit:
        """Read one whole record that follows the hash `previous`.

        Raises:
            LedgerError: the header or the hash does not fit, or `seal` could not have written these bytes.
        """
        digest = check_hash(data, previous)
        step = read_header(data)[1]
        eta, decay, loss, form, count = _FIELDS.unpack_from(data, HEADER_SIZE)
        packed = data[HEADER_SIZE + _FIELDS.size : -HASH_SIZE]
        try:
            terms, notes = _unpack(step, packed, form, count)
        except struct.error as error:
            what = f"the record of step {step} has form {form} and {count} terms in {len(packed)} bytes"
            raise LedgerError(what) from error
        commit = seal(step, eta, decay, loss, terms, previous, notes)
        if commit.hash != digest:
            raise LedgerError(f"the record of step {step} is not in the one form that step can be written in")
        return commit


def seal(
    step: int,
    eta: float,
    decay: float,
    loss: float,
    terms: Iterable[Term],
    previous: bytes,
    notes: Iterable[float] = (),
) -> Commit:
    """Make the commit of `step` that follows the hash `previous`.

    Raises:
        LedgerError: `eta`, `decay`, `loss` or a note is not exactly a float32, `eta` or `decay` is not finite, a
            coefficient is outside -127..127, or a step, an index, `previous` or the number of notes or of runs of
            indices does not fit its field.
    """
    fixed = tuple((int(s), int(index), int(coefficient)) for s, index, coefficient in terms)
    kept = tuple(notes)
    for name, value in (("eta", eta), ("decay", decay), ("loss", loss), *(("a note", note) for note in kept)):
        if float32(value) != value and not (name in ("loss", "a note") and math.isnan(value)):
            raise LedgerError(f"{name} of step {step} is {value!r}, which is not a float32", advice="round it first")
        if not math.isfinite(value) and name in ("eta", "decay"):
            raise LedgerError(f"{name} of step {step} is {value!r}", advice="lower learning_rate or weight_decay")
    for term in fixed:
        if not (0 <= term[0] < 2**64 and 0 <= term[1] < 2**32 and abs(term[2]) <= COEFFICIENT_LIMIT):
            raise LedgerError(f"step {step} has the term {term}, outside (u64, u32, -127..127)")
    if not 0 <= step < 2**64 or len(previous) != HASH_SIZE:
        raise LedgerError(f"step {step} with a previous hash of {len(previous)} bytes cannot be a commit")
    if len(kept) > MOST_RUNS or (kept and len(_runs(fixed)) > MOST_RUNS):
        raise LedgerError(f"step {step} has {len(kept)} notes and terms in {len(_runs(fixed))} runs, above {MOST_RUNS}")
    kept = tuple(map(float32, kept))
    digest = hashlib.sha256(previous + _body(step, eta, decay, loss, fixed, kept)).digest()
    return Commit(step, float32(eta), float32(decay), float32(loss), fixed, previous, digest, kept)


def float32(value: float) -> float:
    """The float32 nearest to `value` (ties to even), as a float: infinite when too large, one nan for every nan."""
    if math.isnan(value):
        return math.nan
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def read_header(data: bytes) -> tuple[int, int]:
    """Length in bytes and step of the record that begins `data`.

    Its own checksum tells a damaged length from a record that was cut short: the first must never pass for the second.

    Raises:
        LedgerError: fewer than `HEADER_SIZE` bytes, a wrong checksum, or a length less than that of any record.
    """
    if len(data) < HEADER_SIZE:
        raise LedgerError(f"{len(data)} bytes are less than the header of a record")
    length, crc, step = _HEADER.unpack_from(data)
    if crc != _header_crc(length, step):
        raise LedgerError("the header of a record has a wrong checksum")
    if length < _SMALLEST:
        raise LedgerError(f"the record of step {step} says it is {length} bytes long, less than any record")
    return length, step


def check_hash(data: bytes, previous: bytes) -> bytes:
    """The hash of one whole record that follows the hash `previous`, without reading its terms.

    Raises:
        LedgerError: the record is damaged, cut short, or belongs after another one.
    """
    if len(data) < _SMALLEST or read_header(data)[0] != len(data):
        raise LedgerError(f"these {len(data)} bytes are not one whole record")
    digest = hashlib.sha256(previous + data[:-HASH_SIZE]).digest()
    if digest != data[-HASH_SIZE:]:
        raise LedgerError(f"the record of step {read_header(data)[1]} has a wrong hash")
    return digest


def _body(step: int, eta: float, decay: float, loss: float, terms: tuple[Term, ...], notes: tuple[float, ...]) -> bytes:
    form, packed = _pack(step, terms, notes)
    length = _SMALLEST + len(packed)
    header = _HEADER.pack(length, _header_crc(length, step), step)
    return header + _FIELDS.pack(eta, decay, float32(loss), form, len(terms)) + packed


def _pack(step: int, terms: tuple[Term, ...], notes: tuple[float, ...]) -> tuple[int, bytes]:
    """The form of a record and its variable part."""
    coefficients = struct.pack(f"<{len(terms)}b", *(term[2] for term in terms))
    if notes:
        runs = _runs(terms)
        head = struct.pack(f"<B{len(notes)}fB", len(notes), *notes, len(runs))
        return 2, head + b"".join(_RUN.pack(*run) for run in runs) + coefficients
    if all(term[0] == step and term[1] == k for k, term in enumerate(terms)):
        return 0, coefficients
    return 1, b"".join(_EXPLICIT.pack(*term) for term in terms)


def _unpack(step: int, packed: bytes, form: int, count: int) -> tuple[Iterable[Term], Iterable[float]]:
    """Terms and notes of a record. Raises struct.error if the bytes are not of this form and count."""
    if form == 0:
        return ((step, k, c) for k, c in enumerate(struct.unpack(f"<{count}b", packed))), ()
    if form == 1 and len(packed) == count * _EXPLICIT.size:
        return _EXPLICIT.iter_unpack(packed), ()
    if form != 2:
        raise struct.error
    (many,) = struct.unpack_from("<B", packed)
    *notes, several = struct.unpack_from(f"<{many}fB", packed, 1)
    start = 2 + 4 * many
    runs = [_RUN.unpack_from(packed, start + k * _RUN.size) for k in range(several)]
    coefficients = struct.unpack(f"<{count}b", packed[start + several * _RUN.size :])
    if sum(length for *_, length in runs) != count:
        raise struct.error
    addresses = ((s, first + k) for s, first, length in runs for k in range(length))
    return [(*address, c) for address, c in zip(addresses, coefficients, strict=True)], notes


def _runs(terms: tuple[Term, ...]) -> list[tuple[int, int, int]]:
    """(step, first index, length) of each longest stretch of terms of one step with consecutive indices."""
    runs: list[tuple[int, int, int]] = []
    for step, index, _ in terms:
        if runs and runs[-1][0] == step and index == runs[-1][1] + runs[-1][2]:
            runs[-1] = (step, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((step, index, 1))
    return runs


def _header_crc(length: int, step: int) -> int:
    return zlib.crc32(struct.pack("<IQ", length, step))
