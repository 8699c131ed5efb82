"""Parameters that are used behind the back of the module that owns them.

A handler sees the calls of its own module. Fused attention reads its output projection's weight without calling that
module, and some heads read the embedding's: such a parameter has to be swapped for the whole forward. Every use of a
parameter is watched during one perturbed forward to find them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zoray.directions import Directions
from zoray.errors import ModelError
from zoray.loss import Batch, LossFunction, ModelLoss
from zoray.partitioned import is_partitioned
from zoray.perturb.context import Active, Signs
from zoray.perturb.engine import Engine, replaced_forward
from zoray.perturb.swap import SwappedModule


def find_strays(
    model: nn.Module, directions: Directions, batch: Batch, rows: int, epsilon: float, loss: LossFunction | None = None
) -> list[str]:
    """Names of trainable parameters that are used while no module that owns them is running.

    Fused attention reads its output projection's weight without calling that module, and some heads read the
    embedding's; the module's own handler would never see that use.

    Args:
        loss: a custom loss; by default the model's own.

    Raises:
        ModelError: a module was given perturbed copies and the originals were used.
    """
    active = Active(directions, 0, 0, epsilon, Signs.PLUS, rows)
    first = _watched(Engine(model, directions.layout), active, batch, loss)
    kept = list(first.kept)
    if first.strays and not kept and not any(map(is_partitioned, model.parameters())):
        # Whoever still uses an original while it is swapped out of the model has a reference of its own. A partitioned
        # parameter is given other values in its place, which such a reference sees too.
        second = _watched(Engine(model, directions.layout, frozenset(first.strays)), active, batch, loss)
        kept = [*second.kept, *sorted(second.strays)]
    if kept:
        raise ModelError(
            f"Parameter {kept[0]!r} cannot be perturbed: the model keeps a reference of its own to it.",
            advice="leave it out of `trainable`",
        )
    return sorted(first.strays)


def _watched(engine: Engine, active: Active, batch: Batch, loss: LossFunction | None) -> _Watch:
    """One perturbed forward under watch."""
    watch = _Watch(engine)
    with ExitStack() as stack:
        stack.enter_context(engine.perturbed(active))
        for module in engine.handlers:
            stack.enter_context(replaced_forward(module, watch.wrap(module, module.__dict__["forward"])))
        stack.enter_context(watch)
        if loss is None:
            ModelLoss(engine.model)(batch, active)
        else:
            loss(engine.model, batch)
    return watch


class _Watch(TorchFunctionMode):
    """Sees every use of a parameter in a torch function, and which modules are running at that moment."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine, self.strays, self.kept = engine, set[str](), list[str]()
        self._running: list[nn.Module] = []

    def wrap(self, module: nn.Module, forward: Any) -> Any:
        """The same forward, noting that its module is running."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._running.append(module)
            try:
                return forward(*args, **kwargs)
            finally:
                self._running.pop()

        return noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called instead of every torch function; looks at the arguments and calls it."""
        result = func(*args, **(kwargs or {}))
        if _makes_tensor(result) and func is not torch.Tensor.detach:
            for tensor in _tensors([*args, *(kwargs or {}).values()]):
                if isinstance(tensor, nn.Parameter) and tensor in self.engine.specs:
                    self._used(tensor)
        return result

    def _used(self, parameter: nn.Parameter) -> None:
        owners = [m for m in self._running if any(parameter is p for p in m._parameters.values())]
        name = self.engine.specs[parameter].name
        if owners:
            return
        swapped_owners = [m for m in self._running if isinstance(self.engine.handlers.get(m), SwappedModule)]
        if any(name in {s.name for s in self.engine.handlers[m].specs.values()} for m in swapped_owners):  # type: ignore[attr-defined]
            self.kept.append(name)
        else:
            self.strays.add(name)


def _makes_tensor(result: Any) -> bool:
    return isinstance(result, torch.Tensor) or (isinstance(result, (list, tuple)) and any(map(_makes_tensor, result)))


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
