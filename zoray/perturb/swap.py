"""The generic path: a module gets a perturbed copy of its own parameters for the time of its call.

Nothing is known of what the module computes. The pointer to the parameter is swapped and put back, whatever happens.
With both signs in one forward, the module runs twice, once on each half of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zoray.layout import ParamSpec
from zoray.perturb.context import Active, NotBatchable, Signs

Forward = Callable[..., Any]


class SwappedModule:
    """A module of any kind that owns trainable parameters directly.

    Args:
        module: the module.
        forward: its own forward.
        specs: the specs of its trainable parameters, by local name.
    """

    def __init__(self, module: nn.Module, forward: Forward, specs: Mapping[str, ParamSpec]) -> None:
        self.module, self.forward, self.specs = module, forward, specs
        self.only_vectors = all(len(spec.shape) <= 1 for spec in specs.values()) and not any(module.children())

    def __call__(self, active: Active, *args: Any, **kwargs: Any) -> Any:
        """The module's output with theta +- eps z in place of theta."""
        if active.signs is not Signs.BOTH:
            return self._call_one(active, args, kwargs)
        rows, halves = active.rows, []
        for signs, half in ((Signs.PLUS, 0), (Signs.MINUS, 1)):
            some_args, some_kwargs = _half(args, half, rows), _half(kwargs, half, rows)
            with active.only(signs):
                halves.append(self._call_one(active, some_args, some_kwargs))
        return _join(halves[0], halves[1], rows)

    def _call_one(self, active: Active, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with swapped(active, self.module, self.specs, self.only_vectors) as promoted:
            output = self.forward(*args, **kwargs)
        if promoted is not None and isinstance(output, torch.Tensor) and output.dtype == torch.float32:
            return output.to(promoted)
        return output


@contextmanager
def swapped(
    active: Active, module: nn.Module, specs: Mapping[str, ParamSpec], promote: bool = False
) -> Iterator[torch.dtype | None]:
    """Swap perturbed copies in for the time of the block; yields the original dtype if they were promoted.

    Args:
        promote: keep half-precision vectors in float32 (a norm's weight of 1 would swallow epsilon).
    """
    own = {name: module._parameters[name] for name in specs}
    promoted: torch.dtype | None = None
    try:
        for name, spec in specs.items():
            parameter = own[name]
            assert parameter is not None
            if promote and parameter.dtype != torch.float32:
                promoted = parameter.dtype
            dtype = torch.float32 if promote else parameter.dtype
            module._parameters[name] = active.perturbed(parameter.detach(), spec, dtype)  # type: ignore[assignment]
        yield promoted
    finally:
        module._parameters.update(own)


def _half(value: Any, half: int, rows: int) -> Any:
    """The plus rows (half 0) or minus rows (half 1) of every tensor that has them; the rest unchanged."""
    if isinstance(value, torch.Tensor):
        if value.dim() and value.shape[0] and value.shape[0] % rows == 0:
            middle = value.shape[0] // 2
            return value[middle:] if half else value[:middle]
        if value.dim() and value.shape[0] != 1 and value.dim() > 1:
            raise NotBatchable(f"a tensor of shape {tuple(value.shape)} for {rows} rows of both signs")
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_half(v, half, rows) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_half(v, half, rows) for v in value)
    if isinstance(value, dict):
        return {k: _half(v, half, rows) for k, v in value.items()}
    return value


def _join(plus: Any, minus: Any, rows: int) -> Any:
    """Put the two halves' outputs together: plus rows first."""
    if isinstance(plus, torch.Tensor):
        if plus.dim() and plus.shape[0] % (rows // 2) == 0:
            return torch.cat([plus, minus])
        if plus.dim() > 1 and plus.shape[0] == 1:
            shape = (rows // 2, *plus.shape[1:])
            return torch.cat([plus.expand(shape), minus.expand(shape)])
        raise NotBatchable(f"an output of shape {tuple(plus.shape)} for {rows // 2} rows of one sign")
    if isinstance(plus, tuple) and hasattr(plus, "_fields"):
        return type(plus)(*(_join(p, m, rows) for p, m in zip(plus, minus, strict=True)))
    if isinstance(plus, (list, tuple)):
        return type(plus)(_join(p, m, rows) for p, m in zip(plus, minus, strict=True))
    if isinstance(plus, dict):
        joined = {k: _join(plus[k], minus[k], rows) for k in plus}
        return type(plus)(**joined) if type(plus) is not dict else joined
    return plus
