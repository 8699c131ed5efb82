"""What every memory must do, checked in worlds of several processes: python -m tests.unit.shards RANK FOLDER SETTING.

`worlds.py` starts the processes, and reads their reports. They form one world after the other, since most of their time
goes into imports. A check compares with the resident replica of the same model in the same process, on the same device.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed, nn
from torch.utils import cpp_extension

from benchmarks.bytes import Peak
from tests.unit.helpers import bits, commit_of
from tests.unit.test_probe import Widths
from zoray.aggregate import commit
from zoray.config import RunConfig
from zoray.directions import Directions
from zoray.errors import ModelError
from zoray.layout import DirectionKind
from zoray.loss import RowLosses
from zoray.memory import Memory, Resident, pieces
from zoray.memory.spill import streamed_loading
from zoray.memory.streamed import Streamed, Streaming
from zoray.memory.world import form
from zoray.memory.zero3 import Sharding, Zero3, partitioned_loading
from zoray.models import load_model
from zoray.replica import Replica
from zoray.selection import Rotation, Selection, SmallWeights
from zoray.snapshot import load_newest, save
from zoray.update import Shard

DTYPES = ("float32", "bfloat16", "float16")
COMMITS = [
    commit_of(0, [127, -127, 5, -88], eta=2.0**-12),
    commit_of(1, [3], eta=2.0**-9, decay=0.75),
    commit_of(2, [0, -9, 64], eta=2.0**-11),
]
RUN, HEAD = "run", b"\1" * 32


@dataclass(frozen=True)
class World:
    """The processes a check runs in.

    Attributes:
        backend: "resident", "streamed-cpu" or "streamed-nvme" (no world at all), "zero3", "zero3-cpu" or "zero3-nvme".
        models: folder with the models, one folder each.
        shared: folder that all of a world's processes and the tests see.
        device: where they compute.
    """

    backend: str
    rank: int
    size: int
    models: Path
    shared: Path
    device: str = "cpu"

    @property
    def alone(self) -> bool:
        return not self.backend.startswith("zero3")

    @property
    def name(self) -> str:
        return self.backend if self.alone else f"{self.backend}-{self.size}"

    @property
    def sharding(self) -> Sharding:
        offload: Any = self.backend.partition("-")[2] or "none"
        return Sharding(offload, self.shared / "offloaded", buffer=1 << 21)

    @property
    def streaming(self) -> Streaming:
        folder = self.shared if self.backend == "streamed-nvme" else None
        return Streaming("cpu" if folder is None else "nvme", folder, self.device)

    def memory(self, model: nn.Module, directions: Directions, **options: object) -> Memory:
        if self.backend == "resident":
            return Resident(model, directions)
        if self.alone:
            return Streamed(model, directions, self.streaming)
        return Zero3(model, directions, replace(self.sharding, options=options))

    def load(self, kind: str, dtype: str = "float32", **keys: Any) -> nn.Module:
        """A model as a run's configuration has it, partitioned or in files from the start."""
        in_parts = not self.alone and partitioned_loading(getattr(torch, dtype), self.sharding)
        with in_parts or streamed_loading(self.streaming):
            return loaded(self.models / kind, dtype, **keys)

    def twin(self, kind: str, dtype: str = "float32", **keys: Any) -> nn.Module:
        """The same model whole, for a resident replica."""
        return loaded(self.models / kind, dtype, **keys).to(self.device)

    def batch(self, seed: int, **sizes: Any) -> dict[str, torch.Tensor]:
        return self.here(batch_of(seed, **sizes))

    def here(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: values.to(self.device) for name, values in batch.items()}

    def replica(
        self,
        model: nn.Module,
        rank: int = 1,
        selection: Selection | None = None,
        direction: DirectionKind = "rank",
        **options: Any,
    ) -> Replica:
        memory = partial(self.memory, **options)
        return Replica(model, 7, direction=direction, rank=rank, selection=selection, memory=memory)

    def everyone(self, value: Any) -> list[Any]:
        """The value each process has."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found


def loaded(folder: Path, dtype: str, num_labels: int | None = None, **keys: Any) -> nn.Module:
    kind = "causal_lm" if num_labels is None else "classification"
    task = {"kind": kind, "train": "t", "max_length": 16}
    run = {"model": str(folder), "max_steps": 1, "task": task, "dtype": dtype, **keys}
    return load_model(RunConfig.model_validate(run), num_labels=num_labels)


class Skipped(Exception):
    """The check cannot be made here; the text says why."""


class Odd(nn.Module):
    """Sizes that few numbers divide, some smaller than the number of processes, and a parameter that is not trained."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 2)
        self.cube = nn.Parameter(torch.randn(3, 5, 7))
        self.single = nn.Parameter(torch.tensor([0.5]))
        self.wide = nn.Parameter(torch.randn(23, 301))
        self.second.weight.requires_grad_(False)
        self.register_buffer("seen", torch.tensor([3, 4]))
        self.to(dtype)


def whole(world: World, memory: Memory) -> dict[str, torch.Tensor]:
    """The weights that all processes hold together; their shards must be disjoint and leave no gap."""
    found: dict[str, torch.Tensor] = {}
    everyone = world.everyone([(s.spec.name, s.start, s.values.clone().cpu()) for s in memory.shards()])
    for spec in memory.directions.layout.specs:
        parts = [part for mine in everyone for part in mine if part[0] == spec.name and part[2].numel()]
        position = 0
        for _, start, values in parts:
            assert start == position, f"{spec.name} has a gap"
            position += values.numel()
        assert position == spec.numel
        found[spec.name] = torch.cat([values for *_, values in parts]).view(spec.shape)
    return found


def assert_same(world: World, sharded: Replica, resident: Replica) -> None:
    """The same weights, bit for bit, and the same digests."""
    together = whole(world, sharded.memory)
    for shard in resident.memory.shards():
        name, theirs = shard.spec.name, together[shard.spec.name].view(-1)
        assert torch.equal(bits(shard.values.cpu()), bits(theirs)), name
    digest = resident.memory.digest()
    assert sharded.digest() == digest
    assert sum(world.everyone(sharded.memory.digest())) % 2**64 == digest
    assert sharded.base_digest() == resident.base_digest()


def batch_of(seed: int, rows: int = 3, length: int = 9, classes: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 40, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3 if classes else ids}


# ---- checks ----


def updates(world: World) -> None:
    """The same commits, at once and one by one, give the weights that they give a resident replica."""
    for dtype in DTYPES:
        for rank in (1, 3):
            odd, tied = partial(Odd, getattr(torch, dtype)), partial(loaded, world.models / "gpt2", dtype)
            for make in (odd,) if rank == 3 and dtype != "float32" else (odd, tied):
                resident = Replica(make().to(world.device), 7, rank=rank)
                sharded = world.replica(make(), rank)
                assert sharded.layout == resident.layout
                assert_same(world, sharded, resident)
                base = resident.digest()
                resident.apply(COMMITS)
                for each in COMMITS:
                    sharded.apply(each)
                assert resident.digest() != base
                assert_same(world, sharded, resident)


def _steps(world: World, sharded: Replica, resident: Replica, steps: int = 2, **batch: Any) -> None:
    first = world.batch(0, **batch)
    assert sharded.prove(first) == resident.prove(first)
    for step in range(steps):
        mine = []
        for microbatch in world.everyone(world.rank):
            # Each process has rows and lengths of its own.
            data = world.batch(10 * step + microbatch, **{"length": 5 + 2 * microbatch, **batch})
            mine.append((step, 0, data, 1e-3, microbatch))
        found = world.everyone(sharded.probe(*mine[world.rank]))
        expected = [resident.probe(*each) for each in mine]
        assert found == expected, (found, expected)
        both = commit(step, [found[0]], learning_rate=1e-2, weight_decay=0.1)
        sharded.apply(both)
        resident.apply(both)
    assert_same(world, sharded, resident)
    evaluated = sharded.evaluate(first).summary(), resident.evaluate(first).summary()
    assert evaluated[0] == evaluated[1]


def probes(world: World) -> None:
    """Probes of models loaded in partitions, and the weights they lead to, are those of a resident replica."""
    cases = [("gpt2", "float32"), ("llama", "bfloat16")]
    if world.size == 2:
        cases += [("opt", "float16"), ("mixtral", "float32"), ("gpt2", "bfloat16")]
    for kind, dtype in cases:
        model = world.load(kind, dtype)
        twin = world.twin(kind, dtype)
        for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(mine.to(world.device), theirs) and mine.dtype == theirs.dtype
        _steps(world, world.replica(model), Replica(twin, 7), steps=3 if kind == "gpt2" else 2)


def selections(world: World) -> None:
    """Every memory finds the same limits and groups, and moves the same weights."""
    for selection in (SmallWeights(0.7), Rotation(2, 1)):
        for dtype in DTYPES:
            make = partial(Odd, getattr(torch, dtype))
            resident = Replica(make().to(world.device), 7, selection=selection)
            sharded = world.replica(make(), selection=selection)
            assert sharded.directions.coverage == resident.directions.coverage
            assert sharded.directions.identity == resident.directions.identity != resident.layout.identity
            resident.apply(COMMITS)
            for each in COMMITS:
                sharded.apply(each)
            assert_same(world, sharded, resident)
        # Forwards gather whole parameters, whatever they are gathered from; two processes tell that.
        for kind, dtype in (("gpt2", "float32"), ("llama", "bfloat16")) if world.size < 3 else ():
            twin = Replica(world.twin(kind, dtype), 7, selection=selection)
            _steps(world, world.replica(world.load(kind, dtype), selection=selection), twin)


def inputs(world: World) -> None:
    """Every memory finds the same inputs of layers, and moves the weights by directions that are made of them."""
    # Forwards gather whole parameters, whatever they are gathered from; two processes tell that.
    for kind, dtype in (("gpt2", "float32"), ("llama", "bfloat16")) if world.size < 3 else ():
        twin = Replica(world.twin(kind, dtype), 7, direction="inputs")
        sharded = world.replica(world.load(kind, dtype), direction="inputs")
        assert twin.directions.inputs and sharded.directions.identity == twin.directions.identity
        assert twin.directions.identity != twin.layout.identity
        _steps(world, sharded, twin)


def every_path(world: World) -> None:
    """Parameters used behind their owners' backs, two forwards per probe, classifiers, adapters, new weights."""
    strays = Replica(world.twin("mamba"), 7)
    _steps(world, world.replica(world.load("mamba")), strays)
    assert strays.verdict is not None and strays.verdict.strays
    relative = Replica(world.twin("mpnet", num_labels=3), 7)
    _steps(world, world.replica(world.load("mpnet", num_labels=3)), relative, classes=True)
    assert relative.verdict is not None and not relative.verdict.batched
    _a_batch_of_another_shape(world)
    keys: dict[str, Any] = {"trainable": {"lora": {"r": 2, "target_modules": ["c_attn"]}}}
    for each in (keys, {"num_labels": 3, "trainable": "score|attn"}):
        twin = Replica(world.twin("gpt2", **each), 7)
        sharded = world.replica(world.load("gpt2", **each))
        assert_same(world, sharded, twin)
        _steps(world, sharded, twin, classes="num_labels" in each)


def _a_batch_of_another_shape(world: World) -> None:
    """A batch that rules out the path that was proved is refused where processes depend on each other."""
    resident, sharded = Replica(Widths().to(world.device), 7), world.replica(Widths())
    labels = batch_of(0, classes=True)["labels"]
    short, long = (world.here({"input_ids": torch.ones(3, n).long(), "labels": labels}) for n in (5, 8))
    assert sharded.prove(short) == resident.prove(short)
    expected = resident.probe(0, 0, short, 1e-3)
    assert sharded.probe(0, 0, short, 1e-3) == expected
    if not world.alone:
        try:
            sharded.probe(0, 0, long, 1e-3)
            raise AssertionError("it was taken in two forwards")
        except ModelError as error:
            assert "places is given a tensor without rows" in error.what and error.advice == "set signs: sequential"
    assert sharded.probe(0, 0, short, 1e-3) == expected


class Chooses(nn.Module):
    """Rows go to the expert that their first token chooses, which is called only if there are any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(40, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 40) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, **_: object) -> Any:
        states, chosen = self.embed(input_ids), input_ids[:, 0] % 4
        logits = torch.zeros(*input_ids.shape, 40, device=states.device)
        for index in chosen.unique().tolist():
            rows = chosen == index
            logits[rows] = self.experts[index](states[rows])
        return SimpleNamespace(logits=logits)


def choices(world: World) -> None:
    """A model that calls other modules for other data is refused where processes gather weights for each other."""
    if world.backend == "resident":
        return

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> RowLosses:
        logits = model(**batch).logits
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten(), reduction="none")
        rows = losses.view(len(batch["labels"]), -1).double().sum(1)
        return RowLosses(rows, torch.full((len(rows),), 4, device=rows.device))

    def batch(*first: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[token, 7, 8, 9] for token in first])
        return world.here({"input_ids": ids, "labels": ids})

    sharded = Replica(Chooses(), 7, memory=world.memory, loss=loss)
    sharded.prove(batch(0, 2))
    sharded.probe(0, 0, batch(2, 0), 1e-3)
    before = sharded.digest()
    try:
        sharded.probe(0, 0, batch(0, 3), 1e-3)
        raise AssertionError("it was taken")
    except ModelError as error:
        assert "'experts.3' is called at a place" in error.what, error.what
    sharded.probe(0, 1, batch(0, 2), 1e-3)
    assert sharded.digest() == before


def snapshots(world: World) -> None:
    """Any layout's snapshot is read by this one, and this one's by `test_memory.py`; a damaged one is passed over."""
    for dtype in DTYPES:
        resident = Replica(Odd(getattr(torch, dtype)).to(world.device), 7)
        resident.apply(COMMITS)
        for parts in (1, 2, 3, 5):
            place = world.shared / f"{world.name}-{dtype}-{parts}"
            if world.rank == 0:
                split_save(place, resident, parts)
            world.everyone(None)
            sharded = world.replica(Odd(getattr(torch, dtype)))
            assert load_newest(place, sharded, RUN, {3: HEAD}) == HEAD
            assert_same(world, sharded, resident)
        damaged = next((place / "step-3").glob("part-3-*"))
        if world.rank == 0:
            data = bytearray(damaged.read_bytes())
            data[-3] ^= 4
            damaged.write_bytes(data)
        fresh = world.replica(Odd(getattr(torch, dtype)))
        before = fresh.digest()
        assert load_newest(place, fresh, RUN, {3: HEAD}) is None
        assert fresh.digest() == before and fresh.step == 0
        save(world.shared / f"own-{world.name}-{dtype}", sharded, HEAD, RUN)


def storage_that_fails(world: World) -> None:
    """If one process cannot write, all say so, and nothing is left."""
    replica = world.replica(Odd(torch.float32))
    place = world.shared / f"full-{world.name}"
    real = pieces.save_file
    if world.rank == world.size - 1:
        pieces.save_file = _full  # type: ignore[assignment]
    try:
        save(place, replica, HEAD, RUN)
        raise AssertionError("it was saved")
    except OSError as error:
        assert "disk full" in str(error) or world.rank < world.size - 1
    finally:
        pieces.save_file = real
    world.everyone(None)
    assert list(place.iterdir()) == []
    save(place, replica, HEAD, RUN)
    assert [path.name for path in place.iterdir()] == ["step-0"]


def _full(*_: object) -> None:
    raise OSError("disk full")


@contextmanager
def unguarded(replica: Replica) -> Iterator[None]:
    replica.memory.settle = lambda: None  # type: ignore[method-assign]
    yield


def _break_off(world: World, replica: Replica, module: nn.Module) -> None:
    """A forward that fails when `module` is about to be called."""

    def fail(*_: object) -> None:
        raise MemoryError("in the middle of a forward")

    hook = module.register_forward_pre_hook(fail)
    try:
        replica.probe(0, 0, world.batch(0), 1e-3)
        raise AssertionError("the forward went through")
    except MemoryError:
        pass
    finally:
        hook.remove()


TRAPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: (model, DeepSpeed's options, the replica's)
    "persisted": ("gpt2", {"stage3_param_persistence_threshold": 10**9}, {}),
    "reused": ("gpt2", {"stage3_max_reuse_distance": 10**9}, {"head": "full"}),
    "tied": ("gpt2", {"stage3_prefetch_bucket_size": 10**8}, {"head": "full"}),
    "prefetched": ("llama", {"stage3_prefetch_bucket_size": 10**8}, {}),
}


def _after_an_update(world: World, trap: str, guarded: bool) -> bool:
    """Whether a probe after an update is that of a resident replica."""
    kind, options, choices = TRAPS[trap]
    resident = Replica(world.twin(kind), 7, **choices)
    sharded = Replica(world.load(kind), 7, memory=partial(world.memory, **options), **choices)
    for k in range(5):
        # DeepSpeed keeps and prefetches by the order of modules that it has seen in earlier forwards.
        assert sharded.probe(0, k, world.batch(k), 1e-3) == resident.probe(0, k, world.batch(k), 1e-3)
    with nullcontext() if guarded else unguarded(sharded):
        if trap != "persisted":
            last = [module for module in sharded.model.modules() if isinstance(module, nn.LayerNorm | nn.Linear)][-3]
            _break_off(world, sharded, last)
        resident.apply(COMMITS)
        sharded.apply(COMMITS)
        assert_same(world, sharded, resident)
        return sharded.probe(3, 0, world.batch(9), 1e-3) == resident.probe(3, 0, world.batch(9), 1e-3)


def stale_copies(world: World) -> None:
    """No copy of a parameter outlives an update; each trap is one, which the check without its guard falls into."""
    for trap in TRAPS:
        assert _after_an_update(world, trap, guarded=True), trap
        assert not _after_an_update(world, trap, guarded=False), f"{trap} is no trap"


@contextmanager
def let_come(replica: Replica) -> Iterator[None]:
    """What is on its way to the device is not called back."""
    replica.memory._stage._cancel = lambda: None  # type: ignore[attr-defined]
    yield


STREAMED_TRAPS: dict[str, tuple[Any, bool]] = {
    # name: (what takes the guard away, whether a forward is broken off while the next unit is on its way)
    "there": (unguarded, False),
    "coming": (let_come, True),
}


def _after_a_streamed_update(world: World, trap: str, guarded: bool) -> bool:
    """Whether a probe after an update is that of a resident replica."""
    without, broken = STREAMED_TRAPS[trap]
    resident, streamed = Replica(world.twin("deep"), 7), world.replica(world.load("deep"))
    for k in range(2):
        assert streamed.probe(0, k, world.batch(k), 1e-3) == resident.probe(0, k, world.batch(k), 1e-3)
    with nullcontext() if guarded else without(streamed):
        if broken:
            norms = [module for module in streamed.model.modules() if isinstance(module, nn.LayerNorm)]
            _break_off(world, streamed, norms[5])
        resident.apply(COMMITS)
        streamed.apply(COMMITS)
        same = streamed.probe(3, 0, world.batch(9), 1e-3) == resident.probe(3, 0, world.batch(9), 1e-3)
        assert_same(world, streamed, resident)
        return same


def stale_streamed_copies(world: World) -> None:
    """Nothing that is on the device or on its way there outlives an update."""
    for trap in STREAMED_TRAPS:
        assert _after_a_streamed_update(world, trap, guarded=True), trap
        assert not _after_a_streamed_update(world, trap, guarded=False), f"{trap} is no trap"


def streamed_peak(world: World) -> None:
    """On the device are two blocks, the largest other module and the activations; loading and moving take no more."""
    twin: Any = loaded(world.models / "deep", "float32")
    model, block, largest = (
        sum(p.numel() * p.element_size() for p in module.parameters())
        for module in (twin, twin.transformer.h[0], twin.transformer.wte)
    )
    assert model > 6 * block > 12 * largest
    with Peak() as loading:
        here = world.load("deep")
    with Peak() as moving:
        streamed = world.replica(here)
    weights = model if world.backend == "streamed-cpu" else 0
    peaks = []
    for replica in (streamed, Replica(twin, 7)):
        with Peak() as stepping:
            for step in range(3):
                probe = replica.probe(step, 0, batch_of(0, rows=1, length=4), 1e-3)
                if replica is streamed:
                    replica.apply(commit(step, [probe], learning_rate=1e-3))
        peaks.append(stepping.peak)
    found = {"loading": loading.peak, "moving": moving.peak, "stepping": peaks, "block": block, "largest": largest}
    assert loading.peak <= weights + largest, found
    # Where a file is, each parameter is in memory on its way.
    assert moving.peak <= weights + block, found
    assert 2 * block < peaks[0] - peaks[1] <= 2 * block + largest, found


def peak(world: World) -> None:
    """Loading, proof, probes and updates never take more than the own parts, one module and the activations."""
    twin = loaded(world.models / "deep", "float32")
    model_bytes = sum(p.numel() * p.element_size() for p in twin.parameters())
    largest = max(sum(p.numel() * p.element_size() for p in m.parameters(recurse=False)) for m in twin.modules())
    batch = batch_of(0, rows=1, length=4)
    del twin
    with Peak() as loading:
        model = world.load("deep")
    with Peak() as stepping:
        sharded = world.replica(model)
        sharded.apply(commit(0, [sharded.probe(0, 0, batch, 1e-3)], learning_rate=1e-3))
        sharded.probe(1, 0, batch, 1e-3)
        sharded.digest()
    world.everyone(None)
    note = {"model": model_bytes, "largest": largest, "loading": loading.peak, "stepping": stepping.peak}
    (world.shared / f"peak-{world.name}-{world.rank}.json").write_text(json.dumps(note))
    # A module is gathered from a copy of its parts, and process 0 has what it reads from the file besides.
    assert loading.peak < model_bytes / world.size + 3.5 * largest, note
    assert stepping.peak < 4 * largest, note


def most(world: World, work: Callable[[], object]) -> int:
    """Bytes of tensors on the world's device while something is done, at their most."""
    if world.device == "cpu":
        with Peak() as counted:
            work()
        return counted.peak
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def device_peak(world: World) -> None:
    """A device has no more than the own parts, if they are there, one module and what a resident replica has too."""
    # An accelerator's allocator rounds, and its libraries have memory of their own from it.
    kind = "deep" if world.device == "cpu" else "tall"
    batch = world.batch(0, rows=1, length=4)

    def step(replica: Replica) -> None:
        replica.apply(commit(0, [replica.probe(0, 0, batch, 1e-3)], learning_rate=1e-3))
        replica.probe(1, 0, batch, 1e-3)
        replica.digest()

    twin = world.twin(kind)
    weights = sum(p.numel() * p.element_size() for p in twin.parameters())
    largest = max(sum(p.numel() * p.element_size() for p in m.parameters(recurse=False)) for m in twin.modules())
    step(Replica(twin, 7))
    del twin
    resident = most(world, lambda: step(Replica(world.twin(kind), 7)))
    sharded = most(world, lambda: step(world.replica(world.load(kind))))
    world.everyone(None)
    own = 0 if world.device != "cpu" and world.backend == "zero3-cpu" else weights // world.size
    note = {"weights": weights, "own": own, "largest": largest, "resident": resident, "sharded": sharded}
    (world.shared / f"device-{world.name}-{world.rank}.json").write_text(json.dumps(note))
    assert sharded - own <= resident - weights + 4 * largest, note
    assert weights > 8 * largest, note


def files(world: World) -> None:
    """Weights in files: updates, probes and snapshots are those of a resident replica."""
    if not list(Path(cpp_extension.get_default_build_root()).rglob("async_io.so")):
        # Compiling it takes minutes, and leaves a lock that blocks for ever if it is broken off.
        raise Skipped("not built: make nvme")
    model = world.load("large")
    resident, sharded = Replica(world.twin("large"), 7), world.replica(model)
    assert list((world.shared / "offloaded").rglob(f"rank{world.rank}/*.swp"))
    assert any(parameter.ds_tensor.numel() < 2 for parameter in model.parameters())  # type: ignore[attr-defined]
    _steps(world, sharded, resident)
    resident.apply(COMMITS[2:])
    sharded.apply(COMMITS[2:])
    assert_same(world, sharded, resident)
    place = world.shared / "files"
    save(place, sharded, HEAD, RUN)
    again = world.replica(world.load("large"))
    assert load_newest(place, again, RUN, {3: HEAD}) == HEAD
    assert_same(world, again, resident)


Check = Callable[[World], None]

CONTRACT: tuple[Check, ...] = (updates, snapshots, storage_that_fails, probes, selections, inputs)
WORLDS: dict[tuple[str, int], tuple[Check, ...]] = {
    ("zero3", 4): (*CONTRACT, peak),
    ("zero3", 3): CONTRACT,
    ("zero3", 2): (*CONTRACT, every_path, stale_copies, peak, device_peak),
    ("zero3-cpu", 2): (updates, probes, every_path),
    ("zero3-nvme", 2): (files,),
    ("zero3", 1): (*CONTRACT, choices),
}
"""The checks of each backend with each number of processes, in the order in which the worlds are formed."""

PAIR: dict[tuple[str, int], tuple[Check, ...]] = {
    ("zero3", 2): (*CONTRACT, every_path, stale_copies, device_peak),
    ("zero3-cpu", 2): (*CONTRACT, every_path, device_peak),
}
SINGLE: dict[tuple[str, int], tuple[Check, ...]] = {
    ("zero3", 1): (*CONTRACT, every_path, choices, device_peak),
    ("zero3-cpu", 1): (*CONTRACT, every_path, choices, device_peak),
}


@dataclass(frozen=True)
class Setting:
    """What the processes compute on, and the worlds they form there.

    Attributes:
        accelerator: they speak to each other by NCCL, each having a device for itself.
    """

    device: str
    accelerator: bool
    worlds: Mapping[tuple[str, int], tuple[Check, ...]]


SETTINGS = {
    "processors": Setting("cpu", False, WORLDS),
    "one-device": Setting("cuda", True, SINGLE),
    # Gloo takes tensors that are on a device, and does not mind whose it is.
    "shared-device": Setting("cuda", False, PAIR),
    "two-devices": Setting("cuda", True, PAIR),
}

RESIDENT: tuple[Check, ...] = (*CONTRACT, every_path)
STREAMED: tuple[Check, ...] = (*CONTRACT, every_path, stale_streamed_copies, streamed_peak)
"""The checks of those that need no world."""


class Split(Memory):
    """Part `rank` of `size` of a resident replica's weights, cut as no backend would."""

    def __init__(self, replica: Replica, rank: int, size: int) -> None:
        super().__init__(replica.directions)
        self.rank, self.size, self._all = rank, size, replica.memory

    def shards(self, writing: bool = False) -> Iterator[Shard]:
        for shard in self._all.shards():
            borders = [shard.stop * i // self.size for i in (self.rank, self.rank + 1)]
            yield Shard(shard.spec, shard.values[slice(*borders)], borders[0])

    def settle(self) -> None:
        pass


def split_save(folder: Path, replica: Replica, parts: int) -> None:
    """A snapshot as `parts` processes would have written it."""
    save(folder, replica, HEAD, RUN)
    if parts > 1:
        (folder / "step-3" / pieces.WHOLE).unlink()
        for rank in range(parts):
            pieces.write(folder / "step-3", Split(replica, rank, parts))


def run(world: World, checks: tuple[Check, ...], report: Callable[[dict[str, Any]], None]) -> None:
    """All of its checks; several processes stop at one that fails: they may not be at the same place any more."""
    for check in checks:
        started, fault, why = time.perf_counter(), "", ""
        try:
            check(world)
        except Skipped as reason:
            why = str(reason)
        except Exception:
            fault = traceback.format_exc()
        seconds = time.perf_counter() - started
        report({"world": world.name, "check": check.__name__, "fault": fault, "skipped": why, "seconds": seconds})
        if fault and world.size > 1:
            return


def main() -> None:
    rank, folder, setting = int(sys.argv[1]), Path(sys.argv[2]), SETTINGS[sys.argv[3]]
    torch.set_num_threads(1)
    if setting.device != "cpu":
        # With gloo between them, DeepSpeed would take it that they compute on processors.
        os.environ["DS_ACCELERATOR"] = setting.device
    places = json.loads((folder / "places.json").read_text())
    with (folder / f"report-{rank}.jsonl").open("w") as out:

        def report(facts: dict[str, Any]) -> None:
            out.write(json.dumps(facts) + "\n")
            out.flush()

        for (backend, size), checks in setting.worlds.items():
            if rank < size:
                world = World(backend, rank, size, folder / "models", folder, setting.device)
                form(places[world.name], rank, size, setting.accelerator, timedelta(seconds=120))
                run(world, checks, report)
                distributed.destroy_process_group()
    # How the threads of torch and DeepSpeed end with an interpreter is no business of these checks: it once aborted.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
