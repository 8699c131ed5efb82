"""On an accelerator (`make gpu`): the same bits after an update, and probes that agree with the processor's."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.helpers import bits, commit_of
from zoray import fused
from zoray.aggregate import commit
from zoray.commits import float32
from zoray.memory.streamed import Streamed, Streaming
from zoray.replica import Replica
from zoray.update import Shard, apply_commits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator on this machine"),
]


def model(dtype: torch.dtype, layers: int = 2, width: int = 64) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": layers, "n_embd": width, "n_head": 2, "n_positions": 64, "vocab_size": 301}
    shape = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(shape).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", [1, 64])
@pytest.mark.parametrize("direction", ["rank", "inputs"])
def test_an_update_gives_the_processor_s_bits(dtype: torch.dtype, terms: int, direction: Any) -> None:
    here = model(dtype)
    one, other = (Replica(each, direction=direction) for each in (here, copy.deepcopy(here).cuda()))
    assert one.directions.identity == other.directions.identity
    commits = [commit_of(step, [(37 * k + step) % 255 - 127 for k in range(terms)], eta=2.0**-17) for step in range(5)]
    one.apply(commits)
    other.apply(commits)
    assert one.digest() == other.digest()
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(bits(mine.detach()), bits(theirs.detach().cpu()))


def test_bfloat16_weights_are_updated_in_one_pass() -> None:
    """Where Triton cannot be used, the bits are the same; here it can."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert fused.gives_the_bits(device)
    assert fused.usable(device, torch.bfloat16)
    assert not fused.usable(device, torch.float32) and not fused.usable(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("direction", ["rank", "inputs"])
@pytest.mark.parametrize("decay", [1.0, 0.999])
@pytest.mark.parametrize("part", [slice(0, None), slice(1, None), slice(1, 2), slice(0, 300)])
def test_every_bfloat16_number_is_updated_as_on_a_processor(direction: Any, decay: float, part: slice) -> None:
    """Also tiny ones, signs of zeros, and parts that begin anywhere."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    layer = torch.nn.Linear(256, 256, bias=False).to(torch.bfloat16)
    layer.weight.data.copy_(numbers.nan_to_num(0.0).view(256, 256))
    inputs = {"input": torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()}
    directions = Replica(layer, 3, direction=direction, texts=inputs).directions
    (spec,) = directions.layout.specs
    steps = [([5], 2.0**-9), ([127, -3, 1], float32(1.7e-41))]
    commits = [commit_of(step, terms, eta, float32(decay)) for step, (terms, eta) in enumerate(steps)]
    found = []
    for device in ("cpu", "cuda"):
        values = layer.weight.detach().view(-1)[part].to(device, copy=True)
        # On the device as far from where an allocation begins as it is in the parameter.
        held = torch.empty(len(values) + part.start, dtype=values.dtype, device=device)[part.start :].copy_(values)
        apply_commits(directions, [Shard(spec, held, part.start)], commits)
        found.append(bits(held.cpu()))
    assert torch.equal(*found)


@pytest.mark.parametrize("direction", ["rank", "inputs"])
def test_a_probe_agrees_with_the_processor_s_and_leaves_the_weights_alone(direction: Any) -> None:
    here = model(torch.float32)
    one, other = (Replica(each, direction=direction) for each in (here, copy.deepcopy(here).cuda()))
    ids = torch.randint(1, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    before = other.digest()
    for direction in range(4):
        mine = one.probe(0, direction, {"input_ids": ids, "labels": ids}, 1e-2)
        theirs = other.probe(0, direction, {"input_ids": ids.cuda(), "labels": ids.cuda()}, 1e-2)
        assert theirs.loss == pytest.approx(mine.loss, rel=1e-4)
        assert theirs.projected_gradient == pytest.approx(mine.projected_gradient, rel=0.02, abs=1e-3)
    assert one.verdict == other.verdict
    assert other.digest() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("offload", "direction"), [("cpu", "rank"), ("cpu", "inputs"), ("nvme", "rank"), ("nvme", "inputs")]
)
def test_streamed_weights_give_the_resident_ones_bits(
    offload: Any, direction: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Blocks large enough to be still on their way when they are wanted, several updates, and nothing in between."""
    resident = Replica(model(dtype, 8, 1024).cuda(), 7, direction=direction)
    streaming = Streaming(offload, tmp_path if offload == "nvme" else None, "cuda")
    memory = partial(Streamed, streaming=streaming)
    streamed = Replica(model(dtype, 8, 1024), 7, direction=direction, memory=memory)
    assert streamed.directions.identity == resident.directions.identity
    ids = torch.randint(1, 300, (4, 64), generator=torch.Generator().manual_seed(1)).cuda()
    batch = {"input_ids": ids, "labels": ids}
    for step in range(6):
        probes = [resident.probe(step, k, batch, 1e-3) for k in range(3)]
        assert [streamed.probe(step, k, batch, 1e-3) for k in range(3)] == probes
        update = commit(step, probes, learning_rate=1e-2)
        resident.apply(update)
        streamed.apply(update)
        if step % 2:
            assert streamed.digest() == resident.digest()
    assert streamed.base_digest() == resident.base_digest()
    for mine, theirs in zip(streamed.memory.shards(), resident.memory.shards(), strict=True):
        assert torch.equal(bits(mine.values.cpu()), bits(theirs.values.cpu())), mine.spec.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_inputs_of_layers_are_the_processor_s(attention: str, dtype: torch.dtype) -> None:
    """Wide enough that float32 sums would differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
    shape = LlamaConfig(vocab_size=301, attn_implementation=attention, **sizes)
    here = LlamaForCausalLM(shape).to(dtype).eval()
    models = here, copy.deepcopy(here).cuda()
    identities = {Replica(each, 3, direction="inputs").directions.identity for each in models}
    assert len(identities) == 1


def test_streamed_weights_take_two_blocks_of_the_device_s_memory() -> None:
    here: Any = model(torch.float32, 8, 1024)
    block, table = (sum(p.numel() * 4 for p in m.parameters()) for m in (here.transformer.h[0], here.transformer.wte))
    ids = torch.randint(1, 300, (4, 64), generator=torch.Generator().manual_seed(1)).cuda()
    peaks = []
    for memory in (partial(Streamed, streaming=Streaming("cpu", None, "cuda")), None):
        replica = Replica(copy.deepcopy(here) if memory else here.cuda(), **({"memory": memory} if memory else {}))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for step in range(3):
            probe = replica.probe(step, 0, {"input_ids": ids, "labels": ids}, 1e-3)
            replica.apply(commit(step, [probe], learning_rate=1e-3))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del replica
    # The allocator rounds; an update's sums are on the device at the same time as the activations.
    assert peaks[0] - peaks[1] < 2.5 * block + table
