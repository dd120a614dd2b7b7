"""The rules by which texts become token rows, in every stage alike: one BOS in front, one end token at most."""

from collections.abc import Sequence
from typing import Any


def tokenise(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens that each text spells, special ones among them; none is added."""
    if not texts:  # transformers' tokenizers cannot take none
        return []
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return rows


def leading_bos(tokenizer: Any) -> list[int]:
    """[the BOS id] if this tokenizer puts one before plain text, else []."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that close an answer: EOS, where the tokenizer has one."""
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def with_bos(row: Sequence[int], bos: Sequence[int]) -> list[int]:
    """The row behind `bos` ([] or one token): a text that spells BOS at its beginning gets no second one."""
    return list(row) if list(row[: len(bos)]) == list(bos) else [*bos, *row]


def without_ends(row: Sequence[int], ends: Sequence[int], start: int = 0) -> list[int]:
    """The row without the end tokens at its end: an answer that spells them is closed once, or not at all.

    What lies before `start` stays.
    """
    stop = len(row)
    while stop > start and row[stop - 1] in ends:
        stop -= 1
    return list(row[:stop])
