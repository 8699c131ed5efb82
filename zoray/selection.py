"""From a rule that selects weights to the coverage of a run's directions, made alike by every replica.

`SmallWeights` is Sparse-MeZO's rule (Liu et al. 2024, arXiv 2402.15751), `Rotation` ZO-Bench's block coordinate descent
(Zhang et al. 2024, arXiv 2402.11592).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import torch
from torch import nn

from zoray.coverage import EVERYTHING, Coverage
from zoray.errors import ConfigError
from zoray.layout import ParamSpec
from zoray.memory import Memory
from zoray.partitioned import shape_of
from zoray.update import Shard


@dataclass(frozen=True, slots=True)
class SmallWeights:
    """The weights of small magnitude of each parameter, as they are when a step begins.

    Attributes:
        sparsity: share of the base model's weights that are above the limit, and not moved; 0 < sparsity < 1.
    """

    sparsity: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """Blocks of consecutive layers, in turn.

    Attributes:
        blocks: how many of them, with about as many weights each; at least 2.
        steps: how many a turn has.
    """

    blocks: int
    steps: int


Selection = SmallWeights | Rotation

_INTEGERS = {2: torch.int16, 4: torch.int32}
_PIECE_ELEMENTS = 1 << 20
_DIGITS = 1 << 16


def cover(selection: Selection | None, model: nn.Module, memory: Memory) -> Coverage:
    """What directions move by a selection; everything if there is none.

    Args:
        selection: the rule.
        model: a replica's.
        memory: that of the replica, with the base model's weights. All of its processes must call this.

    Raises:
        ConfigError: there are not as many layers as blocks, or the rule's numbers are out of range.
    """
    if selection is None:
        return EVERYTHING
    if isinstance(selection, SmallWeights):
        return Coverage(limits=_limits(memory, selection.sparsity))
    if selection.blocks < 2 or selection.steps < 1:
        raise ConfigError(f"{selection.blocks} blocks cannot take turns of {selection.steps} steps.")
    groups = _groups(model, memory.directions.layout.specs, selection.blocks)
    return Coverage(groups=groups, count=selection.blocks, steps=selection.steps)


def _limits(memory: Memory, sparsity: float) -> dict[str, float]:
    """The limit of each parameter that has one."""
    if not 0 < sparsity < 1:
        raise ConfigError(f"The share of weights that stay must be between 0 and 1, not {sparsity}.")
    found = {shard.spec.name: magnitude_limit(shard, memory, sparsity) for shard in memory.shards()}
    return {name: limit for name, limit in found.items() if limit is not None}


def magnitude_limit(shard: Shard, memory: Memory, sparsity: float) -> float | None:
    """The magnitude that `sparsity` of a parameter's weights are above: an order statistic, so exact on every machine.

    Its bits, which are in the order of the magnitudes, are found 16 at a time: weights are counted by theirs, and all
    that the processes of a sharded replica tell each other is how many they have up to a guess.

    Args:
        shard: what this process has of the parameter.
        memory: the replica's; all of its processes must call this for the same parameter.
        sparsity: of the whole parameter.

    Returns:
        A value of the parameter's dtype. None if it is 0, or no weight is above it (zeros of a new head, ones of a
        norm): it would tell a weight that was moved from one that was not, rather than a large one from a small one.
    """
    width = shard.values.element_size()
    bits = shard.values.detach().view(_INTEGERS[width])
    wanted = shard.spec.numel - floor(sparsity * shard.spec.numel)
    found, below = 0, 0
    for shift in range(8 * width - 16, -1, -16):
        up_to = below + _counted(bits, found, shift)
        low, high = 0, _DIGITS - 1
        while low < high:
            middle = (low + high) // 2
            if memory.total(int(up_to[middle])) >= wanted:
                high = middle
            else:
                low = middle + 1
        found, below = found << 16 | low, int(up_to[low - 1]) if low else below
    limit = float(torch.tensor([found], dtype=_INTEGERS[width]).view(shard.values.dtype))
    everything = memory.total(int(up_to[low])) == shard.spec.numel
    return None if limit == 0 or everything else limit


def _counted(bits: torch.Tensor, above: int, shift: int) -> torch.Tensor:
    """How many magnitudes have up to each number (2^16 of them) in the 16 bits from `shift`, and `above` before."""
    unsigned = (1 << (8 * bits.element_size() - 1)) - 1
    counts = torch.zeros(_DIGITS, dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _PIECE_ELEMENTS):
        piece = bits[start : start + _PIECE_ELEMENTS].bitwise_and(unsigned)
        if shift + 16 < 8 * bits.element_size():
            piece = piece[piece >> 16 == above]
        counts += torch.bincount((piece >> shift).bitwise_and(_DIGITS - 1), minlength=_DIGITS)
    return counts.cumsum(0)


def _groups(model: nn.Module, specs: Sequence[ParamSpec], count: int) -> dict[str, int]:
    """The number of the group of each trained parameter; layers stay whole, and in the order the model has them."""
    trained = {spec.name for spec in specs}
    inside = _layers(model)
    sizes: dict[str, int] = {}
    members: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if name in trained:
            layer = next((each for each in inside if name.startswith(f"{each}.")), name.rpartition(".")[0])
            sizes[layer] = sizes.get(layer, 0) + torch.Size(shape_of(parameter)).numel()
            members.setdefault(layer, []).append(name)
    if len(sizes) < count:
        raise ConfigError(
            f"The trained weights of this model are in {len(sizes)} layers, which do not make {count} blocks.",
            where="trainable.blocks.count",
            advice=f"use at most {len(sizes)}" if len(sizes) > 1 else "leave trainable.blocks out",
        )
    numbers = divide(list(sizes.values()), count)
    return {name: number for layer, number in zip(members, numbers, strict=True) for name in members[layer]}


def _layers(model: nn.Module) -> list[str]:
    """Names of the members of the outermost ModuleLists."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{each}.") for each in found):
            found += [f"{name}.{child}" for child, _ in module.named_children()]
    return found


def divide(sizes: Sequence[int], count: int) -> list[int]:
    """Divide a row of things into `count` parts of neighbours so that the largest part is as small as it can be.

    Returns:
        The number of the part of each, ascending from 0; no part is empty.
    """
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if _filled(sizes, middle, count)[-1] < count:
            high = middle
        else:
            low = middle + 1
    return _filled(sizes, low, count)


def _filled(sizes: Sequence[int], most: int, count: int) -> list[int]:
    """Parts filled one after the other with no more than `most` each, but for what the last `count` of them need."""
    numbers: list[int] = []
    part, size = 0, 0
    for index, each in enumerate(sizes):
        remaining = len(sizes) - index
        if numbers and (size + each > most or remaining <= count - 1 - part):
            part, size = part + 1, 0
        numbers.append(part)
        size += each
    return numbers
