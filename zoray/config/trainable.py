"""The section `trainable`: which weights are trained, and which of them when."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Tag, field_validator

from zoray.config.sections import Section, fault, key

BIAS_AND_NORM = "bias_and_norm"
"""`trainable: bias_and_norm`."""


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021), made by `peft`; the names are those of `peft.LoraConfig`."""

    r: int = key(8, "Rank of the adapters.", mathematics=True, ge=1)
    lora_alpha: int = key(8, "Scale of the adapters: they are multiplied by `lora_alpha / r`.", mathematics=True, ge=1)
    target_modules: str | list[str] | None = key(
        None,
        "Modules that get an adapter: a list of name endings, a regular expression, or `all-linear`. Without it, what "
        "`peft` takes for this architecture.",
        mathematics=True,
        min_length=1,
    )
    bias: Literal["none", "all", "lora_only"] = key("none", "Which biases are trained beside them.", mathematics=True)
    init_lora_weights: Literal["default", "activations"] = key(
        "default",
        "What A begins as: `peft`'s random numbers, or inputs of the module itself (`activations`), one for each of "
        "`r` texts of random tokens. A is then frozen and only B trained, which takes fewer forwards (see "
        "docs/learning.md). Not for sharded replicas.",
        mathematics=True,
    )


class PrefixConfig(Section):
    """Prefix tuning (Li and Liang 2021), by `peft`: keys and values of tokens that are not there, before each text.

    They begin as those of real tokens, drawn from `seed` (Malladi et al. 2023, MeZO). Their values are near 1, so
    MeZO perturbs them by more than it does weights: `epsilon: 0.1`. Not for sharded replicas.
    """

    num_virtual_tokens: int = key(
        5, "Tokens before each text; they count as positions of the model, beside `task.max_length`.", mathematics=True,
        ge=1,
    )  # fmt: skip


class SparseConfig(Section):
    """Small weights only (Liu et al. 2024, Sparse-MeZO): those up to a limit, which is fixed for each parameter.

    Which weights are below it is looked up at each step, before the update. All weights decay. A parameter whose limit
    would be 0, or the magnitude of its largest weight, is trained whole.
    """

    sparsity: float = key(
        0.75, "Share of a parameter's weights that are above its limit in the base model.", mathematics=True, gt=0, lt=1
    )
    parameters: str = key(
        "full",
        "Which parameters, in the same words as `trainable` itself: `full`, `bias_and_norm` or a regular expression.",
        mathematics=True,
    )

    @field_validator("parameters")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return checked(value, "trainable.sparse.parameters")


class BlocksConfig(Section):
    """Blocks of consecutive layers that take turns (Zhang et al. 2024, ZO-Bench): the others are not moved meanwhile.

    Layers stay whole, in the order of the model, embeddings first; the largest block is as small as can be. All weights
    decay at every step.
    """

    count: int = key(..., "Number of blocks.", mathematics=True, ge=2)
    steps: int = key(1, "Steps that a block is trained for, until it is the next one's turn.", mathematics=True, ge=1)
    parameters: str = key(
        "full",
        "Which parameters, in the same words as `trainable` itself: `full`, `bias_and_norm` or a regular expression.",
        mathematics=True,
    )

    @field_validator("parameters")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return checked(value, "trainable.blocks.parameters")


class TrainableLora(Section):
    """`trainable: {lora: {...}}`."""

    lora: LoraConfig = key(..., "Low-rank adapters; a new classification head is trained with them.", mathematics=True)


class TrainablePrefix(Section):
    """`trainable: {prefix: {...}}`."""

    prefix: PrefixConfig = key(..., "Prefixes; a new classification head is trained with them.", mathematics=True)


class TrainableSparse(Section):
    """`trainable: {sparse: {...}}`."""

    sparse: SparseConfig = key(..., "Small weights only.", mathematics=True)


class TrainableBlocks(Section):
    """`trainable: {blocks: {...}}`."""

    blocks: BlocksConfig = key(..., "Blocks of layers in turn.", mathematics=True)


TRAINABLE_KINDS: dict[str, type[BaseModel]] = {
    "lora": TrainableLora,
    "prefix": TrainablePrefix,
    "sparse": TrainableSparse,
    "blocks": TrainableBlocks,
}
"""The mappings that `trainable` may be, by their one key."""

TRAINABLE_TAGS = ("a name", "a lora", "a prefix", "a sparse", "a blocks")
"""What pydantic puts into the place of an error."""


def trainable_kind(value: Any) -> str:
    """The key that says which mapping is meant; if none does, the one that is spelt most like it, or the first."""
    if isinstance(value, BaseModel):
        return next(name for name, kind in TRAINABLE_KINDS.items() if isinstance(value, kind))
    keys = [str(each) for each in value] if isinstance(value, dict) else []
    known = [name for name in TRAINABLE_KINDS if name in keys]
    close = [name for key in keys for name in difflib.get_close_matches(key, TRAINABLE_KINDS, n=1)]
    return [*known, *close, *TRAINABLE_KINDS][0]


def _tag(value: Any) -> str:
    return f"a {trainable_kind(value)}" if isinstance(value, dict | BaseModel) else "a name"


def checked(value: str, where: str) -> str:
    """The words for a set of parameters, if they are some: `full`, `bias_and_norm` or a regular expression."""
    if value.strip() == "" or value in TRAINABLE_KINDS:
        raise fault(where, f"{value!r} does not say what to train.", _ADVICE)
    try:
        re.compile(value)
    except re.error as error:
        raise fault(where, f"{value!r} is not a regular expression: {error}.", _ADVICE) from error
    return value


_ADVICE = (
    "Use full, bias_and_norm, a pattern over the names of the parameters, or a mapping: {lora: {r: 8}}, "
    "{prefix: {num_virtual_tokens: 5}}, {sparse: {sparsity: 0.75}} or {blocks: {count: 4}}."
)

Trainable = Annotated[
    Annotated[str, Tag("a name")]
    | Annotated[TrainableLora, Tag("a lora")]
    | Annotated[TrainablePrefix, Tag("a prefix")]
    | Annotated[TrainableSparse, Tag("a sparse")]
    | Annotated[TrainableBlocks, Tag("a blocks")],
    Discriminator(_tag),
]
