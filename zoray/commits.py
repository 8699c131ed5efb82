"""The commit: the record of one step, as a value and as bytes.

A commit means `theta <- decay * theta - eta * sum_k c_k z_k` and nothing else. Learning-rate schedules, clipping and
quantisation have all happened before it, so a replica that can add small integers needs no optimizer (the idea of one
byte per gradient: Zelikman et al. 2023, arXiv 2306.10015).

The record, little endian:

    u32 length of the whole record | u32 crc32 of (length, step) | u64 step | f32 eta | f32 decay | f32 loss |
    u8 form | u32 count | terms | sha256(previous hash, everything before)

Form 0 holds the directions 0..count-1 of this very step, one int8 each. Form 1 holds (u64 step, u32 index, i8) per
term, for sums that reach back to earlier steps. A record of K directions takes K + 65 bytes.
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

_HEADER = struct.Struct("<IIQ")
_FIELDS = struct.Struct("<fffBI")
_EXPLICIT = struct.Struct("<QIb")
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

    @property
    def applied(self) -> bool:
        """False for a null commit, the record of a step without one finite probe: it leaves the weights alone."""
        return self.eta != 0 or self.decay != 1 or not math.isnan(self.loss) or any(term[2] for term in self.terms)

    def encode(self) -> bytes:
        """The record. It leaves out `previous`, which its position in the ledger implies and its hash covers."""
        return _body(self.step, self.eta, self.decay, self.loss, self.terms) + self.hash

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
        if len(packed) != count * {0: 1, 1: _EXPLICIT.size}.get(form, -1):
            raise LedgerError(f"the record of step {step} has form {form} and {count} terms in {len(packed)} bytes")
        terms = _terms(step, packed, form)
        commit = seal(step, eta, decay, loss, terms, previous)
        if commit.hash != digest:
            raise LedgerError(f"the record of step {step} is not in the one form that step can be written in")
        return commit


def seal(step: int, eta: float, decay: float, loss: float, terms: Iterable[Term], previous: bytes) -> Commit:
    """Make the commit of `step` that follows the hash `previous`.

    Raises:
        LedgerError: `eta`, `decay` or `loss` is not exactly a float32, `eta` or `decay` is not finite, a coefficient is
            outside -127..127, or a step, an index or `previous` does not fit its field.
    """
    fixed = tuple((int(s), int(index), int(coefficient)) for s, index, coefficient in terms)
    for name, value in (("eta", eta), ("decay", decay), ("loss", loss)):
        if float32(value) != value and not (name == "loss" and math.isnan(value)):
            raise LedgerError(f"{name} of step {step} is {value!r}, which is not a float32", advice="round it first")
        if not math.isfinite(value) and name != "loss":
            raise LedgerError(f"{name} of step {step} is {value!r}", advice="lower learning_rate or weight_decay")
    for term in fixed:
        if not (0 <= term[0] < 2**64 and 0 <= term[1] < 2**32 and abs(term[2]) <= COEFFICIENT_LIMIT):
            raise LedgerError(f"step {step} has the term {term}, outside (u64, u32, -127..127)")
    if not 0 <= step < 2**64 or len(previous) != HASH_SIZE:
        raise LedgerError(f"step {step} with a previous hash of {len(previous)} bytes cannot be a commit")
    digest = hashlib.sha256(previous + _body(step, eta, decay, loss, fixed)).digest()
    return Commit(step, float32(eta), float32(decay), float32(loss), fixed, previous, digest)


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


def _body(step: int, eta: float, decay: float, loss: float, terms: tuple[Term, ...]) -> bytes:
    implied = all(term[0] == step and term[1] == k for k, term in enumerate(terms))
    if implied:
        packed = struct.pack(f"<{len(terms)}b", *(term[2] for term in terms))
    else:
        packed = b"".join(_EXPLICIT.pack(*term) for term in terms)
    length = _SMALLEST + len(packed)
    header = _HEADER.pack(length, _header_crc(length, step), step)
    return header + _FIELDS.pack(eta, decay, float32(loss), 0 if implied else 1, len(terms)) + packed


def _terms(step: int, packed: bytes, form: int) -> tuple[Term, ...]:
    if form == 0:
        return tuple((step, k, c) for k, c in enumerate(struct.unpack(f"<{len(packed)}b", packed)))
    return tuple(_EXPLICIT.iter_unpack(packed))


def _header_crc(length: int, step: int) -> int:
    return zlib.crc32(struct.pack("<IQ", length, step))
