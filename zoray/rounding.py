"""Deterministic stochastic rounding to bfloat16 and float16.

A value between two representable neighbours goes up with the probability of its distance to the lower one, so updates
far below the spacing of the format survive on average. The random bits are an integer hash of (run seed, step,
parameter, flat index): every machine, thread and shard rounds the same element the same way.
"""

from __future__ import annotations

import hashlib
import struct

import torch

MULTIPLIERS = (0x9E3779B1, 0x7FEB352D, 0x846CA68B)


def rounding_key(run_seed: int, step: int, name: str) -> int:
    """32-bit key of one parameter at one step."""
    text = struct.pack("<QQ", run_seed, step) + name.encode()
    return int.from_bytes(hashlib.blake2s(text, digest_size=4).digest(), "little")


def random_words(key: int, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int32 tensor (count,): a hash of `key` and each flat index start..start+count-1.

    A multiply-xorshift mixer in wrapping 32-bit arithmetic, which every device computes alike.
    """
    index = torch.arange(count, dtype=torch.int32, device=device)
    words = index.mul_(signed(MULTIPLIERS[0])).add_(signed(start * MULTIPLIERS[0] + key))
    for shift, multiplier in zip((15, 13), MULTIPLIERS[1:], strict=True):
        words = words.bitwise_xor_(words >> shift).mul_(signed(multiplier))
    return words.bitwise_xor_(words >> 16)


def stochastic_round(values: torch.Tensor, dtype: torch.dtype, key: int, start: int) -> torch.Tensor:
    """Round float32 `values` (any shape, contiguous) to `dtype`; element i uses the bits of flat index start + i.

    Unbiased for finite values in range: E[round(v)] = v. Infinities and NaNs pass through.
    """
    words = random_words(key, start, values.numel(), values.device).view(values.shape)
    if dtype == torch.bfloat16:
        return _truncate(values, words, 16).to(dtype)
    normal = _truncate(values, words, 13)
    # Below 2^-14 the spacing of float16 stays at 2^-24, so the position of the cut no longer follows the exponent.
    uniform = words.bitwise_and(0x1FFF).float().mul_(2.0**-13)
    magnitude = values.abs().mul_(2.0**24).add_(uniform).floor_().mul_(2.0**-24)
    small = torch.copysign(magnitude, values)
    return torch.where(values.abs() < 2.0**-14, small, normal).to(dtype)


def _truncate(values: torch.Tensor, words: torch.Tensor, bits: int) -> torch.Tensor:
    """Add `bits` random low bits to the float's magnitude, then clear them."""
    mask = (1 << bits) - 1
    raised = (values.view(torch.int32) + words.bitwise_and(mask)).bitwise_and_(~mask).view(torch.float32)
    return torch.where(torch.isfinite(values), raised, values)


def signed(value: int) -> int:
    """The 32-bit integer that has the low bits of `value`."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value
