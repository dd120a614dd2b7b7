"""The rules by which texts become token rows, in every stage alike.

    one BOS in front, one end token at most
    the row of a prompt and its answer is the tokens of the text that both make, where these begin with the prompt's own
    else a token of the whole text would cross the seam. The policy is given the prompt's own tokens and can only go on
        behind them, so these stay, and the answer's follow as they stand within a text (`continuation`)

So a row always begins with what the policy is given to continue. To tokenise the answer as a text of its own would be
wrong: tokenizers of the SentencePiece kind put a blank before a text, and "the ri" + "ver" would read "the ri ver".
"""

from collections.abc import Sequence
from typing import Any

# Texts that tokens seldom join with what follows. What a tokenizer does not know, or drops, is passed over.
GUARDS = ("\n", "a", ".", "1", "a ")


def tokenise(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Find the tokens that each text spells, special ones among them; none is added."""
    if not texts:  # transformers' tokenizers cannot take none
        return []
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return rows


def leading_bos(tokenizer: Any) -> list[int]:
    """List [the BOS id] if this tokenizer puts one before plain text, else []."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


def token_rows(sides: Sequence[tuple[str, str]], tokenizer: Any) -> list[tuple[list[int], int]]:
    """Find (tokens of before + after, where those of after begin) of each (before, after); nothing is added."""
    whole = tokenise([before + after for before, after in sides], tokenizer)
    fronts = tokenise([before for before, _ in sides], tokenizer)
    rows = []
    for row, front, (_, after) in zip(whole, fronts, sides, strict=True):
        crosses = row[: len(front)] != front
        rows.append(([*front, *continuation(after, tokenizer)] if crosses else row, len(front)))
    return rows


def continuation(text: str, tokenizer: Any) -> list[int]:
    """Find the tokens of a text that stands behind another: those that follow a line break, or the like, in one."""
    for guard in GUARDS:
        front, row = tokenise([guard, guard + text], tokenizer)
        if front and row[: len(front)] == front:
            return row[len(front) :]
    return tokenise([text], tokenizer)[0]  # it merges with all of them: as a text of its own


def with_bos(row: Sequence[int], bos: Sequence[int]) -> list[int]:
    """Put the row behind `bos` ([] or one token): a text that spells BOS at its beginning gets no second one."""
    return list(row) if list(row[: len(bos)]) == list(bos) else [*bos, *row]


def without_ends(row: Sequence[int], ends: Sequence[int], start: int = 0) -> list[int]:
    """Cut the end tokens off the row's end: an answer that spells them is closed once, or not at all.

    What lies before `start` stays.
    """
    stop = len(row)
    while stop > start and row[stop - 1] in ends:
        stop -= 1
    return list(row[:stop])
