"""Requests and answers survive the wire, and take as many bytes as the documentation says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoray.commits import Commit, float32, seal
from zoray.errors import LedgerError, RunError
from zoray.protocol import (
    Answer,
    DigestValue,
    EvalSums,
    Failed,
    Item,
    Kind,
    ProbeScalars,
    Refused,
    SideLoss,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    lacking,
)

f32 = st.floats(width=32, allow_nan=False)
u32 = st.integers(0, 2**32 - 1)
items = st.builds(Item, st.sampled_from(Kind), st.integers(0, 2**64 - 1), u32, st.integers(0, 2**16 - 1))
PAYLOADS = {
    Kind.PROBE: st.builds(ProbeScalars, f32, f32, f32, f32, st.none() | f32),
    Kind.EVAL: st.builds(EvalSums, st.floats(allow_nan=False), st.floats(allow_nan=False), u32, u32),
    Kind.SNAPSHOT: st.builds(DigestValue, st.integers(0, 2**128 - 1)),
    Kind.DIGEST: st.builds(DigestValue, st.integers(0, 2**128 - 1)),
    Kind.PLUS: st.builds(SideLoss, st.floats(allow_nan=False), f32, f32, st.none() | st.floats(allow_nan=False)),
    Kind.MINUS: st.builds(SideLoss, st.floats(allow_nan=False), f32, f32, st.none() | st.floats(allow_nan=False)),
    Kind.CENTRE: st.builds(SideLoss, st.floats(allow_nan=False), f32, f32, st.none() | st.floats(allow_nan=False)),
}
answers = items.flatmap(lambda item: st.builds(Answer, st.just("r1"), st.just(item), PAYLOADS[item.kind]))
refusals = st.builds(Refused, st.just("r1"), items, st.integers(0, 2**64 - 1), st.text(max_size=50))
failures = st.builds(Failed, st.just("r1"), items, st.text(max_size=50))

PROBE = Item(Kind.PROBE, 10**12, 15, 3)


def chain(count: int, directions: int = 16) -> list[Commit]:
    commits, previous = [], bytes(32)
    for step in range(count):
        commits.append(seal(step, 0.5, 1.0, 2.0, [(step, k, k - 8) for k in range(directions)], previous))
        previous = commits[-1].hash
    return commits


def joined(commits: list[Commit]) -> bytes:
    return b"".join(commit.encode() for commit in commits)


@given(items, st.binary(max_size=100))
def test_request_round_trip(item: Item, records: bytes) -> None:
    assert decode_request(encode_request(item, records)) == (item, records)


@given(answers | refusals | failures)
def test_answer_round_trip(answer: Answer | Refused | Failed) -> None:
    assert decode_answer("r1", encode_answer(answer)) == answer


def test_scalars_are_rounded_to_float32() -> None:
    sent = Answer("r1", PROBE, ProbeScalars(0.1, math.nan, 1e300, -1e300))
    payload = decode_answer("r1", encode_answer(sent)).payload
    assert payload.projected_gradient == float32(0.1)
    assert math.isnan(payload.loss)
    assert (payload.apply_seconds, payload.probe_seconds) == (math.inf, -math.inf)


def test_probe_takes_the_bytes_documented() -> None:
    request, answer = encode_request(PROBE), encode_answer(Answer("r1", PROBE, ProbeScalars(1.0, 2.0, 3.0, 4.0)))
    assert (len(request), len(answer)) == (15, 35)
    assert len(encode_request(PROBE, joined(chain(1)))) + len(answer) == 131


@pytest.mark.parametrize("data", [b"", b"\0" * 14, bytes([7]) + bytes(14), bytes([16]) + bytes(14)])
def test_malformed_request_is_refused(data: bytes) -> None:
    with pytest.raises(RunError, match="no request"):
        decode_request(data)


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("change", [-1, 1])
def test_answer_of_wrong_length_is_refused(kind: int, change: int) -> None:
    item = Item(Kind(kind), 3)
    payload = {0: ProbeScalars(1.0, 1.0, 1.0, 1.0), 1: EvalSums(1.0, 1.0, 1, 1)}.get(kind, DigestValue(1))
    data = encode_answer(Answer("r1", item, payload))
    with pytest.raises(RunError, match="no answer"):
        decode_answer("r1", data[:-1] if change < 0 else data + b"\0")


def test_short_refusal_is_refused() -> None:
    with pytest.raises(RunError, match="no answer"):
        decode_answer("r1", bytes([16]) + bytes(14 + 7))


def test_numbers_beyond_their_field_are_refused() -> None:
    with pytest.raises(RunError, match="does not fit"):
        encode_request(Item(Kind.PROBE, 1, 0, 2**16))
    with pytest.raises(RunError, match="does not fit"):
        encode_answer(Answer("r1", Item(Kind.DIGEST, 1), DigestValue(2**128)))
    with pytest.raises(RunError, match="no answer to"):
        encode_answer(Answer("r1", PROBE, DigestValue(1)))


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_lacking_yields_each_commit_once_and_in_order(start: int, stop: int, held: int) -> None:
    commits = chain(6)
    head = commits[held - 1].hash if held else bytes(32)
    found = list(lacking(joined(commits[start:stop]), held, head))
    assert found == (commits[held:stop] if held >= start else [])


def test_commits_of_another_run_are_refused() -> None:
    commits = chain(2)
    with pytest.raises(LedgerError, match="hash"):
        list(lacking(joined(commits), 0, bytes(31) + b"\1"))


@pytest.mark.parametrize("cut", [1, 40, 70])
def test_records_cut_short_are_refused(cut: int) -> None:
    commits = chain(2)
    with pytest.raises(RunError, match="no request"):
        list(lacking(joined(commits)[:-cut], 0, bytes(32)))
