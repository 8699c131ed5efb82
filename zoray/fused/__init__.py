"""The end of an update of bfloat16 weights on an accelerator, in one pass over them.

Written as operations on whole tensors it takes two dozen passes, and a step of one direction four times as long as its
forwards. Triton comes with torch where there is an accelerator, and builds kernels when they are first used. This one
gives the bits of `update` and `rounding`, which is proved before it is used; where it cannot be, those do without it,
and a warning says so.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

from zoray.rounding import MULTIPLIERS, signed, stochastic_round

_BLOCK = 1024


def subtract(
    values: torch.Tensor, sums: torch.Tensor, eta: float, decay: float, zero: float, key: int, start: int
) -> None:
    """values <- round(values * decay + zero - sums * eta), in place, each operation rounded by itself.

    Args:
        values: bfloat16, contiguous, on an accelerator that `usable` says is one.
        sums: float32, of the same shape, contiguous.
        eta, decay: that float32 can hold.
        zero: 0.0 makes -0.0 a 0.0, and -0.0 leaves all as it is.
        key, start: of the rounding's bits, see `zoray.rounding.stochastic_round`.
    """
    from zoray.fused.kernel import subtract_rounded

    count = values.numel()
    first, second, third = (signed(each) for each in MULTIPLIERS)
    offset = signed(start * MULTIPLIERS[0] + key)
    subtract_rounded[(-(-count // _BLOCK),)](
        values.view(torch.int16),
        sums,
        eta,
        decay,
        zero,
        offset,
        count,
        FIRST=first,
        SECOND=second,
        THIRD=third,
        BLOCK=_BLOCK,
        # A product and a difference stay two operations.
        enable_fp_fusion=False,
    )


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is for that dtype and device, can be built, and gives the bits it has to give."""
    return dtype == torch.bfloat16 and device.type == "cuda" and _proved(device)


@lru_cache
def _proved(device: torch.device) -> bool:
    try:
        with torch.cuda.device(device):
            right = gives_the_bits(device)
        reason = "it gives other bits"
    # Whatever a compiler that is missing, or a driver that is too old, may raise.
    except Exception as error:
        right, reason = False, f"{type(error).__name__}: {error}"
    if not right:
        text = (
            "Updates of bfloat16 weights take ten times as long as they could: Triton's kernel is of no use here: %s."
        )
        logging.getLogger(__name__).warning(text, reason)
    return right


def gives_the_bits(device: torch.device) -> bool:
    """Whether the kernel does what the operations do that it stands for, on numbers of all kinds."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = torch.cat([patterns, torch.randn(1 << 16, generator=generator).bfloat16()])
    sums = torch.randint(-4096, 4096, values.shape, generator=generator).float()
    values, sums = values.to(device), sums.to(device)
    for decay, eta, zero in ((1.0, 2.0**-20, -0.0), (0.999, 1.2345e-5, 0.0)):
        eta, decay = float(torch.tensor(eta)), float(torch.tensor(decay))
        exact = (values.float() * decay).add_(zero).sub_(sums * eta)
        expected = stochastic_round(exact, torch.bfloat16, 12345, 1 << 33)
        found = values.clone()
        subtract(found, sums, eta, decay, zero, 12345, 1 << 33)
        same = found.view(torch.int16) == expected.view(torch.int16)
        if not bool((same | (found.isnan() & expected.isnan())).all()):
            return False
    return True
