"""Whole conversations as token rows, with the loss on every answer of them.

A template that marks what the assistant says ({% generation %}) says itself which tokens are learnt. Of any other the
answers are what it writes for k + 1 messages and not yet for k with its generation prompt, up to the token that ends a
turn: that holds where both are beginnings of the whole text, and else is an error.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ppo_jax.data.chat import TOOLS, render, split_tools, template_options, turn_closing, turn_end
from ppo_jax.data.encode import TooLong, cut_row, encode_sft, limit_rows
from ppo_jax.data.lines import Message
from ppo_jax.data.records import SFTRecord
from ppo_jax.data.tokens import leading_bos

_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")


class EncodedTurns(NamedTuple):
    rows: list[list[int]]
    starts: list[int]  # of the first answer
    masks: list[list[bool]]  # True on the tokens of every answer and its end
    kept: list[int]
    too_long: int


def encode_turns(
    records: Sequence[SFTRecord], tokenizer: Any, max_length: int, too_long: TooLong = "error"
) -> EncodedTurns:
    """Encode each conversation as one row; plain text as `encode.encode_sft` does. Arguments and errors as there.

    Raises:
      ValueError: also where the answers cannot be told apart, or none is left of a row that was cut.
    """
    bos = leading_bos(tokenizer)
    both = [_encode_one(record, tokenizer) for record in records]
    kept, count = limit_rows([len(row) for row, _ in both], max_length, too_long, [r.where for r in records])
    rows, masks = [], []
    for i in kept:
        row, mask = both[i]
        cut = cut_row(row, max_length, bos)
        front = len(bos) if row[: len(bos)] == bos else 0
        learnt = mask if len(cut) == len(row) else [False] * front + mask[len(row) - len(cut) + front :]
        if not any(learnt):
            raise ValueError(f"{records[i].where}: no answer is left within {max_length} tokens")
        rows.append(cut)
        masks.append(learnt)
    return EncodedTurns(rows, [mask.index(True) for mask in masks], masks, kept, count)


def _encode_one(record: SFTRecord, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Encode one record as (tokens, which of them are learnt); what follows the last of these is left out."""
    if not isinstance(record.prompt, list):
        found = encode_sft([record], tokenizer, 1 << 30)
        row, mask = found.rows[0], [place >= found.starts[0] for place in range(len(found.rows[0]))]
    else:
        turn = record.response
        answer: Message = turn if isinstance(turn, dict) else {"role": "assistant", "content": turn}
        messages = [*record.prompt, answer]
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("the answers of a conversation are found by a fast tokenizer only; choose --turns all")
        whole = render(messages, tokenizer, record.where, add_generation_prompt=False)
        marked = bool(_MARKER.search(str(tokenizer.chat_template)))
        row, mask = _marked(messages, tokenizer) if marked else _between(messages, whole, tokenizer, record.where)
    if not any(mask):
        raise ValueError(f"{record.where}: the chat template marks nothing as an answer")
    stop = len(mask) - mask[::-1].index(True)
    row, mask = row[:stop], mask[:stop]
    if isinstance(record.prompt, list) and turn_end(tokenizer) is None and tokenizer.eos_token_id is not None:
        return [*row, tokenizer.eos_token_id], [*mask, True]
    return row, mask


def _marked(messages: list[Message], tokenizer: Any) -> tuple[list[int], list[bool]]:
    tools, said = split_tools(messages)
    more = template_options(tokenizer, tools)
    found = tokenizer.apply_chat_template(
        said, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **more
    )
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def _between(messages: list[Message], whole: str, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    end = turn_end(tokenizer)
    closing = None if end is None else str(tokenizer.convert_ids_to_tokens(end))
    spans = []
    for place, message in enumerate(messages):
        asked = [earlier for earlier in messages[:place] if earlier["role"] != TOOLS]
        if message["role"] != "assistant" or not asked:
            continue
        before = render(messages[:place], tokenizer, where)
        after = render(messages[: place + 1], tokenizer, where, add_generation_prompt=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"{where}: the chat template writes an answer in another way when more follows, and marks none "
                "({% generation %}), so they cannot be learnt in one row; choose --turns all"
            )
        found = after.rfind(closing, len(before)) if closing else -1
        stop = found + len(closing or "") if found >= 0 else len(after.removesuffix(turn_closing(tokenizer)))
        spans.append((len(before), stop))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return list(encoded["input_ids"]), [any(a <= start < b for a, b in spans) for start, _ in offsets]
