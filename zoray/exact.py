"""Forwards whose results are the same bits on every machine, for what all replicas must derive alike.

No float32 forward is: its last bits depend on threads, on the kernel of attention and on the processor. So these
compute in float64, layer by layer, and what they find is rounded so coarsely that what machines differ by is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_FINENESS = 8
"""Bits by which the grid that values are rounded to is finer than the largest of them."""

_LARGE = 1 << 24
"""Weights in a tensor of three dimensions, such as a convolution has, that are widened at once at most."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Values (float64) on a grid of about 2^8 steps between 0 and the largest.

    With errors of 1e-13 of the largest value, one in 10^10 values falls to another side on another machine.
    """
    exponent = int(torch.frexp(values.abs().max()).exponent)
    grid = 2.0 ** (exponent - _FINENESS)
    return torch.round(values / grid) * grid


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Forwards of the model compute in float64; a module's parameters are widened for the time of its call alone.

    Of a table of embeddings, which may be half a model, only what is looked up is widened, and of experts in one large
    tensor what the model computes with at a time.
    """
    choose = getattr(model, "set_experts_implementation", lambda _: None)
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    attend = model.set_attn_implementation if "flash" in attention else lambda _: None
    before: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def widen(module: nn.Module, args: object) -> None:
        before[module] = dict(module._parameters)
        for name, parameter in before[module].items():
            if parameter is not None and parameter.dtype in _FLOATS and not _is_of_experts(parameter):
                module._parameters[name] = nn.Parameter(parameter.detach().double(), requires_grad=False)

    def restore(module: nn.Module, args: object, output: object) -> None:
        module._parameters.update(before.pop(module, {}))

    def widened(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output.double()

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            hooks.append(module.register_forward_hook(widened))
        elif any(True for _ in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(widen))
            # First of all: who takes weights away after the call must find its own.
            hooks.append(module.register_forward_hook(restore, prepend=True, always_call=True))
    try:
        # The others have kernels for shorter floats alone.
        choose("eager")
        attend("sdpa")
        with _Wider():
            yield
    finally:
        choose(experts)
        attend(attention)
        for hook in hooks:
            hook.remove()
        # An interrupt ends a module's call without its hooks.
        for module in list(before):
            restore(module, (), None)


class _Wider(TorchFunctionMode):
    """Whoever asks for a shorter float gets float64: many models compute norms and softmax in float32.

    Weights that a module takes from another, which is not called, come here in their own dtype, beside float64.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called instead of every torch function."""
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        args = [torch.float64 if _is_short(value) else value for value in args]
        named = {name: torch.float64 if _is_short(value) else value for name, value in (kwargs or {}).items()}
        if any(_has(value, torch.float64) for value in (*args, *named.values())) and not func.__name__.endswith("_"):
            args = [_widened(value) for value in args]
            named = {name: _widened(value) for name, value in named.items()}
        return func(*args, **named)


def _is_of_experts(parameter: torch.Tensor) -> bool:
    return parameter.dim() > 2 and parameter.numel() > _LARGE


def _has(value: Any, dtype: torch.dtype) -> bool:
    if type(value) in (list, tuple):
        return any(_has(each, dtype) for each in value)
    return isinstance(value, torch.Tensor) and value.dtype == dtype


def _widened(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_widened, value))
    return value.double() if isinstance(value, torch.Tensor) and value.dtype in _FLOATS else value


def _is_short(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in _FLOATS
