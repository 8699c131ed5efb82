"""Prompts for the data sets of the literature, in their usual columns: the keys that `template: NAME` fills in.

The wording of MeZO's eleven tasks for causal language models (Malladi et al. 2023, appendix E) is what its published
numbers were measured with, so it is kept to the letter. MeZO has `sst5`, `trec`, `mnli` and `snli` for masked language
models only: those are the templates that end in `_mask`, after LM-BFF (Gao et al. 2021); without it they are put like
the tasks nearest to them. Columns are those of the data sets on the Hugging Face hub (`glue`, `super_glue`,
`SetFit/sst5`, `trec`, `snli`, `squad`, `ucinlp/drop`).
"""

from __future__ import annotations

from typing import Any

_NLI = {"0": "Yes", "1": "Maybe", "2": "No"}
_TRUE = {"0": "No", "1": "Yes"}

_COPA = "{premise.rstrip().removesuffix('.')} { {'cause': 'because', 'effect': 'so'}[question] }"
_LOWER_FIRST = (
    "{choice if choice.split(' ')[0] == 'I' else choice.split(' ')[0].lower() ~ choice[choice.split(' ')[0] | length:]}"
)
_BOOLQ = "{passage} {question[0] | upper}{question[1:]}{'' if question.endswith('?') else '?'}"

_MASKED_PAIR = "{premise.rstrip().rstrip('.,;!?')}?{mask}, {hypothesis[0] | lower}{hypothesis[1:]}"

TEMPLATES: dict[str, dict[str, Any]] = {
    "sst2": {
        "kind": "classification",
        "prompt": "{sentence.strip()} It was",
        "label_words": {"0": "terrible", "1": "great"},
    },
    "sst5": {
        "kind": "classification",
        "prompt": "{text.strip()} It was",
        "label_words": {"0": "terrible", "1": "bad", "2": "okay", "3": "good", "4": "great"},
    },
    "trec": {
        "kind": "classification",
        "prompt": "{text.strip()}\nThis question asks for:",
        "label_words": {
            "0": "Expression",
            "1": "Entity",
            "2": "Description",
            "3": "Human",
            "4": "Location",
            "5": "Number",
        },
        "label_column": "coarse_label",
    },
    "mnli": {
        "kind": "classification",
        "prompt": 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        "label_words": _NLI,
    },
    "snli": {
        "kind": "classification",
        "prompt": 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        "label_words": _NLI,
    },
    "rte": {
        "kind": "classification",
        "prompt": '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        "label_words": {"0": "Yes", "1": "No"},
    },
    "cb": {
        "kind": "classification",
        "prompt": 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        "label_words": {"0": "Yes", "1": "No", "2": "Maybe"},
    },
    "boolq": {"kind": "classification", "prompt": _BOOLQ, "label_words": _TRUE},
    "wsc": {
        "kind": "classification",
        "prompt": '{text}\nIn the previous sentence, does the pronoun "{span2_text.lower()}" refer to {span1_text}? '
        "Yes or No?\n",
        "label_words": _TRUE,
    },
    "wic": {
        "kind": "classification",
        "prompt": 'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n",
        "label_words": _TRUE,
    },
    "multirc": {
        "kind": "classification",
        "prompt": '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        "label_words": _TRUE,
    },
    "copa": {
        "kind": "multiple_choice",
        "prompt": _COPA,
        "choices": ["choice1", "choice2"],
        "choice_text": _LOWER_FIRST,
        "answer": "label",
    },
    "record": {
        "kind": "multiple_choice",
        "prompt": "{passage.replace('@highlight\n', '- ')}\n-",
        "choices": "entities",
        "choice_text": "{query.replace('@placeholder', choice)}",
        "answer": "answers",
    },
    "squad": {
        "kind": "generation",
        "prompt": "Title: {title}\nContext: {context}\nQuestion: {question.strip()}\nAnswer:",
        "answers": "answers.text",
    },
    "drop": {
        "kind": "generation",
        "prompt": "Passage: {passage}\nQuestion: {question.strip()}\nAnswer:",
        "answers": "answers_spans.spans",
    },
}
"""The keys of a task by the name of a data set."""

for _name, _prompt in {
    "sst2": "{sentence.strip()} It was {mask}.",
    "sst5": "{text.strip()} It was {mask}.",
    "trec": "{mask}: {text.strip()}",
    "mnli": _MASKED_PAIR,
    "snli": _MASKED_PAIR,
    "rte": _MASKED_PAIR,
}.items():
    TEMPLATES[f"{_name}_mask"] = {**TEMPLATES[_name], "prompt": _prompt}
