"""Losses, one number per row, added up in float64.

A float32 mean loss near 10 has a resolution of 1e-6, which at epsilon = 1e-3 makes the projected gradient a multiple of
5e-4; so tokens are evaluated in float32 and everything from there on is float64.

The language-model head and its cross entropy over a large vocabulary are computed in slices of the vocabulary that stay
in cache, where the model returns the head's output untouched (`proof` checks it); no tensor of (tokens x vocabulary)
ever exists then.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zoray.errors import DataError, ModelError
from zoray.optim.shaping import total
from zoray.partitioned import kept_whole
from zoray.perturb.context import Active
from zoray.perturb.engine import replaced_forward
from zoray.perturb.linear import LinearLayer

Batch = Mapping[str, torch.Tensor]
IGNORED = -100
ASIDE = frozenset(("labels", "words", "right", "candidate", "correct", "prompt_ids", "prompt_mask", "references"))
"""What a batch has beside the inputs of the model: targets, and what objectives need (see `zoray.objective`)."""
_SLICE_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Losses of a batch, shape (rows,) each.

    Attributes:
        sums: sum over the row's targets, float64.
        counts: number of targets, int64.
        correct: whether the most likely class is the right one, for a classification.
        scores: what the rows are measured by beside the loss (float64), higher is better, if by anything.
        outputs: what the losses were computed from, where an objective needs it: the logits, or the log-likelihoods of
            the batch's `words`.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    correct: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    def mean(self, rows: slice = slice(None)) -> float:
        """Mean over all targets of some rows; NaN where there is none."""
        return float(self.sums[rows].sum() / self.counts[rows].sum())

    def contrast(self, rows: slice = slice(None)) -> float | None:
        """How far apart the means of two halves of some rows are, in units in which it is as noisy as `mean`.

        With targets of variance v around the mean of all data, the mean over n has the variance v / n, and so has
        (m_1 - m_2) sqrt(n_1 n_2) / n, whose expectation is 0: it tells the noise of the mean, and nothing else.

        Returns:
            None where fewer than two rows have a target.
        """
        # A device is waited for twice, and not for every number.
        sums: list[float] = self.sums[rows].tolist()
        counts: list[int] = self.counts[rows].tolist()
        there = [row for row, count in enumerate(counts) if count]
        if len(there) < 2:
            return None
        cut = there[len(there) // 2]
        first, last = total(sums[:cut]), total(sums[cut:])
        some, others = sum(counts[:cut]), sum(counts[cut:])
        return (first / some - last / others) * math.sqrt(some * others) / (some + others)

    def summary(self) -> tuple[float, float, int, int, float]:
        """Over the rows that have a target: sum of the mean losses and of their squares, rows, correct ones, scores."""
        losses = (self.sums / self.counts)[self.counts > 0]
        correct = 0 if self.correct is None else int(self.correct.sum())
        score = 0.0 if self.scores is None else float(self.scores.sum())
        return float(losses.sum()), float(losses.square().sum()), len(losses), correct, score


LossFunction = Callable[[nn.Module, Batch], RowLosses]
"""A custom loss: it may call the model as it likes, and must keep one entry per row of the batch, in order."""


class ModelLoss:
    """The loss of a Hugging Face model with `labels` in the batch.

    Token targets (labels (B, T)) and class targets (labels (B,)) are told apart by the shapes.

    Args:
        model: a model whose output is its logits, or has them as `.logits`.
        chunked: compute the head in slices.
        shifted: compare the logits at t with the label at t+1, as causal models do.
        kept: return the logits too, as `RowLosses.outputs`.
    """

    def __init__(self, model: nn.Module, chunked: bool = False, shifted: bool = False, kept: bool = False) -> None:
        self.model, self.chunked, self.shifted, self.kept = model, chunked, shifted, kept

    @cached_property
    def accepted(self) -> frozenset[str]:
        """Names of the arguments the model's forward takes."""
        return frozenset(inspect.signature(_innermost(self.model).forward).parameters)

    @cached_property
    def output_embedding(self) -> nn.Module | None:
        """The module the model names as its output embedding, of whatever kind."""
        getter = getattr(self.model, "get_output_embeddings", None)
        module = getter() if getter is not None else None
        return module if isinstance(module, nn.Module) else None

    @cached_property
    def head(self) -> LinearLayer | None:
        """The output embedding, if it is a plain linear layer."""
        module = self.output_embedding
        if module is None or type(module).forward is not nn.Linear.forward:
            return None
        return LinearLayer(module, False, None, None)

    def __call__(self, batch: Batch, active: Active | None = None, layer: LinearLayer | None = None) -> RowLosses:
        """Losses of each row.

        Args:
            batch: inputs of the model and `labels`; with `words` (rows, candidates), each row has one label, and the
                log-likelihoods of those tokens in its place are returned too.
            active: the direction in force; the chunked head applies it itself.
            layer: the head with the specs of its trainable parameters, as the engine has it.
        """
        labels = batch["labels"]
        if not self.chunked or labels.dim() != 2 or self.head is None:
            logits = self.logits(batch)
            losses = self.from_logits(logits, labels)
            if "words" in batch:
                return replace(losses, outputs=self._of_words(logits, labels, batch["words"]))
            return replace(losses, outputs=logits) if self.kept else losses
        head = self.head if layer is None else layer
        with kept_whole(head.module.parameters(recurse=False)) as keep:

            def passing(hidden: torch.Tensor) -> torch.Tensor:
                keep()
                return hidden

            with replaced_forward(head.module, passing):
                hidden = self.logits(batch)
            return self._chunked(hidden, labels, batch.get("words"), active, head)

    def logits(self, batch: Batch) -> torch.Tensor:
        """The model's logits: (rows, classes) or (rows, T, vocabulary)."""
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k not in ASIDE}
        if "use_cache" in self.accepted:
            inputs["use_cache"] = False
        shift: Any = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = shift(labels=batch["labels"])
        output = self.model(**inputs)
        logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise ModelError(
                f"{type(self.model).__name__} returns no logits.",
                advice="use a model class with a head, or give zoray.Replica a `loss` of your own",
            )
        return logits

    def from_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> RowLosses:
        """Cross entropy of each row from logits, float32 per target."""
        if labels.dim() == 1:
            if logits.shape[-1] == 1:
                losses = (logits.float().squeeze(-1) - labels.float()).square()
                return RowLosses(losses.double(), torch.ones(len(losses), dtype=torch.int64, device=losses.device))
            losses = functional.cross_entropy(logits.float(), labels, reduction="none")
            return RowLosses(losses.double(), torch.ones_like(labels), logits.argmax(-1) == labels)
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        return _by_row(losses.view(labels.shape).double(), labels)

    def _of_words(self, logits: torch.Tensor, labels: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        chosen = labels != IGNORED
        some = chosen.any(1)
        found = logits[chosen].float().log_softmax(-1).gather(1, words[some])
        return torch.zeros(words.shape, dtype=torch.float64, device=words.device).index_put((some,), found.double())

    def _chunked(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        words: torch.Tensor | None,
        active: Active | None,
        head: LinearLayer,
    ) -> RowLosses:
        if self.shifted:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        chosen = labels != IGNORED
        weight = head.module._parameters["weight"]
        assert weight is not None
        # A model that widens the logits after its head widens the hidden states here; the head was given them narrow.
        flat, targets = hidden[chosen].to(weight.dtype), labels[chosen][:, None]
        some = chosen.any(1)
        if words is not None:
            targets = torch.cat([targets, words[some]], 1)
        found = _sliced_cross_entropy(flat, targets, active, head)
        losses = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        losses[chosen] = found[:, 0]
        if words is None:
            return _by_row(losses, labels)
        likelihoods = torch.zeros(words.shape, dtype=torch.float64, device=words.device)
        likelihoods[some] = -found[:, 1:]
        return replace(_by_row(losses, labels), outputs=likelihoods)


def _sliced_cross_entropy(
    flat: torch.Tensor, targets: torch.Tensor, active: Active | None, head: LinearLayer
) -> torch.Tensor:
    """Cross entropy (float64) of each of `flat`'s rows with each of its targets, shape (rows, targets).

    The logits are made a slice of the vocabulary at a time.
    """
    weight, bias = head.module._parameters["weight"], head.module._parameters.get("bias")
    assert weight is not None
    coefficients = head.project(active, flat) if active is not None else None
    width = max(256, _SLICE_ELEMENTS // max(len(flat), 1))
    target = flat.new_zeros(targets.shape, dtype=torch.float32)
    parts = []
    for start in range(0, len(weight), width):
        outputs = slice(start, min(start + width, len(weight)))
        if active is not None:
            logits = head.product(active, flat, coefficients, outputs)
        else:
            logits = functional.linear(flat, weight[outputs], None if bias is None else bias[outputs])
        exact = logits.float()
        parts.append(exact.logsumexp(-1))
        inside = (targets >= start) & (targets < outputs.stop)
        local = (targets - start).clamp(0, outputs.stop - start - 1)
        target = torch.where(inside, exact.gather(1, local), target)
    return torch.stack(parts).double().logsumexp(0)[:, None] - target.double()


def _by_row(losses: torch.Tensor, labels: torch.Tensor) -> RowLosses:
    return RowLosses(losses.sum(-1), (labels != IGNORED).sum(-1))


def _innermost(model: nn.Module) -> nn.Module:
    base = getattr(model, "get_base_model", None)
    return base() if base is not None else model


def doubled(batch: Batch, rows: int) -> dict[str, torch.Tensor]:
    """The batch twice over, plus rows first; tensors without the leading batch dimension stay as they are.

    Raises:
        DataError: no tensor has `rows` rows.
    """
    if not any(v.dim() and v.shape[0] == rows for v in batch.values()):
        raise DataError(f"No tensor of the batch has {rows} rows.", advice="put `labels` of shape (rows, ...) in it")
    return {k: torch.cat([v, v]) if v.dim() and v.shape[0] == rows else v for k, v in batch.items()}


def resized(batch: Batch, rows: int, count: int) -> dict[str, torch.Tensor]:
    """The batch's first `count` rows; if it has fewer, its rows again, each moved on by a place so that they differ."""

    def row(tensor: torch.Tensor, index: int) -> torch.Tensor:
        chosen = tensor[index % rows]
        return chosen.roll(index // rows, 0) if chosen.dim() else chosen

    return {
        k: torch.stack([row(v, i) for i in range(count)]) if v.dim() and v.shape[0] == rows else v
        for k, v in batch.items()
    }


def with_specs(head: LinearLayer, handler: object) -> LinearLayer:
    """The head as the engine perturbs it, or unperturbed if the engine has no linear handler for it."""
    return handler if isinstance(handler, LinearLayer) else replace(head, weight=None, bias=None)
