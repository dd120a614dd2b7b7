"""Ratings and choices: the other two forms in which people say what they prefer (pairs are in `records`)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.data.encode import TooLong, _bos, _cut, _joined, _limit
from ppo_jax.data.records import Text, _chat_or_text, _form, _objects, _shown, _text


class RatingRecord(NamedTuple):
    prompt: Text | None
    response: str
    rating: float  # higher is better; only the order counts
    where: str  # "file:line"


class ChoiceRecord(NamedTuple):
    prompt: Text | None
    responses: list[str]  # at least two
    best: int  # place of the one that was chosen
    where: str


class EncodedRatings(NamedTuple):
    rows: list[list[int]]
    ratings: list[float]
    too_long: int


class EncodedChoices(NamedTuple):
    groups: list[list[list[int]]]  # the responses' token rows, of each prompt
    best: list[int]
    too_long: int


def read_ratings(path: str | Path) -> list[RatingRecord]:
    """Rated responses, one JSON object per line: {"response": text, "rating": number}, optionally "prompt".

    Raises:
      ValueError: a line is not that; the message names file, line and field.
      FileNotFoundError: there is no such file.
    """
    records = []
    for where, line in _objects(path):
        _form(line, where, [("response", "rating")], optional=("prompt",))
        rating = line["rating"]
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
            raise ValueError(f'{where}: "rating" must be a finite number, got {_shown(rating)}')
        records.append(
            RatingRecord(_prompt(line, where), _text(line["response"], where, "response"), float(rating), where)
        )
    return records


def read_choices(path: str | Path) -> list[ChoiceRecord]:
    """Best of n, one JSON object per line: {"responses": [text, ...], "best": place from 0}, optionally "prompt".

    Raises: as `read_ratings`.
    """
    records = []
    for where, line in _objects(path):
        _form(line, where, [("responses", "best")], optional=("prompt",))
        responses, best = line["responses"], line["best"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise ValueError(f'{where}: "responses" must be a list of at least 2 texts, got {_shown(responses)}')
        texts = [_text(text, where, f"responses[{i}]") for i, text in enumerate(responses)]
        if isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < len(texts):
            raise ValueError(f'{where}: "best" must be from 0 to {len(texts) - 1}, got {_shown(best)}')
        records.append(ChoiceRecord(_prompt(line, where), texts, best, where))
    return records


def encode_ratings(
    records: Sequence[RatingRecord], tokenizer: Any, max_length: int, too_long: TooLong = "error"
) -> EncodedRatings:
    """Token rows of prompt + response, without EOS. Arguments and errors as `encode.encode_prompts`."""
    bos = _bos(tokenizer)
    rows = [_joined(r.prompt, r.response, tokenizer, bos, [], r.where)[0] for r in records]
    kept, count = _limit([len(row) for row in rows], max_length, too_long, [r.where for r in records])
    return EncodedRatings([_cut(rows[i], max_length, bos) for i in kept], [records[i].rating for i in kept], count)


def encode_choices(
    records: Sequence[ChoiceRecord], tokenizer: Any, max_length: int, too_long: TooLong = "error"
) -> EncodedChoices:
    """Token rows of prompt + each response, without EOS; a choice is too long if one of its rows is. As above."""
    bos = _bos(tokenizer)
    groups = [[_joined(r.prompt, text, tokenizer, bos, [], r.where)[0] for text in r.responses] for r in records]
    lengths = [max(map(len, group)) for group in groups]
    kept, count = _limit(lengths, max_length, too_long, [r.where for r in records])
    cut = [[_cut(row, max_length, bos) for row in groups[i]] for i in kept]
    return EncodedChoices(cut, [records[i].best for i in kept], count)


def _prompt(line: dict[str, Any], where: str) -> Text | None:
    return _chat_or_text(line["prompt"], where, "prompt") if "prompt" in line else None
