"""The end of a long text: what a reward model with a limit reads, without the tokens of all that stands before.

A model reads the last n tokens. The n-th last begins at most n * (length of the longest token) characters before the
end, and mostly far later, so a short end is tokenised first, and one twice as long as long as it has too few tokens.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from ppo_jax.data.tokens import token_rows

MARGIN = 32  # tokens at the beginning of an end, of which the first may differ from those of the whole text
FIRST = 8  # characters for a token, at the first try
WORD = re.compile(r"(?<=\S)\s(?=\S)")  # no tokenizer in use joins what is before with what is behind

Side = tuple[str, str]  # (before, after)


def longest_token(tokenizer: Any) -> int:
    """Count the characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def cut_sides(side: Side, chars: int) -> Side:
    """Cut before + after to its last `chars` characters or a little fewer, so that it begins with a word if it can."""
    before, after = side
    more = len(before) + len(after) - chars
    if more <= 0:
        return side
    text = before if more < len(before) else after
    start = more if text is before else more - len(before)
    found = WORD.search(text, start, start + min(MARGIN, (len(text) - start) // 2) + 2)  # 2: what follows is looked at
    text = text[found.start() if found else start :]
    return (text, after) if more < len(before) else ("", text)


def end_rows(
    sides: Sequence[Side],
    tokenizer: Any,
    lengths: Sequence[int],
    longest: int,
    finish: Callable[[Sequence[int]], list[int]],
) -> list[list[int]]:
    """Find the tokens of each (before, after), as `token_rows` does, but of a long text only those of its end.

    Args:
      lengths: tokens that are wanted of each text; what comes back may have more, and of a shorter text has all.
      longest: characters of the longest token.
      finish: what is done with a row before its tokens are counted: end tokens that are not read, say, are cut off.
    """
    rows: list[list[int]] = [[] for _ in sides]
    most = [longest * (length + MARGIN) for length in lengths]
    chars = [min(longest, FIRST) * (length + MARGIN) for length in lengths]
    todo = list(range(len(sides)))
    while todo:
        found = token_rows([cut_sides(sides[i], chars[i]) for i in todo], tokenizer)
        short = []
        for i, (row, _) in zip(todo, found, strict=True):
            rows[i] = finish(row)
            if sum(map(len, sides[i])) > chars[i] < most[i] and len(rows[i]) < lengths[i] + MARGIN:
                short.append(i)
                chars[i] = min(2 * chars[i], most[i])
        todo = short
    return rows
