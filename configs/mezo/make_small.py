"""Make a small OPT with random weights and small data sets in the columns of MeZO's: its protocol then runs anywhere.

The texts are put together from the lists below: a stand-in for the real data, whose columns and types they have. What
is measured on them says nothing of the method; that the whole path works is what they are for.

Usage, from the root of the repository; the same seed writes the same rows::

    .venv/bin/python configs/mezo/make_small.py [FOLDER]

writes FOLDER/model (a Hugging Face folder) and FOLDER/data/TASK/{train,validation}/rows.parquet (default: `data/small/`
beside this file).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TRAIN, VALIDATION = 120, 40
"""Rows of the two parts of each data set."""

VOCABULARY = 1024
POSITIONS = 512

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn")
PLACES = ("the garden", "the station", "a small town", "the river", "the market")
GOOD = ("warm", "clever", "moving", "funny", "bright")
BAD = ("dull", "cold", "clumsy", "silly", "grey")
THINGS = ("film", "book", "song", "play", "story")
ACTS = (("slept late", "was tired"), ("ran home", "heard thunder"), ("bought bread", "was hungry"))

Row = dict[str, Any]


def sentence(pick: random.Random) -> tuple[str, str, str]:
    """A sentence, with who it is about and where."""
    who, where = pick.choice(NAMES), pick.choice(PLACES)
    return f"{who} {pick.choice(ACTS)[0]} near {where}.", who, where


def sst2(pick: random.Random) -> Row:
    """`glue`, `sst2`."""
    label = pick.randrange(2)
    words = pick.sample(GOOD if label else BAD, 2)
    return {"sentence": f"a {words[0]} and {words[1]} {pick.choice(THINGS)} ", "label": label}


def rte(pick: random.Random) -> Row:
    """`super_glue`, `rte`: 0 is entailment."""
    premise, who, where = sentence(pick)
    label = pick.randrange(2)
    other = pick.choice([place for place in PLACES if place != where])
    return {"premise": premise, "hypothesis": f"{who} was near {other if label else where}.", "label": label}


def cb(pick: random.Random) -> Row:
    """`super_glue`, `cb`: 0 is entailment, 1 contradiction, 2 neutral."""
    premise, who, where = sentence(pick)
    label = pick.randrange(3)
    said = (f"was near {where}", "was never there", "likes music")[label]
    return {"premise": premise, "hypothesis": f"{who} {said}", "label": label}


def boolq(pick: random.Random) -> Row:
    """`super_glue`, `boolq`."""
    passage, who, where = sentence(pick)
    label = pick.randrange(2)
    asked = where if label else pick.choice([place for place in PLACES if place != where])
    return {"passage": passage, "question": f"was {who} near {asked}", "label": label}


def wsc(pick: random.Random) -> Row:
    """`super_glue`, `wsc.fixed`."""
    first, second = pick.sample(NAMES, 2)
    label = pick.randrange(2)
    text = f"{first} called {second} because She was at {pick.choice(PLACES)}."
    return {"text": text, "span1_text": first if label else second, "span2_text": "She", "label": label}


def wic(pick: random.Random) -> Row:
    """`super_glue`, `wic`."""
    label = pick.randrange(2)
    first, second = (f"{pick.choice(NAMES)} sat on the bank of the river.", "The bank lent them money.")
    other = f"The bank was green near {pick.choice(PLACES)}." if label else second
    return {"word": "bank", "sentence1": first, "sentence2": other, "label": label}


def multirc(pick: random.Random) -> Row:
    """`super_glue`, `multirc`."""
    paragraph, who, _ = sentence(pick)
    label = pick.randrange(2)
    answer = who if label else pick.choice([name for name in NAMES if name != who])
    return {"paragraph": paragraph, "question": "Who is it about?", "answer": answer, "label": label}


def copa(pick: random.Random) -> Row:
    """`super_glue`, `copa`."""
    label, question = pick.randrange(2), pick.choice(("cause", "effect"))
    (act, reason), (_, other) = pick.sample(ACTS, 2)
    premise, right = (act, reason) if question == "cause" else (reason, act)
    choices = [f"She {right}.", f"She {other}."][:: 1 if label == 0 else -1]
    return {
        "premise": f"{pick.choice(NAMES)} {premise}.",
        "question": question,
        "choice1": choices[0],
        "choice2": choices[1],
        "label": label,
    }


def record(pick: random.Random) -> Row:
    """`super_glue`, `record`."""
    text, who, where = sentence(pick)
    names = [who, *pick.sample([name for name in NAMES if name != who], pick.randrange(1, 3))]
    pick.shuffle(names)
    return {
        "passage": f"{text} {' and '.join(names)} were friends.\n@highlight\n{text}",
        "query": f"It was @placeholder who went to {where}.",
        "entities": names,
        "answers": [who],
    }


def squad(pick: random.Random) -> Row:
    """`squad`."""
    text, who, where = sentence(pick)
    asked, answer = pick.choice((("Who was it?", who), ("Near which place?", where)))
    spans = {"text": [answer], "answer_start": [text.index(answer)]}
    return {"id": "0", "title": "A_day", "context": text, "question": asked, "answers": spans}


def drop(pick: random.Random) -> Row:
    """`ucinlp/drop`."""
    count, (_, who, where) = pick.randrange(2, 9), sentence(pick)
    passage = f"{who} counted {count} birds near {where}."
    spans = {"spans": [str(count)], "types": ["number"]}
    return {"passage": passage, "question": "How many birds were there?", "answers_spans": spans}


MAKERS: dict[str, Callable[[random.Random], Row]] = {
    each.__name__: each for each in (sst2, rte, cb, boolq, wsc, wic, multirc, copa, record, squad, drop)
}


def make_data(folder: Path) -> list[str]:
    """Write all data sets under a folder; returns their texts, for a vocabulary."""
    texts = []
    for name, maker in MAKERS.items():
        for part, count in (("train", TRAIN), ("validation", VALIDATION)):
            pick = random.Random(f"{name} {part}")
            rows = [maker(pick) for _ in range(count)]
            texts += [str(value) for row in rows for value in row.values()]
            (folder / name / part).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / name / part / "rows.parquet")
    return texts


def make_model(folder: Path, texts: list[str]) -> None:
    """Save an OPT with random weights, and a byte-level tokenizer that, like OPT's, begins every text with `</s>`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    settings = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
    )
    OPTForCausalLM(settings).save_pretrained(folder)


def main(folder: Path) -> None:
    """Make the data, and a model that can read them."""
    make_model(folder / "model", make_data(folder / "data"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "data" / "small")
