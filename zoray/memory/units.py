"""What is brought to a device at once: a decoder layer, or what else a module owns.

The members of a model's outermost ModuleLists are its blocks; each is brought in whole for its own call, with all that
is in it. What remains (embeddings, final norm, head) is brought in for the call of the module that owns it. Parameters
that several of these modules use, such as a tied embedding, are units of their own. Nothing else is known of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from zoray.errors import ModelError
from zoray.layout import ParamSpec
from zoray.memory.resident import ALIGNMENT
from zoray.update import Group, Shard


@dataclass(eq=False, repr=False, slots=True)
class Slot:
    """The place of one parameter in its unit.

    Attributes:
        parameters: usually one; parameters over the same memory stay one weight.
        offset, stop: its bytes within the unit; offset is divisible by 64.
        specs: of those that are trained.
    """

    parameters: list[nn.Parameter]
    shape: torch.Size
    dtype: torch.dtype
    offset: int = 0
    specs: list[ParamSpec] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """Behind its last byte."""
        return self.offset + prod(self.shape) * self.dtype.itemsize

    def flat(self, values: torch.Tensor) -> torch.Tensor:
        """The parameter as a 1-D tensor, viewing the bytes of its whole unit."""
        return values[self.offset : self.stop].view(self.dtype)


@dataclass(eq=False, repr=False, slots=True)
class Unit:
    """Parameters that are brought in together, one behind the other.

    Attributes:
        users: the modules for whose calls they are.
        size: bytes.
    """

    users: tuple[nn.Module, ...]
    slots: list[Slot] = field(default_factory=list)
    size: int = 0

    def add(self, slot: Slot) -> None:
        """Put a slot behind the others."""
        slot.offset = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.slots.append(slot)
        self.size = slot.stop

    @property
    def trained(self) -> bool:
        """Whether any of its parameters is."""
        return any(slot.specs for slot in self.slots)

    def changes(self, group: Group) -> bool:
        """Whether commits may change any of its parameters."""
        return any(group.changes(spec) for slot in self.slots for spec in slot.specs)

    def shards(self, values: torch.Tensor) -> Iterator[Shard]:
        """Its trained parameters, in the order of the layout, viewing the unit's bytes."""
        placed = [(spec.offset, spec, slot) for slot in self.slots for spec in slot.specs]
        for _, spec, slot in sorted(placed, key=lambda each: each[0]):
            yield Shard(spec, slot.flat(values))


@dataclass(frozen=True, slots=True)
class Plan:
    """A model's units.

    Attributes:
        units: all of them.
        needs: the units that a module's call needs.
        room: bytes on the device for two blocks, the largest unit that is no block, and what is needed around blocks.
    """

    units: list[Unit]
    needs: dict[nn.Module, list[Unit]]
    room: int


def make_plan(model: nn.Module, specs: Sequence[ParamSpec]) -> Plan:
    """Divide a model into units.

    Args:
        specs: the parameters that are trained.

    Raises:
        ModelError: a parameter is of a class of its own, as those of quantised models are.
    """
    users: dict[nn.Parameter, list[nn.Module]] = {}
    blocks: list[nn.Module] = []
    _find_users(model, model, users, blocks)
    trained = {spec.name: spec for spec in specs}
    slots: dict[tuple[object, ...], Slot] = {}
    calls: dict[tuple[object, ...], list[nn.Module]] = {}
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise ModelError(
                f"Parameter {name!r} is a {type(parameter).__name__}, which cannot be streamed.",
                where="memory",
                advice="use resident replicas for this model",
            )
        key = _memory_of(parameter)
        slot = slots.setdefault(key, Slot([], parameter.shape, parameter.dtype))
        slot.parameters.append(parameter)
        slot.specs += [trained[name]] if name in trained else []
        calls.setdefault(key, []).extend(m for m in users[parameter] if m not in calls.get(key, ()))
    units: dict[tuple[nn.Module, ...], Unit] = {}
    for key, slot in slots.items():
        units.setdefault(tuple(calls[key]), Unit(tuple(calls[key]))).add(slot)
    needs: dict[nn.Module, list[Unit]] = {}
    for unit in units.values():
        for module in unit.users:
            needs.setdefault(module, []).append(unit)
    return Plan(list(units.values()), needs, _room(needs, blocks))


def _find_users(
    module: nn.Module, caller: nn.Module, users: dict[nn.Parameter, list[nn.Module]], blocks: list[nn.Module]
) -> None:
    """Note for each parameter the modules whose calls it is brought in for.

    Args:
        caller: the module itself if it can be called, or the nearest one around it that can.
    """
    caller = module if _has_forward(module) else caller
    for parameter in module.parameters(recurse=False):
        if caller not in users.setdefault(parameter, []):
            users[parameter].append(caller)
    for child in module.children():
        if isinstance(module, nn.ModuleList) and _has_forward(child):
            blocks.append(child)
            for parameter in child.parameters():
                if child not in users.setdefault(parameter, []):
                    users[parameter].append(child)
        else:
            _find_users(child, caller, users, blocks)


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _memory_of(parameter: nn.Parameter) -> tuple[object, ...]:
    if parameter.numel() == 0 or parameter.is_meta:
        return (parameter,)
    return parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()


def _room(needs: dict[nn.Module, list[Unit]], blocks: list[nn.Module]) -> int:
    sizes = {module: sum(unit.size for unit in units) for module, units in needs.items()}
    around = {module for module in needs if any(m in needs for m in module.modules() if m is not module)}
    leaves = [size for module, size in sizes.items() if module not in around and module not in blocks]
    largest = max(leaves, default=0)
    two = 2 * max((sizes[block] for block in blocks if block in sizes), default=largest)
    return two + largest + sum(sizes[module] for module in around - set(blocks))
