"""Finding out which tensors have the rows of the batch in front: two plain forwards with different numbers of rows.

A leading dimension in the ratio of the rows is led by them; one that stays the same is fixed. Only shapes are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from zoray.perturb.context import NotBatchable
from zoray.perturb.engine import Engine, Handler, no_fused_attention, replaced_forward
from zoray.perturb.rows import RETURN, Fixed, Rows, mapped
from zoray.perturb.swap import SwappedModule

COUNTS = (2, 3)
"""Numbers of rows; no multiple of one equals the same multiple of the other, so a tensor is never taken for both."""

Shapes = dict[str, tuple[int, ...]]
"""The shape of each tensor of one call, by its place (see `Fixed`)."""


def find_rows(engine: Engine, forward: Callable[[int], object]) -> Rows:
    """Which of the tensors that the engine's modules exchange have no rows of the batch.

    Args:
        engine: of the model; nothing is perturbed.
        forward: runs the model on that many rows, which should differ, as its probes do on theirs.

    Raises:
        NotBatchable: a module regroups the rows, so that the two signs cannot be told apart.
    """
    few, more = (_recorded(engine, forward, count) for count in COUNTS)
    fixed = [
        Fixed(name, place, shape)
        for module, name in engine.names.items()
        for place, shape in _fixed(name, few.calls[module], more.calls[module]).items()
        if not (shape[:1] in ("", "1") and _is_whole(engine.handlers[module], place))
    ]
    return Rows(tuple(fixed), tuple(_unseen(engine, few.seen | more.seen)))


def _is_whole(handler: Handler, place: str) -> bool:
    """Whether a tensor without a leading dimension, or of 1, needs no mention there: a swapped module passes it on."""
    return isinstance(handler, SwappedModule) and place.split(".")[0] != RETURN


def _recorded(engine: Engine, forward: Callable[[int], object], count: int) -> _Recorder:
    recorder = _Recorder()
    with ExitStack() as stack:
        stack.enter_context(no_fused_attention())
        for module, handler in engine.handlers.items():
            recorder.calls[module] = []
            stack.enter_context(replaced_forward(module, recorder.wrap(module, handler)))
        forward(count)
    return recorder


class _Recorder:
    """The shapes of what modules are given and return, call by call.

    What happens within a swapped module does not count: it runs once for each sign, and its modules see one at a time.
    """

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[Shapes]] = {}
        self.seen: set[nn.Module] = set()
        self._inside = 0

    def wrap(self, module: nn.Module, handler: Handler) -> Handler:
        """The module's own forward, noting the shapes that its handler will have to tell apart."""
        forward, swapped = module.forward, isinstance(handler, SwappedModule)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.seen.add(module)
            if not swapped:
                # A layer takes one tensor, whatever it is called by.
                args, kwargs = (*args, *kwargs.values()), {}
            if self._inside:
                return forward(*args, **kwargs)
            shapes: Shapes = {}
            self.calls[module].append(shapes)
            for inputs in (args, kwargs):
                mapped(_note_in(shapes), "", inputs)
            self._inside += swapped
            try:
                output = forward(*args, **kwargs)
            finally:
                self._inside -= swapped
            if swapped:
                mapped(_note_in(shapes), RETURN, output)
            return output

        return noted


def _note_in(shapes: Shapes) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def note(place: str, tensor: torch.Tensor) -> torch.Tensor:
        shapes[place] = tuple(tensor.shape)
        return tensor

    return note


def _fixed(name: str, few: list[Shapes], more: list[Shapes]) -> dict[str, str]:
    """The shapes of a module's tensors without rows, by place, after its calls with few and with more rows."""
    if len(few) != len(more):
        raise _regroups(name, f"{len(few)} calls for {COUNTS[0]} rows and {len(more)} for {COUNTS[1]}")
    found: dict[str, str | None] = {}
    for first, second in zip(few, more, strict=True):
        kinds = {place: _kind(name, first[place], second[place]) for place in first if place in second}
        inputs = [kind for place, kind in kinds.items() if place.split(".")[0] != RETURN]
        if None in kinds.values() and None not in inputs:
            raise _regroups(name, "it makes rows of tensors that have none")
        if any(found.setdefault(place, kind) != kind for place, kind in kinds.items()):
            raise _regroups(name, "a tensor has them in one of its calls and not in another")
    return {place: kind for place, kind in found.items() if kind is not None}


def _kind(name: str, few: tuple[int, ...], more: tuple[int, ...]) -> str | None:
    """None for a tensor that is led by the rows, its shape as in `Fixed` for one that has none."""
    if few and more and few[1:] == more[1:] and few[0] * COUNTS[1] == more[0] * COUNTS[0]:
        return None
    if few == more:
        return "".join("1" if i == 0 and size == 1 else "*" for i, size in enumerate(few))
    raise _regroups(name, f"shapes {few} for {COUNTS[0]} of them and {more} for {COUNTS[1]}")


def _regroups(name: str, how: str) -> NotBatchable:
    return NotBatchable(f"{name or 'the model'} regroups rows ({how})")


def _unseen(engine: Engine, seen: set[nn.Module]) -> list[str]:
    """The largest modules of which nothing was called, of those that contain something the engine handles."""
    unseen: list[str] = []
    for name, module in engine.model.named_modules():
        if any(name.startswith(f"{other}.") for other in unseen if other) or "" in unseen:
            continue
        handled = [part for part in module.modules() if part in engine.handlers]
        if handled and seen.isdisjoint(handled):
            unseen.append(name)
    return unseen
