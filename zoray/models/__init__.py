"""Loading a model and its tokenizer: from a folder or the Hugging Face hub to weights that can be trained."""

from __future__ import annotations

from zoray.models.blank import blank_model
from zoray.models.limits import check_lengths, check_tokens, max_positions
from zoray.models.load import load_model, load_tokenizer
from zoray.models.placed import Make, load_placed
from zoray.models.trainable import selection

__all__ = [
    "Make",
    "blank_model",
    "check_lengths",
    "check_tokens",
    "load_model",
    "load_placed",
    "load_tokenizer",
    "max_positions",
    "selection",
]
