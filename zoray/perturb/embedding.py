"""Embeddings: row W[token], corrected by +-eps a[token] b for the rank-1 direction z = a b^T of W."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from zoray.layout import ParamSpec
from zoray.perturb.context import Active, Signs
from zoray.perturb.rows import ALL_LED, RowRule


@dataclass(frozen=True, slots=True)
class EmbeddingLayer:
    """An `nn.Embedding` whose weight is trained."""

    module: nn.Module
    weight: ParamSpec
    rule: RowRule = ALL_LED

    def __call__(self, active: Active, tokens: torch.Tensor) -> torch.Tensor:
        """Perturbed rows, shape (..., dim) for tokens of shape (...).

        Position embeddings are often looked up once, with a batch of 1 or without one, and broadcast; with both signs
        in one forward they get the 2B rows of the input.
        """
        if active.signs is Signs.BOTH:
            tokens = self._with_rows(tokens, active.rows)
        weight = self.module._parameters["weight"]
        assert weight is not None
        rows = functional.embedding(tokens.reshape(-1), weight)
        left, right = active.factors(self.weight, rows)
        coefficients = left.t()[tokens.reshape(-1)].mul_(active.scale * active.weight(self.weight))
        if active.signs is Signs.BOTH:
            coefficients[len(rows) // 2 :].neg_()
        mask = active.mask(self.weight, rows)
        rows = rows.addmm_(coefficients, right) if mask is None else rows.add_((coefficients @ right).mul_(mask))
        return rows.view(*tokens.shape, weight.shape[1])

    def _with_rows(self, tokens: torch.Tensor, rows: int) -> torch.Tensor:
        if "0" not in self.rule.fixed and self.rule.led("0", tokens, rows):
            return tokens
        if tokens.dim() == 1:
            tokens = tokens.unsqueeze(0)
        if tokens.dim() < 2 or tokens.shape[0] != 1:
            raise self.rule.refusal("0", tokens, rows)
        return tokens.expand(rows, *tokens.shape[1:])
