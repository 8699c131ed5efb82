"""The orders in which a model calls its modules: processes that gather weights for each other must keep to the same.

An all-gather joins whatever parameters the processes have come to. If one of them calls another module than the rest
(an expert that only its own rows go to), weights of one are taken for the other's, and nothing would tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zoray.errors import ModelError


class Paths:
    """Remembers the orders that the first forwards take, and refuses any other before a parameter is gathered for it.

    Args:
        model: of its modules those count that own parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._learning = model, False
        self._names = {module: name for name, module in model.named_modules()}
        # A tree: from each module to those that may come next.
        self._known: dict[nn.Module, Any] = {}
        self._here = self._known

    @contextmanager
    def forwards(self, first: bool) -> Iterator[None]:
        """For forwards of the model, from the beginning of one; the orders of the `first` ones are remembered."""
        self._learning, self._here = first, self._known
        try:
            yield
        finally:
            self._learning = False

    def enter(self, module: nn.Module) -> None:
        """A module is about to be called.

        Raises:
            ModelError: it was never called at this place in the first forwards.
        """
        if module is self._model:
            self._here = self._known
        elif next(module.parameters(recurse=False), None) is None:
            return
        if module not in self._here:
            if not self._learning:
                raise ModelError(
                    f"Module {self._names.get(module, '?')!r} is called at a place where the first batch did not call "
                    "it. The processes of a sharded replica must call the same modules in the same order, whatever "
                    "their data.",
                    where="memory",
                    advice="use resident or streamed replicas for a model that chooses modules by its data",
                )
            self._here[module] = {}
        self._here = self._here[module]
