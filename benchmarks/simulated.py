"""Replicas that hold no model and answer every probe at once, many of them in one process, for measuring the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from actors.fleet import Fleet, Reference
from actors.replica import Introduction, ReplicaActor
from zoray.config import RunConfig
from zoray.protocol import Answer, DigestValue, Item, Kind, ProbeScalars, decode_request, encode_answer


class Host:
    """A process that is many replicas: each answers after no time with scalars that follow from the address alone."""

    def introduce(self, introduction: Introduction) -> Introduction:
        """As a replica that has loaded the model."""
        return introduction

    def find_snapshots(self) -> tuple[dict[int, str | None], tuple[str, ...]]:
        """There are none."""
        return {}, ()

    def join(self, genesis: bytes, run: str, known: dict[int, bytes]) -> tuple[int, tuple[str, ...]]:
        """As a replica of the base model."""
        return 0, ()

    def catch_up(self, records: bytes) -> int:
        """The joiners of the measured run are there from its start."""
        raise AssertionError

    def memory(self) -> dict[str, int]:
        """Of a process that holds no model."""
        return {}

    def work(self, request: bytes) -> bytes:
        """The answer to any item."""
        item, _ = decode_request(request)
        return encode_answer(Answer("", item, _payload(item)))


def _payload(item: Item) -> ProbeScalars | DigestValue:
    if item.kind is Kind.PROBE:
        return ProbeScalars((item.direction * 37 % 101 - 50) / 50, 1.0, 0.0, 0.0)
    return DigestValue(7)


class SimulatedFleet(Fleet):
    """A fleet of simulated replicas, spread over some processes; a real replica introduces them all."""

    def __init__(self, config: RunConfig, snapshots: Path, processes: int) -> None:
        super().__init__(config, snapshots, embedded=True)
        remote: Any = ray.remote(Host)
        self._hosts = [remote.options(num_cpus=0).remote() for _ in range(processes)]
        real: Any = ray.remote(ReplicaActor)
        one = real.options(num_cpus=0).remote("real", config, str(snapshots))
        self._introduction = ray.get(one.introduce.remote())
        ray.kill(one)

    def introduce(self, name: str) -> tuple[Reference, ...]:
        """Let the host of a replica say what the real one has said."""
        return self.call(name, "introduce", self._introduction)

    def _create(self, name: str, rank: int, node: str) -> Any:
        return self._hosts[int(name[1:]) % len(self._hosts)]

    def _kill(self, actor: Any) -> None:
        """Its process goes on for the others."""
