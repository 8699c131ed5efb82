"""The torch.distributed world of one replica's processes: NCCL between accelerators, gloo between processors."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed

_APPEAR = timedelta(minutes=10)
"""How long processes wait for each other at first: the others may still be importing their libraries."""

PATIENCE = timedelta(minutes=30)
"""How long one waits for the others later: one may be uploading its part of a snapshot. NCCL's own are ten minutes."""


# Torch's stubs do not say that it is public.
_store: Any = distributed.TCPStore  # type: ignore[attr-defined]


class Meeting:
    """Where the processes of one replica find each other: a store that process 0 keeps open as long as it lives.

    Args:
        host: name or address of this machine, as the others know it.
    """

    def __init__(self, host: str) -> None:
        self._store: Any = _store(host, 0, is_master=True, wait_for_workers=False)
        self.place = f"{host}:{self._store.port}"


def form(place: str, rank: int, size: int, accelerator: bool, patience: timedelta = PATIENCE) -> None:
    """Become process `rank` of `size`; returns once all of them are there.

    If one dies, gloo tells the others at once. NCCL does not notice on one machine: they wait, and whoever has started
    them is to end them (`actors.fleet` does). If nobody does, they end when their patience does.

    Args:
        place: of the `Meeting` of process 0.
        accelerator: the processes compute on one each, that which is current.
        patience: how long one waits for the others in a collective.

    Raises:
        RuntimeError: not all of them came (torch's own errors).
    """
    host, _, port = place.rpartition(":")
    store = _store(host, int(port), is_master=False, timeout=_APPEAR)
    backend = "nccl" if accelerator else "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if accelerator else None
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device, timeout=patience)


def lost_touch(error: BaseException) -> bool:
    """Whether an error is torch's word for a process of the world that is gone, and none of this process's own."""
    if isinstance(error, distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo/transport", "NCCL", "ProcessGroup"))
