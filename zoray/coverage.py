"""Which weights the directions of a step move: all that are trained, or some of them.

A direction has bits for every trained parameter, whatever it moves: layouts, snapshots and digests know nothing of
this. What is not covered is neither perturbed nor updated, as if its elements of z were 0. Weight decay is not part of
a direction, and acts on all trained weights.

Limits are those of Sparse-MeZO (Liu et al. 2024, arXiv 2402.15751): only weights of small magnitude are moved. Which
ones these are is told by the weights as they are when a step begins, on which its probes run, so a replica that joins
has nothing to be told. Groups are the blocks of block coordinate descent (Zhang et al. 2024, ZO-Bench, arXiv
2402.11592).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch

from zoray.layout import ParamSpec


@dataclass(frozen=True, slots=True)
class Coverage:
    """What directions move; everything, unless something is said.

    Attributes:
        limits: by parameter, the largest magnitude of a weight that is moved; all of one that is not named. A limit is
            a value of the parameter's dtype.
        groups: by parameter, the number of its group; a parameter that is not named is moved at every step.
        count: of groups. They take turns, beginning with group 0.
        steps: how many of them a turn has.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    count: int = 1
    steps: int = 1

    def group(self, spec: ParamSpec) -> int | None:
        """The group of a parameter; None if it is moved at every step."""
        return self.groups.get(spec.name)

    def touches(self, group: int | None, step: int) -> bool:
        """Whether directions of a step move the parameters of a group."""
        return group is None or step // self.steps % self.count == group

    def mask(self, spec: ParamSpec, values: torch.Tensor) -> torch.Tensor | None:
        """Which of a parameter's weights are moved; None: all of them.

        Args:
            values: any of its weights as they are when the step begins, of any shape.

        Returns:
            A bool tensor of that shape.
        """
        limit = self.limits.get(spec.name)
        return None if limit is None else values.abs() <= limit

    def all_groups(self) -> Coverage:
        """The same with all groups moved at every step."""
        return replace(self, groups={}, count=1, steps=1)

    @property
    def identity(self) -> str:
        """Digest (hex): equal if and only if two replicas move the same weights. Empty where all are moved."""
        if not self.limits and not self.groups:
            return ""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


EVERYTHING = Coverage()
"""All trained weights at every step."""
