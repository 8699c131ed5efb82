"""What a replica's process takes beside its weights, counted on tensors without memory for each thing that it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from zoray.commits import seal
from zoray.config import CausalLMTask, ClassificationTask, RunConfig
from zoray.coverage import EVERYTHING, Coverage
from zoray.digest import tensor_digest
from zoray.errors import ModelError, ZorayError
from zoray.estimators import ESTIMATORS
from zoray.inputs import POOL, RANDOM_TOKENS, TEXT_TOKENS, Mixture, input_sides
from zoray.layout import Layout, ParamSpec, make_layout, trainable_parameters
from zoray.memory.units import make_plan
from zoray.models import blank_model, check_lengths, selection
from zoray.models.words import reason
from zoray.planning.gathered import gathering
from zoray.planning.live import Peak
from zoray.planning.shadow import Shadow, ShadowDirections
from zoray.probe import Prober
from zoray.product import factor_dtype
from zoray.proof import Verdict, prove
from zoray.selection import SmallWeights
from zoray.update import BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS, Shard, apply_commits

_REPLAYED = 1024
"""Terms that a replica that catches up applies together."""

_PACKED_BYTES = 64 << 20
"""Most bits of directions that an update keeps at hand."""

_LARGEST_ON_HEAP = 32 << 20
"""glibc's M_MMAP_THRESHOLD_MAX: it has larger pieces mapped, and gives them back at once."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one process needs for a replica's work, in bytes.

    Attributes:
        parameters: (elements, bytes per element, trained) of each parameter; tied ones once.
        buffers: of the model, of which every process has all.
        largest_module: parameters that belong to one module, of the largest.
        tied: parameters that have several names, counted once for each name beyond the first.
        pieces: parameters of all modules that have less than 32 MiB each, which the C library has on its heap when they
            are gathered.
        room: on the device for the units of weights that are streamed through it (see `zoray.memory.units`).
        inputs: of layers, which directions are mixed from; in the host's memory.
        passing: peak of what is made and let go of again, by what the process is doing.
        verdict: the paths that the probes take.
    """

    parameters: tuple[tuple[int, int, bool], ...]
    buffers: int
    largest_module: int
    tied: int
    pieces: int
    room: int
    inputs: int
    passing: Mapping[str, int]
    verdict: Verdict

    def weights(self, shards: int = 1, *, trained: bool = False, smallest: int = 0, largest: float = math.inf) -> int:
        """Bytes that each of `shards` processes holds of the parameters.

        Args:
            trained: only of those that are trained.
            smallest, largest: only parts of at least, and less than, so many bytes.
        """
        parts = [-(-elements // shards) * width for elements, width, own in self.parameters if own or not trained]
        return sum(part for part in parts if smallest <= part < largest)

    def pinned(self, shards: int) -> int:
        """Bytes of torch's memory that is not paged out for what each of `shards` processes holds.

        It gives each parameter the next power of two.
        """
        return sum(1 << (-(-elements // shards) * width - 1).bit_length() for elements, width, _ in self.parameters)


def measure(config: RunConfig, num_labels: int | None = None, shards: int = 1) -> Work:
    """Run what a replica's process does on tensors without memory.

    Args:
        config: the run; where its `memory` has the weights is left to the caller.
        num_labels: see `blank_model`.
        shards: processes that hold the weights together.

    Raises:
        ModelError: see `blank_model`; or what the model computes depends on more than shapes, or the paths that are
            asked for are not right for it.
        ConfigError: `trainable` matches nothing, or sequences are longer than the model takes.
    """
    model = blank_model(config, num_labels)
    check_lengths(config, model)
    sides = input_sides(model) if config.direction.kind == "inputs" else {}
    layout = make_layout(trainable_parameters(model), config.direction.kind, config.direction.rank, sides)
    directions = ShadowDirections(layout, config.seed, _coverage(config, layout), _mixtures(layout))
    room = make_plan(model, layout.specs).room
    # Looked up here, since it multiplies matrices to find out.
    factor_dtype(torch.device("cpu"))
    padded = not (isinstance(config.task, CausalLMTask) and config.task.prompt_column is None)
    shadow = Shadow(model, padded)
    counter = _Counter(shadow)
    with _explained(config), gathering(model, shards) if shards > 1 else nullcontext():
        verdict = _forwards(config, model, directions, counter)
    _updates(config, directions, counter, shards)
    if directions.inputs:
        counter.found["finding the inputs of layers"] = _finding(model, config)
    named = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    once = list(model.parameters())
    modules = [_bytes(module.parameters(recurse=False)) for module in model.modules()]
    return Work(
        parameters=tuple((p.numel(), p.element_size(), p.requires_grad) for p in once),
        buffers=_bytes(model.buffers()),
        largest_module=max(modules),
        tied=_bytes(named) - _bytes(once),
        pieces=sum(size for size in modules if size < _LARGEST_ON_HEAP),
        room=room,
        inputs=sum(mixture.values.nbytes for mixture in directions.inputs.values()),
        passing=counter.found,
        verdict=verdict,
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Counter:
    """Peaks by name."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow, self.found = shadow, dict[str, int]()

    def count(self, name: str, work: Callable[[], object], there: Iterable[torch.Tensor]) -> None:
        """Do some work on tensors that are there before, and note what was made for it at its peak."""
        with self.shadow.running(peak := Peak([*self.shadow.tensors, *there])):
            work()
        self.found[name] = max(peak.peak, self.found.get(name, 0))


def _forwards(config: RunConfig, model: nn.Module, directions: ShadowDirections, counter: _Counter) -> Verdict:
    """The proof, a probe and an evaluation, of batches as wide as the task allows."""
    found = list[Verdict]()
    rows = config.per_direction_batch_size * config.task.rows_per_example(held_out=not config.differentiable)
    with counter.shadow.running():
        batch = _batch(config, rows)
        held_out = _batch(config, config.per_device_eval_batch_size * config.task.rows_per_example(held_out=True))

    # A function of the user's looks at all logits.
    head = "full" if ":" in config.objective else config.head

    def proof() -> None:
        made = prove(model, directions, batch, rows, signs=config.proved_signs, head=head, epsilon=config.epsilon)
        found.append(made)

    counter.count("proof of the fast paths", proof, batch.values())
    prober = Prober(model, directions, found[0])
    estimator = ESTIMATORS[config.estimator](prober)

    def probe() -> None:
        estimator.probe(0, 0, batch, config.epsilon)

    counter.count("probe", probe, batch.values())
    if estimator.differentiates:
        # A proof ends with one.
        counter.count("proof of the fast paths", probe, batch.values())
    if config.evaluated_in_run:
        counter.count("evaluation", lambda: prober.evaluate(held_out), held_out.values())
    return found[0]


def _batch(config: RunConfig, rows: int) -> dict[str, torch.Tensor]:
    ids = torch.empty((rows, config.task.max_length), dtype=torch.int64)
    labels = torch.empty((rows,) if config.task.architecture == "classifier" else ids.shape, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.empty_like(ids), "labels": labels}


def _mixtures(layout: Layout) -> dict[str, Mixture]:
    """What factors are mixed from, as large as it will be."""
    features = {each.name: each.rows if each.mixed == "rows" else each.cols for each in layout.specs if each.mixed}
    return {name: Mixture(np.ones((POOL, count), np.int8)) for name, count in features.items()}


def _finding(model: nn.Module, config: RunConfig) -> int:
    """Of a forward in float64: a module's weights, and a few tensors of the most features."""
    classifies = isinstance(config.task, ClassificationTask)
    tokens = POOL * (min(TEXT_TOKENS, config.task.max_length) if classifies else RANDOM_TOKENS)
    # The head would come after all that is looked for.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    called = (module for module in model.modules() if not isinstance(module, nn.Embedding) and module is not head)
    modules = [list(module.parameters(recurse=False)) for module in called]
    widest = max(max(p.shape) for parameters in modules for p in parameters if p.dim() == 2)
    # Of experts in one tensor, one at a time, as most models have it.
    largest = max(sum(p[0].numel() if p.dim() > 2 else p.numel() for p in parameters) for parameters in modules)
    return 8 * (largest + 8 * tokens * widest)


def _coverage(config: RunConfig, layout: Layout) -> Coverage:
    """What takes as much as any step: groups that take turns are counted as if all were moved."""
    small = isinstance(selection(config), SmallWeights)
    return Coverage(limits={spec.name: 0.0 for spec in layout.specs}) if small else EVERYTHING


def _updates(config: RunConfig, directions: ShadowDirections, counter: _Counter, shards: int) -> None:
    """An update by as many directions as are ever applied together, and a digest, of the parameters that take most."""
    layout = directions.layout
    # Gaussian directions are added one by one.
    together = max(config.most_directions * config.update_rule.window, _REPLAYED // config.direction.rank)
    terms = 1 if layout.kind == "gaussian" else together
    # Their values do not matter, but for zeros, which are left out.
    commit = seal(0, 2.0**-20, 0.5, 0.0, tuple((0, index, 1) for index in range(terms)), bytes(32))
    factored = [spec for spec in layout.specs if spec.rank]
    dense = [spec for spec in layout.specs if not spec.rank]
    block = DEVICE_BLOCK_ELEMENTS if config.gpus_per_replica > 0 else BLOCK_ELEMENTS
    # A block of wide rows takes most for b, one of many short rows for a.
    measures: tuple[Callable[[ParamSpec], int], ...] = (lambda spec: spec.cols, lambda spec: _rows(spec, block))
    chosen = [max(specs, key=measure) for specs in (factored, dense) if specs for measure in measures]

    def shard(spec: ParamSpec) -> Shard:
        count = min(-(-spec.numel // shards), 2 * block)
        with counter.shadow.running():
            return Shard(spec, torch.empty(count, dtype=getattr(torch, spec.dtype)))

    for part in map(shard, chosen):
        counter.count("update", partial(apply_commits, directions, [part], [commit], block), [part.values])
    largest = shard(max(layout.specs, key=lambda spec: spec.numel))
    counter.count("digest", partial(tensor_digest, largest.spec.name, largest.values), [largest.values])
    counter.found["update"] += _bits(layout, terms, block)


def _bits(layout: Layout, terms: int, block: int) -> int:
    """What NumPy takes of an update, which torch does not see: the directions' bits and signs, or normals."""
    if layout.kind == "gaussian":
        return 4 * max(spec.numel + min(spec.numel, block) for spec in layout.specs)
    packed = terms * layout.total_bytes
    if layout.kind not in ("inputs", "rank") or packed > _PACKED_BYTES:
        packed = 0
    pieces = [terms * spec.cols if spec.rank else min(terms * spec.cols, _PACKED_BYTES) for spec in layout.specs]
    return packed + 2 * max(pieces)


@contextmanager
def _explained(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except ZorayError:
        raise
    except Exception as error:
        raise ModelError(
            f"What {config.model} takes cannot be counted without running it: {reason(error)}.",
            where="model",
            advice="Start it with a small batch, and see what `zoray status` says of its replicas' memory.",
        ) from error


def _rows(spec: ParamSpec, block: int) -> int:
    """Rows of a block of a parameter."""
    return min(spec.numel // spec.cols, max(1, block // spec.cols))
