"""Which tensors have the rows of the batch in front.

With both signs in one forward of 2B rows, a handler must know whether the leading dimension of what it is given counts
rows or something else. The number alone does not tell: T positions may be 2B by coincidence. So `record` finds out at
proof, from two forwards with different numbers of rows, which tensors are *led* by the rows of the batch and which are
*fixed*, without any; only the latter are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from zoray.perturb.context import NotBatchable

RETURN = "return"
"""The place of a module's output; no argument can be called that."""


class Fixed(NamedTuple):
    """A tensor without rows of the batch, named by the module it is given to or comes from.

    Attributes:
        module: the module's name in the model.
        place: number or name of the argument, or "return", and the way from there through lists and dictionaries: "1",
            "mask", "position_embeddings.0", "return.last_hidden_state".
        shape: a letter per dimension: "1" if the leading one is 1 (a batch of 1, to be broadcast), "*" for the others.
    """

    module: str
    place: str
    shape: str


@dataclass(frozen=True, slots=True)
class Rows:
    """What a proof found; empty where every tensor is led by the rows of the batch.

    Attributes:
        fixed: the tensors that have no rows, but for those that a swapped module passes on whole anyway (a leading 1).
        unseen: the modules, with all they contain, that were never called: nothing is known of them.
    """

    fixed: tuple[Fixed, ...] = ()
    unseen: tuple[str, ...] = ()

    def rule(self, module: str) -> RowRule:
        """What is known of one module's tensors."""
        unseen = any(name == "" or module == name or module.startswith(f"{name}.") for name in self.unseen)
        return RowRule(module, {f.place: f.shape for f in self.fixed if f.module == module}, not unseen)


@dataclass(frozen=True, slots=True)
class RowRule:
    """Tells the tensors of one module apart while both signs are in one forward.

    Attributes:
        module: the module's name.
        fixed: the shape (see `Fixed`) of each tensor without rows, by its place.
        seen: whether the module was called in the proof.
    """

    module: str = ""
    fixed: Mapping[str, str] = field(default_factory=dict)
    seen: bool = True

    def led(self, place: str, tensor: torch.Tensor, rows: int) -> bool:
        """Whether the tensor has `rows` rows, or a multiple of them, in front.

        A tensor without rows gets them when an earlier module expands it: it then has a dimension more, or that many in
        the place of one.

        Raises:
            NotBatchable: it should have rows, and has another number of them.
        """
        shape = self.fixed.get(place)
        divides = tensor.dim() > 0 and tensor.shape[0] % rows == 0
        if self.seen and shape is not None and tensor.dim() == len(shape):
            return divides and shape.startswith("1")
        if self.seen and divides and (shape is None or tensor.dim() == len(shape) + 1):
            return True
        raise self.refusal(place, tensor, rows)

    def expanded(self, tensor: torch.Tensor, rows: int) -> torch.Tensor:
        """A layer's input with `rows` rows in front: a fixed one of shape (1, ..., n) is given them.

        Raises:
            NotBatchable: it has another number of rows, or is fixed and of another shape.
        """
        if tensor.dim() > 1 and self.led("0", tensor, rows):
            return tensor
        if tensor.dim() > 1 and tensor.shape[0] == 1:
            return tensor.expand(rows, *tensor.shape[1:])
        raise self.refusal("0", tensor, rows)

    def refusal(self, place: str, tensor: torch.Tensor, rows: int) -> NotBatchable:
        """The reason why this tensor rules out one forward for both signs."""
        who = self.module or "the model"
        if not self.seen:
            return NotBatchable(f"{who} is called, and was not when the paths were proved")
        verb = "returns" if place.split(".")[0] == RETURN else "is given"
        what = f"without rows, of shape {tuple(tensor.shape)}"
        if place not in self.fixed:
            what = f"of shape {tuple(tensor.shape)} for {rows} rows"
        return NotBatchable(f"{who} {verb} a tensor {what}")


ALL_LED = RowRule()
"""Every tensor has the rows of the batch in front."""


def mapped(function: Callable[..., Any], place: str, value: Any, *others: Any) -> Any:
    """Apply `function(place, tensor, ...)` to every tensor of a structure and rebuild the structure around the results.

    Args:
        function: called with the tensor's place, the tensor, and those at the same place of the other structures.
        place: the place of the structure itself.
        value: tensors in tuples, lists and dictionaries, of any depth; anything else is returned as it is.
        others: structures of the same form.

    Raises:
        NotBatchable: they are not of the same form.
    """
    if isinstance(value, torch.Tensor) and all(isinstance(other, torch.Tensor) for other in others):
        return function(place, value, *others)
    if any(type(other) is not type(value) for other in others):
        raise NotBatchable(f"the two signs differ in what they have at {place!r}")
    if not isinstance(value, (list, tuple, dict)):
        return value
    keys = _keys(value)
    if any(_keys(other) != keys for other in others):
        raise NotBatchable(f"the two signs differ in what they have at {place!r}")
    parts = {
        key: mapped(function, f"{place}.{key}" if place else str(key), value[key], *(other[key] for other in others))
        for key in keys
    }
    if isinstance(value, dict):
        return parts if type(value) is dict else type(value)(**parts)
    return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(list(parts.values()))


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))
