"""Out of memory, in the user's terms: how much there was, and which keys of the configuration need less."""

from __future__ import annotations

import re

import psutil
import torch

from zoray.config import DIFFERENTIATING, ResidentMemory, RunConfig, Zero3Memory
from zoray.errors import ResourceError

_GIB = 2**30


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's; on processors torch has no class of its own for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def explain(error: BaseException, config: RunConfig, who: str, batched: bool | None) -> ResourceError:
    """What to tell the user of an `out_of_memory` error.

    Args:
        error: the allocator's.
        config: of the run.
        who: which process of which replica, doing what.
        batched: whether both signs of a probe are in one forward; None while the model is being loaded.
    """
    process = psutil.Process().memory_info().rss / _GIB
    host = psutil.virtual_memory()
    have = [f"it takes {process:.2f} GiB of the machine's {host.total / _GIB:.1f} ({host.available / _GIB:.1f} free)"]
    if config.gpus_per_replica > 0 and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        own = torch.cuda.memory_reserved()
        have.append(f"{own / _GIB:.2f} GiB of the accelerator's {total / _GIB:.1f} ({free / _GIB:.1f} free)")
    return ResourceError(
        f"There is not enough memory for {who}: {_asked(error)}; {' and '.join(have)}.",
        where="memory",
        advice=f"{'; or '.join(_knobs(config, batched))}. `zoray plan` says what each of them needs",
    )


def _asked(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    # Torch's own advice on processors is none: what follows the number of bytes is an errno.
    found = re.search(r"tried to allocate (\d+) bytes", text)
    return f"{int(found[1]) / _GIB:.2f} GiB more were asked for" if found else text


def _knobs(config: RunConfig, batched: bool | None) -> list[str]:
    """What would need less, what costs least first."""
    knobs = []
    if batched:
        knobs.append("set signs: sequential in a new run (half the activations)")
    if batched is not None:
        knobs.append(f"a smaller per_direction_batch_size than {config.per_direction_batch_size} in a new run")
    if config.estimator in DIFFERENTIATING:
        knobs.append("estimator: spsa in a new run (no derivatives, and weights may be elsewhere)")
    else:
        knobs += _places(config)
    if not isinstance(config.memory, Zero3Memory):
        knobs.append("fewer replicas on a machine")
    if config.dtype == "float32":
        knobs.append("dtype: bfloat16 in a new run")
    return knobs


def _places(config: RunConfig) -> list[str]:
    """Where weights could be in place of where they are."""
    memory, shards = config.memory, config.shards * 2
    offload = "none" if isinstance(memory, ResidentMemory) else memory.offload
    kind = f"kind: zero3, shards: {config.shards}" if config.shards > 1 else "kind: streamed"
    places = [f"memory: {{kind: zero3, shards: {shards}}} (a {shards}th of the weights in each process)"]
    if config.gpus_per_replica > 0 and offload == "none":
        places.append(f"memory: {{{kind}, offload: cpu}} (weights in the host's memory)")
    elif offload != "nvme":
        places.append(f"memory: {{{kind}, offload: nvme, nvme_path: ...}} (in files)")
    return places
