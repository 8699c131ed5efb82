"""What an estimator is, and how it keeps what the next probe of the same batch would compute again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, Literal, TypeVar

import torch

from zoray.aggregate import ProbeResult
from zoray.loss import Batch
from zoray.probe import Prober

EstimatorName = Literal["spsa", "one_sided", "forward_gradient", "backprop"]
"""The names of the estimators."""

_T = TypeVar("_T")


class Estimator(ABC):
    """Finds the slope of the loss along a direction, a pure function of the weights and the probe's address.

    Args:
        prober: runs forwards of the model.

    Attributes:
        differentiates: whether it takes derivatives of the loss, which needs all of the weights in their places.
    """

    differentiates: ClassVar[bool] = False

    def __init__(self, prober: Prober) -> None:
        self.prober = prober

    @abstractmethod
    def probe(self, step: int, direction: int, batch: Batch, epsilon: float, microbatch: int = 0) -> ProbeResult:
        """The probe at (step, direction, microbatch); its scalars are rounded to float32, as they travel."""

    def forget(self) -> None:
        """The weights are not those any more that what is kept was computed with, if anything is."""
        return


class Kept(Generic[_T]):
    """What was computed of a batch last: several directions may be probed on the same one.

    Batches are compared, not their addresses: whoever calls may have one for each direction.
    """

    def __init__(self) -> None:
        self._batch: dict[str, torch.Tensor] | None = None
        self._value: _T | None = None

    def of(self, batch: Batch, compute: Callable[[], _T]) -> _T:
        """What `compute` returns, which must depend on the batch alone."""
        if self._batch is None or self._value is None or not _same(self._batch, batch):
            # Before the next is computed: there may not be room for two.
            self.forget()
            self._value = compute()
            self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        return self._value

    def forget(self) -> None:
        """Compute again next time."""
        self._batch = self._value = None


def _same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and tensor.device == other[name].device and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )
