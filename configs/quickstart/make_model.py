"""Make the quickstart's pretrained model: a small GPT-2 that has read the standard library's docstrings and comments.

The model is trained here, by ordinary backpropagation with AdamW, from random weights and on text that every Python
has. The language reference, which the quickstart adapts it to, is kept out: `pydoc_data` is not read, and neither is
any passage that shares eight consecutive words with it (`make_data.shingles`).

Usage, from the root of the repository::

    .venv/bin/python configs/quickstart/make_model.py [FOLDER]

writes config.json, the tokenizer and model.safetensors (bfloat16) into FOLDER (default: `model/` beside this file). One
thread and fixed seeds: the same Python, torch and processor type write the same bytes.

The folder in the repository was made with Python 3.11.7 and torch 2.13.0+cpu in 465 s on one thread of an AMD EPYC: 513
modules (29 of them held out), 851,840 + 48,384 tokens, 1,088,256 parameters. Held-out loss per token at steps 250, 500,
1000, 1500 and 2000: 4.888, 4.487, 4.123, 3.920 and 3.838 ± 0.021.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from make_data import paragraphs, shingles

SEED = 0
VOCABULARY = 2048
CONTEXT = 128
"""Tokens per training sequence; the model has positions for twice as many."""
HIDDEN, LAYERS, HEADS = 128, 4, 4
BATCH = 16
STEPS = 2000
WARMUP = 100
PEAK = 3e-3
"""Largest learning rate."""
SPREAD = 0.06
"""Standard deviation of the first weights; GPT-2's own 0.02 suits layers six times as wide and learns slower here."""
WEIGHT_DECAY = 0.1
HELD_OUT = 20
"""One module in this many is held out of pretraining, to measure it."""

END = "<|endoftext|>"
NOT_PROSE = {"pydoc_data", "encodings", "test", "tests", "idle_test", "lib2to3", "site-packages", "_bundled"}
"""Folders that are not read: the language reference, character tables, tests, other people's packages."""

_LETTERS = re.compile(r"[A-Za-z]{2,}")


def comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """Every run of whole-line comments at one column, as (line, text without the marks)."""
    block: list[str] = []
    first, at = 0, (-1, -1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        if block and token.start != (at[0] + 1, at[1]):
            yield first, "\n".join(block)
            block = []
        if not block:
            first = token.start[0]
        at = token.start
        block.append(re.sub(r"^#+:? ?", "", token.string).rstrip())
    if block:
        yield first, "\n".join(block)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Every docstring, as (line, text without the indentation)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield node.body[0].lineno, inspect.cleandoc(text)


def corpus(library: Path) -> dict[str, str]:
    """The prose of every module of the standard library: file name -> docstrings and comments in source order.

    A passage that occurs twice, or is part of the language reference, is left out.
    """
    from pydoc_data.topics import topics

    reference = set().union(*(shingles(text) for topic in topics.values() for text in paragraphs(topic)))
    seen: set[str] = set()
    found: dict[str, str] = {}
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        name = path.relative_to(library)
        if NOT_PROSE & set(name.parts):
            continue
        source = path.read_text(encoding="utf-8")
        passages = []
        for _, text in sorted([*docstrings(source), *comment_blocks(source)]):
            text = "\n".join(line.rstrip() for line in text.strip().expandtabs().split("\n"))
            if len(_LETTERS.findall(text)) >= 4 and text not in seen and not shingles(text) & reference:
                seen.add(text)
                passages.append(text)
        if passages:
            found[name.as_posix()] = "\n\n".join(passages)
    return found


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE vocabulary of `VOCABULARY` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=2 * CONTEXT,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> Tensor:
    """All texts, each closed by the end token, cut into rows. Returns int64 of shape (rows, length)."""
    flat: list[int] = []
    for text in texts:
        flat += [*tokenizer.encode(text, add_special_tokens=False, verbose=False), tokenizer.eos_token_id]
    rows = len(flat) // length
    return torch.tensor(flat[: rows * length]).view(rows, length)


def make_network(end: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, no dropout."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=2 * CONTEXT,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=SPREAD,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config)


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, rows: Tensor) -> tuple[float, float]:
    """Mean loss over the rows in nats per token, and its standard error."""
    losses = []
    for batch in rows.split(BATCH):
        logits = model(batch).logits[:, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        losses.append(loss.mean(1))
    each = torch.cat(losses)
    return each.mean().item(), (each.std() / math.sqrt(len(each))).item()


def learning_rate(step: int) -> float:
    """Linear warm-up to `PEAK`, then a cosine to a tenth of it."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return PEAK * (0.55 + 0.45 * math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def pretrain(model: GPT2LMHeadModel, train: Tensor, held_out: Tensor) -> None:
    """Train `model` in place for `STEPS` steps, epochs shuffled without replacement."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    generator = torch.Generator().manual_seed(SEED)
    order = torch.empty(0, dtype=torch.int64)
    start = time.perf_counter()
    for step in range(STEPS):
        if len(order) < BATCH:
            order = torch.randperm(len(train), generator=generator)
        batch, order = train[order[:BATCH]], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            mean, error = evaluate(model, held_out)
            seconds = time.perf_counter() - start
            print(
                f"{seconds:6.0f} s  step {step + 1}  loss {loss.item():.3f}  held out {mean:.4f} +- {error:.4f}",
                flush=True,
            )


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face folder; the tokenizer's class by the name that transformers 4 and 5 both know."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    """Read the library, train the tokenizer and the model, measure and save."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    modules = corpus(Path(sysconfig.get_path("stdlib")))
    names = list(modules)
    held = [name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0]
    texts = [modules[name] for name in names if name not in held]
    digest = hashlib.sha256("\0".join(modules.values()).encode()).hexdigest()
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}: {len(names)} modules, {len(held)} held out,")
    print(f"{sum(map(len, modules.values())):,} characters, sha256 {digest[:16]}")
    tokenizer = make_tokenizer(texts)
    train = pack(tokenizer, texts, CONTEXT)
    held_out = pack(tokenizer, [modules[name] for name in held], CONTEXT)
    model = make_network(tokenizer.eos_token_id)
    print(f"{train.numel():,} + {held_out.numel():,} tokens, {model.num_parameters():,} parameters", flush=True)
    pretrain(model, train, held_out)
    model = model.to(torch.bfloat16)
    save(model, tokenizer, folder)
    print("held out, after rounding to bfloat16: {:.4f} +- {:.4f}".format(*evaluate(model.float(), held_out)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "model")
