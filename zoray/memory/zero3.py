"""Weights partitioned over several processes by DeepSpeed's ZeRO stage 3; the only module that knows DeepSpeed.

Each of R processes holds a flat part of every parameter (see `zoray.partitioned`). DeepSpeed gathers a parameter for
the time of its module's call, and for no longer: the exact update is made to the parts, and whatever copy of a
parameter outlived it would be stale. Losses come from gathered parameters, which are the resident ones bit for bit.

Rajbhandari et al. 2020, ZeRO; 2021, ZeRO-Infinity.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, nn

from zoray.directions import Directions
from zoray.errors import ConfigError, ModelError, ResourceError
from zoray.layout import trainable_parameters
from zoray.memory.base import Memory
from zoray.memory.paths import Paths
from zoray.partitioned import own_part, shape_of
from zoray.update import Shard

_MASK = (1 << 64) - 1
_OPTIONS = {
    # Parameters that DeepSpeed keeps gathered between two forwards would be stale after an update.
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    # Besides a process's parts there is one module, unless it is asked to trade memory for speed.
    "stage3_prefetch_bucket_size": 0,
    # It puts a linear layer with other rounding in the place of torch's, for the whole process.
    "memory_efficient_linear": False,
}


@dataclass(frozen=True)
class Sharding:
    """Where the parts lie, and what else DeepSpeed is told.

    Attributes:
        offload: "none", where the model computes; "cpu", in the host's memory; "nvme", in files, but for parts of less
            than 1 MiB, which lie in the host's memory.
        folder: for those files; no two replicas may have the same.
        buffer: weights of the largest part; five such buffers in the host's memory serve "nvme".
        options: keys of DeepSpeed's `zero_optimization` to be set otherwise.
    """

    offload: Literal["none", "cpu", "nvme"] = "none"
    folder: Path | None = None
    buffer: int = 100_000_000
    options: Mapping[str, object] = field(default_factory=dict)

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """DeepSpeed's configuration for a model of that dtype."""
        place: dict[str, object] = {}
        if self.offload != "none":
            place = {"device": self.offload, "pin_memory": torch.cuda.is_available()}
        if self.offload == "nvme":
            place |= {"nvme_path": str(self.folder), "buffer_size": self.buffer}
        stage = {"stage": 3, **_OPTIONS, **({"offload_param": place} if place else {}), **self.options}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": stage,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        }


_DEFAULT = Sharding()


@contextmanager
def partitioned_loading(dtype: torch.dtype, sharding: Sharding = _DEFAULT) -> Iterator[None]:
    """Models that `from_pretrained` loads in this block are partitioned while they are loaded.

    No process ever holds more of them than its parts and one module. Every process of the world must load the same.

    Args:
        dtype: of the model, as given to `from_pretrained`.
        sharding: as given to `Zero3`.

    Raises:
        ResourceError, ConfigError: see `Zero3`.
    """
    _deepspeed(sharding)
    from transformers.integrations import deepspeed as integration

    hub: Any = integration
    # transformers keeps no more than a weak reference to it.
    try:
        settings = hub.HfDeepSpeedConfig(sharding.settings(dtype))
    except ImportError as error:
        raise _missing("accelerate") from error
    try:
        with _as_on_a_processor():
            yield
    finally:
        hub.unset_hf_deepspeed_config()
        del settings
        # A partitioned parameter refers to itself, so one that was tied to another would stay.
        gc.collect()


class Zero3(Memory):
    """A part of the weights, on each process of a torch.distributed world that the caller has made.

    All processes of the world must make the replica, and call its methods, in the same order; their probes must be of
    batches that take the same path through the model. What is not partitioned yet (adapters, or a model that was not
    loaded under `partitioned_loading`) is partitioned here, with the values that process 0 has.

    Args:
        model: the model; it gets DeepSpeed's hooks, for good.
        directions: the run's directions.
        sharding: where the parts lie; what the model was loaded with, if it was loaded in partitions.

    Raises:
        ResourceError: there is no world.
        ConfigError: DeepSpeed is not installed, or cannot use files.
        ModelError: a parameter has no dimension.
    """

    def __init__(self, model: nn.Module, directions: Directions, sharding: Sharding = _DEFAULT) -> None:
        super().__init__(directions)
        _deepspeed(sharding)
        single = [name for name, parameter in model.named_parameters() if not shape_of(parameter)]
        if single:
            raise ModelError(
                f"Parameter {single[0]!r} is a single number, which ZeRO-3 cannot partition.",
                where="memory",
                advice="use resident replicas for this model",
            )
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.fleeting = sharding.offload == "nvme"
        self._device = torch.device(get_accelerator().current_device_name())
        settings = sharding.settings(next(model.parameters()).dtype)
        stage = DeepSpeedZeroConfig(**settings["zero_optimization"])
        # The hooks without the engine around them: that one is for training, has a rule for each dtype on each
        # device, and a forward of its own.
        self._hooks: Any = DeepSpeedZeRoOffload(
            model,
            None,
            settings,
            # Else it gathers in a stream of its own, which does not wait for an update in the one that is computed in.
            overlap_comm=False,
            offload_param_config=stage.offload_param,
            prefetch_bucket_size=stage.prefetch_bucket_size,
            max_reuse_distance=stage.max_reuse_distance,
            max_live_parameters=stage.max_live_parameters,
            param_persistence_threshold=stage.param_persistence_threshold,
        )
        for hook in self._hooks.backward_hooks:
            hook.remove()
        self._paths = Paths(model)
        self._shield()
        for buffer in model.buffers():
            # DeepSpeed's engine, which is not used, would have moved them.
            buffer.data = buffer.data.to(self._device)
        self._parameters = trainable_parameters(model)

    def shards(self, writing: bool = False) -> Iterator[Shard]:
        """This process's part of each parameter; empty where there are more processes than elements."""
        for spec in self.directions.layout.specs:
            with own_part(self._parameters[spec.name], writing) as part:
                yield Shard(spec, *part)

    def total(self, part: int) -> int:
        """Sum of all processes' parts modulo 2^64: one all-reduce of eight bytes."""
        signed = (part & _MASK) - (1 << 64 if part & (1 << 63) else 0)
        total = torch.tensor(signed, dtype=torch.int64, device=self._device)
        distributed.all_reduce(total)
        return int(total) & _MASK

    def settle(self) -> None:
        """Take apart every parameter that is still gathered, also those of a forward that was broken off."""
        self._hooks.partition_all_parameters()

    @contextmanager
    def forwards(self, first: bool = False) -> Iterator[None]:
        """In the first, DeepSpeed notes which modules use parameters of others, to gather those for them from then on.

        The proof's are broken off where a path turns out not to be right, so what they leave is let go of in any case.
        """
        for module in self._hooks.module.modules() if first else ():
            module._parameters._in_forward = True
        try:
            with self._paths.forwards(first), super().forwards(first):
                yield
        finally:
            if first:
                for module in self._hooks.module.modules():
                    module._parameters._in_forward = False
                self.settle()

    def _shield(self) -> None:
        """Keep DeepSpeed from those who watch what the model does with its parameters, and its order guarded."""
        hooks, paths = self._hooks, self._paths
        gather, let_go = hooks.pre_sub_module_forward_function, hooks.post_sub_module_forward_function

        def before(module: nn.Module) -> None:
            with torch._C.DisableTorchFunction():
                paths.enter(module)
                gather(module)

        def after(module: nn.Module) -> None:
            with torch._C.DisableTorchFunction():
                let_go(module)

        hooks.pre_sub_module_forward_function, hooks.post_sub_module_forward_function = before, after


@contextmanager
def _as_on_a_processor() -> Iterator[None]:
    """What a model computes and draws while it is loaded is made by the processor, as for a resident replica.

    DeepSpeed would have an accelerator make its buffers and its new weights, and would make those in bfloat16 that it
    wants in float32, such as the frequencies of rotary positions. Their bits and its random numbers are others, so the
    base model would be another than that of replicas elsewhere and of `zoray verify`.
    """
    from deepspeed.runtime.zero import partition_parameters as parameters
    from transformers import PreTrainedModel

    hub: Any = PreTrainedModel
    initialize = hub._initialize_weights

    def there(model: Any, module: nn.Module, *args: Any) -> None:
        whole = [] if getattr(module, "_is_hf_initialized", False) else [*module.parameters(), *module.buffers()]
        away = [(t, t.data) for t in whole if t.device.type != "cpu" and not getattr(t, "_is_hf_initialized", False)]
        for tensor, values in away:
            tensor.data = values.cpu()
        try:
            initialize(model, module, *args)
        finally:
            for tensor, values in away:
                values.copy_(tensor.data)
                tensor.data = values

    # The default of an argument of `zero.Init`, which transformers calls without it, but with its own default dtype.
    overrides = list(parameters.DEFAULT_TENSOR_OVERRIDES)
    parameters.DEFAULT_TENSOR_OVERRIDES.clear()
    hub._initialize_weights = there
    try:
        yield
    finally:
        hub._initialize_weights = initialize
        parameters.DEFAULT_TENSOR_OVERRIDES.extend(overrides)


def _deepspeed(sharding: Sharding) -> None:
    """Import DeepSpeed and tell it of the torch.distributed world that is there."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ResourceError(
            "Sharded weights need several processes that know of each other, and there are none.",
            where="torch.distributed",
            advice="call torch.distributed.init_process_group in each of them first",
        )
    # Read when deepspeed is imported and when it looks for the world; whoever has set them knows better.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if "nccl" in distributed.get_backend() else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if torch.cuda.is_available() else 0))
    try:
        import deepspeed
    except ImportError as error:
        raise _missing("deepspeed") from error
    # An all-reduce through shared memory that nothing here calls, for which DeepSpeed would start a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    if sharding.offload == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(
                "Weights in files need DeepSpeed's asynchronous input and output, which cannot be built here.",
                where="memory",
                advice="install libaio with its headers (Debian: libaio-dev) and a C++ compiler",
            )


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"Sharded weights need {package}, which is not installed.",
        where="memory",
        advice="Install it: pip install 'zoray[zero3]'.",
    )
