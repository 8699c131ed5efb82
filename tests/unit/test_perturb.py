"""Layer by layer: the perturbed forward against a layer whose weights were really perturbed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from tests.unit.helpers import bits, really_perturbed
from zoray.perturb import Active, Engine, NotBatchable, Signs
from zoray.perturb.embedding import EmbeddingLayer
from zoray.perturb.linear import LinearLayer
from zoray.perturb.norm import NormLayer
from zoray.perturb.swap import SwappedModule
from zoray.replica import Replica

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


def run(replica: Replica, x: torch.Tensor, signs: Signs, strays: frozenset[str] = frozenset()) -> Any:
    rows = 2 * ROWS if signs is Signs.BOTH else ROWS
    active = Active(replica.directions, 4, 2, EPSILON, signs, rows)
    with torch.no_grad(), Engine(replica.model, replica.layout, strays).perturbed(active):
        return replica.model(torch.cat([x, x]) if signs is Signs.BOTH else x)


def perturbed_copies(replica: Replica, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [really_perturbed(replica.model, replica, 4, 2, s * EPSILON)(x) for s in (1, -1)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"direction": "rademacher"}, {"direction": "gaussian"}])
def test_a_layer_is_perturbed_as_if_its_weights_were(name: str, options: dict[str, Any]) -> None:
    make, x, kind = LAYERS[name]
    replica = Replica(random(make), run_seed=0, **options)
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
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(9, 8)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.unsqueeze = unsqueeze

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])
        rows = self.places(places[None] if self.unsqueeze else places)
        return self.tokens(ids) + self.mix(self.norm(rows))


@pytest.mark.parametrize("unsqueeze", [True, False])
def test_what_is_broadcast_gets_both_signs(unsqueeze: bool) -> None:
    replica = Replica(random(lambda: Positions(unsqueeze)))
    expected = torch.cat(perturbed_copies(replica, tokens(5)))
    torch.testing.assert_close(run(replica, tokens(5), Signs.BOTH), expected, atol=2e-6, rtol=2e-5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("signs", [Signs.BOTH, Signs.PLUS])
def test_a_tied_weight_has_one_direction(signs: Signs) -> None:
    replica = Replica(random(Tied))
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
    moved = ((outputs[0].double() - outputs[1].double()) * active.noise(spec) * x.double().sign()).mean()
    # Each output is rounded, but on average they move by 2 epsilon E|x|.
    assert float(moved) == pytest.approx(4e-4 * (2 / math.pi) ** 0.5, rel=0.2)
