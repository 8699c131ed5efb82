"""What probes minimise and evaluations measure: the loss, or any score of what the model puts out.

Zeroth-order estimates need values, not gradients, so accuracy, F1 of generated text (Malladi et al. 2023, section 3.3)
or any Python function will do. Each kind of task has one `Objective`, which turns the losses of a batch's rows into
those of its examples and knows what a score is computed from:

    task               outputs, one entry per example            batch
    rows (a head)      logits (rows, classes), as computed       `labels` (rows,) and the inputs
    causal LM          logits (rows, T, vocabulary)              `labels` (rows, T) and the inputs
    candidates         mean log-likelihoods per token, float64,  `labels`: the number of the right candidate
                       (examples, candidates); -inf: none
    generated text     list of texts                             `references`: a list of right answers for each

A score is a function `(outputs, batch) -> one number per example`, higher is better.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from zoray.errors import ConfigError, NumericsError
from zoray.loss import Batch, RowLosses

Losses = Callable[[], RowLosses]
"""The model's own losses of the batch's rows, computed when they are asked for."""

Function = Callable[[Any, Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Score:
    """A function by which outputs are measured.

    Attributes:
        name: in configurations.
        function: None stands for whether the best candidate, or class, is right.
        best: the largest value there is, from which the value is subtracted; 0 where there is none.
        source: digest (hex) of the file it is defined in; empty for those of Zoray's own.
    """

    name: str
    function: Function | None = None
    best: float = 1.0
    source: str = ""

    @property
    def identity(self) -> str:
        """What tells it from other functions, those of the same name included."""
        return f"{self.name} {self.source}".strip()

    def values(self, outputs: Any, batch: Mapping[str, Any], examples: int) -> torch.Tensor:
        """One number per example, float64, shape (examples,), on the CPU.

        Raises:
            ConfigError: the function fails, or does not return one number per example.
            NumericsError: a number is not finite.
        """
        assert self.function is not None
        try:
            found = torch.as_tensor(self.function(outputs, batch), dtype=torch.float64).cpu()
        except Exception as error:
            raise ConfigError(
                f"{self.name} fails: {type(error).__name__}: {error}",
                where="objective",
                advice="it is called with (outputs, batch); see docs/mezo.md for what they are",
            ) from error
        if found.shape != (examples,):
            raise ConfigError(
                f"{self.name} returns numbers of shape {tuple(found.shape)} for {examples} examples.",
                where="objective",
                advice="return one number per example, in their order",
            )
        if not bool(found.isfinite().all()):
            wrong = next(value for value in found.tolist() if not math.isfinite(value))
            raise NumericsError(f"{self.name} returns {wrong}.", where="objective", advice="return finite numbers")
        return found


ACCURACY = Score("accuracy")


class Objective:
    """The losses of the rows as they are, and a score of the model's outputs instead, if there is one.

    Args:
        score: what probes maximise in place of minimising the loss.

    Attributes:
        separate: the signs of a probe cannot be in one forward.
        whole: the logits are needed, all of them.
    """

    def __init__(self, score: Score | None = None) -> None:
        self.score = score

    @property
    def identity(self) -> str:
        """Part of the run's identity: replicas must minimise the same thing."""
        return "loss" if self.score is None else self.score.identity

    @property
    def separate(self) -> bool:
        """A function must not see the other sign's outputs beside those it measures."""
        return self.score is not None and self.score.function is not None

    @property
    def whole(self) -> bool:
        """Whether the logits have to be kept."""
        return self.score is not None and self.score.function is not None

    def probe(self, model: nn.Module, batch: Batch, losses: Losses) -> RowLosses:
        """What a probe minimises, at the weights that are in force.

        Args:
            model: for objectives that run it in a way of their own.
            batch: the probe's batch; with both signs in one forward, twice over.
            losses: runs the model and gives its own losses.
        """
        found = self.reduced(losses(), batch)
        return found if self.score is None else _minimised(self.score, found, self.values(found, batch))

    def evaluate(self, model: nn.Module, batch: Batch, losses: Losses) -> RowLosses:
        """The losses of an evaluation, with the scores of a function of the user's own."""
        found = self.reduced(losses(), batch)
        if self.score is None or self.score.function is None:
            return replace(found, outputs=None)
        return replace(found, scores=self.values(found, batch), outputs=None)

    def reduced(self, losses: RowLosses, batch: Batch) -> RowLosses:
        """The losses of examples, each in the first of its rows; the other rows have no targets."""
        return losses

    def values(self, found: RowLosses, batch: Batch) -> torch.Tensor:
        """The score of each example, float64, on the CPU."""
        assert self.score is not None
        first = found.counts > 0
        if self.score.function is None:
            assert found.correct is not None
            return found.correct[first].to("cpu", torch.float64)
        return self.score.values(found.outputs, self.shown(found, batch), int(first.sum()))

    def shown(self, found: RowLosses, batch: Batch) -> Mapping[str, Any]:
        """What a score function sees of the batch."""
        return batch


class Candidates(Objective):
    """Examples with candidates of which one or several are right.

    Either an example is one row, whose label is one of several `words` (rows, candidates), tokens that might stand in
    its place, number `right` (rows,); or it has a row for each candidate, numbered by `candidate`, and `correct` says
    which are right.

    Args:
        loss: `candidates`: cross entropy of the first right one among all, by mean log-likelihoods per token; `answer`:
            the loss of the first right one.
    """

    def __init__(self, loss: Literal["candidates", "answer"], score: Score | None = None) -> None:
        super().__init__(score)
        self.loss = loss

    @property
    def whole(self) -> bool:
        """The losses of the rows are enough."""
        return False

    def reduced(self, losses: RowLosses, batch: Batch) -> RowLosses:
        """As of `Objective.reduced`; `outputs` are the candidates' mean log-likelihoods."""
        if "words" in batch:
            return self._of_words(losses, batch["right"])
        first = batch["candidate"] == 0
        place = first.cumsum(0) - 1, batch["candidate"]
        shape = int(first.sum()), int(batch["candidate"].max()) + 1
        likelihood = torch.full(shape, -torch.inf, dtype=torch.float64, device=first.device)
        likelihood[place] = -losses.sums / losses.counts
        right = torch.zeros(shape, dtype=torch.bool, device=first.device)
        right[place] = batch["correct"] != 0
        target = right.int().argmax(1)
        correct = right.gather(1, likelihood.argmax(1, keepdim=True)).squeeze(1)
        if self.loss == "candidates":
            cost = likelihood.logsumexp(1) - likelihood.gather(1, target[:, None]).squeeze(1)
            counts = torch.ones_like(target)
        else:
            row = first.nonzero().squeeze(1) + target
            cost, counts = losses.sums[row], losses.counts[row]
        return RowLosses(
            torch.zeros_like(losses.sums).masked_scatter(first, cost),
            torch.zeros_like(losses.counts).masked_scatter(first, counts),
            torch.zeros_like(first).masked_scatter(first, correct),
            outputs=likelihood,
        )

    def _of_words(self, losses: RowLosses, right: torch.Tensor) -> RowLosses:
        likelihood = losses.outputs
        assert likelihood is not None
        correct = likelihood.argmax(1) == right
        if self.loss == "answer":
            return replace(losses, correct=correct)
        cost = likelihood.logsumexp(1) - likelihood.gather(1, right[:, None]).squeeze(1)
        return RowLosses(cost, torch.ones_like(right), correct, outputs=likelihood)

    def shown(self, found: RowLosses, batch: Batch) -> Mapping[str, Any]:
        """The number of the right candidate of each example."""
        if "words" in batch:
            return {"labels": batch["right"]}
        first = batch["candidate"] == 0
        group = first.cumsum(0) - 1
        chosen = batch["correct"] != 0
        labels = torch.full((int(first.sum()),), int(batch["candidate"].max()), device=first.device)
        return {"labels": labels.scatter_reduce(0, group[chosen], batch["candidate"][chosen], "amin")}


class Text(Objective):
    """Text that the model writes after `prompt_ids`, compared with `references`.

    Args:
        write: runs the model and returns a text for each row.
        measure: by which evaluations are measured where no score is given: F1.
        same: whether a text is exactly right, as evaluations count them.
        score: what probes maximise.
    """

    def __init__(
        self,
        write: Callable[[nn.Module, Batch], list[str]],
        measure: Score,
        same: Callable[[str, list[str]], bool],
        score: Score | None = None,
    ) -> None:
        super().__init__(score)
        self.write, self.measure, self.same = write, measure, same

    @property
    def separate(self) -> bool:
        """Generated text has as many forwards as it takes, at each sign by itself."""
        return self.score is not None

    @property
    def whole(self) -> bool:
        """Logits are looked at while text is generated."""
        return False

    def probe(self, model: nn.Module, batch: Batch, losses: Losses) -> RowLosses:
        """As of `Objective.probe`; the losses are not computed where a score takes their place."""
        if self.score is None:
            return losses()
        texts = self.write(model, batch)
        values = self._scored(self.score, texts, batch)
        device = batch["labels"].device
        return RowLosses(
            (self.score.best - values).to(device), torch.ones(len(values), dtype=torch.int64, device=device)
        )

    def evaluate(self, model: nn.Module, batch: Batch, losses: Losses) -> RowLosses:
        """The losses of the right answers, the score of the generated ones, and which of those are exactly right."""
        found, texts = losses(), self.write(model, batch)
        same = [self.same(text, known) for text, known in zip(texts, references(batch), strict=True)]
        score = self.measure if self.score is None or self.score.function is None else self.score
        return replace(found, correct=torch.tensor(same), scores=self._scored(score, texts, batch))

    def _scored(self, score: Score, texts: list[str], batch: Batch) -> torch.Tensor:
        known = references(batch)
        if score.function is None:
            return torch.tensor([float(self.same(*each)) for each in zip(texts, known, strict=True)]).double()
        return score.values(texts, {"references": known}, len(texts))


def references(batch: Batch) -> list[list[str]]:
    """The right answers of each row, of their JSON in UTF-8, a byte per element, with zeros behind."""
    return [json.loads(bytes(row[row != 0].tolist())) for row in batch["references"].cpu()]


def load_function(name: str) -> Score:
    """The score that `package.module:function` names.

    Raises:
        ConfigError: it cannot be imported here, or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        found = import_module(module)
        function = getattr(found, attribute)
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be imported: {type(error).__name__}: {error}",
            where="objective",
            advice="every machine needs the module: put its folder in PYTHONPATH, or submit with --working-dir",
        ) from error
    if not callable(function):
        raise ConfigError(f"{name} is {type(function).__name__}, not a function.", where="objective")
    try:
        # It may be defined elsewhere, and only be imported where it is named.
        homes = {found, inspect.getmodule(function) or found}
        source = "".join(sorted(inspect.getsource(home) for home in homes))
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"{name} has no source, by which replicas could tell that theirs is the same: {error}.",
            where="objective",
            advice="define it in a .py file",
        ) from error
    return Score(name, function, 0.0, hashlib.sha256(source.encode()).hexdigest()[:16])


def _minimised(score: Score, found: RowLosses, values: torch.Tensor) -> RowLosses:
    first = found.counts > 0
    cost = (score.best - values).to(found.sums.device)
    return RowLosses(torch.zeros_like(found.sums).masked_scatter(first, cost), first.to(torch.int64))
