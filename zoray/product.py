"""Exact products of small integers, the sum S = sum_k c_k a_k b_k^T of an update.

Every factor is at most 127 in magnitude and every partial sum stays below 2^24, so the float32 product is exact for any
order of summation. Where the processor has an int8 product it is exact by construction and several times faster; it is
used only after it has proved itself on the extreme values.
"""

from __future__ import annotations

from functools import lru_cache

import torch

MAX_TERMS = (1 << 24) // 127 - 1
"""Most terms (directions times rank) a commit can hold so that 127 * terms < 2^24."""


def integer_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right without rounding.

    Args:
        left: int8 (rows, terms) of values in [-127, 127].
        right: int8 (terms, cols) of signs.

    Returns:
        int32 or float32 (rows, cols) of integers below 2^24 in magnitude.
    """
    # A single row or column has ambiguous strides, which torch's int8 kernel misreads; there is nothing to gain there.
    if left.device.type == "cpu" and min(left.shape[0], right.shape[1]) > 1 and _int8_product_is_exact():
        return torch._int_mm(left.contiguous(), right)
    return left.float() @ right.float()


@lru_cache(maxsize=1)
def _int8_product_is_exact() -> bool:
    """Whether this processor's int8 product is exact on the worst case.

    Before VNNI, x86 kernels add pairs of 8-bit products in saturating 16-bit arithmetic.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, 65, 129), generator=generator, dtype=torch.int8) * 2 - 1
    for left, right in ((signs[0] * 127, signs[1].t()), (torch.full((3, 70), -127), torch.full((70, 5), -1))):
        left, right = left.to(torch.int8), right.to(torch.int8).contiguous()
        try:
            product = torch._int_mm(left, right)
        except (RuntimeError, AttributeError):
            return False
        if not torch.equal(product.double(), left.double() @ right.double()):
            return False
    return True
