"""What the fast paths promise, proved at start on the run's own first batch.

Some things cannot be read off a model's code: whether its own loss compares the logits at t with the label at t or at
t+1, whether a parameter is used behind the back of the module that owns it, whether the model touches the logits after
its head, which tensors have the rows of the batch, and whether every module keeps them apart and in order. Each is
tried against the slow path (two separate forwards, logits in one piece), and a path that fails is not used. The verdict
says why; it is a function of the model, the layout and the batch alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from zoray.directions import Directions
from zoray.errors import ModelError
from zoray.loss import ASIDE, Batch, LossFunction, ModelLoss, RowLosses, doubled, resized, with_specs
from zoray.perturb.context import Active, NotBatchable, Signs
from zoray.perturb.engine import Engine, replaced_forward
from zoray.perturb.linear import LinearLayer
from zoray.perturb.record import find_rows
from zoray.perturb.rows import Rows
from zoray.perturb.swap import SwappedModule
from zoray.strays import find_strays

SignsChoice = Literal["auto", "batched", "sequential"]
HeadChoice = Literal["auto", "chunked", "full"]

_PROOF_EPSILON = 1e-2
_NO_HEAD = "the loss is not that of a language-model head"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The paths a replica uses.

    Attributes:
        batched: both signs in one forward of 2B rows.
        chunked: the head and its loss in slices of the vocabulary.
        shifted: the model's own loss compares the logits at t with the label at t+1.
        strays: parameters used outside of the module that owns them.
        reasons: why a faster path is not used, for the user; empty if all are.
        rows: which tensors have no rows of the batch, for both signs in one forward.
    """

    batched: bool
    chunked: bool
    shifted: bool = False
    strays: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    rows: Rows = field(default_factory=Rows)


def prove(
    model: nn.Module,
    directions: Directions,
    batch: Batch,
    rows: int,
    *,
    signs: SignsChoice = "auto",
    head: HeadChoice = "auto",
    epsilon: float = 1e-3,
    loss: LossFunction | None = None,
) -> Verdict:
    """Find the fastest paths that give the right answer for this model.

    Args:
        batch: the run's first batch, of `rows` rows, with `labels`.
        signs, head: what the configuration asks for; "auto" takes the faster path where it is right.
        loss: a custom loss, whose head is always computed in one piece; by default the model's own.

    Raises:
        ModelError: a path that was asked for by name is not right for this model, or a module keeps references of its
            own to its parameters, so that it cannot be perturbed.
    """
    with torch.no_grad():
        # Whatever any step moves is tried, at once.
        return _prove(model, directions.all_groups(), batch, rows, signs, head, epsilon, loss)


def _prove(
    model: nn.Module,
    directions: Directions,
    batch: Batch,
    rows: int,
    signs: SignsChoice,
    head: HeadChoice,
    epsilon: float,
    loss: LossFunction | None,
) -> Verdict:
    shifted = loss is None and is_shifted(model, batch)
    strays = find_strays(model, directions, batch, rows, epsilon, loss)
    reasons = [f"used outside of the module that owns it: {name}" for name in strays]
    engine = Engine(model, directions.layout, frozenset(strays))
    trial = _Trial(model, directions, batch, rows, engine, shifted, loss)
    chunked, why = (False, None) if head == "full" else trial.head_is_right()
    if why:
        reasons.append(f"the head and its loss are computed in one piece: {why}")
    if head == "chunked" and not chunked:
        raise ModelError(f"`head: chunked` is not right here: {why or _NO_HEAD}.", advice="use `head: auto`")
    found, why = (None, None) if signs == "sequential" else trial.batching(chunked, bool(strays))
    if why:
        reasons.append(f"two forwards per probe: {why}")
    if signs == "batched" and found is None:
        raise ModelError(f"`signs: batched` is not right for this model: {why}.", advice="use `signs: auto`")
    return Verdict(found is not None, chunked, shifted, tuple(strays), tuple(reasons), found or Rows())


class _Trial:
    """Perturbed forwards of the first batch, on one path or another."""

    def __init__(
        self,
        model: nn.Module,
        directions: Directions,
        batch: Batch,
        rows: int,
        engine: Engine,
        shifted: bool,
        custom: LossFunction | None,
    ) -> None:
        self.model, self.directions, self.batch, self.rows, self.engine = model, directions, batch, rows, engine
        self.custom = custom
        self.full = ModelLoss(model, shifted=shifted)
        self.sliced = ModelLoss(model, chunked=True, shifted=shifted)

    def run(self, loss: ModelLoss, signs: Signs, count: int | None = None) -> RowLosses:
        """Row losses of the direction (0, 0) at the proof's own epsilon, for `count` rows of the batch (or all)."""
        batch, rows = (self.batch, self.rows) if count is None else (resized(self.batch, self.rows, count), count)
        if signs is Signs.BOTH:
            batch, rows = doubled(batch, rows), 2 * rows
        active = Active(self.directions, 0, 0, _PROOF_EPSILON, signs, rows)
        with self.engine.perturbed(active):
            if self.custom is not None:
                return self.custom(self.model, batch)
            return loss(batch, active, head_layer(loss, self.engine))

    def head_is_right(self) -> tuple[bool, str | None]:
        """Whether the head may be taken out of the model and computed in slices."""
        if self.custom is not None:
            return False, None
        module = self.sliced.output_embedding
        if self.batch["labels"].dim() != 2:
            return False, None
        if module is None:
            return False, f"{type(self.model).__name__} names no output embedding (`get_output_embeddings`)"
        if self.sliced.head is None or isinstance(self.engine.handlers.get(module), SwappedModule):
            return False, "its output embedding is not a plain linear layer"
        if self.engine.strays & {
            s.name for p, s in self.engine.specs.items() if any(p is q for q in module.parameters())
        }:
            return False, "its output embedding is used in more than one way"
        if not self._returns_head_output(module):
            return False, "the model changes the logits after its head"
        whole = self.run(self.full, Signs.PLUS)
        try:
            parts = self.run(self.sliced, Signs.PLUS)
        except Exception as fault:
            return False, f"the model refuses to give the head's input for its output ({_said(fault)})"
        error = float((whole.sums - parts.sums).abs().max())
        scale = float(whole.sums.abs().max())
        precision = torch.finfo(next(module.parameters()).dtype).eps
        if not error <= max(1e-4, 4 * precision) * scale:
            return False, f"the losses differ by {error:.2g} of {scale:.3g}"
        return True, None

    def _returns_head_output(self, module: nn.Module) -> bool:
        seen: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            return hidden

        try:
            with replaced_forward(module, keep):
                returned = self.full.logits(self.batch)
        except (RuntimeError, ValueError, IndexError):
            return False
        return len(seen) == 1 and returned.shape == seen[0].shape and torch.equal(returned, seen[0])

    def batching(self, chunked: bool, astray: bool) -> tuple[Rows | None, str | None]:
        """Which tensors have rows, if one forward of 2B of them gives the losses of two forwards of B; else why not."""
        if astray:
            return None, "a parameter is used outside of the module that owns it"
        loss = self.sliced if chunked else self.full
        try:
            found = find_rows(self.engine, self._plain)
            self.engine = Engine(self.model, self.directions.layout, rows=found)
            both = self.run(loss, Signs.BOTH)
            if found.fixed:
                # Tensors without rows are given them. If those met another dimension further on, that would not be
                # noticed where it has as many elements; it cannot have for two numbers of rows.
                self.run(loss, Signs.BOTH, 2 if self.rows == 3 else 3)
        except NotBatchable as fault:
            return None, str(fault)
        except Exception as fault:
            return None, f"the model refuses another number of rows ({_said(fault)})"
        why = self._signs_are_wrong(loss, both)
        return (None, why) if why else (found, None)

    def _plain(self, count: int) -> object:
        """The unperturbed model on some of the batch's rows."""
        batch = resized(self.batch, self.rows, count)
        return self.full.logits(batch) if self.custom is None else self.custom(self.model, batch)

    def _signs_are_wrong(self, loss: ModelLoss, both: RowLosses) -> str | None:
        """How the losses of both signs in one forward differ from those of two, if they do."""
        plus, minus = self.run(loss, Signs.PLUS), self.run(loss, Signs.MINUS)
        expected = torch.cat([plus.sums, minus.sums])
        if both.sums.shape != expected.shape:
            return "the rows of the batch do not come out in order"
        error = float((both.sums - expected).abs().max())
        effect = float((plus.sums - minus.sums).abs().max())
        if not error <= _tolerance(self.model) * effect:
            return f"the signs come out wrong (error {error:.2g}, effect of the perturbation {effect:.2g})"
        return None


def _tolerance(model: nn.Module) -> float:
    """Error of one forward of both signs, relative to the perturbation's effect, that rounding may explain."""
    return 0.05 if any(parameter.element_size() < 4 for parameter in model.parameters()) else 0.01


def _said(fault: Exception) -> str:
    return (str(fault).splitlines() or [type(fault).__name__])[0]


def is_shifted(model: nn.Module, batch: Batch) -> bool:
    """Whether the model's own loss on this batch is that of the labels shifted by one.

    Raises:
        ModelError: the model reports a loss that is the cross entropy of its logits neither way.
    """
    if batch["labels"].dim() != 2:
        return False
    if not ModelLoss(model).accepted & {"labels", "kwargs"}:
        return False
    inputs = {name: tensor for name, tensor in batch.items() if name == "labels" or name not in ASIDE}
    output = model(**inputs)
    if isinstance(output, torch.Tensor) or getattr(output, "loss", None) is None:
        return False
    own = float(output.loss)
    candidates = {shifted: ModelLoss(model, shifted=shifted)(batch).mean() for shifted in (True, False)}
    best = min(candidates, key=lambda shifted: abs(candidates[shifted] - own))
    if not abs(candidates[best] - own) <= 0.05 * abs(own) and math.isfinite(own):
        raise ModelError(
            f"{type(model).__name__} reports a loss of {own:.4f}, but the cross entropy of its logits is "
            f"{candidates[True]:.4f} with labels shifted by one and {candidates[False]:.4f} without.",
            advice="give zoray.Replica a `loss` of your own",
        )
    return best


def head_layer(loss: ModelLoss, engine: Engine) -> LinearLayer | None:
    """The loss's head as the engine perturbs it."""
    return None if loss.head is None else with_specs(loss.head, engine.handlers.get(loss.head.module))
