"""Label words in the place of a mask, as masked language models fill it (Gao et al. 2021, and MeZO's RoBERTa)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoray.config import PromptedTask
from zoray.errors import ConfigError, DataError
from zoray.tasks.store import TokenBatch
from zoray.tasks.worded import Row, prompts, shortened, word_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fill(task: PromptedTask, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> tuple[TokenBatch, int]:
    """Each row once with every label word in the place of the mask, and how many rows were cut.

    Raises:
        ConfigError: the tokenizer has no mask, or a label word is not one of its tokens.
        DataError: a prompt has not one mask, or loses it where it is cut.
    """
    mask = tokenizer.mask_token_id
    if mask is None:
        raise ConfigError(
            "The prompt has a {mask}, and the model's tokenizer has none.",
            where="task.prompt",
            advice="Leave it out for a causal language model: the word comes after the prompt.",
        )
    words = [_token(tokenizer, word) for word in task.label_words.values()]
    texts = prompts(task, rows, tokenizer.mask_token)
    batch, cut = TokenBatch([], {"loss_start": [], "candidate": [], "correct": []}), 0
    for ids, (row, where) in zip(tokenizer(texts, verbose=False)["input_ids"], rows, strict=True):
        _, right = word_of(task, row, where)
        kept = shortened(ids, task.max_length, ids[0])
        cut += len(kept) < len(ids)
        if kept.count(mask) != 1:
            raise DataError(
                f"The text has {kept.count(mask)} masks in its last {len(kept)} tokens.",
                where=where,
                advice="Put {mask} into task.prompt once, and raise task.max_length if texts are long.",
            )
        place = kept.index(mask)
        for number, word in enumerate(words):
            batch.tokens.append([*kept[:place], word, *kept[place + 1 :]])
            batch.extras["loss_start"].append(place)
            batch.extras["candidate"].append(number)
            batch.extras["correct"].append(int(number in right))
    return batch, cut


def _token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    ids = tokenizer(f" {word}", add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise ConfigError(
            f"The word {word!r} is {len(ids)} tokens, and a mask stands for one.",
            where="task.label_words",
            advice="Choose a word that is one token of this model.",
        )
    return int(ids[0])
