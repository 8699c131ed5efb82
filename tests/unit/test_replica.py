from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from tests.unit.helpers import bits, commit_of
from tests.unit.test_architectures import MODELS, batch_for, load
from zoray import update
from zoray.aggregate import commit
from zoray.errors import NumericsError
from zoray.memory import Resident
from zoray.replica import Replica, base_digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["opt", "mixtral", "t5"])
def test_weights_are_bit_identical_after_any_number_of_probes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(MODELS[name][0], tmp_path, dtype)
    batch = batch_for(model)
    replica = Replica(model)
    before = {key: bits(p) for key, p in model.named_parameters()}
    pointers = {key: p.data_ptr() for key, p in model.named_parameters()}
    for k in range(5):
        replica.probe(3, k, batch, 1e-2)
    for key, parameter in model.named_parameters():
        assert torch.equal(bits(parameter), before[key]) and parameter.data_ptr() == pointers[key], key


@pytest.mark.parametrize("signs", ["batched", "sequential"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_forward_that_raises_in_the_middle_leaves_no_trace(
    name: str, signs: Literal["batched", "sequential"], tmp_path: Path
) -> None:
    model = load(MODELS[name][0], tmp_path)
    batch = batch_for(model)
    replica = Replica(model, signs=signs)
    wanted = replica.probe(0, 0, batch, 1e-3)
    before = {key: (id(p), bits(p)) for key, p in model.named_parameters()}

    def fail(*_: object) -> None:
        raise MemoryError("in the middle of a forward")

    # Deep inside of modules whose forward or parameters are replaced at that moment.
    for inner in [module for module in model.modules() if not any(module.children())][4::5]:
        hook = inner.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            replica.probe(0, 0, batch, 1e-3)
        hook.remove()
        assert {key: id(p) for key, p in model.named_parameters()} == {key: at for key, (at, _) in before.items()}
        assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(bits(p), before[key][1]) for key, p in model.named_parameters())
    assert replica.probe(0, 0, batch, 1e-3) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_in_one_call_gives_the_weights_of_the_run(dtype: torch.dtype, tmp_path: Path) -> None:
    run, late = (Replica(load(MODELS["llama"][0], tmp_path, dtype), run_seed=0) for _ in range(2))
    other = Replica(load(MODELS["llama"][0], tmp_path, dtype), run_seed=1)
    batch, commits = batch_for(run.model), []
    for step in range(6):
        probes = [run.probe(step, k, batch, 1e-3) for k in range(3)]
        commits.append(commit(step, probes, learning_rate=1e-2, weight_decay=0.1))
        run.apply(commits[-1])
    start = late.digest()
    late.apply(commits)
    other.apply(commits)
    assert late.digest() == run.digest() != start
    assert other.digest() != run.digest(), "another run seed, 0 included, is another run"


def test_an_update_that_is_broken_off_leaves_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some weights have changed and some have not: applied once more, the commit would change the first ones twice."""
    model = nn.Linear(8, 8)
    replica, whole = Replica(model), Replica(copy.deepcopy(model))
    base = {name: values.clone() for name, values in model.state_dict().items()}
    updated = update._Sums.apply

    def apply(self: Any, shard: Any, block_elements: int | None = None) -> None:
        updated(self, shard, block_elements)
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(update._Sums, "apply", apply)
        replica.apply(commit_of(0, [3, -7]))
    assert replica.torn and replica.step == 0
    batch = {"input_ids": torch.ones(2, 8), "labels": torch.ones(2, 8)}
    for use in (
        lambda: replica.apply(commit_of(0, [3, -7])),
        lambda: replica.probe(0, 0, batch, 1e-3),
        lambda: replica.side(0, 0, batch, 1e-3, 1),
        lambda: replica.evaluate(batch),
        replica.digest,
    ):
        with pytest.raises(NumericsError, match="broken off"):
            use()
    replica.load(lambda spec, start, stop: base[spec.name].view(-1)[start:stop], 0)
    for each in (replica, whole):
        each.apply(commit_of(0, [3, -7]))
    assert replica.digest() == whole.digest()


def test_commits_are_applied_once_and_in_order() -> None:
    replica = Replica(nn.Linear(6, 7))
    first, second = commit_of(0, [3, 4]), commit_of(1, [-5])
    replica.apply(first)
    once = replica.digest()
    replica.apply(first)
    assert replica.step == 1 and replica.digest() == once
    with pytest.raises(NumericsError, match=r"step 1 .* steps \[3\]"):
        replica.apply(commit_of(3, [1]))
    assert replica.digest() == once
    replica.apply([first, second])
    assert replica.step == 2 and replica.digest() != once


def test_probes_do_not_depend_on_what_was_probed_before(tmp_path: Path) -> None:
    model = load(MODELS["gpt2"][0], tmp_path)
    batch = batch_for(model)
    replica, other = Replica(model), Replica(load(MODELS["gpt2"][0], tmp_path))
    wanted = replica.probe(2, 5, batch, 1e-3)
    for k in (9, 1, 5):
        other.probe(2, k, batch, 1e-3)
    assert other.probe(2, 5, batch, 1e-3) == wanted


def test_storage_is_aligned_and_contiguous() -> None:
    model = nn.Linear(33, 17)
    raw = torch.zeros(33 * 17 + 1)
    model.weight.data = raw[1:].view(33, 17).t().copy_(model.weight.data)
    values = model.weight.detach().clone()
    replica = Replica(model)
    assert isinstance(replica.memory, Resident)
    assert model.weight.is_contiguous() and model.weight.data_ptr() % 64 == 0
    assert torch.equal(model.weight, values)


def test_the_base_digest_sees_frozen_weights_and_buffers_and_changes_nothing() -> None:
    model = nn.BatchNorm1d(4)
    model.weight.requires_grad_(False)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first = base_digest(model)
    assert base_digest(model) == first
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    model.num_batches_tracked += 1
    second = base_digest(model)
    with torch.no_grad():
        model.weight[2] = 1.0000001
    assert len({first, second, base_digest(model)}) == 3
