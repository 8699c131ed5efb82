"""The generic path: a module gets a perturbed copy of its own parameters for the time of its call.

Nothing is known of what the module computes. The pointer to the parameter is swapped and put back, whatever happens.
With both signs in one forward, the module runs twice, once on each half of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from zoray.layout import ParamSpec
from zoray.partitioned import altered, is_partitioned
from zoray.perturb.context import Active, Signs
from zoray.perturb.rows import ALL_LED, RETURN, RowRule, mapped

Forward = Callable[..., Any]


class SwappedModule:
    """A module of any kind that owns trainable parameters directly.

    Args:
        module: the module.
        forward: its own forward.
        specs: the specs of its trainable parameters, by local name.
        rule: which of its tensors have the rows of the batch.
    """

    def __init__(
        self, module: nn.Module, forward: Forward, specs: Mapping[str, ParamSpec], rule: RowRule = ALL_LED
    ) -> None:
        self.module, self.forward, self.specs, self.rule = module, forward, specs, rule
        self.only_vectors = all(len(spec.shape) <= 1 for spec in specs.values()) and not any(module.children())

    def __call__(self, active: Active, *args: Any, **kwargs: Any) -> Any:
        """The module's output with theta +- eps z in place of theta."""
        if active.signs is not Signs.BOTH:
            return self._call_one(active, args, kwargs)
        outputs = []
        for signs, half in ((Signs.PLUS, 0), (Signs.MINUS, 1)):
            take = partial(self._half, active.rows, half)
            with active.only(signs):
                outputs.append(self._call_one(active, mapped(take, "", args), mapped(take, "", kwargs)))
        return mapped(partial(self._join, active.rows // 2), RETURN, *outputs)

    def _half(self, rows: int, half: int, place: str, tensor: torch.Tensor) -> torch.Tensor:
        """The plus rows (half 0) or minus rows (half 1) of a tensor that has them; another one whole."""
        if tensor.dim() == 0 or tensor.shape[0] == 1 or not self.rule.led(place, tensor, rows):
            return tensor
        middle = len(tensor) // 2
        return tensor[middle:] if half else tensor[:middle]

    def _join(self, rows: int, place: str, plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
        """Both signs' outputs together, plus rows first; what has none gets `rows` rows of each sign."""
        if self.rule.led(place, plus, rows):
            return torch.cat([plus, minus])
        if plus.dim() > 1 and plus.shape[0] == 1:
            shape = (rows, *plus.shape[1:])
            return torch.cat([plus.expand(shape), minus.expand(shape)])
        raise self.rule.refusal(place, plus, rows)

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
            if not active.touches(spec):
                continue
            if promote and parameter.dtype != torch.float32:
                promoted = parameter.dtype
            dtype = torch.float32 if promote else parameter.dtype
            module._parameters[name] = active.perturbed(parameter.detach(), spec, dtype)  # type: ignore[assignment]
        yield promoted
    finally:
        module._parameters.update(own)


@contextmanager
def swapped_throughout(active: Active, module: nn.Module, specs: Mapping[str, ParamSpec]) -> Iterator[None]:
    """Perturb parameters for the time of the block, whoever uses them: whole forwards, not one module's call.

    A partitioned one is gathered and given other values instead: its place must not be taken by a plain tensor while
    modules are called, whose parameters DeepSpeed gathers.
    """
    specs = {name: spec for name, spec in specs.items() if active.touches(spec)}
    partitioned = {name: spec for name, spec in specs.items() if is_partitioned(module._parameters.get(name))}
    with ExitStack() as stack:
        stack.enter_context(swapped(active, module, {n: spec for n, spec in specs.items() if n not in partitioned}))
        for name, spec in partitioned.items():
            change = partial(active.perturbed, spec=spec)
            stack.enter_context(altered(module._parameters.get(name), change))
        yield
