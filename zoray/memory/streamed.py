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
from zoray.errors import ConfigError
from zoray.layout import trainable_parameters
from zoray.memory.backing import Backing, File, Host
from zoray.memory.base import Memory
from zoray.memory.carrier import Carrier, Change
from zoray.memory.resident import aligned
from zoray.memory.stage import Stage
from zoray.memory.units import Slot, Unit, make_plan
from zoray.partitioned import own_part
from zoray.update import Group, Shard, groups_of

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Streaming:
    """Where the weights lie, and where they are used.

    Attributes:
        offload: "cpu", in the host's memory; "nvme", in a file.
        folder: for that file; it has no name there and is gone with the process.
        device: where the model computes; None: where it is.

    Raises:
        ConfigError: a file without a folder, or a folder without a file.
    """

    offload: Literal["cpu", "nvme"] = "cpu"
    folder: Path | None = None
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        if (self.offload == "nvme") != (self.folder is not None):
            raise ConfigError(f"Weights are to be in {self.offload!r}, and the folder for them is {self.folder}.")


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
        self._stage = Stage(self._carrier, self._change)
        self._units, self._needs = plan.units, plan.needs
        self._due: dict[Unit, None] = {}
        self._update: Group | None = None
        for unit in plan.units:
            self._move_out(unit)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else aligned(buffer.to(device))
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
        self._stage.clear()

    def apply(self, commits: Sequence[Commit]) -> None:
        """Apply consecutive commits, to each unit when it is next brought in or anything else is done with it."""
        for group in groups_of(commits, self.directions):
            self.settle()
            self.flush()
            self._update = group
            self._due = {unit: None for unit in self._units if unit.changes(group)}

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
        trained = [unit for unit in self._units if unit.trained]
        for unit, following in zip(trained, [*trained[1:], None], strict=True):
            values = self._stage.hold(unit)
            if following is not None:
                self._stage.send_ahead([following])
            total += sum(tensor_digest(s.spec.name, s.values, s.start) for s in unit.shards(values))
            self._stage.let_go(unit)
        return total & _MASK

    @contextmanager
    def window(self, unit: Unit, slot: Slot, writing: bool) -> Iterator[torch.Tensor]:
        """A parameter's values on the host, flat; to be written to only if the memory is settled."""
        self._flush(unit)
        self._carrier.wait()
        with self._backing.window(unit, slot.offset, slot.stop, writing) as values:
            yield values.view(slot.dtype)

    def _enter(self, module: nn.Module, args: Any) -> None:
        """Before a module's call."""
        # Not to be seen by those who watch what the model does with its parameters.
        with torch._C.DisableTorchFunction():
            self._stage.enter(self._needs[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a module's call, also one that was broken off."""
        for unit in self._needs[module]:
            self._stage.let_go(unit)

    def _flush(self, unit: Unit) -> None:
        change = self._change(unit)
        if change is not None:
            self._stage.make_room(unit.size)
            self._carrier.change(unit, change)

    def _change(self, unit: Unit) -> Change | None:
        """The update that a unit has not seen yet; it counts as seen from now on."""
        if unit not in self._due:
            return None
        del self._due[unit]
        assert self._update is not None
        return partial(_change, self._update, unit)

    def _move_out(self, unit: Unit) -> None:
        """Move a unit's parameters from where they were loaded to where they will lie."""
        self._backing.reserve(unit)
        home = _Home(self, self._stage, unit)
        for slot in unit.slots:
            with self._backing.window(unit, slot.offset, slot.stop, writing=True) as values:
                values.view(slot.dtype).copy_(slot.parameters[0].detach().reshape(-1))
            for parameter in slot.parameters:
                parameter.zoray_home = home  # type: ignore[attr-defined]
        self._stage.empty(unit)


class _Home:
    """A unit of one memory: what its parameters know of them (see `zoray.partitioned.Home`)."""

    def __init__(self, memory: Streamed, stage: Stage, unit: Unit) -> None:
        self._memory, self._stage, self._unit = memory, stage, unit

    def hold(self) -> None:
        self._stage.hold(self._unit)

    def let_go(self) -> None:
        self._stage.let_go(self._unit)

    @contextmanager
    def part(self, tensor: torch.Tensor, writing: bool) -> Iterator[torch.Tensor]:
        slot = next(s for s in self._unit.slots if any(tensor is p for p in s.parameters))
        with self._memory.window(self._unit, slot, writing) as values:
            yield values


def _change(update: Group, unit: Unit, values: torch.Tensor) -> None:
    for shard in unit.shards(values):
        update.apply(shard)
