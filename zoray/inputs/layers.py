"""Which of a model's parameters take inputs that can be watched: the weights of its linear layers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

from torch import nn

from zoray.inputs.mixture import TERMS
from zoray.layout import Side
from zoray.partitioned import shape_of


def watched(model: nn.Module) -> Iterator[tuple[str, nn.Module, Side]]:
    """(name of the weight, its module, side of the inputs) of the linear layers whose weights are trained.

    `nn.Linear` has inputs along the columns, `Conv1D` of GPT-2 along the rows. A weight that is another module's too,
    as a head's that is tied to embeddings, is none of them; neither is one of an adapter, whose B has inputs that
    change with A and whose A does nothing as long as B is 0, or one with fewer features than a factor has inputs.
    """
    users = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or not weight.requires_grad or users[id(weight)] > 1 or len(shape := shape_of(weight)) != 2:
            continue
        side: Side
        if isinstance(module, nn.Linear):
            side, features = "cols", shape[1]
        elif is_conv1d(module):
            side, features = "rows", shape[0]
        else:
            continue
        if features >= TERMS and ".lora_" not in f".{name}":
            yield f"{name}.weight" if name else "weight", module, side


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer with a transposed weight; it can only exist where transformers has been imported."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module).forward is library.Conv1D.forward


def input_sides(model: nn.Module) -> dict[str, Side]:
    """By name of the weight, the side of the inputs; of all that `watched` finds."""
    return {name: side for name, _, side in watched(model)}
