"""Replicas that keep their process from one run to the next: nearly all of a replica's start is imports."""

from __future__ import annotations

from typing import Any

from actors.fleet import Fleet
from actors.replica import Introduction, ReplicaActor
from zoray.config import RunConfig


class WarmReplica:
    """A process that is one replica after the other; resident ones, for DeepSpeed takes one model per process."""

    def become(self, name: str, config: RunConfig, snapshots: str) -> None:
        self.actor = ReplicaActor(name, config, snapshots)

    def meet(self) -> str | None:
        return self.actor.meet()

    def introduce(self, meeting: str | None) -> Introduction:
        return self.actor.introduce(meeting)

    def find_snapshots(self) -> tuple[dict[int, str | None], tuple[str, ...]]:
        return self.actor.find_snapshots()

    def join(self, genesis: bytes, run: str, known: dict[int, bytes]) -> tuple[int, tuple[str, ...]]:
        return self.actor.join(genesis, run, known)

    def catch_up(self, records: bytes) -> int:
        return self.actor.catch_up(records)

    def work(self, request: bytes) -> bytes:
        return self.actor.work(request)

    def memory(self) -> dict[str, int]:
        return self.actor.memory()

    def flip(self) -> None:
        """Change one bit of one weight, as a cosmic ray would."""
        import torch

        weights = next(self.actor.replica.memory.shards()).values.view(torch.int32)
        weights[0] ^= 1 << 21


class WarmFleet(Fleet):
    """A fleet whose replicas give their process back instead of ending it."""

    idle: list[Any]

    def _create(self, name: str, rank: int, node: str) -> Any:
        import ray

        remote: Any = ray.remote(WarmReplica)
        actor = self.idle.pop() if self.idle else remote.options(num_cpus=0, max_concurrency=1).remote()
        actor.become.remote(name, self.config, self._snapshots)
        return actor

    def _kill(self, actor: Any) -> None:
        self.idle.append(actor)
