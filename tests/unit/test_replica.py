from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.helpers import bits, commit_of
from tests.unit.test_architectures import MODELS, batch_for, load
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
