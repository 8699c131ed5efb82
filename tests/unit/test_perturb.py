"""Layer by layer: the perturbed forward against a layer whose weights were really perturbed."""

from __future__ import annotations

import json
import math
import pickle
import weakref
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from tests.unit.helpers import bits, really_perturbed
from zoray.perturb import Active, Engine, NotBatchable, Rows, Signs, find_rows, linear
from zoray.perturb.embedding import EmbeddingLayer
from zoray.perturb.linear import LinearLayer
from zoray.perturb.norm import NormLayer
from zoray.perturb.rows import Fixed, RowRule, mapped
from zoray.perturb.swap import SwappedModule
from zoray.replica import Replica
from zoray.selection import Rotation, Selection, SmallWeights

ROWS, EPSILON = 3, 0.05


class Subclass(nn.Embedding):
    """Takes positions, not indices, like OPT's learned positions."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.long().cumsum(1))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 20, (ROWS, *shape), generator=torch.Generator().manual_seed(1))


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, type]] = {
    "linear": (lambda: nn.Linear(8, 12), floats(5, 8), LinearLayer),
    "linear of rows": (lambda: nn.Linear(8, 12), floats(8), LinearLayer),
    "linear without bias": (lambda: nn.Linear(8, 12, bias=False), floats(5, 8), LinearLayer),
    "linear, bias alone": (lambda: frozen(nn.Linear(8, 12), "weight"), floats(5, 8), LinearLayer),
    "linear, weight alone": (lambda: frozen(nn.Linear(8, 12), "bias"), floats(5, 8), LinearLayer),
    "linear to one output": (lambda: nn.Linear(8, 1), floats(5, 8), SwappedModule),
    "conv1d of gpt2": (lambda: Conv1D(12, 8), floats(5, 8), LinearLayer),
    "embedding": (lambda: nn.Embedding(20, 8), tokens(5), EmbeddingLayer),
    "embedding of a padding token": (lambda: nn.Embedding(20, 8, padding_idx=3), tokens(5), EmbeddingLayer),
    "embedding of one token a row": (lambda: nn.Embedding(20, 8), tokens(), EmbeddingLayer),
    "embedding subclass": (lambda: Subclass(20, 8), torch.ones(ROWS, 5), SwappedModule),
    "layer norm": (lambda: nn.LayerNorm(8), floats(5, 8), NormLayer),
    "layer norm without bias": (lambda: nn.LayerNorm(8, bias=False), floats(5, 8), NormLayer),
    "layer norm, bias alone": (lambda: frozen(nn.LayerNorm(8), "weight"), floats(5, 8), NormLayer),
    "layer norm, weight alone": (lambda: frozen(nn.LayerNorm(8), "bias"), floats(5, 8), NormLayer),
    "layer norm over a matrix": (lambda: nn.LayerNorm((5, 8)), floats(5, 8), NormLayer),
    "rms norm": (lambda: nn.RMSNorm(8), floats(5, 8), NormLayer),
    "convolution": (lambda: nn.Conv1d(5, 4, 3), floats(5, 8), SwappedModule),
    "a module of its own": (Scale, floats(5, 8), SwappedModule),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        floats(5, 8),
        nn.Module,
    ),
}


def random(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def run(
    replica: Replica, x: torch.Tensor, signs: Signs, strays: frozenset[str] = frozenset(), found: Rows | None = None
) -> Any:
    rows = 2 * ROWS if signs is Signs.BOTH else ROWS
    active = Active(replica.directions, 4, 2, EPSILON, signs, rows)
    with torch.no_grad(), Engine(replica.model, replica.layout, strays, found).perturbed(active):
        return replica.model(torch.cat([x, x]) if signs is Signs.BOTH else x)


def rows_of(replica: Replica, x: torch.Tensor) -> Rows:
    with torch.no_grad():
        return find_rows(Engine(replica.model, replica.layout), lambda count: replica.model(x[:count]))


def perturbed_copies(replica: Replica, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [really_perturbed(replica.model, replica, 4, 2, s * EPSILON)(x) for s in (1, -1)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("selection", [None, SmallWeights(0.6)], ids=["all", "small"])
@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"direction": "rademacher"}, {"direction": "gaussian"}])
def test_a_layer_is_perturbed_as_if_its_weights_were(
    name: str, options: dict[str, Any], selection: SmallWeights | None
) -> None:
    make, x, kind = LAYERS[name]
    replica = Replica(random(make), run_seed=0, selection=selection, **options)
    assert bool(replica.directions.coverage.limits) == (selection is not None)
    if not options and not any(replica.model.children()):
        assert isinstance(Engine(replica.model, replica.layout).handlers[replica.model], kind)
    before = {key: (id(p), bits(p)) for key, p in replica.model.named_parameters()}
    expected = perturbed_copies(replica, x)
    # Attention reads its output projection behind that module's back; `prove` finds that out for a whole model.
    strays = frozenset(s.name for s in replica.layout.specs if "out_proj" in s.name)
    for output, signs in zip(expected, (Signs.PLUS, Signs.MINUS), strict=True):
        torch.testing.assert_close(run(replica, x, signs, strays), output, atol=2e-6, rtol=2e-5)
    if not strays:
        torch.testing.assert_close(run(replica, x, Signs.BOTH), torch.cat(expected), atol=2e-6, rtol=2e-5)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3
    for key, parameter in replica.model.named_parameters():
        assert id(parameter) == before[key][0] and torch.equal(bits(parameter), before[key][1])
    assert not any("forward" in module.__dict__ for module in replica.model.modules())


class Positions(nn.Module):
    """Looks positions up once and broadcasts them, with a batch of 1 or without one."""

    def __init__(self, unsqueeze: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(12, 8)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.unsqueeze = unsqueeze

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])
        rows = self.places(places[None] if self.unsqueeze else places)
        return self.tokens(ids) + self.mix(self.norm(rows))


@pytest.mark.parametrize("length", [1, 2, 5, 2 * ROWS, 7, 4 * ROWS])
@pytest.mark.parametrize("unsqueeze", [True, False])
@pytest.mark.parametrize("selection", [None, SmallWeights(0.5), Rotation(3, 1), Rotation(4, 3)])
def test_what_is_broadcast_gets_both_signs(unsqueeze: bool, length: int, selection: Selection | None) -> None:
    """Also where the number of positions is that of the rows, or a multiple of it."""
    replica = Replica(random(lambda: Positions(unsqueeze)), selection=selection)
    expected = torch.cat(perturbed_copies(replica, tokens(length)))
    found = rows_of(replica, tokens(5))
    assert {fixed.module: fixed.shape for fixed in found.fixed} == {
        "places": "1*" if unsqueeze else "*",
        "norm": "1**" if unsqueeze else "**",
        "mix": "1**" if unsqueeze else "**",
    }
    torch.testing.assert_close(run(replica, tokens(length), Signs.BOTH, found=found), expected, atol=2e-6, rtol=2e-5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("signs", [Signs.BOTH, Signs.PLUS])
@pytest.mark.parametrize("selection", [None, SmallWeights(0.7)])
def test_a_tied_weight_has_one_direction(signs: Signs, selection: Selection | None) -> None:
    replica = Replica(random(Tied), selection=selection)
    assert [spec.name for spec in replica.layout.specs] == ["embed.weight"]
    plus, minus = perturbed_copies(replica, tokens(5))
    expected = torch.cat([plus, minus]) if signs is Signs.BOTH else plus
    torch.testing.assert_close(run(replica, tokens(5), signs), expected, atol=2e-6, rtol=2e-5)


class Pair(NamedTuple):
    first: torch.Tensor
    rest: list[torch.Tensor]


class Structured(nn.Module):
    """Owns a parameter, takes a dictionary, and returns its output in the given structure."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.wrap = nn.Parameter(torch.randn(8)), wrap

    def forward(self, inputs: dict[str, torch.Tensor], shared: torch.Tensor) -> Any:
        return self.wrap(inputs["x"] * self.weight + shared)


class Mixing(nn.Module):
    """Owns a parameter and is given a table of all pairs of places, which has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor, table: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
        return {"x": table @ x * self.weight * scale, "rest": (None, x)}


class Pairs(nn.Module):
    """Calls `Mixing` with a table (T, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mixing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        table = torch.arange(float(length * length)).view(length, length).sin()
        out: torch.Tensor = self.inner(x, table, scale=torch.tensor(0.5))["x"]
        return out


def test_pieces_of_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some weights are moved, a matrix is perturbed a few output features at a time; each sees its own signs."""
    for make in (lambda: nn.Linear(8, 13), lambda: Conv1D(13, 8)):
        replica = Replica(random(make), selection=SmallWeights(0.5))
        x = floats(5, 8)
        expected = torch.cat(perturbed_copies(replica, x))
        for elements in (1, 8 * 5, 8 * 13):
            monkeypatch.setattr(linear, "_PIECE_ELEMENTS", elements)
            torch.testing.assert_close(run(replica, x, Signs.BOTH), expected, atol=2e-6, rtol=2e-5)


class Counts(nn.Module):
    """Owns a parameter and calls another module, once for each sign if it is swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner, self.after = nn.Parameter(torch.randn(8)), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.inner(x * self.weight))


def test_how_often_a_module_is_called_does_not_depend_on_the_step() -> None:
    replica = Replica(random(Counts), selection=Rotation(3, 1))
    calls: list[int] = []
    replica.model.inner.register_forward_hook(lambda *_: calls.append(1))
    for step in range(3):
        calls.clear()
        active = Active(replica.directions, step, 0, EPSILON, Signs.BOTH, 2 * ROWS)
        x = floats(8)
        with torch.no_grad():
            expected = [really_perturbed(replica.model, replica, step, 0, s * EPSILON)(x) for s in (1, -1)]
            calls.clear()
            with Engine(replica.model, replica.layout).perturbed(active):
                found = replica.model(torch.cat([x, x]))
        torch.testing.assert_close(found, torch.cat(expected), atol=2e-6, rtol=2e-5)
        assert len(calls) == 2


def test_what_a_step_does_not_move_is_left_alone() -> None:
    replica = Replica(random(lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))), selection=Rotation(2, 5))
    for step, moved in ((0, 0), (4, 0), (5, 1), (9, 1), (10, 0)):
        active = Active(replica.directions, step, 0, EPSILON, Signs.BOTH, 2 * ROWS)
        with Engine(replica.model, replica.layout).perturbed(active):
            assert ["forward" in module.__dict__ for module in replica.model] == [moved == 0, moved == 1]


@pytest.mark.parametrize("length", [1, 2, 5, 2 * ROWS, 4 * ROWS])
def test_the_generic_path_leaves_whole_what_has_no_rows(length: int) -> None:
    replica = Replica(random(Pairs))
    found = rows_of(replica, floats(5, 8))
    assert found.fixed == (Fixed("inner", "1", "**"),)
    x = floats(length, 8)
    expected = torch.cat(perturbed_copies(replica, x))
    torch.testing.assert_close(run(replica, x, Signs.BOTH, found=found), expected, atol=2e-5, rtol=2e-5)


class Table(nn.Module):
    """Returns a tensor made of its parameter alone, with a batch of 1 or without one."""

    def __init__(self, batch: bool) -> None:
        super().__init__()
        self.weight, self.batch = nn.Parameter(torch.randn(5, 8)), batch

    def forward(self) -> torch.Tensor:
        return self.weight[None] * 2 if self.batch else self.weight * 2


class Adds(nn.Module):
    def __init__(self, batch: bool) -> None:
        super().__init__()
        self.table = Table(batch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table()


def test_an_output_without_rows_gets_them_if_it_is_a_batch_of_one() -> None:
    x = floats(5, 8)
    replica = Replica(random(lambda: Adds(True)))
    found = rows_of(replica, x)
    assert found.fixed == (Fixed("table", "return", "1**"),)
    torch.testing.assert_close(run(replica, x, Signs.BOTH, found=found), torch.cat(perturbed_copies(replica, x)))
    replica = Replica(random(lambda: Adds(False)))
    with pytest.raises(NotBatchable, match=r"table returns a tensor without rows, of shape \(5, 8\)"):
        run(replica, x, Signs.BOTH, found=rows_of(replica, x))


class Calls(nn.Module):
    """Gives a linear layer whatever `make` makes of the rows."""

    def __init__(self, make: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
        super().__init__()
        self.inner, self.make = nn.Linear(8, 8), make

    def forward(self, x: torch.Tensor) -> None:
        for tensor in self.make(x):
            self.inner(tensor)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda x: [x], None),
        (lambda x: [x.flatten(0, 1), x.repeat_interleave(7, 0)], None),
        (lambda x: [x[:0]], None),
        (lambda x: [x[0]], "**"),
        (lambda x: [x[:1], x[1:2]], "1**"),
        (lambda x: [x[:1, 0]], "1*"),
        (lambda x: [x.transpose(0, 1)], "(5, 2, 8) for 2 of them and (5, 3, 8) for 3"),
        (lambda x: [torch.cat([x, x[:1]])], "(3, 5, 8) for 2 of them and (4, 5, 8) for 3"),
        (lambda x: [x[:, : len(x)]], "(2, 2, 8) for 2 of them and (3, 3, 8) for 3"),
        (lambda x: list(x), "2 calls for 2 rows and 3 for 3"),
        (lambda x: [x, x[0]], "in one of its calls and not in another"),
        (lambda x: [x, x[:1]], "in one of its calls and not in another"),
    ],
)
def test_what_is_found_of_a_tensor(make: Callable[[torch.Tensor], list[torch.Tensor]], found: str | None) -> None:
    replica = Replica(random(lambda: Calls(make)))
    if found is None or set(found) <= {"1", "*"}:
        expected = () if found is None else (Fixed("inner", "0", found),)
        assert rows_of(replica, floats(5, 8)) == Rows(expected)
        return
    with pytest.raises(NotBatchable) as fault:
        rows_of(replica, floats(5, 8))
    assert str(fault.value).startswith("inner regroups rows (") and found in str(fault.value)


def test_a_module_that_makes_rows_of_none_regroups_them() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, count: int) -> torch.Tensor:
            return self.weight.expand(count, 8)

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = Spread()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.prompt(len(x))[:, None]

    with pytest.raises(NotBatchable, match="prompt regroups rows"):
        rows_of(Replica(Prompted()), floats(5, 8))


def test_what_happens_within_a_swapped_module_does_not_count() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.inner, self.never = nn.Parameter(torch.randn(8)), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner((x * self.weight).transpose(0, 1)).transpose(0, 1)

    replica = Replica(random(Whole))
    found = rows_of(replica, floats(5, 8))
    assert found == Rows((), ("never",))
    x = floats(2 * ROWS, 8)
    expected = torch.cat(perturbed_copies(replica, x))
    torch.testing.assert_close(run(replica, x, Signs.BOTH, found=found), expected, atol=2e-6, rtol=2e-5)


def test_a_module_that_was_never_called_is_not_trusted() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.tower = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tower(self.first(x)) if x.shape[1] > 5 else self.first(x)

    replica = Replica(random(Sometimes))
    found = rows_of(replica, floats(5, 8))
    assert found == Rows((), ("tower",))
    run(replica, floats(5, 8), Signs.BOTH, found=found)
    run(replica, floats(6, 8), Signs.PLUS, found=found)
    with pytest.raises(NotBatchable, match=r"tower\.0 is called, and was not"):
        run(replica, floats(6, 8), Signs.BOTH, found=found)
    assert Rows(unseen=("",)).rule("any.module").seen is False
    assert Rows(unseen=("tower",)).rule("towers").seen is True


def test_finding_rows_keeps_no_tensor_and_puts_every_forward_back() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def make(x: torch.Tensor) -> list[torch.Tensor]:
        made = x + 1
        kept.append(weakref.ref(made))
        return [made]

    replica = Replica(random(lambda: Calls(make)))
    rows_of(replica, floats(5, 8))
    assert len(kept) == 2 and all(ref() is None for ref in kept)
    assert not any("forward" in module.__dict__ for module in replica.model.modules())


def test_rows_travel_and_are_written_down() -> None:
    found = Rows((Fixed("wpe", "0", "*"), Fixed("a.b", "return.x", "1**")), ("tower",))
    assert pickle.loads(pickle.dumps(found)) == found and hash(found) == hash(pickle.loads(pickle.dumps(found)))
    assert json.loads(json.dumps(asdict(found))) == {
        "fixed": [["wpe", "0", "*"], ["a.b", "return.x", "1**"]],
        "unseen": ["tower"],
    }


def test_one_rule_for_each_kind_of_tensor() -> None:
    rule = RowRule("m", {"single": "1**", "bare": "**", "scalar": ""})
    assert rule.led("other", torch.ones(12, 2), 6) and rule.led("other", torch.ones(0, 2), 6)
    assert not rule.led("single", torch.ones(1, 6, 2), 6) and rule.led("single", torch.ones(6, 6, 2), 6)
    assert not rule.led("bare", torch.ones(6, 2), 6) and rule.led("bare", torch.ones(6, 6, 2), 6)
    assert not rule.led("scalar", torch.ones(()), 6)
    assert rule.led("single", torch.ones(6, 1, 6, 2), 6)
    for place, shape in (("other", (5, 2)), ("other", ()), ("bare", (5, 6, 2)), ("bare", (6,))):
        with pytest.raises(NotBatchable, match="m is given a tensor"):
            rule.led(place, torch.ones(shape), 6)


def test_structures_must_be_alike() -> None:
    def add(place: str, *tensors: torch.Tensor) -> torch.Tensor:
        places.append(place)
        return torch.stack(tensors).sum(0)

    places: list[str] = []
    one = torch.ones(2)
    out = mapped(add, "return", {"a": (one, [one, 3, None])}, {"a": (one, [one, 3, None])})
    assert out["a"][0].tolist() == [2.0, 2.0] and out["a"][1][1:] == [3, None]
    assert places == ["return.a.0", "return.a.1.0"]
    for other in ({"a": one}, {"b": (one,)}, [one], None, {"a": (one, one)}):
        with pytest.raises(NotBatchable, match="the two signs differ"):
            mapped(add, "return", {"a": (one,)}, other)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda y: (y, None, 3), lambda out: out[0]),
        (lambda y: [y, y], lambda out: out[1]),
        (lambda y: {"y": y}, lambda out: out["y"]),
        (lambda y: Pair(y, [y]), lambda out: out.rest[0]),
        (lambda y: BaseModelOutput(last_hidden_state=y), lambda out: out.last_hidden_state),
    ],
)
def test_the_generic_path_splits_and_joins_structures(
    wrap: Callable[[torch.Tensor], Any], unwrap: Callable[[Any], torch.Tensor]
) -> None:
    replica = Replica(Structured(wrap))
    x, shared = floats(5, 8), torch.randn(1, 5, 8)
    active = Active(replica.directions, 4, 2, EPSILON, Signs.BOTH, 2 * ROWS)
    with torch.no_grad(), Engine(replica.model, replica.layout).perturbed(active):
        found = replica.model({"x": torch.cat([x, x])}, shared=shared)
    z = EPSILON * replica.directions.dense((4, 2), replica.layout.specs[0])
    weight = replica.model.get_parameter("weight").detach()
    assert type(found) is type(wrap(x))
    torch.testing.assert_close(unwrap(found), torch.cat([x * (weight + z) + shared, x * (weight - z) + shared]))


@pytest.mark.parametrize("name", ["linear", "embedding", "layer norm", "convolution"])
def test_rows_that_are_not_those_of_both_signs_are_refused(name: str) -> None:
    make, x, _ = LAYERS[name]
    replica = Replica(random(make))
    active = Active(replica.directions, 0, 0, EPSILON, Signs.BOTH, 2 * ROWS)
    with (
        torch.no_grad(),
        Engine(replica.model, replica.layout).perturbed(active),
        pytest.raises(NotBatchable, match="rows"),
    ):
        replica.model(torch.cat([x, x, x])[: 2 * ROWS + 1])


def test_what_a_module_had_for_forward_is_put_back() -> None:
    """Hooks of other libraries (accelerate) put a forward on the instance, and it must still run."""
    layer = nn.Linear(8, 8)
    calls: list[int] = []

    def hooked(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return nn.Linear.forward(layer, x)

    layer.forward = hooked  # type: ignore[method-assign]
    replica = Replica(layer)
    assert isinstance(Engine(layer, replica.layout).handlers[layer], SwappedModule)
    expected = perturbed_copies(Replica(nn.Linear(8, 8)), floats(5, 8))[0]
    assert run(replica, floats(5, 8), Signs.PLUS).shape == expected.shape
    assert calls and layer.__dict__["forward"] is hooked


def test_fused_attention_is_off_only_while_a_direction_is_on() -> None:
    replica = Replica(nn.Linear(8, 8))
    active = Active(replica.directions, 0, 0, EPSILON, Signs.PLUS, ROWS)
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), Engine(replica.model, replica.layout).perturbed(active):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ZeroDivisionError
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_of_ones_is_perturbed_in_float32(dtype: torch.dtype, kind: type[nn.Module]) -> None:
    """In half precision 1 + 2e-4 is 1: perturbing the stored vector would perturb nothing."""
    replica = Replica(kind(64).to(dtype))
    x = torch.randn(ROWS, 500, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    outputs = []
    with torch.no_grad():
        for signs in (Signs.PLUS, Signs.MINUS):
            active = Active(replica.directions, 0, 0, 2e-4, signs, ROWS)
            with Engine(replica.model, replica.layout).perturbed(active):
                outputs.append(replica.model(x))
    assert outputs[0].dtype == dtype
    (spec,) = (spec for spec in replica.layout.specs if spec.name == "weight")
    moved = (
        (outputs[0].double() - outputs[1].double())
        * active.noise(spec, replica.model.weight.float())
        * x.double().sign()
    ).mean()
    # Each output is rounded, but on average they move by 2 epsilon E|x|.
    assert float(moved) == pytest.approx(4e-4 * (2 / math.pi) ** 0.5, rel=0.2)


class ByKeyword(nn.Module):
    """Calls its layers by keyword, as some code on the hub does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.norm, self.layer = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 20)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(input=self.norm(input=self.table(input=input_ids)))


def test_layers_may_be_called_by_keyword() -> None:
    model = ByKeyword()
    replica = Replica(model)
    ids = tokens(6)
    batch = {"input_ids": ids, "labels": ids}
    found = replica.probe(0, 0, batch, EPSILON)
    assert replica.verdict is not None and replica.verdict.batched
    losses = [
        nn.functional.cross_entropy(
            really_perturbed(model, replica, 0, 0, shift)(ids).detach().double().flatten(0, 1), ids.flatten()
        )
        for shift in (EPSILON, -EPSILON)
    ]
    assert found.projected_gradient == pytest.approx(float(losses[0] - losses[1]) / (2 * EPSILON), rel=1e-4)
