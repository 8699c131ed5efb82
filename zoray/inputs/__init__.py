"""Factors of directions that are mixed from inputs of the layers they belong to.

The gradient of a linear layer's weight is a sum of outer products with inputs of the layer. Of all directions a b^T
most have a b that is no input's, and move what the layer makes of inputs that never occur. So one half of b is a sum of
some inputs with random signs: those of a few texts, as the model is when the run begins, in a few bits each, the same
on every machine. The other half is signs as ever, so that nothing is out of reach: E[z z^T] is at least a
fraction of I.

LoRA-FA (Zhang et al. 2023, arXiv 2308.03303) and EVA (Paischer et al. 2024, arXiv 2410.07170) begin adapters with
activations; K-FAC (Martens and Grosse 2015, arXiv 1503.05671) scales gradients by their second moment.
"""

from zoray.inputs.find import RANDOM_TOKENS, TEXT_TOKENS, find_mixtures, random_texts
from zoray.inputs.layers import input_sides
from zoray.inputs.mixture import LARGEST_MIXED, POOL, Mixture

__all__ = [
    "LARGEST_MIXED",
    "POOL",
    "RANDOM_TOKENS",
    "TEXT_TOKENS",
    "Mixture",
    "find_mixtures",
    "input_sides",
    "random_texts",
]
