"""What each process of a replica (each actor) will need, for each way of keeping the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoray.commits import seal
from zoray.config import ResidentMemory, RunConfig, StreamedMemory, Zero3Memory
from zoray.errors import ConfigError
from zoray.planning.work import Work

PROCESS_BYTES = 400 << 20
"""What a process has beside its tensors: interpreter, libraries, tokenizer, Ray's worker.

A replica of a model of 31,616 weights on a local Ray had 321 MiB of anonymous memory when it was ready (2026-11-27,
torch 2.13, transformers 5.23), and work adds up to 80, most of which the C library keeps of freed memory. Another
175 MiB are pages of shared libraries, which the processes of a machine have in common.
"""

DEEPSPEED_BYTES = 100 << 20
"""What a process with DeepSpeed has beside that: 375 MiB where one without it had 290."""

CONTEXT_BYTES = 512 << 20
"""What an accelerator has of its driver's context and the libraries' kernels. An assumption, which nothing measured."""

_IN_MEMORY = 1 << 20
"""Parts below this are not put into files (see `Sharding`)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes in one place.

    Attributes:
        lasting: what is there all the time, by what it is.
        passing: what is there for a time, by what the process is doing; one at a time, so the largest counts.
    """

    lasting: Mapping[str, int] = field(default_factory=dict)
    passing: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes when most is there."""
        return sum(self.lasting.values()) + max(self.passing.values(), default=0)

    def __add__(self, other: Place) -> Place:
        return Place({**self.lasting, **other.lasting}, {**self.passing, **other.passing})


@dataclass(frozen=True, slots=True)
class Need:
    """What one process needs.

    Attributes:
        device: on its accelerator; nothing where it has none.
        host: in the memory of its machine.
        files: on the disk of its machine, by what they are.
        mapped: pages of the checkpoint, which the kernel keeps while it has room and drops when it has not.
    """

    device: Place
    host: Place
    files: Mapping[str, int]
    mapped: int


def needs(config: RunConfig, work: Work) -> Need:
    """What each process of a replica needs.

    Args:
        config: of the run.
        work: measured for `config.shards` processes.

    Raises:
        ConfigError: nothing is known of this kind of memory.
    """
    layout = _LAYOUTS.get(type(config.memory))
    if layout is None:
        raise ConfigError(
            f"Nothing is known yet of what replicas of kind {config.memory.kind} need.",
            where="memory.kind",
            advice=f"Ask for one of {', '.join(kind.__name__ for kind in _LAYOUTS)}.",
        )
    found = layout(config, work)
    process = Place({"process": PROCESS_BYTES + (DEEPSPEED_BYTES if isinstance(config.memory, Zero3Memory) else 0)})
    if work.inputs:
        process = process + Place({"inputs of layers": work.inputs})
    if config.gpus_per_replica > 0:
        context = Place({"context of the accelerator": CONTEXT_BYTES})
        return Need(context + found.device, process + found.host, found.files, found.mapped)
    # Without an accelerator, the model computes where the machine's memory is.
    return Need(Place(), process + _kept_on_heap(config, work) + found.device + found.host, found.files, found.mapped)


def _kept_on_heap(config: RunConfig, work: Work) -> Place:
    """What the C library keeps of what gathering lets go of: the many pieces that it does not map one by one.

    Each leaves a buffer and a copy behind. An observation, of replicas of two processes (docs/LOG.md), and no law: with
    `MALLOC_MMAP_THRESHOLD_=1048576` in their environment there is nothing of it.
    """
    sharded = isinstance(config.memory, Zero3Memory)
    return Place({"kept of gathered modules": 2 * work.pieces}) if sharded and work.pieces else Place()


def _resident(config: RunConfig, work: Work) -> Need:
    weights = work.weights() + work.buffers
    host = Place()
    if config.gpus_per_replica > 0:
        host = Place({}, {"loading": weights, "snapshot": work.weights(trained=True)})
    return Need(Place({"weights": weights}, work.passing), host, {}, weights)


def _zero3(config: RunConfig, work: Work) -> Need:
    memory, shards = config.memory, config.shards
    assert isinstance(memory, Zero3Memory)
    parts, own = work.weights(shards), work.weights(shards, trained=True)
    # A module is whole until it is taken apart; what will be tied has parts of its own until then.
    loading = work.largest_module + -(-work.tied // shards)
    buffers = {"buffers of the model": work.buffers} if work.buffers else {}
    device = Place(buffers, {**work.passing, "loading": loading})
    mapped = work.weights()
    if memory.offload == "none":
        host = Place({}, {"snapshot": own}) if config.gpus_per_replica > 0 else Place()
        return Need(device + Place({"weights": parts}), host, {}, mapped)
    if memory.offload == "cpu":
        kept = work.pinned(shards) if config.gpus_per_replica > 0 else parts
        return Need(device, Place({"weights": kept}), {}, mapped)
    buffer = max((-(-elements // shards) + 1) * width for elements, width, _ in work.parameters)
    small = work.weights(shards, largest=_IN_MEMORY)
    host = Place({"small weights": small, "buffers for files": 5 * buffer}, {"snapshot": own})
    return Need(device, host, {"weights": work.weights(shards, smallest=_IN_MEMORY)}, mapped)


def _streamed(config: RunConfig, work: Work) -> Need:
    assert isinstance(config.memory, StreamedMemory)
    weights, own = work.weights(), work.weights(trained=True)
    buffers = {"buffers of the model": work.buffers} if work.buffers else {}
    device = Place({**buffers, "blocks of weights": work.room}, work.passing)
    if config.memory.offload == "cpu":
        return Need(device, Place({"weights": weights}), {}, weights)
    # Each parameter is in memory until it is in its file; loaded, they are in one file, and then in another.
    largest = max(elements * width for elements, width, _ in work.parameters)
    host = Place({}, {"loading": largest, "snapshot": own})
    return Need(device, host, {"weights": weights, "weights while they are loaded": weights}, weights)


_LAYOUTS: dict[type[Any], Callable[[RunConfig, Work], Need]] = {
    ResidentMemory: _resident,
    Zero3Memory: _zero3,
    StreamedMemory: _streamed,
}
"""For each kind of memory, what a process needs beside its libraries; `device` is where the model computes."""


def storage(config: RunConfig, work: Work) -> dict[str, int]:
    """Bytes of a whole run's snapshots and ledger, in its folder or where `snapshot_dir` says."""
    kept = config.snapshots_kept
    if kept is None:
        kept = math.ceil(config.max_steps / (config.save_steps or config.max_steps))
    # A new one is whole before the oldest goes.
    snapshots = (kept + 1) * work.weights(trained=True)
    count, rule = config.most_directions, config.update_rule
    terms = [(step, index, 1) for step in range(rule.window) for index in range(count)]
    notes = (1.0,) * 5 if rule.reach else ()
    record = seal(0, 1.0, 1.0, 1.0, terms, bytes(32), notes).encode()
    return {"snapshots": snapshots, "ledger": config.max_steps * len(record)}
