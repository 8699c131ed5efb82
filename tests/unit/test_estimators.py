"""One contract for all estimators: the slope of the loss along a direction, and a pure function of weights and address.

What they are held against is the gradient of plain torch, projected on the direction made dense.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tests.unit.helpers import commit_of
from tests.unit.test_architectures import MODELS, batch_for, bert, gpt2, load
from tests.unit.test_proof import WIDTH, Attention, Functional, Plain, Scaled
from tests.unit.test_proof import batch as small_batch
from zoray.aggregate import ProbeResult, commit
from zoray.commits import float32
from zoray.config.estimator import DIFFERENTIATING
from zoray.config.estimator import EstimatorName as ConfigName
from zoray.errors import ConfigError, ModelError
from zoray.estimators import ESTIMATORS, Estimator, EstimatorName
from zoray.estimators.base import Kept
from zoray.loss import RowLosses
from zoray.memory.streamed import Streamed
from zoray.probe import Prober
from zoray.replica import Replica
from zoray.selection import Rotation, SmallWeights

NAMES: tuple[EstimatorName, ...] = get_args(EstimatorName)
EXACT: tuple[EstimatorName, ...] = ("forward_gradient", "backprop")
KINDS = [("rank", 1), ("rank", 3), ("inputs", 1), ("inputs", 3), ("rademacher", 1), ("gaussian", 1)]

NO_FORWARD_RULE = ("mixtral", "gpt-oss", "bloom")
"""Their grouped products, and a function of their own, have no rule for forward-mode differentiation."""


def moved(make: Callable[[], Any]) -> Any:
    """A random model whose norms and biases are moved off 1 and 0."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def slope(
    model: Any, replica: Replica, address: tuple[int, int], batch: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """<grad L, z> in float64, and the mean loss, from torch and dense directions alone."""
    named = dict(model.named_parameters())
    loss = model(**batch).loss
    wanted = [named[spec.name] for spec in replica.layout.specs]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    coverage, total = replica.directions.coverage, 0.0
    for spec, gradient in zip(replica.layout.specs, gradients, strict=True):
        if gradient is not None and coverage.touches(coverage.group(spec), address[0]):
            z = replica.directions.dense(address, spec).double()
            mask = coverage.mask(spec, named[spec.name].detach())
            total += float((gradient.double() * (z if mask is None else z * mask)).sum())
    return total, float(loss.detach())


def made(model: Any, name: EstimatorName, **options: Any) -> Replica:
    return Replica(model, 5, estimator=name, **options)


def test_the_configuration_has_the_same_names() -> None:
    assert NAMES == get_args(ConfigName) == tuple(ESTIMATORS)
    assert tuple(name for name, kind in ESTIMATORS.items() if kind.differentiates) == DIFFERENTIATING == EXACT


@pytest.mark.parametrize(("kind", "rank"), KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_estimate_is_the_slope_along_the_direction(name: EstimatorName, kind: str, rank: int) -> None:
    """Exactly, or as far as a difference over epsilon has it: small enough for curvature, large enough for rounding."""
    model = moved(gpt2)
    batch = batch_for(model)
    replica = made(model, name, direction=kind, rank=rank)
    before = replica.digest()
    tolerance = {"spsa": 5e-3, "one_sided": 5e-2}.get(name, 1e-5)
    found = [replica.probe(3, k, batch, 3e-4, 1) for k in range(3)]
    for k, each in enumerate(found):
        expected, loss = slope(model, replica, (3, k), batch)
        assert (each.step, each.direction, each.microbatch) == (3, k, 1)
        assert each.projected_gradient == pytest.approx(expected, abs=tolerance, rel=tolerance)
        assert each.loss == pytest.approx(loss, abs=1e-4 if name == "spsa" else 2e-6)
        assert (float32(each.projected_gradient), float32(each.loss)) == (each.projected_gradient, each.loss)
    assert max(abs(each.projected_gradient) for each in found) > 5 * tolerance, "or nothing is shown"
    assert replica.digest() == before and not any("forward" in m.__dict__ for m in model.modules())
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)


@pytest.mark.parametrize(("kind", "rank"), KINDS)
@pytest.mark.parametrize("selection", [SmallWeights(0.75), Rotation(3, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_only_what_a_direction_moves_counts(
    name: EstimatorName, selection: SmallWeights | Rotation, kind: str, rank: int
) -> None:
    model = moved(gpt2)
    batch = batch_for(model)
    replica = made(model, name, direction=kind, rank=rank, selection=selection)
    tolerance = {"spsa": 5e-3, "one_sided": 5e-2}.get(name, 1e-5)
    expected = [slope(model, replica, (step, 1), batch)[0] for step in range(3)]
    found = [replica.probe(step, 1, batch, 3e-4).projected_gradient for step in range(3)]
    assert found == pytest.approx(expected, abs=tolerance, rel=tolerance)
    whole = made(model, "backprop", direction=kind, rank=rank)
    others = [whole.probe(step, 1, batch, 0).projected_gradient for step in range(3)]
    assert max(abs(each - other) for each, other in zip(found, others, strict=True)) > 5 * tolerance, "nothing is shown"


@pytest.mark.parametrize("name", EXACT)
def test_a_group_that_the_loss_does_not_depend_on(name: EstimatorName) -> None:
    model, batch, loss = curved()
    other = nn.Module()
    other.used, other.unused = model, nn.Linear(99, 99)

    def of_used(net: Any, data: dict[str, torch.Tensor]) -> RowLosses:
        return loss(net.used, data)

    replica = made(other, name, loss=of_used, selection=Rotation(2, 1))
    slopes = [replica.probe(step, 0, batch, 0).projected_gradient for step in range(2)]
    assert slopes[0] and not slopes[1]


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", EXACT)
def test_any_model_is_differentiated(name: EstimatorName, architecture: str, tmp_path: Path) -> None:
    model = load(MODELS[architecture][0], tmp_path)
    batch = batch_for(model)
    replica = made(model, name)
    if name == "forward_gradient" and architecture in NO_FORWARD_RULE:
        with pytest.raises(ModelError, match=r"(?s)cannot be differentiated forwards.*estimator: spsa"):
            replica.prove(batch)
        assert not any("forward" in m.__dict__ for m in model.modules())
        return
    for index in range(2):
        expected, loss = slope(model, replica, (7, index), batch)
        found = replica.probe(7, index, batch, 1.0)
        assert (found.projected_gradient, found.loss) == pytest.approx((expected, loss), rel=2e-5, abs=2e-5)


def curved() -> tuple[nn.Module, dict[str, torch.Tensor], Callable[..., RowLosses]]:
    """A smooth model, small enough for differences without much rounding."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh())

    def loss(net: Any, data: dict[str, torch.Tensor]) -> RowLosses:
        losses = (net(data["x"]) - data["labels"]).double().square().sum(1)
        return RowLosses(losses, torch.ones(len(losses), dtype=torch.int64))

    return model, {"x": torch.randn(5, 6), "labels": torch.randn(5, 4)}, loss


@pytest.mark.parametrize(("name", "order"), [("spsa", 2), ("one_sided", 1)])
def test_differences_go_to_the_derivative_as_epsilon_goes_to_0(name: EstimatorName, order: int) -> None:
    """Their errors fall with the power of epsilon that theory says."""
    model, batch, loss = curved()
    exact = Replica(model, 5, estimator="backprop", loss=loss)
    replica = Replica(model, 5, estimator=name, loss=loss)
    factors = []
    for k in range(8):
        truth = exact.probe(0, k, batch, 1.0).projected_gradient
        errors = [abs(replica.probe(0, k, batch, epsilon).projected_gradient - truth) for epsilon in (0.04, 0.02, 0.01)]
        factors += [coarse / fine for coarse, fine in pairwise(errors)]
    middle = sorted(factors)[len(factors) // 2]
    assert middle == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("name", EXACT)
def test_those_that_differentiate_have_no_epsilon(name: EstimatorName) -> None:
    model, batch, loss = curved()
    replica = Replica(model, 5, estimator=name, loss=loss)
    assert replica.probe(0, 1, batch, 1.0) == replica.probe(0, 1, batch, 1e-9)


@pytest.mark.parametrize("make", [gpt2, bert])
def test_a_one_sided_probe_is_that_of_its_own_pieces(make: Callable[[], Any]) -> None:
    """Whoever evaluates L(theta) and L(theta + eps z) apart comes to the same bits."""
    model = moved(make)
    batch = batch_for(model)
    replica, other = made(model, "one_sided"), made(model, "one_sided")
    other.prove(batch)
    for k in (2, 0):
        centre, plus = (other.side(1, direction, batch, 1e-3, s) for direction, s in ((0, 0), (k, 1)))  # type: ignore[arg-type]
        assert replica.probe(1, k, batch, 1e-3) == ProbeResult.of_one_side(1, k, 0, plus, centre, 1e-3)
    assert {other.side(1, k, batch, 1e-3, 0) for k in range(3)} == {centre}, "it has no direction"
    assert centre.loss == pytest.approx(other.evaluate(batch).mean(), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_depends_on_nothing_but_weights_and_address(name: EstimatorName) -> None:
    """Whatever came before it, on which batch, in which order, and whether something was kept."""
    model = moved(gpt2)
    batches = [batch_for(model)]
    batches.append({**batches[0], "input_ids": (batches[0]["input_ids"] + 1) % 97})
    addresses = [(step, k, m) for step in (0, 4) for k in range(3) for m in range(2)]

    def fresh(address: tuple[int, int, int]) -> ProbeResult:
        replica = made(model, name)
        replica.prove(batches[0])
        return replica.probe(address[0], address[1], batches[address[2]], 1e-3, address[2])

    expected = {address: fresh(address) for address in addresses}
    assert len({each.projected_gradient for each in expected.values()}) == len(addresses)
    replica, generator = made(model, name), random.Random(0)
    replica.prove(batches[0])
    for _ in range(2):
        for step, k, m in generator.sample(addresses, len(addresses)):
            copied = {key: tensor.clone() for key, tensor in batches[m].items()}
            assert replica.probe(step, k, copied, 1e-3, m) == expected[step, k, m]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [gpt2, bert])
def test_a_contrast_is_what_the_slopes_of_two_halves_differ_by(make: Callable[[], Any], name: EstimatorName) -> None:
    """g = w_1 g_1 + w_2 g_2 and contrast = (g_1 - g_2) sqrt(w_1 w_2), with w the shares of the targets."""
    model = moved(make)
    batch = batch_for(model)
    replica = made(model, name)
    rows = len(batch["labels"])
    halves = [
        {key: tensor[part] for key, tensor in batch.items()} for part in (slice(rows // 2), slice(rows // 2, rows))
    ]
    counts = [float(replica.evaluate(half).counts.sum()) for half in halves]
    shares = [count / sum(counts) for count in counts]
    whole = replica.probe(0, 1, batch, 1e-2)
    if name in EXACT:
        assert whole.contrast is None
        return
    first, second = (replica.probe(0, 1, half, 1e-2).projected_gradient for half in halves)
    assert whole.projected_gradient == pytest.approx(shares[0] * first + shares[1] * second, abs=1e-3)
    assert whole.contrast == pytest.approx((first - second) * math.sqrt(shares[0] * shares[1]), abs=1e-3)
    assert abs(first - second) > 0.01, "or nothing is shown"
    assert replica.probe(0, 1, {key: tensor[:1] for key, tensor in batch.items()}, 1e-2).contrast is None


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_beyond_an_update(name: EstimatorName) -> None:
    model = moved(gpt2)
    batch = batch_for(model)
    replica = made(model, name)
    before = replica.probe(1, 0, batch, 1e-3)
    replica.apply(commit_of(0, [100], eta=2.0**-10))
    after = replica.probe(1, 0, batch, 1e-3)
    assert after.loss != before.loss and after.projected_gradient != before.projected_gradient
    fresh = made(model, name)
    fresh.prove(batch)
    assert fresh.probe(1, 0, batch, 1e-3) == after
    values = {shard.spec.name: shard.values.clone() for shard in replica.memory.shards()}
    replica.load(lambda spec, start, stop: values[spec.name][start:stop] * 1.5, 7)
    loaded = made(model, name)
    loaded.prove(batch)
    assert replica.probe(8, 0, batch, 1e-3) == loaded.probe(8, 0, batch, 1e-3) != after


@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_goes_downhill(name: EstimatorName) -> None:
    model, batch, loss = curved()
    replica = Replica(model, estimator=name, loss=loss)
    before = replica.evaluate(batch).mean()
    for step in range(40):
        replica.apply(commit(step, [replica.probe(step, k, batch, 1e-3) for k in range(8)], learning_rate=0.02))
    assert replica.evaluate(batch).mean() < 0.7 * before


@pytest.mark.parametrize(("name", "forwards"), list(zip(NAMES, (8, 5, 4, 1), strict=True)))
def test_forwards_of_four_directions_on_one_batch(name: EstimatorName, forwards: int) -> None:
    model, batch, loss = curved()
    calls = []

    def counted(net: Any, data: dict[str, torch.Tensor]) -> RowLosses:
        calls.append(len(data["x"]) // 5)
        return loss(net, data)

    replica = Replica(model, 5, estimator=name, loss=counted, signs="sequential")
    replica.prove(batch)
    replica.probe(0, 0, {**batch, "x": batch["x"] + 1}, 1e-3)
    calls.clear()
    for k in range(4):
        replica.probe(0, k, batch, 1e-3)
    assert sum(calls) == forwards


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name: EstimatorName, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every activation is rounded, so the slopes agree with those of float32 only as far as that."""
    model, twin = load(gpt2, tmp_path, dtype), load(gpt2, tmp_path)
    batch = batch_for(model)
    replica, exact = made(model, name), made(twin, name)
    found, expected = ([r.probe(0, k, batch, 0.05).projected_gradient for k in range(12)] for r in (replica, exact))
    assert float(torch.corrcoef(torch.tensor([found, expected]))[0, 1]) > 0.97


@pytest.mark.parametrize("name", EXACT)
def test_only_what_is_trained_counts(name: EstimatorName) -> None:
    model = moved(gpt2)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("attn" in key or "ln_1.bias" in key)
    batch = batch_for(model)
    replica = made(model, name)
    expected, _ = slope(model, replica, (0, 0), batch)
    assert replica.probe(0, 0, batch, 1.0).projected_gradient == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_lora_through_peft(name: EstimatorName) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(moved(gpt2), peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    batch = batch_for(model)
    replica = made(model, name)
    expected, _ = slope(model, replica, (0, 0), batch)
    assert replica.probe(0, 0, batch, 1.0).projected_gradient == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("core", [Attention, Functional, lambda: Scaled(WIDTH, WIDTH)])
def test_parameters_used_behind_their_owners_back_and_modules_of_other_kinds(core: Callable[[], nn.Module]) -> None:
    model, batch = Plain(core()), small_batch()
    forwards, backwards, spsa = (made(model, name) for name in ("forward_gradient", "backprop", "spsa"))
    for k in range(3):
        exact = backwards.probe(0, k, batch, 1.0)
        found = forwards.probe(0, k, batch, 1.0)
        assert (found.projected_gradient, found.loss) == pytest.approx((exact.projected_gradient, exact.loss), abs=1e-5)
        assert spsa.probe(0, k, batch, 1e-3).projected_gradient == pytest.approx(exact.projected_gradient, abs=5e-3)


@pytest.mark.parametrize("name", EXACT)
def test_a_loss_without_a_derivative_is_refused(name: EstimatorName) -> None:
    model, batch, loss = curved()

    def steps(net: Any, data: dict[str, torch.Tensor]) -> RowLosses:
        found = loss(net, data)
        return RowLosses((found.sums > 4).double(), found.counts)

    assert Replica(model, loss=steps).probe(0, 0, batch, 1e-3).loss > 0
    for selection in (None, Rotation(2, 1), SmallWeights(0.5)):
        with pytest.raises(ModelError, match=r"(?s)loss has no .*use estimator: spsa"):
            Replica(model, loss=steps, estimator=name, selection=selection).prove(batch)


def test_what_does_not_go_together_is_refused() -> None:
    for name in NAMES[1:]:
        with pytest.raises(ConfigError, match="no two signs"):
            Replica(nn.Linear(2, 2), estimator=name, signs="batched")
    for name in EXACT:
        with pytest.raises(ConfigError, match="needs all weights in one place, and Streamed has not"):
            Replica(nn.Sequential(nn.Linear(2, 2)), estimator=name, memory=partial(Streamed))
    assert Replica(nn.Sequential(nn.Linear(2, 2)), estimator="one_sided", memory=Streamed).step == 0


def test_a_prober_whose_signs_share_a_forward_has_no_sides() -> None:
    model = moved(gpt2)
    replica = made(model, "spsa")
    assert replica.prove(batch_for(model)).batched
    with pytest.raises(ModelError, match="signs: sequential"):
        replica.side(0, 0, batch_for(model), 1e-3, 1)
    # At the weights there is no sign: both halves are the same.
    assert replica.side(0, 0, batch_for(model), 1e-3, 0).loss == pytest.approx(
        replica.evaluate(batch_for(model)).mean()
    )
    assert not made(model, "one_sided").prove(batch_for(model)).batched


def test_what_is_kept_is_of_the_same_batch() -> None:
    kept, made = Kept[int](), []

    def ask(batch: dict[str, torch.Tensor]) -> int:
        return kept.of(batch, lambda: made.append(0) or len(made))  # type: ignore[func-returns-value]

    one = {"x": torch.arange(3), "labels": torch.arange(3)}
    assert [ask(one), ask({key: tensor.clone() for key, tensor in one.items()})] == [1, 1]
    others: list[dict[str, torch.Tensor]] = [
        {**one, "x": torch.arange(3) + 1}, {**one, "x": torch.arange(3).float()}, {**one, "x": torch.arange(3)[None]},
        {"x": one["x"]}, {**one, "y": one["x"]},
    ]  # fmt: skip
    assert [ask(other) for other in others] == [2, 3, 4, 5, 6]
    changed = {"x": torch.zeros(2), "labels": torch.zeros(2)}
    ask(changed)
    changed["x"][0] = 1
    assert ask(changed) == 8, "a batch may be written to after it was probed"
    kept.forget()
    assert ask(changed) == 9


class Wrong(Estimator):
    """Takes the direction of the next address: the suite must notice."""

    def probe(self, step: int, direction: int, batch: Any, epsilon: float, microbatch: int = 0) -> ProbeResult:
        losses = self.prober.losses(step, direction + 1, batch, epsilon)
        return ProbeResult.of_losses(step, direction, microbatch, *losses, epsilon)


def test_the_wrong_direction_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ESTIMATORS, "spsa", Wrong)
    with pytest.raises(AssertionError):
        test_an_estimate_is_the_slope_along_the_direction("spsa", "rank", 1)


def test_probers_know_their_model() -> None:
    """The whole loss, which is differentiated, is the one that is evaluated."""
    model = moved(gpt2)
    batch = batch_for(model)
    replica = made(model, "spsa")
    assert replica.prove(batch).chunked
    prober = replica._prober
    assert isinstance(prober, Prober)
    with torch.no_grad():
        assert float(prober.mean_loss(batch)) == pytest.approx(prober.evaluate(batch).mean(), abs=2e-6)
