from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tests.unit.helpers import really_perturbed
from zoray import loss as module
from zoray.errors import DataError, ModelError
from zoray.loss import IGNORED, ModelLoss, RowLosses, doubled, resized
from zoray.replica import Replica

VOCABULARY = 700


class WithHead(nn.Module):
    """Embeddings and a head with a bias, over more words than a slice of the head holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed(input_ids))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(0, VOCABULARY, 11)[:60].view(4, 15)
    labels = ids.flip(1).clone()
    labels[0, :9] = labels[2, 3] = IGNORED
    return {"input_ids": ids, "labels": labels}


def exact(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).sum(1)


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 256 words, the fewest there are: the last one holds 188."""
    monkeypatch.setattr(module, "_SLICE_ELEMENTS", 1)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("shifted", [True, False])
def test_a_head_in_slices_gives_the_losses_of_the_whole(shifted: bool) -> None:
    model, data = WithHead(), batch()
    with torch.no_grad():
        found = ModelLoss(model, chunked=True, shifted=shifted)(data)
        logits, labels = model(data["input_ids"]), data["labels"]
    expected = exact(logits[:, :-1], labels[:, 1:]) if shifted else exact(logits, labels)
    torch.testing.assert_close(found.sums, expected, atol=1e-5, rtol=1e-6)
    counts = (labels[:, 1:] if shifted else labels).ne(IGNORED).sum(1)
    assert found.sums.dtype == torch.float64 and torch.equal(found.counts, counts)
    assert found.mean() == pytest.approx(float(expected.sum() / counts.sum()))
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("signs", ["batched", "sequential"])
@pytest.mark.parametrize("frozen", [None, "lm_head.weight", "lm_head.bias"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_perturbed_head_in_slices(signs: Any, frozen: str | None, rank: int) -> None:
    model, data = WithHead(), batch()
    if frozen is not None:
        model.get_parameter(frozen).requires_grad_(False)
    replica = Replica(model, signs=signs, head="chunked", rank=rank)
    assert replica.prove(data).chunked and replica._prober is not None
    found = replica._prober.losses(1, 2, data, 0.05)
    for loss, sign in zip(found, (1, -1), strict=True):
        with torch.no_grad():
            logits = really_perturbed(model, replica, 1, 2, sign * 0.05)(data["input_ids"])
        expected = exact(logits, data["labels"]).sum() / data["labels"].ne(IGNORED).sum()
        assert loss.loss == pytest.approx(float(expected), abs=2e-6)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_batch_without_a_target_has_no_mean(chunked: bool) -> None:
    data = batch() | {"labels": torch.full((4, 15), IGNORED)}
    with torch.no_grad():
        losses = ModelLoss(WithHead(), chunked=chunked)(data)
    assert losses.counts.tolist() == [0] * 4 and math.isnan(losses.mean())
    assert losses.summary() == (0.0, 0.0, 0, 0, 0.0)


def test_classes_and_values_by_row() -> None:
    model = nn.Identity()
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    losses = ModelLoss(model).from_logits(logits, torch.tensor([0, 2]))
    expected = functional.cross_entropy(logits.double(), torch.tensor([0, 2]), reduction="none")
    torch.testing.assert_close(losses.sums, expected, atol=1e-6, rtol=1e-6)
    assert losses.correct is not None and losses.correct.tolist() == [True, False]
    assert losses.summary()[2:] == (2, 1, 0.0)
    regression = ModelLoss(model).from_logits(torch.tensor([[2.0], [-1.0]]), torch.tensor([0.5, 1.0]))
    assert regression.sums.tolist() == [2.25, 4.0] and regression.mean() == 3.125


def test_rows_weigh_as_many_targets_as_they_have() -> None:
    losses = RowLosses(torch.tensor([6.0, 1.0, 5.0], dtype=torch.float64), torch.tensor([3, 1, 0]))
    assert losses.mean(slice(0, 2)) == 7 / 4
    assert losses.mean(slice(1, 2)) == 1.0
    assert losses.summary() == (3.0, 5.0, 2, 0, 0.0)


def test_the_batch_twice_over() -> None:
    data = {"ids": torch.arange(6).view(3, 2), "labels": torch.tensor([1, 2, 3]), "shared": torch.ones(1, 4)}
    twice = doubled(data, 3)
    assert twice["ids"].tolist() == [[0, 1], [2, 3], [4, 5]] * 2 and twice["labels"].tolist() == [1, 2, 3] * 2
    assert twice["shared"].shape == (1, 4)
    with pytest.raises(DataError, match="5 rows"):
        doubled(data, 5)


def test_some_rows_of_the_batch() -> None:
    data = {"ids": torch.arange(6).view(2, 3), "labels": torch.tensor([7, 8]), "shared": torch.ones(1, 4)}
    few = resized(data, 2, 1)
    assert few["ids"].tolist() == [[0, 1, 2]] and few["labels"].tolist() == [7] and few["shared"].shape == (1, 4)
    more = resized(data, 2, 5)
    assert more["ids"].tolist() == [[0, 1, 2], [3, 4, 5], [2, 0, 1], [5, 3, 4], [1, 2, 0]]
    assert more["labels"].tolist() == [7, 8, 7, 8, 7]


def test_a_head_in_slices_takes_what_the_model_widened() -> None:
    class Widening(WithHead):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids).float()

    model, data = Widening().to(torch.bfloat16), batch()
    with torch.no_grad():
        found, whole = (ModelLoss(model, chunked=chunked)(data) for chunked in (True, False))
    torch.testing.assert_close(found.sums, whole.sums, atol=1e-3, rtol=1e-5)


def test_a_model_without_logits_is_refused() -> None:
    model = hf.GPT2Model(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ModelError, match="GPT2Model returns no logits"):
        ModelLoss(model)({"input_ids": torch.zeros(2, 3, dtype=torch.int64), "labels": torch.tensor([0, 1])})


rows_of_targets = st.lists(st.lists(st.floats(0, 20), max_size=5), max_size=9)


@given(rows_of_targets)
def test_a_contrast_is_as_noisy_as_the_mean_whatever_rows_have(rows: list[list[float]]) -> None:
    """Its weights of the targets add up to 0, and their squares to as much as those of the mean's."""
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    losses = RowLosses(torch.tensor([math.fsum(row) for row in rows], dtype=torch.float64), counts)
    there = [row for row in rows if row]
    if len(there) < 2:
        assert losses.contrast() is None
        return
    first, second = ([x for row in half for x in row] for half in (there[: len(there) // 2], there[len(there) // 2 :]))
    n, m = len(first), len(second)
    weight = math.sqrt(n * m) / (n + m)
    weights = [weight / n] * n + [-weight / m] * m
    assert math.fsum(weights) == pytest.approx(0, abs=1e-12)
    assert math.fsum(w * w for w in weights) == pytest.approx(1 / (n + m))
    expected = math.fsum(w * x for w, x in zip(weights, first + second, strict=True))
    assert losses.contrast() == pytest.approx(expected, abs=1e-9)
