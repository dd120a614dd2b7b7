"""Records -> token rows, in the form that the policy sees when it generates.

Chats are rendered by the tokenizer's own template. A row is the tokens of prompt + response, closed with EOS, and
begins with the very tokens that the policy is given to continue (`data.tokens`).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from ppo_jax.data.chat import TOOLS, end_ids, render, turn_end, write_answer
from ppo_jax.data.lines import Message, Text
from ppo_jax.data.records import ChoiceRecord, PairRecord, RatingRecord, SFTRecord
from ppo_jax.data.tokens import leading_bos, token_rows, tokenise, with_bos, without_ends

TooLong = Literal["error", "truncate_left", "drop", "share"]  # share: with a template (`data.llamafactory.rows`)


class EncodedRatings(NamedTuple):
    rows: list[list[int]]
    ratings: list[float]
    too_long: int


class EncodedChoices(NamedTuple):
    groups: list[list[list[int]]]  # the responses' token rows, of each prompt
    best: list[int]
    too_long: int


class EncodedPrompts(NamedTuple):
    rows: list[list[int]]
    kept: list[int]  # kept[i] is the place of rows[i] among the texts that were given
    too_long: int  # how many were truncated or dropped


class EncodedPairs(NamedTuple):
    chosen: list[list[int]]
    rejected: list[list[int]]
    margins: list[float]
    kept: list[int]
    too_long: int
    starts: Sequence[tuple[int, int]] = ()  # of the answers in chosen[i] and rejected[i]; -1: it was cut itself


class EncodedSFT(NamedTuple):
    rows: list[list[int]]
    starts: list[int]  # rows[i][starts[i]:] is the response
    kept: list[int]
    too_long: int


def encode_prompts(
    prompts: Sequence[Text],
    tokenizer: Any,
    max_length: int,
    too_long: TooLong = "error",
    where: Sequence[str] | None = None,
) -> EncodedPrompts:
    """Encode prompts as token rows of 1 to `max_length` tokens; BOS comes first where the tokenizer uses one.

    Args:
      too_long: what to do with longer ones. "error"; "truncate_left" keeps BOS and the last tokens; "drop".
        The result says how many there were.
      where: names of the prompts for messages, such as `PromptRecord.where`; by default their places.

    Raises:
      ValueError: some are too long (how many, and which is the longest), one has no tokens, or none is left.
    """
    names = where or [f"prompt {i}" for i in range(len(prompts))]
    bos = leading_bos(tokenizer)
    rows = [_encode(prompt, tokenizer, bos, name) for prompt, name in zip(prompts, names, strict=True)]
    for row, name in zip(rows, names, strict=True):
        if row == bos:
            raise ValueError(f"{name}: the prompt has no tokens")
    kept, count = limit_rows([len(row) for row in rows], max_length, too_long, names)
    return EncodedPrompts([cut_row(rows[i], max_length, bos) for i in kept], kept, count)


def encode_pairs(
    records: Sequence[PairRecord], tokenizer: Any, max_length: int, too_long: TooLong = "error", eos: bool = True
) -> EncodedPairs:
    """Encode prompt + answer (+ EOS) as token rows, as a finished response looks in PPO. Arguments as `encode_prompts`.

    A pair is too long if one of its rows is; both then lose the same tokens of the prompt. Without `eos` an answer that
    spells EOS loses it, since a reward reads the text of a response (`rewards.adapter`).
    """
    bos = leading_bos(tokenizer)
    sides: list[list[tuple[list[int], int]]] = [[], []]
    for rows, name in zip(sides, ("chosen", "rejected"), strict=True):
        rows += _answered([(*_asked(r.prompt, getattr(r, name)), r.where) for r in records], tokenizer, eos)
    lengths = [max(len(a), len(b)) for (a, _), (b, _) in zip(*sides, strict=True)]
    kept, count = limit_rows(lengths, max_length, too_long, [record.where for record in records])
    pairs = [_cut_alike([sides[0][i], sides[1][i]], max_length, bos) for i in kept]
    chosen, rejected = ([pair[side][0] for pair in pairs] for side in (0, 1))
    starts = [(pair[0][1], pair[1][1]) for pair in pairs]
    return EncodedPairs(chosen, rejected, [records[i].margin for i in kept], kept, count, starts)


def expand_turns(records: Sequence[SFTRecord]) -> list[SFTRecord]:
    """Make each answer of a conversation a demonstration of its own, behind what was said before it.

    So its row is what the policy is given when it writes that answer, also where a template writes earlier answers in
    another way than the last one (it may leave their thoughts out).
    """
    expanded = []
    for record in records:
        messages = record.prompt if isinstance(record.prompt, list) else []
        for place, message in enumerate(messages):
            if message["role"] == "assistant" and any(earlier["role"] != TOOLS for earlier in messages[:place]):
                expanded.append(record._replace(prompt=messages[:place], response=_answer_of(message)))
        expanded.append(record)
    return expanded


def encode_sft(
    records: Sequence[SFTRecord], tokenizer: Any, max_length: int, too_long: TooLong = "error"
) -> EncodedSFT:
    """Encode prompt + response + EOS as token rows, and where the responses start. Arguments as `encode_prompts`.

    Raises:
      ValueError: as `encode_prompts`; also with "truncate_left" if a response alone is too long.
    """
    bos = leading_bos(tokenizer)
    both = _answered([(r.prompt, r.response, r.where) for r in records], tokenizer, True)
    kept, count = limit_rows([len(row) for row, _ in both], max_length, too_long, [r.where for r in records])
    rows, starts = [], []
    for i in kept:
        row, start = both[i]
        room = max_length - len(bos)
        if len(row) - start > room:
            raise ValueError(
                f"{records[i].where}: the response alone has {len(row) - start} tokens, there is room for {room}"
            )
        rows.append(cut_row(row, max_length, bos))
        starts.append(start - (len(row) - len(rows[-1])))
    return EncodedSFT(rows, starts, kept, count)


def _asked(prompt: Text | None, answer: Text) -> tuple[Text | None, str | Message]:
    """Split an answer into (prompt, response); one in messages is its last message, earlier ones follow the prompt."""
    if isinstance(answer, str):
        return prompt, answer
    return [*(prompt or []), *answer[:-1]], _answer_of(answer[-1])


def _answer_of(message: Message) -> str | Message:
    """Take the text of an answer; all of it where it calls tools."""
    return message if "tool_calls" in message else str(message["content"])


def _encode(text: Text, tokenizer: Any, bos: list[int], where: str) -> list[int]:
    (ids,) = tokenise([render(text, tokenizer, where)], tokenizer)
    return ids if isinstance(text, list) else with_bos(ids, bos)  # a chat template writes its own BOS


def _answered(
    texts: Sequence[tuple[Text | None, str | Message, str]], tokenizer: Any, close: bool
) -> list[tuple[list[int], int]]:
    """Encode each (prompt, response, name for messages) as (tokens, where the response begins).

    With `close` the end token follows: in a chat the template's own, else EOS.
    """
    bos, ends, turn, eos = leading_bos(tokenizer), end_ids(tokenizer), turn_end(tokenizer), tokenizer.eos_token_id
    sides: list[tuple[str, str]] = [
        write_answer(prompt, response, tokenizer, turn, where)
        if isinstance(prompt, list)
        else (prompt or "", str(response))  # a response is a message in chats only
        for prompt, response, where in texts
    ]
    rows = []
    for (prompt, _, _), (row, start) in zip(texts, token_rows(sides, tokenizer), strict=True):
        end = turn if isinstance(prompt, list) and turn is not None else eos
        if close and end is None:
            raise ValueError("the tokenizer has no EOS token, so responses cannot be closed; set tokenizer.eos_token")
        if not isinstance(prompt, list):  # a chat template writes its own BOS
            bare, row = len(row), with_bos(row, bos)
            start = max(start + len(row) - bare, len(bos))
        rows.append((without_ends(row, ends, start) + ([end] if close else []), start))
    return rows


def limit_rows(lengths: list[int], max_length: int, too_long: TooLong, names: Sequence[str]) -> tuple[list[int], int]:
    """Choose which rows to keep, and count those that were too long."""
    if too_long not in get_args(TooLong):
        raise ValueError(f"too_long={too_long!r}; allowed: {', '.join(get_args(TooLong))}")
    if too_long == "share":
        raise ValueError("--too-long share is the way of LLaMA-Factory and goes with --dataset.template.name")
    if max_length < 2:
        raise ValueError(f"max_length={max_length} must be at least 2")
    long = [i for i, length in enumerate(lengths) if length > max_length]
    if long and too_long == "error":
        longest = max(long, key=lengths.__getitem__)
        raise ValueError(
            f"{len(long)} of {len(lengths)} texts are longer than {max_length} tokens; the longest has "
            f'{lengths[longest]} ({names[longest]}). Raise the limit, or choose "truncate_left" or "drop"'
        )
    kept = [i for i, length in enumerate(lengths) if too_long != "drop" or length <= max_length]
    if not kept:
        raise ValueError(f"no text is left: all {len(lengths)} are longer than {max_length} tokens")
    return kept, len(long)


def cut_row(row: list[int], max_length: int, bos: list[int]) -> list[int]:
    if len(row) <= max_length:
        return row
    return bos + row[len(row) - max_length + len(bos) :] if row[: len(bos)] == bos else row[-max_length:]


def _cut_alike(rows: Sequence[tuple[list[int], int]], max_length: int, bos: list[int]) -> list[tuple[list[int], int]]:
    """Cut answers (row, start) to one prompt on the left to `max_length`, so that the prompt stays one and the same.

    The longest says how much of the prompt goes, from all of them. An answer that is too long by itself is cut further,
    and its start is -1.
    """
    excess = max(len(row) for row, _ in rows) - max_length
    if excess <= 0:
        return list(rows)
    cut = []
    for row, start in rows:
        front = len(bos) if row[: len(bos)] == bos else 0
        gone = min(excess, start - front)
        short = cut_row(row[:front] + row[front + gone :], max_length, bos)
        cut.append((short, start - gone if len(short) == len(row) - gone else -1))
    return cut


def encode_ratings(
    records: Sequence[RatingRecord], tokenizer: Any, max_length: int, too_long: TooLong = "error"
) -> EncodedRatings:
    """Encode prompt + response as token rows, without EOS. Arguments and errors as `encode.encode_prompts`."""
    bos = leading_bos(tokenizer)
    rows = [row for row, _ in _answered([(r.prompt, r.response, r.where) for r in records], tokenizer, False)]
    kept, count = limit_rows([len(row) for row in rows], max_length, too_long, [r.where for r in records])
    return EncodedRatings([cut_row(rows[i], max_length, bos) for i in kept], [records[i].rating for i in kept], count)


def encode_choices(
    records: Sequence[ChoiceRecord], tokenizer: Any, max_length: int, too_long: TooLong = "error"
) -> EncodedChoices:
    """Encode prompt + each response, without EOS; a choice is too long if one of its rows is. As above.

    A choice is too long if one of its rows is; all of them then lose the same tokens of the prompt.
    """
    bos = leading_bos(tokenizer)
    rows = iter(_answered([(r.prompt, text, r.where) for r in records for text in r.responses], tokenizer, False))
    groups = [[next(rows) for _ in r.responses] for r in records]
    lengths = [max(len(row) for row, _ in group) for group in groups]
    kept, count = limit_rows(lengths, max_length, too_long, [r.where for r in records])
    cut = [[row for row, _ in _cut_alike(groups[i], max_length, bos)] for i in kept]
    return EncodedChoices(cut, [records[i].best for i in kept], count)
