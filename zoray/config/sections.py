"""The sections of a configuration: directions, replicas, memory; `task` and `trainable` have modules of their own.

`docs/configuration.md` is generated from these classes. Each key says whether it changes the mathematics of a run: a
key that does cannot be changed when a run is resumed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self


def key(default: Any, description: str, *, mathematics: bool | Literal["content"], **limits: Any) -> Any:
    """A configuration key: `Field` with the two things every key must have.

    A file's place is not mathematics, but its content is: a digest of that is compared instead.
    """
    return Field(default, description=description, json_schema_extra={"mathematics": mathematics}, **limits)


def fault(key: str, message: str, advice: str) -> PydanticCustomError:
    """A fault of one key that only shows beside other keys; `load` finds the key's line from the context."""
    return PydanticCustomError("fault", "{message}", {"key": key, "message": message, "advice": advice})


class Section(BaseModel):
    """What all parts of a configuration share: no unknown keys, no coercion (`true` is not 1), no mutation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


CellKind = Literal["text", "label", "value"]
"""What a column must hold: `text` is str, `label` is int or str, `value` is anything but null."""

Architecture = Literal["causal", "masked", "classifier"]
"""A causal or masked language model, or a sequence classifier."""

FILES = (
    "a JSONL, JSON, CSV or Parquet file, or a folder of such files (read in order of their names); also on an object "
    "store (`s3://bucket/folder`, `gs://...`)."
)
"""What a data set is, for the keys that name one."""


class DirectionConfig(Section):
    """How random directions are drawn."""

    kind: Literal["inputs", "rank", "rademacher", "gaussian"] = key(
        "inputs",
        "`rank`: products of ±1 vectors for matrices, ±1 for vectors. `inputs`: the same, but the vector on the input "
        "side of a linear layer's weight is half made of inputs of the layer, those of 64 texts (random tokens; of a "
        "classification, training examples) as the run begins; it learns more from a forward on two of three tasks "
        "(docs/learning.md), and all learning "
        "rates but those of `normalize: curvature` mean other numbers. `rademacher`: ±1 everywhere. "
        "`gaussian`: for comparison with the literature; its updates are not bit-exact.",
        mathematics=True,
    )
    rank: int = key(
        1, "Products summed in the direction of one matrix (kinds `inputs` and `rank`).", mathematics=True, ge=1
    )

    @model_validator(mode="after")
    def _rank_means_something(self) -> Self:
        if self.rank != 1 and self.kind not in ("inputs", "rank"):
            raise fault(
                "direction.rank",
                f"A direction of kind {self.kind} has no rank, but rank is {self.rank}.",
                "Leave direction.rank out, or set direction.kind to inputs or rank.",
            )
        return self


class ReplicaRange(Section):
    """`replicas: {min: 1, max: 64}`: as many as the cluster offers, between the two."""

    min: int = key(1, "The run begins when so many are ready, and cannot be scaled below.", mathematics=False, ge=1)
    max: int = key(..., "Never more than this.", mathematics=False, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise fault(
                "replicas.min", f"min ({self.min}) is above max ({self.max}).", "Give a min that is at most max."
            )
        return self


class ResidentMemory(Section):
    """A replica is one process that holds all of its weights."""

    kind: Literal["resident"] = key("resident", "All weights in one process.", mathematics=False)


class Zero3Memory(Section):
    """A replica is several processes on one machine, each with a part of every weight (DeepSpeed's ZeRO stage 3)."""

    kind: Literal["zero3"] = key(..., "Weights in parts, gathered module by module for a forward.", mathematics=False)
    shards: int = key(
        ...,
        "Processes of one replica, each with `1/shards` of the weights; each runs a probe of its own at the same time. "
        "`threads_per_replica` and `gpus_per_replica` are what each of them has.",
        mathematics=False,
        ge=1,
        le=1024,
    )
    offload: Literal["none", "cpu", "nvme"] = key(
        "none",
        "Where the parts lie between two uses: with the process's accelerator (`none`), in the machine's memory, or in "
        "files under `nvme_path`.",
        mathematics=False,
    )
    nvme_path: str | None = key(
        None,
        "Folder on a fast disk of each machine, for `offload: nvme`. What replicas that have ended leave there is "
        "deleted when the next one begins.",
        mathematics=False,
        min_length=1,
    )

    @model_validator(mode="after")
    def _files_have_a_place(self) -> Self:
        _require_place(self.offload, self.nvme_path)
        return self


class StreamedMemory(Section):
    """A replica is one process, which brings its weights to the device block by block while it computes."""

    kind: Literal["streamed"] = key(
        ..., "Weights that are on the device for the time of their block's forward.", mathematics=False
    )
    offload: Literal["cpu", "nvme"] = key(
        "cpu",
        "Where the weights lie: in the machine's memory, or in a file under `nvme_path`.",
        mathematics=False,
    )
    nvme_path: str | None = key(
        None,
        "Folder on a fast disk of each machine, for `offload: nvme`; the file is gone with the replica.",
        mathematics=False,
        min_length=1,
    )

    @model_validator(mode="after")
    def _files_have_a_place(self) -> Self:
        _require_place(self.offload, self.nvme_path)
        return self


def _require_place(offload: str, nvme_path: str | None) -> None:
    if (offload == "nvme") != (nvme_path is not None):
        raise fault(
            "memory.nvme_path",
            "Weights in files need a folder." if offload == "nvme" else "A folder is given, but no files.",
            "Give nvme_path together with offload: nvme.",
        )
    if nvme_path is not None and not nvme_path.startswith(("/", "~")):
        raise fault(
            "memory.nvme_path",
            f"{nvme_path!r} is a relative path, and the replicas' processes have folders of their own.",
            "Give a path that begins with / or ~.",
        )


MemoryConfig = Annotated[ResidentMemory | Zero3Memory | StreamedMemory, Field(discriminator="kind")]
