from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.unit.helpers import really_perturbed
from zoray.errors import ModelError
from zoray.loss import ModelLoss, RowLosses
from zoray.perturb.rows import Fixed, Rows
from zoray.replica import Replica

ROWS, WIDTH, CLASSES = 4, 16, 5
WRONG = "signs come out wrong|rows"


class Plain(nn.Module):
    """Embeds, lets `core` do something, classifies the mean."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.core, self.head = nn.Embedding(20, WIDTH), core, nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(self.embed(input_ids)).mean(1))


class Attention(nn.Module):
    """`nn.MultiheadAttention` uses its output projection's weight without calling that module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(0, 1)).relu().transpose(0, 1)


class Regrouping(nn.Module):
    """Sends every other row to another expert: the rows an expert sees are not plus rows and then minus rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        order = torch.arange(len(x)).flip(0)
        for i, expert in enumerate(self.experts):
            rows = order[order % 2 == i]
            out[rows] = expert(x[rows]).tanh()
        return out


class Scaled(nn.Linear):
    """A linear layer that is not `nn.Linear`: it must take the generic path."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


class Private(nn.Module):
    """Keeps a reference of its own to its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self._own = [self.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._own[0]


class Functional(nn.Module):
    """Reads an embedding's weight as its head, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table.weight


class Borrowed(nn.Module):
    """Uses, under cover of a list, a weight that belongs to a module it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self._weights = [self.layer.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._weights[0]


class Encoder(nn.Module):
    """Its layers have a fused kernel that reads all their weights and calls none of their modules."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def batch(length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 20, (ROWS, length), generator=generator)
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 3])}


def agrees(model: nn.Module, replica: Replica, data: dict[str, torch.Tensor]) -> None:
    assert replica._prober is not None
    found = replica._prober.losses(2, 1, data, 1e-2)
    expected = []
    for sign in (1, -1):
        loss = ModelLoss(really_perturbed(model, replica, 2, 1, sign * 1e-2))
        with torch.no_grad():
            expected.append(loss(data).mean())
    assert [each.loss for each in found] == pytest.approx(expected, abs=2e-6)


class Positions(nn.Module):
    """nanoGPT's: looked up by (T,) indices without a batch; small, so that wrong signs hardly show in the loss."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.places, self.factor = nn.Embedding(40, WIDTH), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh() * (1 + self.factor * self.places(torch.arange(x.shape[1])))


class Relative(nn.Module):
    """Mixes the places of a sequence by a bias that is looked up by (T, T) indices."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.bias, self.factor = nn.Embedding(40, 4), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        bias = self.bias((places[:, None] - places[None]).abs())[..., 0]
        return x + self.factor * (bias.softmax(-1) @ x)


class Crossed(nn.Module):
    """Broadcasts a small table (1, T, n) along rows and heads, of which there are as many as rows of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(len(x), x.shape[1], 2 * ROWS, 2).transpose(1, 2)
        heads = heads * (1 + 1e-3 * self.table(torch.arange(x.shape[1])[None]))
        return heads.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("core", [nn.Identity(), nn.Linear(WIDTH, WIDTH), Scaled(WIDTH, WIDTH), nn.LayerNorm(WIDTH)])
def test_batched_where_it_is_right(core: nn.Module) -> None:
    model = Plain(core)
    replica = Replica(model)
    assert replica.prove(batch()).batched
    agrees(model, replica, batch())


@pytest.mark.parametrize(
    ("core", "reason"),
    [(SequenceFirst(), WRONG), (Regrouping(), WRONG), (Attention(), "outside of the module")],
)
@pytest.mark.parametrize("length", [6, 2 * ROWS])
def test_two_forwards_where_it_is_not(core: nn.Module, reason: str, length: int) -> None:
    model = Plain(core)
    replica = Replica(model)
    verdict = replica.prove(batch(length))
    assert not verdict.batched
    assert any(re.search(reason, text) for text in verdict.reasons), verdict.reasons
    agrees(model, replica, batch(length))
    with pytest.raises(ModelError, match="batched"):
        Replica(model, signs="batched").prove(batch(length))


@pytest.mark.parametrize("factor", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("length", [3, ROWS, 7, 2 * ROWS, 11, 4 * ROWS])
def test_as_many_positions_as_rows_are_not_taken_for_rows(length: int, factor: float) -> None:
    model = Plain(Positions(factor))
    replica = Replica(model)
    verdict = replica.prove(batch(length))
    assert verdict.batched and verdict.rows == Rows((Fixed("core.places", "0", "*"),)), verdict.reasons
    for other in (5, 2 * ROWS, 4 * ROWS):
        agrees(model, replica, batch(other))


@pytest.mark.parametrize("factor", [1.0, 1e-3])
@pytest.mark.parametrize("length", [3, ROWS, 2 * ROWS, 4 * ROWS])
def test_a_table_without_rows_takes_two_forwards_whatever_its_size(length: int, factor: float) -> None:
    model = Plain(Relative(factor))
    replica = Replica(model)
    verdict = replica.prove(batch(length))
    assert not verdict.batched
    assert f"core.bias is given a tensor without rows, of shape ({length}, {length})" in verdict.reasons[-1]
    agrees(model, replica, batch(2 * ROWS))


@pytest.mark.parametrize("length", [5, 2 * ROWS])
def test_rows_given_to_a_table_must_not_meet_another_dimension(length: int) -> None:
    """In the trial they meet as many heads, unnoticed; not so with another number of rows."""
    model = Plain(Crossed())
    replica = Replica(model)
    verdict = replica.prove(batch(length))
    assert not verdict.batched and "the model refuses another number of rows" in verdict.reasons[-1]
    agrees(model, replica, batch(length))


@pytest.mark.parametrize("rows", [1, 2])
def test_regrouping_is_seen_in_few_rows(rows: int) -> None:
    """Rows that the batch lacks are made up, unlike those it has."""

    class ByContent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat, kinds = x.flatten(0, 1), x.flatten(0, 1)[:, :3].argmax(-1)
            out = torch.empty_like(flat)
            for i, expert in enumerate(self.experts):
                # The place counts too: a row that is moved on goes to other experts.
                chosen = (kinds + torch.arange(x.shape[1]).repeat(len(x))) % 3 == i
                out[chosen] = expert(flat[chosen])
            return out.view(x.shape)

    data = {name: tensor[:rows] for name, tensor in batch(9).items()}
    verdict = Replica(Plain(ByContent())).prove(data)
    assert not verdict.batched and "regroups rows" in verdict.reasons[-1], verdict


@pytest.mark.parametrize(("dtype", "batched"), [(torch.float32, False), (torch.bfloat16, True)])
def test_float32_may_be_off_by_less_than_half_precision(dtype: torch.dtype, batched: bool) -> None:
    """A loss that is wrong by 2 % of the effect: rounding explains it in half precision only."""

    def slanted(model: nn.Module, data: Any) -> RowLosses:
        losses = own_loss(model, data).sums
        if len(losses) == 2 * ROWS:
            plus, minus = losses.chunk(2)
            losses = torch.cat([plus + 0.02 * (plus - minus), minus])
        return RowLosses(losses, torch.ones_like(data["labels"]))

    verdict = Replica(Plain(nn.Identity()).to(dtype), loss=slanted).prove(batch())
    assert verdict.batched == batched, verdict.reasons


def test_a_loss_that_takes_an_even_number_of_rows_takes_two_forwards() -> None:
    def paired(model: nn.Module, data: Any) -> RowLosses:
        assert len(data["labels"]) % 2 == 0, "rows come in pairs"
        return own_loss(model, data)

    model = Plain(nn.Identity())
    replica = Replica(model, loss=paired)
    verdict = replica.prove(batch())
    assert verdict.reasons == ("two forwards per probe: the model refuses another number of rows (rows come in pairs)",)
    agrees(model, replica, batch())


def test_a_parameter_used_behind_its_modules_back_is_named() -> None:
    verdict = Replica(Plain(Attention())).prove(batch())
    assert "core.attention.out_proj.weight" in verdict.strays
    assert "core.attention.in_proj_weight" not in verdict.strays


@pytest.mark.parametrize("core", [Private(), Borrowed()])
def test_a_private_reference_is_refused(core: nn.Module) -> None:
    model = Plain(core)
    with pytest.raises(ModelError, match="reference of its own"):
        Replica(model).prove(batch())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("weight" not in name or "core" not in name)
    Replica(model).prove(batch())


@pytest.mark.parametrize("core", [Functional(), Encoder()])
def test_parameters_used_behind_their_modules_back_are_still_perturbed(core: nn.Module) -> None:
    model = Plain(core)
    for outside in (model.embed, model.head):
        outside.requires_grad_(False)
    replica = Replica(model)
    assert replica.prove(batch()).strays
    agrees(model, replica, batch())
    assert replica.probe(0, 0, batch(), 1e-2).projected_gradient != 0.0


def own_loss(model: nn.Module, data: Any) -> RowLosses:
    losses = functional.cross_entropy(model(data["input_ids"]), data["labels"], reduction="none")
    return RowLosses(losses.double(), torch.ones_like(data["labels"]))


@pytest.mark.parametrize(
    ("core", "batched"),
    [(nn.Linear(WIDTH, WIDTH), True), (Regrouping(), False), (Attention(), False), (Encoder(), False)],
)
def test_a_custom_loss_is_proved_as_well(core: nn.Module, batched: bool) -> None:
    model = Plain(core)
    replica = Replica(model, loss=own_loss)
    assert replica.prove(batch()).batched == batched
    agrees(model, replica, batch())
    if not batched:
        with pytest.raises(ModelError, match="batched"):
            Replica(model, signs="batched", loss=own_loss).prove(batch())
    with pytest.raises(ModelError, match=r"chunked.*not that of a language-model head"):
        Replica(model, head="chunked", loss=own_loss).prove(batch())


def test_a_custom_loss_that_mixes_rows_takes_two_forwards() -> None:
    def contrastive(model: nn.Module, data: Any) -> RowLosses:
        return RowLosses((own_loss(model, data).sums.sum().sqrt() * data["labels"]).double(), data["labels"] + 1)

    verdict = Replica(Plain(nn.Identity()), loss=contrastive).prove(batch())
    assert not verdict.batched and "signs come out wrong" in verdict.reasons[-1]


def test_a_custom_loss_may_read_parameters_itself() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(5))

    model = Bare()
    target = torch.arange(5.0)

    def bowl(net: Any, data: Any) -> RowLosses:
        loss = (net.w - target).double().square().sum()
        return RowLosses(loss.expand(len(data["labels"])), torch.ones_like(data["labels"]))

    replica = Replica(model, loss=bowl)
    z = replica.directions.dense((0, 3), replica.layout.specs[0])
    found = replica.probe(0, 3, {"labels": torch.zeros(1, dtype=torch.int64)}, 1e-3).projected_gradient
    assert found == pytest.approx(float(-2 * (target * z).sum()), abs=1e-3)
    assert replica.verdict is not None and replica.verdict.strays == ("w",)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids))


def test_a_language_model_without_a_loss_of_its_own() -> None:
    """Its forward takes no labels: they are compared with the logits at the same place."""
    ids = batch()["input_ids"]
    model, data = Words(), {"input_ids": ids, "labels": ids.roll(-1, 1)}
    replica = Replica(model)
    verdict = replica.prove(data)
    assert verdict.batched and not verdict.shifted
    assert verdict.reasons == (
        "the head and its loss are computed in one piece: Words names no output embedding (`get_output_embeddings`)",
    )
    agrees(model, replica, data)


@pytest.mark.parametrize(
    ("attribute", "reason"), [("embed", "its output embedding is not a plain linear layer"), ("missing", "names no")]
)
def test_a_head_that_cannot_be_sliced_is_told_from_none(attribute: str, reason: str) -> None:
    class Naming(Words):
        def get_output_embeddings(self) -> nn.Module | None:
            return getattr(self, attribute, None)

    ids = batch()["input_ids"]
    verdict = Replica(Naming()).prove({"input_ids": ids, "labels": ids})
    assert not verdict.chunked and reason in verdict.reasons[0]


def test_a_model_that_needs_logits_of_its_vocabulary_keeps_its_head() -> None:
    """It gives back the head's output untouched, but what it does besides fails on anything else."""

    class Looking(Words):
        calls = 0

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits = self.head(self.embed(input_ids))
            Looking.calls += logits.shape[-1] == WIDTH
            if logits.shape[-1] == WIDTH and Looking.calls > 1:
                raise KeyError("vocabulary")
            return logits

    ids = batch()["input_ids"]
    model, data = Looking(), {"input_ids": ids, "labels": ids.roll(-1, 1)}
    replica = Replica(model)
    verdict = replica.prove(data)
    assert (
        not verdict.chunked and "refuses to give the head's input for its output ('vocabulary')" in verdict.reasons[0]
    )
    agrees(model, replica, data)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def test_a_recurrent_layer_is_right_or_refused() -> None:
    model = Plain(Recurrent())
    replica = Replica(model)
    try:
        replica.prove(batch())
    except ModelError as error:
        assert "reference of its own" in str(error)
        return
    agrees(model, replica, batch())


def test_the_verdict_is_a_function_of_the_model_and_the_batch() -> None:
    verdicts: list[Any] = [Replica(Plain(Regrouping()), run_seed=s).prove(batch()) for s in (0, 0)]
    assert verdicts[0].batched == verdicts[1].batched and verdicts[0].strays == verdicts[1].strays


def test_weights_and_forwards_are_as_before_when_a_forward_raises() -> None:
    class Fragile(nn.Module):
        broken = False

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.broken:
                raise RuntimeError("in the middle of a forward")
            return x * self.weight

    model = Plain(Fragile())
    replica = Replica(model)
    replica.prove(batch())
    before, identities = replica.digest(), [id(p) for p in model.parameters()]
    Fragile.broken = True
    with pytest.raises(RuntimeError, match="in the middle"):
        replica.probe(0, 0, batch(), 1e-3)
    assert replica.digest() == before
    assert [id(p) for p in model.parameters()] == identities
    assert not any("forward" in module.__dict__ for module in model.modules())
