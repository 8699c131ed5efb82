"""A digest of weights that adds up over shards and sees every bit.

digest = sum over elements of bits(w_i) * r_i mod 2^64, where r_i is an *odd* hash of (parameter name, flat index).
Flipping bit b of one element changes the sum by +-2^b r_i, which is never 0 modulo 2^64 because r_i is odd and b < 32.
Any split of the elements into shards gives parts whose sum is the digest of the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

_CHUNK = 1 << 20
_MASK = (1 << 64) - 1
_A, _B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_digest(name: str, values: torch.Tensor, start: int = 0) -> int:
    """Digest (0 <= d < 2^64) of a flat shard holding elements start, start+1, ... of the parameter `name`.

    Args:
        values: any dtype and shape of elements of 1, 2, 4 or 8 bytes, taken in row-major order.
        start: flat index of the first element within the whole parameter.
    """
    key = int.from_bytes(hashlib.blake2s(name.encode(), digest_size=8).digest(), "little")
    flat = values.detach().reshape(-1).view(_INTEGER_VIEW[values.element_size()])
    total = 0
    for begin in range(0, flat.numel(), _CHUNK):
        bits = flat[begin : begin + _CHUNK].to(torch.int64)
        index = torch.arange(bits.numel(), dtype=torch.int64, device=bits.device)
        odd = index.mul_(_signed(_A)).add_(_signed((start + begin) * _A + key))
        odd = odd.bitwise_xor_(odd >> 29).mul_(_signed(_B))
        odd = odd.bitwise_xor_(odd >> 32).bitwise_or_(1)
        total += int(odd.mul_(bits).sum())
    return total & _MASK


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Digest of whole named tensors: the sum of their digests modulo 2^64."""
    return sum(tensor_digest(name, values) for name, values in tensors) & _MASK


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value
