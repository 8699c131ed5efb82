"""Weights in the host's memory or in a file, brought to the device block by block while it computes.

Each unit (see `zoray.memory.units`) is brought in for its module's call, in which it serves both signs, and the next
one comes in meanwhile, as far as the order of the forward before tells. The exact update is made to a unit on the
device, when it is brought in for the first time after it, and the unit is written back. No more is on the device than
two blocks, the largest unit that is none, and the activations. Losses, weights and digests are a resident replica's.

Wang et al. 2025, ZO2 (arXiv 2503.12668).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from zoray.commits import Commit
from zoray.digest import tensor_digest
from zoray.directions import Directions
from zoray.layout import trainable_parameters
from zoray.memory.away import bring_back, send_away
from zoray.memory.backing import Backing, File, Host
from zoray.memory.base import Memory
from zoray.memory.carrier import Carrier, Change, Load
from zoray.memory.resident import aligned
from zoray.memory.units import Slot, Unit, make_plan
from zoray.partitioned import own_part
from zoray.update import Group, Shard, groups_of

_AHEAD = 3
"""Units that are brought in before they are asked for, where there is room: norm and head follow the last block."""
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Streaming:
    """Where the weights lie, and where they are used.

    Attributes:
        offload: "cpu", in the host's memory; "nvme", in a file.
        folder: for that file; it has no name there and is gone with the process.
        device: where the model computes; None: where it is.
    """

    offload: Literal["cpu", "nvme"] = "cpu"
    folder: Path | None = None
    device: str | torch.device | None = None


_DEFAULT = Streaming()


class Streamed(Memory):
    """All of a replica's weights, in the memory of one process's machine or on its disk.

    Args:
        model: its parameters are moved there, unit by unit, and its modules get hooks, for good; buffers are moved to
            the device.
        directions: the run's directions.
        streaming: where to.

    Raises:
        ModelError: a parameter is of a class of its own, as those of quantised models are.
        ResourceError: there is no room for the file.
    """

    def __init__(self, model: nn.Module, directions: Directions, streaming: Streaming = _DEFAULT) -> None:
        super().__init__(directions)
        device = torch.device(streaming.device or next(model.parameters()).device)
        cuda = device.type == "cuda"
        self._parameters = trainable_parameters(model)
        plan = make_plan(model, directions.layout.specs)
        self._backing: Backing = Host(cuda) if streaming.folder is None else File(streaming.folder, cuda)
        self.fleeting = self._backing.fleeting
        self._carrier = Carrier(self._backing, device, plan.room)
        self._nothing = {dtype: _nothing(dtype, device) for dtype in {p.dtype for p in model.parameters()}}
        self._homes = {unit: _Home(self, unit) for unit in plan.units}
        self._present: dict[Unit, Load] = {}
        self._coming: dict[Unit, Load] = {}
        self._held: dict[Unit, int] = dict.fromkeys(plan.units, 0)
        self._next: dict[tuple[Unit | None, Unit], Unit] = {}
        self._trail: tuple[Unit | None, Unit] | None = None
        self._due: dict[Unit, None] = {}
        self._update: Group | None = None
        for unit in plan.units:
            self._move_out(unit)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else aligned(buffer.to(device))
        self._needs = plan.needs
        for module in plan.needs:
            module.register_forward_pre_hook(self._enter, prepend=True)
            module.register_forward_hook(self._leave, always_call=True)

    def shards(self, writing: bool = False) -> Iterator[Shard]:
        """One shard per parameter: all of it, on the host."""
        for spec in self.directions.layout.specs:
            with own_part(self._parameters[spec.name], writing) as part:
                yield Shard(spec, *part)

    def settle(self) -> None:
        """Nothing is left on the device, whatever was there or on its way."""
        self._held = dict.fromkeys(self._held, 0)
        for unit in list(self._present):
            self._release(unit)
        self._cancel()

    def apply(self, commits: Sequence[Commit]) -> None:
        """Apply consecutive commits, to each unit when it is next brought in or anything else is done with it."""
        for group in groups_of(commits, self.directions):
            self.settle()
            self.flush()
            self._update = group
            self._due = {unit: None for unit in self._held if unit.trained}

    def flush(self) -> None:
        """Apply to every unit what it has not seen yet."""
        for unit in list(self._due):
            self._flush(unit)
        self._carrier.wait()

    def digest(self) -> int:
        """Digest (64 bits) of the trained weights, computed on the device unless they are in the processor's memory."""
        self.flush()
        if self._carrier.device.type == "cpu" and not self.fleeting:
            return super().digest()
        total = 0
        trained = [unit for unit in self._held if unit.trained]
        for unit, following in zip(trained, [*trained[1:], None], strict=True):
            self.hold(unit)
            if following is not None:
                self._send_ahead([following])
            values = self._present[unit].buffer
            total += sum(tensor_digest(s.spec.name, s.values, s.start) for s in unit.shards(values))
            self.let_go(unit)
        return total & _MASK

    # ---- between the units and the modules ----

    def _enter(self, module: nn.Module, args: Any) -> None:
        """Before a module's call."""
        # Not to be seen by those who watch what the model does with its parameters.
        with torch._C.DisableTorchFunction():
            for unit in self._needs[module]:
                self._held[unit] += 1
            for unit in self._needs[module]:
                self._bring(unit)
                self._follow(unit)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a module's call, also one that was broken off: its units stay until their room is wanted."""
        for unit in self._needs[module]:
            self.let_go(unit)

    def hold(self, unit: Unit) -> None:
        """Bring a unit in, and keep it until it is let go as often."""
        self._held[unit] += 1
        self._bring(unit)

    def let_go(self, unit: Unit) -> None:
        """A unit is not needed any more by one of those who held it."""
        self._held[unit] = max(0, self._held[unit] - 1)

    @contextmanager
    def window(self, unit: Unit, slot: Slot, writing: bool) -> Iterator[torch.Tensor]:
        """A parameter's values on the host, flat; to be written to only if the memory is settled."""
        self._flush(unit)
        self._carrier.wait()
        with self._backing.window(unit, slot.offset, slot.stop, writing) as values:
            yield values.view(slot.dtype)

    # ---- what is on the device ----

    def _bring(self, unit: Unit) -> None:
        load = self._present.pop(unit, None)
        if load is None:
            if unit not in self._coming:
                # Another order than the last time: what was sent for takes up room.
                self._cancel()
            load = self._coming.pop(unit, None) or self._send(unit)
            values = self._carrier.arrive(load)
            for slot in unit.slots:
                for parameter in slot.parameters:
                    bring_back(parameter, slot.flat(values).view(slot.shape))
        # The last one is that which was used last.
        self._present[unit] = load

    def _send(self, unit: Unit) -> Load:
        self._make_room(unit.size)
        return self._carrier.send(unit, self._change(unit))

    def _flush(self, unit: Unit) -> None:
        change = self._change(unit)
        if change is not None:
            self._make_room(unit.size)
            self._carrier.change(unit, change)

    def _change(self, unit: Unit) -> Change | None:
        """The update that a unit has not seen yet; it counts as seen from now on."""
        if unit not in self._due:
            return None
        del self._due[unit]
        assert self._update is not None
        return partial(_change, self._update, unit)

    def _follow(self, unit: Unit) -> None:
        """Note the order of units, and send for those that came next the last time."""
        if self._trail is not None:
            if self._trail[1] is unit:
                return
            self._next[self._trail] = unit
        self._trail = (None if self._trail is None else self._trail[1], unit)
        expected: list[Unit] = []
        trail = self._trail
        while len(expected) < _AHEAD and trail in self._next:
            expected.append(self._next[trail])
            trail = trail[1], expected[-1]
        self._send_ahead(expected)

    def _send_ahead(self, units: Sequence[Unit]) -> None:
        first = True
        for unit in units:
            if unit in self._present or unit in self._coming:
                continue
            if not (self._make_room(unit.size, sparing=units) if first else self._fits(unit.size)):
                break
            self._coming[unit] = self._send(unit)
            first = False

    def _fits(self, size: int) -> bool:
        return self._carrier.used + size <= self._carrier.room

    def _make_room(self, size: int, sparing: Sequence[Unit] = ()) -> bool:
        """Send away what nobody holds until there is room; first what was used last, for that is needed latest."""
        for unit in reversed(list(self._present)):
            if self._fits(size):
                break
            if not self._held[unit] and unit not in sparing:
                self._release(unit)
        return self._fits(size)

    def _release(self, unit: Unit) -> None:
        for slot in unit.slots:
            for parameter in slot.parameters:
                send_away(parameter, self._nothing[slot.dtype])
        self._carrier.give_back(self._present.pop(unit))

    def _cancel(self) -> None:
        while self._coming:
            self._carrier.give_back(self._coming.popitem()[1])

    def _move_out(self, unit: Unit) -> None:
        """Move a unit's parameters from where they were loaded to where they will lie."""
        self._backing.reserve(unit)
        for slot in unit.slots:
            with self._backing.window(unit, slot.offset, slot.stop, writing=True) as values:
                values.view(slot.dtype).copy_(slot.parameters[0].detach().reshape(-1))
            for parameter in slot.parameters:
                parameter.zoray_home = self._homes[unit]  # type: ignore[attr-defined]
                send_away(parameter, self._nothing[slot.dtype])


class _Home:
    """A unit of one memory: what its parameters know of them (see `zoray.partitioned.Home`)."""

    def __init__(self, memory: Streamed, unit: Unit) -> None:
        self._memory, self._unit = memory, unit

    def hold(self) -> None:
        self._memory.hold(self._unit)

    def let_go(self) -> None:
        self._memory.let_go(self._unit)

    @contextmanager
    def part(self, tensor: torch.Tensor, writing: bool) -> Iterator[torch.Tensor]:
        slot = next(s for s in self._unit.slots if any(tensor is p for p in s.parameters))
        with self._memory.window(self._unit, slot, writing) as values:
            yield values


def _change(update: Group, unit: Unit, values: torch.Tensor) -> None:
    for shard in unit.shards(values):
        update.apply(shard)


def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One element that makes itself felt if it is computed with all the same."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((1,), value, dtype=dtype, device=device)
