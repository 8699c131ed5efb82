"""Whether a run fits on given machines, and the smallest changes with which it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from zoray.config import DIFFERENTIATING, RunConfig, StreamedMemory, Zero3Memory
from zoray.errors import ModelError
from zoray.planning.needs import Need, needs
from zoray.planning.work import Work, measure

_GIB = 1 << 30
_FOLDER = "/mnt/nvme"


@dataclass(frozen=True, slots=True)
class Machine:
    """What one machine has.

    Attributes:
        host: bytes of its memory.
        device: bytes of each of its accelerators.
        devices: how many of them it has.
    """

    host: int
    device: int = 0
    devices: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """How much of a run fits on a machine.

    Attributes:
        replicas: how many of them.
        missing: why not even one does, a sentence each.
    """

    replicas: int
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will need.

    Attributes:
        config: the run.
        work: as measured on tensors without memory.
        need: of each process of a replica.
    """

    config: RunConfig
    work: Work
    need: Need

    def fit(self, machine: Machine) -> Fit:
        """How many of the run's replicas fit on a machine."""
        shards, share = self.config.shards, self.config.gpus_per_replica
        host, device = self.need.host.peak, self.need.device.peak
        missing, replicas = [], machine.host // (shards * host)
        if not replicas:
            count = "" if shards == 1 else f"{shards} processes of "
            has = f"{machine.host / _GIB:.1f} GiB"
            missing.append(f"a replica needs {count}{host / _GIB:.1f} GiB of a machine's memory, which has {has}")
        if share:
            # Processes that share an accelerator have no more than their share of it.
            room = machine.device * min(share, 1.0)
            if device > room:
                missing.append(
                    f"a process needs {device / _GIB:.1f} GiB of an accelerator, and has {room / _GIB:.1f} GiB"
                )
            on_devices = math.floor(machine.devices / (share * shards) + 1e-9)
            if not on_devices:
                missing.append(f"a replica takes {share * shards:g} accelerators, and a machine has {machine.devices}")
            replicas = min(replicas, on_devices)
        return Fit(0 if missing else replicas, tuple(missing))


@dataclass(frozen=True, slots=True)
class Change:
    """Keys of a configuration to set otherwise.

    Attributes:
        keys: with their values, as in the configuration.
        plan: of the run with these.
    """

    keys: Mapping[str, Any]
    plan: Plan

    @property
    def words(self) -> list[str]:
        """Arguments for the command line."""
        return [f"{key}={_flow(value)}" for key, value in self.keys.items()]


class Planner:
    """Makes plans of one run and of variations of it; what was measured once is not measured again.

    Args:
        config: the run.
        num_labels: see `zoray.models.blank_model`.
    """

    def __init__(self, config: RunConfig, num_labels: int | None = None) -> None:
        self.config, self.num_labels = config, num_labels
        self._measured: dict[tuple[bool, str], Work] = {}

    def plan(self, **keys: Any) -> Plan:
        """The plan of the run with some keys set otherwise.

        Raises:
            ModelError, ConfigError: see `measure` and `needs`.
        """
        config = self.config
        if keys:
            config = RunConfig.model_validate({**config.model_dump(exclude_none=True), **keys})
        # How many processes share a parameter makes no difference to what it takes when it is gathered.
        sharded = isinstance(config.memory, Zero3Memory)
        key = sharded, config.model_dump_json(exclude={"memory"})
        if key not in self._measured:
            self._measured[key] = measure(config, self.num_labels, shards=2 if sharded else 1)
        work = self._measured[key]
        return Plan(config, work, needs(config, work))

    def changes(self, machine: Machine) -> list[Change]:
        """Small changes with which a replica fits on such a machine: of the memory, of the batch, or else of both.

        Empty if none does.
        """
        if self.config.gpus_per_replica and not machine.devices:
            return []
        memories, batches = list(self._memories(machine)), list(self._batches())
        if self.config.estimator in DIFFERENTIATING:
            # Derivatives take memory, and need all weights in one place.
            differences = {"estimator": "spsa"}
            memories = [differences, *({**differences, **memory} for memory in memories)]
        found = [self._first(memories, machine), self._first(batches, machine)]
        if self.config.dtype == "float32":
            found.append(self._first([{"dtype": "bfloat16"}], machine))
        if not any(found) and batches:
            smallest = batches[-1]
            for memory in memories:
                found.append(self._first([{**batch, **memory} for batch in batches], machine, smallest | memory))
                if found[-1]:
                    break
        return [change for change in found if change is not None]

    def _first(
        self, candidates: list[dict[str, Any]], machine: Machine, least: dict[str, Any] | None = None
    ) -> Change | None:
        """The first that fits; none is tried if the last of them, or `least`, does not."""
        if not candidates or not self._fits(least or candidates[-1], machine):
            return None
        return next((Change(keys, self.plan(**keys)) for keys in candidates if self._fits(keys, machine)), None)

    def _fits(self, keys: dict[str, Any], machine: Machine) -> bool:
        try:
            return self.plan(**keys).fit(machine).replicas > 0
        except ModelError:
            # Both signs in one forward were asked for, say, and are not right for this model.
            return False

    def _memories(self, machine: Machine) -> Iterator[dict[str, Any]]:
        """Other layouts, the fastest first."""
        share, before = self.config.gpus_per_replica, self.config.memory
        most = int(machine.devices / share) if share else 1
        counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
        for offload in ("none", "cpu", "nvme"):
            place: dict[str, Any] = {"nvme_path": _FOLDER} if offload == "nvme" else {}
            for shards in counts:
                if (shards, offload) == (1, "none") or (shards > 1 and share not in (0, 1)):
                    continue
                # One device is better off without DeepSpeed (docs/LOG.md).
                keys = {"kind": "zero3", "shards": shards} if shards > 1 else {"kind": "streamed"}
                keys |= {"offload": offload, **place}
                made: object = Zero3Memory(**keys) if shards > 1 else StreamedMemory(**keys)
                if made != before:
                    yield {"memory": {name: value for name, value in keys.items() if value != "none"}}

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Smaller batches, the largest first; the last is the smallest there is."""
        rows, held_out = self.config.per_direction_batch_size, self.config.per_device_eval_batch_size
        evaluated = self.config.evaluated_in_run

        def at_most(most: int) -> dict[str, Any]:
            return {"per_device_eval_batch_size": most} if evaluated and held_out > most else {}

        if at_most(rows):
            yield at_most(rows)
        signs = {} if self.config.proved_signs == "sequential" else {"signs": "sequential"}
        if signs:
            yield {**signs, **at_most(rows)}
        while rows > 1:
            rows //= 2
            yield {"per_direction_batch_size": rows, **at_most(rows)}
        if signs:
            yield {**signs, "per_direction_batch_size": 1, **at_most(1)}


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")
