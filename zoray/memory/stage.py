"""What of a model is on its device, and what is on the way there.

A unit that nobody holds stays until its room is wanted. What was used last goes first: a forward uses each unit once or
twice, in the same order every time, so that is what will be needed again last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zoray.memory.away import bring_back, send_away
from zoray.memory.carrier import Carrier, Change, Load
from zoray.memory.units import Unit

_AHEAD = 3
"""Units that are sent for before they are asked for, where there is room: norm and head follow the last block."""


class Stage:
    """The units on a device.

    Args:
        carrier: brings them there.
        change: the update that a unit has not seen yet, which counts as seen from then on; None if there is none.
    """

    def __init__(self, carrier: Carrier, change: Callable[[Unit], Change | None]) -> None:
        self._carrier, self._change = carrier, change
        self._present: dict[Unit, Load] = {}
        self._coming: dict[Unit, Load] = {}
        self._held: dict[Unit, int] = {}
        self._next: dict[tuple[Unit | None, Unit], Unit] = {}
        self._trail: tuple[Unit | None, Unit] | None = None
        self._nothing: dict[torch.dtype, torch.Tensor] = {}

    def hold(self, unit: Unit) -> torch.Tensor:
        """Bring a unit in and keep it until it is let go as often; returns its bytes."""
        self._held[unit] = self._held.get(unit, 0) + 1
        return self._bring(unit)

    def let_go(self, unit: Unit) -> None:
        """A unit is not needed any more by one of those who held it."""
        self._held[unit] = max(0, self._held.get(unit, 0) - 1)

    def enter(self, units: Sequence[Unit]) -> None:
        """Hold the units that a module's call needs, and send for those that came next the last time."""
        for unit in units:
            self.hold(unit)
        for unit in units:
            self._follow(unit)

    def clear(self) -> None:
        """Let go of everything, whoever holds it, and of what is on its way."""
        self._held.clear()
        for unit in list(self._present):
            self._release(unit)
        self._cancel()

    def send_ahead(self, units: Sequence[Unit]) -> None:
        """Send for units that will be asked for, in that order: the first if others can go for it, more if they fit."""
        first = True
        for unit in units:
            if unit in self._present or unit in self._coming:
                continue
            if not (self.make_room(unit.size, sparing=units) if first else self._fits(unit.size)):
                break
            self._coming[unit] = self._send(unit)
            first = False

    def make_room(self, size: int, sparing: Sequence[Unit] = ()) -> bool:
        """Send away units that nobody holds until there is room; whether there is."""
        for unit in reversed(list(self._present)):
            if self._fits(size):
                break
            if not self._held.get(unit) and unit not in sparing:
                self._release(unit)
        return self._fits(size)

    def empty(self, unit: Unit) -> None:
        """Take a unit's values from its parameters."""
        for slot in unit.slots:
            if slot.dtype not in self._nothing:
                self._nothing[slot.dtype] = _nothing(slot.dtype, self._carrier.device)
            for parameter in slot.parameters:
                send_away(parameter, self._nothing[slot.dtype])

    def _bring(self, unit: Unit) -> torch.Tensor:
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
        return load.buffer

    def _follow(self, unit: Unit) -> None:
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
        self.send_ahead(expected)

    def _send(self, unit: Unit) -> Load:
        self.make_room(unit.size)
        return self._carrier.send(unit, self._change(unit))

    def _fits(self, size: int) -> bool:
        return self._carrier.used + size <= self._carrier.room

    def _release(self, unit: Unit) -> None:
        self.empty(unit)
        self._carrier.give_back(self._present.pop(unit))

    def _cancel(self) -> None:
        while self._coming:
            self._carrier.give_back(self._coming.popitem()[1])


def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One element that makes itself felt if it is computed with all the same."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((1,), value, dtype=dtype, device=device)
