"""The kernel itself; importing this takes Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["offset"])  # type: ignore[untyped-decorator]
def subtract_rounded(  # type: ignore[no-untyped-def]
    values,
    sums,
    eta,
    decay,
    offset,
    count,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of BLOCK bfloat16 weights, as int16: see `zoray.fused.subtract` and `zoray.rounding`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    weights = tl.load(values + at, mask=there, other=0).to(tl.int32) << 16
    exact = weights.to(tl.float32, bitcast=True) * decay
    if DROP:
        exact = exact + 0.0
    exact = exact - tl.load(sums + at, mask=there, other=0.0) * eta
    # They overflow as they are meant to, which a debugging Triton would not let 32 bits do.
    words = (at * FIRST + offset).to(tl.int32)
    words = ((words ^ (words >> 15)).to(tl.int64) * SECOND).to(tl.int32)
    words = ((words ^ (words >> 13)).to(tl.int64) * THIRD).to(tl.int32)
    words = words ^ (words >> 16)
    raw = exact.to(tl.int32, bitcast=True)
    finite = (raw & 0x7F800000) != 0x7F800000
    # A NaN whose payload is in its low bits alone would become an infinity.
    odd = tl.where((raw & 0x7FFFFFFF) > 0x7F800000, raw | 0x00400000, raw)
    rounded = (odd + tl.where(finite, words & 0xFFFF, 0)) >> 16
    tl.store(values + at, rounded.to(tl.int16), mask=there)
