"""Exact products of small integers, the sum S = sum_k c_k a_k b_k^T of an update.

Every factor is at most 127 in magnitude and every partial sum stays below 2^24, so the float32 product is exact for any
order of summation; where neither factor is of signs, a part of the terms is summed at a time. Where the processor has
an int8 product it is exact by construction and several times faster, but without one torch's is a hundred times slower,
and older kernels saturate: so it is used only after it has proved itself on the extreme values and won a race. Which of
the two is used changes no bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch

MAX_TERMS = (1 << 24) // 127 - 1
"""Most terms (directions times rank) a commit can hold so that 127 * terms < 2^24."""


def factor_dtype(device: torch.device) -> torch.dtype:
    """What the faster exact product on this device takes its factors as: int8 or float32."""
    return torch.int8 if device.type == "cpu" and _int8_product_is_better() else torch.float32


def integer_product(left: torch.Tensor, right: torch.Tensor, largest: int = 127) -> torch.Tensor:
    """left @ right without rounding.

    Args:
        left: (rows, terms) of integers in [-127, 127], int8 or float32.
        right: (terms, cols) of integers in [-127, 127], of the same dtype. All products of a left and a right one are
            at most `largest`.
        largest: such that largest * terms < 2^31.

    Returns:
        int32 or float32 (rows, cols) of integers; the latter are below 2^24 in magnitude.
    """
    # A single row or column has ambiguous strides, which torch's int8 kernel misreads; there is nothing to gain there.
    if left.dtype == torch.int8 and left.shape[0] > 1 and right.shape[1] > 1 and len(right):
        return torch._int_mm(left.contiguous(), right)
    count = (1 << 24) // largest - 1
    if len(right) <= count:
        return left.float() @ right.float()
    total = torch.zeros(left.shape[0], right.shape[1], dtype=torch.int32, device=left.device)
    for start in range(0, len(right), count):
        part = slice(start, start + count)
        total += (left[:, part].float() @ right[part].float()).int()
    return total


@lru_cache(maxsize=1)
def _int8_product_is_better() -> bool:
    """Whether this processor's int8 product is exact, and faster than the float32 one."""
    return int8_product_is_exact() and _int8_product_is_faster()


def int8_product_is_exact() -> bool:
    """Whether this processor's int8 product is exact on the worst case.

    Before VNNI, x86 kernels add pairs of 8-bit products in saturating 16-bit arithmetic.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, 65, 129), generator=generator, dtype=torch.int8) * 2 - 1
    for left, right in ((signs[0] * 127, signs[1].t() * 127), (torch.full((3, 70), -127), torch.full((70, 5), -127))):
        left, right = left.to(torch.int8), right.to(torch.int8).contiguous()
        try:
            product = torch._int_mm(left, right)
        except (RuntimeError, AttributeError):
            return False
        if not torch.equal(product.double(), left.double() @ right.double()):
            return False
    return True


def _int8_product_is_faster() -> bool:
    left, right = torch.ones((256, 64), dtype=torch.int8), torch.ones((64, 512), dtype=torch.int8)
    return _shortest(lambda: torch._int_mm(left, right)) < _shortest(lambda: left.float() @ right.float())


def _shortest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of four calls: other processes can only make a call slower."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
