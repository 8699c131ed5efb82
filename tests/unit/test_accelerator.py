"""On an accelerator (`make gpu`): the same bits after an update, and probes that agree with the processor's."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.unit.helpers import bits, commit_of
from zoray.replica import Replica

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator on this machine"),
]


def model(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=64, vocab_size=301, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(shape).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", [1, 64])
def test_an_update_gives_the_processor_s_bits(dtype: torch.dtype, terms: int) -> None:
    here = model(dtype)
    one, other = Replica(here), Replica(copy.deepcopy(here).cuda())
    commits = [commit_of(step, [(37 * k + step) % 255 - 127 for k in range(terms)], eta=2.0**-17) for step in range(5)]
    one.apply(commits)
    other.apply(commits)
    assert one.digest() == other.digest()
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(bits(mine.detach()), bits(theirs.detach().cpu()))


def test_a_probe_agrees_with_the_processor_s_and_leaves_the_weights_alone() -> None:
    here = model(torch.float32)
    one, other = Replica(here), Replica(copy.deepcopy(here).cuda())
    ids = torch.randint(1, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    before = other.digest()
    for direction in range(4):
        mine = one.probe(0, direction, {"input_ids": ids, "labels": ids}, 1e-2)
        theirs = other.probe(0, direction, {"input_ids": ids.cuda(), "labels": ids.cuda()}, 1e-2)
        assert theirs.loss == pytest.approx(mine.loss, rel=1e-4)
        assert theirs.projected_gradient == pytest.approx(mine.projected_gradient, rel=0.02, abs=1e-3)
    assert one.verdict == other.verdict
    assert other.digest() == before
