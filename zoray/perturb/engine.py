"""Which module is perturbed how, and the switch that turns a direction on for the time of a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from zoray.inputs.layers import is_conv1d
from zoray.layout import Layout, ParamSpec
from zoray.perturb.context import Active
from zoray.perturb.embedding import EmbeddingLayer
from zoray.perturb.linear import LinearLayer
from zoray.perturb.norm import NormLayer
from zoray.perturb.rows import RowRule, Rows
from zoray.perturb.swap import SwappedModule, swapped_throughout

Handler = Callable[..., Any]


class Engine:
    """The perturbed forwards of one model.

    Every module that owns a trainable parameter has one handler. A class that merely derives from `nn.Linear` or
    `nn.Embedding` and redefines `forward` is not that class (OPT's learned positions take a mask, not indices): it is
    swapped like any other module.

    Args:
        model: the model; never changed outside of `perturbed`.
        layout: the layout of its trainable parameters.
        strays: names of parameters that are used outside of the module that owns them (see `proof`): they are swapped
            for the whole forward, which rules out both signs in one.
        rows: which tensors have no rows of the batch (see `record`); all have them by default.

    Attributes:
        handlers: the handler of each module.
        names: the name of each of these modules.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, strays: frozenset[str] = frozenset(), rows: Rows | None = None
    ) -> None:
        self.model, self.layout, self.strays = model, layout, strays
        self.specs = parameter_specs(model, layout)
        self.handlers: dict[nn.Module, Handler] = {}
        self.names: dict[nn.Module, str] = {}
        self._own: dict[nn.Module, tuple[ParamSpec, ...]] = {}
        self._root: list[tuple[nn.Module, dict[str, ParamSpec]]] = []
        for name, module in model.named_modules():
            own = {n: self.specs[p] for n, p in module._parameters.items() if p is not None and p in self.specs}
            astray = {n: spec for n, spec in own.items() if spec.name in strays}
            if astray:
                self._root.append((module, astray))
            own = {n: spec for n, spec in own.items() if n not in astray}
            if own:
                self.names[module], self._own[module] = name, tuple(own.values())
                self.handlers[module] = self.handler(module, own, (rows or Rows()).rule(name))

    def handler(self, module: nn.Module, own: Mapping[str, ParamSpec], rule: RowRule) -> Handler:
        """The way to perturb one module, given the specs of its trainable parameters by local name."""
        weight, bias = own.get("weight"), own.get("bias")
        factored = weight is None or weight.rank > 0
        if own.keys() <= {"weight", "bias"} and "forward" not in module.__dict__:
            forward: Any = type(module).forward
            transposed = is_conv1d(module)
            if (
                (forward is nn.Linear.forward or transposed)
                and factored
                and module._parameters.get("weight") is not None
            ):
                return LinearLayer(module, transposed, weight, bias, rule)
            if (
                forward is nn.Embedding.forward
                and weight is not None
                and weight.rank
                and getattr(module, "max_norm", None) is None
            ):
                return EmbeddingLayer(module, weight, rule)
            if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
                return NormLayer(module, weight, bias, rule)  # type: ignore[arg-type]
        return SwappedModule(module, module.forward, own, rule)

    @contextmanager
    def perturbed(self, active: Active) -> Iterator[None]:
        """Install the handlers for one direction; every forward is put back when the block ends, however it ends.

        Modules of which the direction moves nothing are left alone, but for those that are swapped with others inside:
        these call them once for each sign, and how often a module is called must not depend on the step.
        """
        with ExitStack() as stack:
            stack.enter_context(no_fused_attention())
            for module, specs in self._root:
                stack.enter_context(swapped_throughout(active, module, specs))
            for module, handler in self.handlers.items():
                around = isinstance(handler, SwappedModule) and any(module.children())
                if not around and not any(map(active.touches, self._own[module])):
                    continue
                call = handler if isinstance(handler, SwappedModule) else partial(_by_position, handler)
                stack.enter_context(replaced_forward(module, partial(call, active)))
            yield


def _by_position(handler: Handler, active: Active, *args: Any, **kwargs: Any) -> Any:
    """Call a layer's handler: it takes one tensor, which a model may pass by a name of its own."""
    return handler(active, *args, *kwargs.values())


def parameter_specs(model: nn.Module, layout: Layout) -> dict[torch.Tensor, ParamSpec]:
    """Spec of each trainable parameter object; a tied parameter has one, whichever module uses it."""
    named = dict(model.named_parameters())
    return {named[spec.name]: spec for spec in layout.specs}


@contextmanager
def replaced_forward(module: nn.Module, forward: Handler) -> Iterator[None]:
    """Give a module another `forward` for the time of the block."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def no_fused_attention() -> Iterator[None]:
    """Keep `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` from their fused kernels for the time of the block.

    Those read the weights of all the layer's modules without calling one of them.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
