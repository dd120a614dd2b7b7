"""From prompt records to what a run trains on: held-out rows apart, token rows, and room for responses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ppo_jax.data import PromptRecord, TooLong, encode_prompts, render
from ppo_jax.models.pretrained import Model

T = TypeVar("T")


class PromptSet(NamedTuple):
    """Prompts as token rows and as text, with whatever else the user gave for each."""

    rows: Sequence[Sequence[int]]
    texts: Sequence[str]
    metadata: Sequence[dict[str, Any]]


def split_held_out(records: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """Split into (training, held-out): `count` random records, at most a fifth, are held out; if none, both are all."""
    if count < 0:
        raise ValueError(f"--held-out {count} must not be negative")
    count = min(count, len(records) // 5)
    if not count:
        return list(records), list(records)
    chosen = set(np.random.default_rng(seed).permutation(len(records))[:count].tolist())
    return [r for i, r in enumerate(records) if i not in chosen], [r for i, r in enumerate(records) if i in chosen]


def too_few_rows(option: str, batch_size: int, rows: int, path: Path) -> str:
    """Say that a batch has more rows than there are."""
    return f"{option} {batch_size}, but {path} leaves only {rows} to train on; lower it or give more data"


def encode_prompt_set(
    records: Sequence[PromptRecord], model: Model, max_length: int, too_long: TooLong
) -> tuple[PromptSet, int]:
    """Encode prompts as token rows and as the text of those tokens; and count those that were too long.

    Of a prompt that "truncate_left" cut, the text is cut too: rewards that read text score what the policy read.
    """
    where = [record.where for record in records]
    encoded = encode_prompts([record.prompt for record in records], model.tokenizer, max_length, too_long, where)
    kept = [records[i] for i in encoded.kept]
    texts = [render(record.prompt, model.tokenizer, record.where) for record in kept]
    if too_long == "truncate_left" and encoded.too_long:
        pairs = zip(encoded.rows, texts, strict=True)
        texts = [text if len(row) < max_length else _tail(row, text, model) for row, text in pairs]
    return PromptSet(encoded.rows, texts, [record.metadata for record in kept]), encoded.too_long


def _tail(row: Sequence[int], text: str, model: Model) -> str:
    """Find the end of `text` that its last tokens, in `row`, stand for; all of it where `row` holds them all."""
    fast = getattr(model.tokenizer, "is_fast", False)
    found = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
    ids = list(found["input_ids"])
    if list(row[-len(ids) :]) == ids:
        return text
    own = row[1:] if row[0] == model.tokenizer.bos_token_id else row  # BOS, which stays in front
    return text[found["offset_mapping"][-len(own)][0] :] if fast else model.decode(np.asarray(own))


def check_room(
    model: Model, rows: Sequence[Sequence[int]], response: int = 0, option: str = "--sampling.response-length"
) -> None:
    """Raise ValueError unless the longest row and `response` more tokens fit into the model's positions.

    The message says which option to lower: where rows get responses, of the length that `option` gives, --max-prompt
    limits them, or that option must be lowered first; rows without are limited by --max-length.
    """
    longest, room = max(map(len, rows)), model.config.max_positions
    if longest + response <= room:
        return
    more, limit, left = "", "--max-length", room - response
    if response:
        more, limit = f" and {response} of response", "--max-prompt"
    advice = f'Lower {limit} to {left} and choose --too-long "truncate_left" or "drop"'
    if response and left < 2:  # no prompt is so short
        advice = f"Lower {option} to {max(room - longest, room // 2)}"
    raise ValueError(
        f"the longest text has {longest} tokens; these{more} do not fit into the {room} positions of {model.name}. "
        + advice
    )
