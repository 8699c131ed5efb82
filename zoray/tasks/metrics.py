"""How generated text is compared with right answers, as in SQuAD (Rajpurkar et al. 2016): F1 of words, exact match."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from zoray.objective import Score

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """The words that are compared: in lower case, without ASCII punctuation and without articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def f1(text: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the text's words, against the answer it agrees with best; 0 to 1.

    Words count as often as they occur. Without any word, a text agrees with nothing.
    """
    return max(_f1(words(text), words(answer)) for answer in answers)


def exact(text: str, answers: Sequence[str]) -> bool:
    """Whether the text has the same words in the same order as one of the answers."""
    return words(text) in [words(answer) for answer in answers]


def _f1(found: list[str], wanted: list[str]) -> float:
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _scores(texts: Sequence[str], batch: Mapping[str, Any]) -> list[float]:
    return [f1(text, answers) for text, answers in zip(texts, batch["references"], strict=True)]


F1 = Score("f1", _scores)
"""F1 as an objective."""
