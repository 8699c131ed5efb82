"""Requests and answers as bytes, little endian, without padding.

    request:  u8 kind | u64 step | u32 part | u16 microbatch | records of the commits that the replica lacks
    answer:   u8 kind + 16 * outcome | u64 step | u32 part | u16 microbatch | outcome
        answered (0)  probe: f32 projected gradient, f32 loss, f32 seconds of applying, f32 of the probe, f32 contrast
                      one evaluation of a probe: f64 loss, f32 seconds of applying, f32 of the evaluation, f64 contrast
                      (a contrast that there is not is nan)
                      evaluation: f64 sum of losses, f64 sum of squares, u32 count, u32 correct, f64 sum of scores
                      snapshot, digest: u128 digest
        refused (1)   u64 step held, reason in UTF-8
        failed (2)    reason in UTF-8

A probe takes 15 + 35 = 50 bytes in both directions together; with the commit of 16 directions (81 bytes, and 38
more where the curvature is measured), 131.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from zoray.commits import HEADER_SIZE, Commit, float32, read_header
from zoray.errors import RunError
from zoray.protocol.messages import (
    PAYLOAD_TYPE,
    Answer,
    DigestValue,
    EvalSums,
    Failed,
    Item,
    Kind,
    ProbeScalars,
    Refused,
    SideLoss,
)

_ITEM = struct.Struct("<BQIH")
_PROBE = struct.Struct("<5f")
_SIDE = struct.Struct("<d2fd")
_EVAL = struct.Struct("<2d2Id")
_HELD = struct.Struct("<Q")
_DIGEST_SIZE = 16
_LONGEST_REASON = 4096
_ANSWERED, _REFUSED, _FAILED = range(3)


def encode_request(item: Item, records: bytes = b"") -> bytes:
    """A request for `item`; `records` are the encoded commits, one after the other.

    Raises:
        RunError: a number of the item does not fit its field.
    """
    return _encode_item(item, _ANSWERED) + records


def decode_request(data: bytes) -> tuple[Item, bytes]:
    """The item and the records of a request.

    Raises:
        RunError: these bytes are no request.
    """
    item, _ = _decode_item(data, "request")
    return item, data[_ITEM.size :]


def lacking(records: bytes, held: int, head: bytes) -> Iterator[Commit]:
    """The commits among `records` that a replica at step `held` applies next, each checked against the chain.

    Those it has applied before are passed over; at a gap it ends, and the replica refuses the item for want of them.

    Args:
        records: what came with a request.
        held: the step of the replica's weights: the first one it has not applied.
        head: hash of the last commit the replica applied (of the ledger's header at step 0), 32 bytes.

    Raises:
        LedgerError: a record is damaged or belongs to another ledger.
        RunError: the last record is cut short.
    """
    at = 0
    while at < len(records):
        if len(records) - at < HEADER_SIZE:
            raise _malformed("request", len(records))
        length, step = read_header(records[at : at + HEADER_SIZE])
        if at + length > len(records):
            raise _malformed("request", len(records))
        if step > held:
            return
        if step == held:
            commit = Commit.decode(records[at : at + length], head)
            held, head = held + 1, commit.hash
            yield commit
        at += length


def encode_answer(answer: Answer | Refused | Failed) -> bytes:
    """What a replica sends back. Its name is not sent: the connection tells.

    Raises:
        RunError: a number does not fit its field, or the payload is not that of the item's kind.
    """
    match answer:
        case Refused():
            return _encode_item(answer.item, _REFUSED) + _HELD.pack(answer.held) + _encode_reason(answer.reason)
        case Failed():
            return _encode_item(answer.item, _FAILED) + _encode_reason(answer.reason)
    item, payload = answer.item, answer.payload
    if not isinstance(payload, PAYLOAD_TYPE[item.kind]):
        raise RunError(f"{type(payload).__name__} is no answer to the {item}")
    try:
        match payload:
            case ProbeScalars(gradient, loss, applying, probing, contrast):
                body = _PROBE.pack(*map(float32, (gradient, loss, applying, probing, _number(contrast))))
            case SideLoss(loss, applying, probing, contrast):
                body = _SIDE.pack(loss, float32(applying), float32(probing), _number(contrast))
            case EvalSums(loss_sum, square_sum, count, correct, score_sum):
                body = _EVAL.pack(loss_sum, square_sum, count, correct, score_sum)
            case DigestValue(digest):
                body = digest.to_bytes(_DIGEST_SIZE, "little")
    except (struct.error, OverflowError) as error:
        raise RunError(f"{payload} does not fit its fields: {error}", where=str(item)) from error
    return _encode_item(item, _ANSWERED) + body


def decode_answer(replica: str, data: bytes) -> Answer | Refused | Failed:
    """The event that the bytes sent by `replica` stand for.

    Raises:
        RunError: these bytes are no answer.
    """
    item, outcome = _decode_item(data, "answer")
    body = data[_ITEM.size :]
    try:
        if outcome == _REFUSED:
            return Refused(replica, item, _HELD.unpack_from(body)[0], body[_HELD.size :].decode(errors="replace"))
        if outcome == _FAILED:
            return Failed(replica, item, body.decode(errors="replace"))
        if item.kind is Kind.PROBE:
            gradient, loss, applying, probing, contrast = _PROBE.unpack(body)
            return Answer(replica, item, ProbeScalars(gradient, loss, applying, probing, _told(contrast)))
        if item.kind.probing:
            loss, applying, probing, contrast = _SIDE.unpack(body)
            return Answer(replica, item, SideLoss(loss, applying, probing, _told(contrast)))
        if item.kind is Kind.EVAL:
            return Answer(replica, item, EvalSums(*_EVAL.unpack(body)))
    except struct.error as error:
        raise _malformed("answer", len(data)) from error
    if len(body) != _DIGEST_SIZE:
        raise _malformed("answer", len(data))
    return Answer(replica, item, DigestValue(int.from_bytes(body, "little")))


def _encode_item(item: Item, outcome: int) -> bytes:
    try:
        return _ITEM.pack(item.kind + 16 * outcome, item.step, item.part, item.microbatch)
    except struct.error as error:
        raise RunError(f"the {item} does not fit its fields: {error}") from error


def _decode_item(data: bytes, what: str) -> tuple[Item, int]:
    if len(data) < _ITEM.size:
        raise _malformed(what, len(data))
    code, step, part, microbatch = _ITEM.unpack_from(data)
    outcome, kind = divmod(code, 16)
    if kind not in Kind.__members__.values() or outcome > (_FAILED if what == "answer" else _ANSWERED):
        raise _malformed(what, len(data))
    return Item(Kind(kind), step, part, microbatch), outcome


def _number(contrast: float | None) -> float:
    return math.nan if contrast is None else contrast


def _told(contrast: float) -> float | None:
    return None if math.isnan(contrast) else contrast


def _encode_reason(reason: str) -> bytes:
    return reason.encode(errors="replace")[:_LONGEST_REASON]


def _malformed(what: str, size: int) -> RunError:
    return RunError(f"a message of {size} bytes is no {what}", advice="run the same version of Zoray on every machine")
