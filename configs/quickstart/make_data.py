"""Make the quickstart's data: the Python language reference, as training and evaluation prose.

Every Python carries the text of its language reference in `pydoc_data.topics` (what `help("import")` prints), so this
is real prose that needs no network. Topics quote each other, often whole chapters at a time, so a split by topic alone
would leak. Three rules keep the two files apart:

1. a paragraph that occurs in several topics is kept only in the first of them, in the order of their names;
2. a topic belongs to one file only, decided by a hash of its name, so it does not move when topics are added;
3. a paragraph of the training file that shares `SHINGLE` consecutive words with any evaluation paragraph is dropped.

Usage, from the root of the repository; the same Python version writes the same bytes every time::

    .venv/bin/python configs/quickstart/make_data.py [FOLDER]

writes FOLDER/train.jsonl and FOLDER/eval.jsonl (default: `data/` beside this file), rows
``{"topic": ..., "text": ...}``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

SHINGLE = 8
"""Consecutive words two passages must share to count as the same text."""

EVAL_SHARE = 0.3
"""Share of the topics that is held out."""

MIN_CHARS = 200
"""Topics with less prose of their own than this (after rule 1) are left out."""

MIN_WORDS = 12
"""Paragraphs with fewer words are headings, signatures and labels."""

_WORD = re.compile(r"\w+")
_MARK = re.compile(r"^(?:[*•-]|\d+\.|\[\d+\]) +")
_HYPHEN = re.compile(r"([A-Za-z])- (?=[a-z])")
_NOT_PROSE = re.compile(
    r"^ *(?:>>>|\.\.\. |[+|])|::=|={4}|-{4}|\*{4}|\S {3,}\S|^ *(?:def|class|import|from|return|if|for) .*[:)]$", re.M
)


def shingles(text: str) -> set[int]:
    """Hashes of every run of `SHINGLE` words of `text`, case and punctuation ignored.

    A shorter text has one shingle, all of its words.
    """
    words = [word.lower() for word in _WORD.findall(text)]
    starts = range(max(1, len(words) - SHINGLE + 1))
    joined = (" ".join(words[start : start + SHINGLE]) for start in starts)
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in joined}


def held_out(topic: str) -> bool:
    """True when `topic` belongs to the evaluation file."""
    digest = hashlib.sha256(topic.encode()).digest()
    return int.from_bytes(digest[:4], "big") < EVAL_SHARE * 2**32


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of one topic as the reference lays them out: wrapped, with headings, tables and examples."""
    for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
        if paragraph.strip():
            yield "\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n"))


def prose(paragraph: str) -> str | None:
    """The paragraph on one line without its list mark, or None where it is no prose.

    Prose is `MIN_WORDS` words or more that end like a sentence. Headings, tables, grammar and examples are not.
    """
    lines = [line.strip() for line in paragraph.split("\n")]
    text = _MARK.sub("", _HYPHEN.sub(r"\1-", " ".join(lines)))
    if _NOT_PROSE.search(paragraph) or len(_WORD.findall(text)) < MIN_WORDS or text[-1] not in ".:;!?)":
        return None
    return text


def split(topics: dict[str, str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Split topics into training and evaluation paragraphs that share no run of `SHINGLE` words.

    Args:
        topics: topic name -> text, as in `pydoc_data.topics`.

    Returns:
        (train, evaluation), each topic name -> its paragraphs in order.
    """
    train: dict[str, list[str]] = {}
    evaluation: dict[str, list[str]] = {}
    seen: set[str] = set()
    for topic in sorted(topics):
        for text in filter(None, map(prose, paragraphs(topics[topic]))):
            words = " ".join(_WORD.findall(text.lower()))
            if words not in seen:
                seen.add(words)
                (evaluation if held_out(topic) else train).setdefault(topic, []).append(text)
    secret = set().union(*(shingles(paragraph) for kept in evaluation.values() for paragraph in kept))
    train = {topic: [text for text in kept if not shingles(text) & secret] for topic, kept in train.items()}
    return train, evaluation


def rows(topics: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    """One row per topic that has at least `MIN_CHARS` characters of prose."""
    for topic, kept in sorted(topics.items()):
        text = "\n\n".join(kept)
        if len(text) >= MIN_CHARS:
            yield {"topic": topic, "text": text}


def write(path: Path, records: Iterable[dict[str, str]]) -> int:
    """Write `records` as JSON lines, whole or not at all. Returns the number of rows."""
    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(lines), encoding="utf-8", newline="\n")
    partial.replace(path)
    return len(lines)


def make(folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl` into `folder` and return their paths."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, part in zip(paths, split(topics), strict=True):
        records = list(rows(part))
        write(path, records)
        print(f"{path}: {len(records)} topics, {sum(len(record['text']) for record in records):,} characters")
    return paths


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "data")
