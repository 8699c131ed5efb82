"""Streaming beyond the contract of memories (`test_memory.py`): what is brought in when, and what models do to that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import make_model
from tests.unit.helpers import bits, commit_of
from tests.unit.shards import batch_of, loaded
from tests.unit.test_architectures import MODELS
from zoray.errors import ConfigError, ModelError, ResourceError
from zoray.memory import carrier
from zoray.memory.away import Away
from zoray.memory.backing import File
from zoray.memory.spill import streamed_loading
from zoray.memory.streamed import Streamed, Streaming
from zoray.memory.units import Unit
from zoray.partitioned import is_spilled
from zoray.replica import Replica
from zoray.selection import Rotation, SmallWeights

COMMIT = commit_of(0, [127, -127, 5], eta=2.0**-9)


def pair(model: nn.Module, streaming: Streaming | None = None, **options: Any) -> tuple[Replica, Replica]:
    """The same model resident and streamed."""
    twin = copy.deepcopy(model)
    memory = Streamed if streaming is None else partial(Streamed, streaming=streaming)
    return Replica(model, 7, **options), Replica(twin, 7, memory=memory, **options)


def same(resident: Replica, streamed: Replica, steps: int = 3, **batch: Any) -> None:
    """The same probes and weights over some steps."""
    for step in range(steps):
        data = batch_of(step, **batch)
        assert streamed.probe(step, 0, data, 1e-3) == resident.probe(step, 0, data, 1e-3)
        each = commit_of(step, [3 + step, -9], eta=2.0**-9)
        resident.apply(each)
        streamed.apply(each)
    assert streamed.digest() == resident.digest() and streamed.base_digest() == resident.base_digest()
    data = batch_of(9, **batch)
    assert streamed.evaluate(data).summary() == resident.evaluate(data).summary()


def sends(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Unit, bool]]:
    """What is sent for from now on, and whether it is updated on its way."""
    memory: Any = replica.memory
    seen: list[tuple[Unit, bool]] = []
    send = memory._carrier.send

    def noted(unit: Unit, change: Any = None) -> Any:
        seen.append((unit, change is not None))
        return send(unit, change)

    monkeypatch.setattr(memory._carrier, "send", noted)
    return seen


@pytest.mark.parametrize("kind", ["gpt-oss", "t5", "bart", "bert-mlm", "falcon"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    same(*pair(MODELS[kind][0](), Streaming("nvme", tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"direction": "rademacher"}, {"direction": "gaussian"}, {"rank": 3}, {"selection": SmallWeights(0.75)}]
)
def test_other_directions(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    same(*pair(MODELS["gpt2"][0](), **options))


def test_each_block_is_brought_in_once_per_probe_and_updated_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    resident, streamed = pair(MODELS["llama"][0]())
    same(resident, streamed)
    seen = sends(streamed, monkeypatch)
    streamed.apply(commit_of(3, [5, 6]))
    assert seen == []
    for direction, updated in ((0, True), (1, False), (2, False)):
        seen.clear()
        streamed.probe(4, direction, batch_of(0), 1e-3)
        blocks = [each for each in seen if each[0].users[0] in set(streamed.model.model.layers)]
        assert [change for _, change in blocks] == [updated, updated] and blocks[0][0] is not blocks[1][0]
        assert sum(change for _, change in seen) == (len(streamed.memory._units) if updated else 0)  # type: ignore[attr-defined]
    resident.apply(commit_of(3, [5, 6]))
    assert streamed.digest() == resident.digest()


def test_only_the_blocks_whose_turn_it_was_are_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    resident, streamed = pair(MODELS["llama"][0](), selection=Rotation(2, 1))
    same(resident, streamed)
    groups, layout = streamed.directions.coverage.groups, streamed.layout
    assert set(groups.values()) == {0, 1}
    for step in (3, 4):
        seen = sends(streamed, monkeypatch)
        for each in (resident, streamed):
            each.apply(commit_of(step, [5, 6]))
        assert streamed.probe(step + 1, 0, batch_of(0), 1e-3) == resident.probe(step + 1, 0, batch_of(0), 1e-3)
        changed = {spec.name for unit, change in seen if change for slot in unit.slots for spec in slot.specs}
        assert changed == {spec.name for spec in layout.specs if groups[spec.name] == step % 2}
    assert streamed.digest() == resident.digest()


def test_the_next_unit_is_sent_for_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    _, streamed = pair(MODELS["llama"][0]())
    streamed.probe(0, 0, batch_of(0), 1e-3)
    stage = streamed.memory._stage  # type: ignore[attr-defined]
    streamed.apply(COMMIT)
    asked = []
    bring = stage._bring

    def noted(unit: Unit) -> Any:
        asked.append(unit in stage._coming or unit in stage._present)
        return bring(unit)

    monkeypatch.setattr(stage, "_bring", noted)
    streamed.probe(1, 0, batch_of(0), 1e-3)
    assert asked.count(False) == 1, "only the first may have to be waited for"


class Crossing(nn.Module):
    """A model that does what none should: layers in an order that the data choose, other modules' parameters, views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.shift = Shift()
        self.scales = nn.ParameterList([torch.ones(16), torch.ones(16)])
        self.score = nn.Linear(16, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        shift = self.shift()
        order = range(5) if int(input_ids[0, 0]) % 2 else reversed(range(5))
        for i in order:
            x = x + torch.tanh(self.layers[i](x)) * self.scales[i % 2]
        x = x + self.layers[0].weight[0] + self.embedding.weight.mean(0) + shift
        return self.score(x.mean(1))


class Shift(nn.Module):
    """Its output is a view of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        # As many bytes as a layer of the model above has.
        self.weight = nn.Parameter(torch.randn(17, 16))

    def forward(self) -> torch.Tensor:
        return self.weight[None, :1]


def test_any_order_and_uses_behind_owners_backs() -> None:
    resident, streamed = pair(Crossing())
    same(resident, streamed, steps=8, classes=True)
    assert resident.verdict is not None and len(resident.verdict.strays) > 1
    assert resident.verdict == streamed.verdict


def evaluated(replica: Replica, seed: int) -> Any:
    return replica.evaluate(batch_of(seed, classes=True)).sums


@pytest.mark.parametrize("guarded", [True, False])
def test_a_buffer_that_an_output_views_is_nobody_else_s(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, streamed = pair(Crossing())
    if not guarded:
        monkeypatch.setattr(carrier, "_is_seen", lambda buffer: False)
    equal = [torch.equal(evaluated(resident, seed), evaluated(streamed, seed)) for seed in range(4)]
    assert all(equal) == guarded


def test_a_use_that_nothing_announced_brings_the_values_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    expected = {name: values.clone() for name, values in model.state_dict().items()}
    replica = Replica(model, memory=Streamed)
    weight = model[1].weight
    assert type(weight) is Away and isinstance(weight, nn.Parameter)
    assert weight.shape == (4, 4) and weight.numel() == 16 and weight.dtype == torch.float32 and len(weight) == 4
    assert type(weight) is Away, "its shape alone needs no values"
    assert torch.equal(weight.t()[0], expected["1.weight"][:, 0])
    assert type(weight) is nn.Parameter
    assert torch.equal(model[0].weight.data, expected["0.weight"])
    # More at once than there is room for.
    stacked = torch.stack([each.weight for each in model])
    assert torch.equal(stacked, torch.stack([expected[f"{i}.weight"] for i in range(5)]))
    replica.memory.settle()
    assert all(type(parameter) is Away for parameter in model.parameters())
    assert all(torch.equal(values, expected[name]) for name, values in model.state_dict().items())


def test_parameters_over_the_same_memory_stay_one() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        made[1].weight = nn.Parameter(made[0].weight.data)
        return made

    resident, streamed = Replica(model(), 7), Replica(model(), 7, memory=Streamed)
    for replica in (resident, streamed):
        replica.apply(COMMIT)
    assert streamed.digest() == resident.digest()
    assert torch.equal(bits(streamed.model[0].weight), bits(streamed.model[1].weight))  # type: ignore[index]


def test_a_forward_that_two_signs_cannot_share_is_taken_twice() -> None:
    from tests.unit.test_probe import Widths

    resident, streamed = pair(Widths())
    short, long = ({"input_ids": torch.ones(3, n).long(), "labels": torch.tensor([0, 1, 2])} for n in (5, 8))
    for batch in (short, long, short):
        assert streamed.probe(0, 0, batch, 1e-3) == resident.probe(0, 0, batch, 1e-3)


def test_a_parameter_of_another_class_is_refused() -> None:
    class Quantised(nn.Parameter):
        pass

    model = nn.Linear(3, 3)
    model.weight = Quantised(model.weight.data)
    with pytest.raises(ModelError, match="'weight' is a Quantised"):
        Replica(model, memory=Streamed)


def test_a_file_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder for them is None"):
        Streaming("nvme")
    with pytest.raises(ConfigError, match="in 'cpu'"):
        Streaming("cpu", tmp_path)


def no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_an_error_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.posix_fallocate", no_room)
    with pytest.raises(ResourceError, match="No space left"):
        Replica(nn.Linear(3, 3), memory=partial(Streamed, streaming=Streaming("nvme", tmp_path)))
    with pytest.raises(ResourceError, match="No space left"), streamed_loading(Streaming("nvme", tmp_path)):
        nn.Linear(3, 3)


@pytest.mark.parametrize("fault", ["read", "write"])
def test_after_a_fault_of_the_disk_nothing_is_computed(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    _, streamed = pair(MODELS["gpt2"][0](), Streaming("nvme", tmp_path))
    streamed.probe(0, 0, batch_of(0), 1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(File, fault, no_room)
        streamed.apply(COMMIT)
        with pytest.raises(OSError, match="No space left"):
            streamed.digest()
    calls: list[Callable[[], object]] = [streamed.digest, lambda: streamed.probe(1, 0, batch_of(0), 1e-3)]
    for call in calls:
        with pytest.raises(OSError, match="could not be read or written"):
            call()


def test_what_is_loaded_for_a_file_is_in_a_file(tmp_path: Path) -> None:
    make_model("gpt2", tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    streaming = Streaming("nvme", there)
    resident = Replica(loaded(tmp_path / "gpt2", "bfloat16", trainable={"lora": {"r": 2}}), 7)
    with streamed_loading(streaming):
        model = loaded(tmp_path / "gpt2", "bfloat16", trainable={"lora": {"r": 2}})
    assert all(map(is_spilled, model.parameters()))
    # Adapters are moved once more by peft.
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert not any(parameter.untyped_storage().resizable() for parameter in frozen)
    assert list(there.iterdir()) == []
    same(resident, Replica(model, 7, memory=partial(Streamed, streaming=streaming)))
    assert nn.Linear(2, 2).weight.untyped_storage().resizable(), "only what is loaded there"
