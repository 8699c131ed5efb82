"""The end of an update of bfloat16 weights on an accelerator, in one pass over them.

Written as operations on whole tensors it takes two dozen passes, four times as long as the two forwards of a step of
one direction. Triton comes with torch where there is an accelerator, and builds kernels when they are first used. This
one gives the bits of `update` and `rounding`, which is proved before it is used; where it cannot be, those do without
it, and a warning says so.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import lru_cache

import torch

from zoray.rounding import MULTIPLIERS, signed, stochastic_round

_BLOCK = 1024


def subtract(
    values: torch.Tensor, sums: torch.Tensor, eta: float, decay: float, key: int, start: int, *, drop: bool
) -> None:
    """values <- round(values * decay - sums * eta), in place, each operation rounded by itself.

    Args:
        values: bfloat16, contiguous, on an accelerator that `usable` says is one.
        sums: float32, of the same shape, contiguous.
        eta, decay: that float32 can hold.
        key, start: of the rounding's bits, see `zoray.rounding.stochastic_round`.
        drop: -0.0 is made a 0.0 before something is subtracted from it.
    """
    from zoray.fused.kernel import subtract_rounded

    count = values.numel()
    first, second, third = (signed(each) for each in MULTIPLIERS)
    offset = signed(start * MULTIPLIERS[0] + key)
    # Triton launches on the device that is current, and in its stream.
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        subtract_rounded[(-(-count // _BLOCK),)](
            values.view(torch.int16),
            sums,
            eta,
            decay,
            offset,
            count,
            FIRST=first,
            SECOND=second,
            THIRD=third,
            DROP=drop,
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
        right, reason = gives_the_bits(device), "it gives other bits"
    except torch.OutOfMemoryError:
        # That says nothing about the kernel.
        raise
    # Whatever a compiler that is missing, or a driver that is too old, may raise.
    except Exception as error:
        right, reason = False, f"{type(error).__name__}: {error}"
    if not right:
        text = "Updates of bfloat16 weights take several times as long as they could: Triton is of no use here: %s."
        logging.getLogger(__name__).warning(text, reason)
    return right


def gives_the_bits(device: torch.device) -> bool:
    """Whether the kernel does what the operations do that it stands for.

    On every bfloat16 number, alone and with a change; where the change cancels what is there, so that a product that is
    not rounded by itself shows; with changes that are no normal numbers; and for every way it is compiled: of weights
    that are aligned or not, one of them, or an odd number.
    """
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16)
    sums = (torch.arange(len(every), dtype=torch.int32, device="cpu") * 40503 % 8191 - 4095).float()
    for decay, eta, drop in ((1.0, 2.0**-20, False), (0.999, 1.2345e-5, True), (0.999, 1.7e-41, False)):
        exact = torch.tensor([decay, eta], dtype=torch.float32, device="cpu").tolist()
        cancelled = (sums * exact[1]).bfloat16()
        cases = [(every, sums), (every, torch.zeros_like(sums)), (cancelled, sums)]
        cases += [(every[part], sums[part]) for part in (slice(1, 4098), slice(1, 2), slice(0, 1))]
        for values, change in cases:
            if not _same(values.to(device), change.to(device), exact[1], exact[0], drop):
                return False
    return True


def _same(values: torch.Tensor, sums: torch.Tensor, eta: float, decay: float, drop: bool) -> bool:
    key, start = 12345, 1 << 33
    exact = values.float() * decay
    exact = (exact.add_(0.0) if drop else exact).sub_(sums * eta)
    expected = stochastic_round(exact, torch.bfloat16, key, start)
    # As far from where an allocation begins as the values are from the first one.
    found = torch.empty(len(values) + 1, dtype=values.dtype, device=values.device)[len(values) % 2 :][: len(values)]
    found.copy_(values)
    subtract(found, sums, eta, decay, key, start, drop=drop)
    same = found.view(torch.int16) == expected.view(torch.int16)
    return bool((same | (found.isnan() & expected.isnan())).all())
