"""The user's rows -> records, of our own form; `data.forms` brings others into it.

What is wrong in a file is a ValueError that names the file, the line or row and the field. A text is a string, or a
chat: a list of {"role": ..., "content": ...} messages, behind the tools that it may call (`data.chat.put_tools`).
"""

import json
import math
from typing import Any, NamedTuple

from ppo_jax.data.chat import put_tools
from ppo_jax.data.lines import (
    Message,
    Text,
    check_answered,
    check_chat_or_text,
    check_messages,
    check_text,
    check_tools,
    choose_form,
    read_prompt,
    show_value,
)


class RatingRecord(NamedTuple):
    prompt: Text | None
    response: str | Message  # as of a demonstration
    rating: float  # higher is better; only the order counts
    where: str  # "file:line"
    member: int = 0  # which of several files it is of


class ChoiceRecord(NamedTuple):
    prompt: Text | None
    responses: list[str]  # at least two
    best: int  # place of the one that was chosen
    where: str
    member: int = 0  # which of several files it is of


class PromptRecord(NamedTuple):
    prompt: Text
    metadata: dict[str, Any]  # whatever the user wants to find again beside the response
    where: str  # "file:line"
    member: int = 0  # which of several files it is of


class PairRecord(NamedTuple):
    prompt: Text | None  # None: the two texts stand alone
    chosen: Text  # messages: the last one is the assistant's, earlier ones follow the prompt
    rejected: Text
    margin: float  # by how much the chosen one is better; 0 if the file does not say
    where: str
    member: int = 0  # which of several files it is of


class SFTRecord(NamedTuple):
    prompt: Text | None  # None: plain text, all of which is learnt
    response: str | Message  # a message where it calls tools
    where: str
    member: int = 0  # which of several files it is of


Record = PromptRecord | PairRecord | SFTRecord | RatingRecord | ChoiceRecord


def identities(record: Record) -> set[str]:
    """List what makes two records one, for a measurement on held-out ones: they share the prompt, or one of the texts.

    The prompt of an answer in messages is all that comes before its last one.
    """
    prompt = record.prompt
    match record:
        case PromptRecord():
            answers: list[Any] = []
        case PairRecord():
            answers = [record.chosen, record.rejected]
        case ChoiceRecord():
            answers = list(record.responses)
        case _:
            answers = [record.response]
    found = set() if prompt is None else {_key("prompt", prompt)}
    for answer in answers:
        if isinstance(answer, list):
            found.add(_key("prompt", [*(prompt or []), *answer[:-1]]))
        elif isinstance(answer, str) and not isinstance(prompt, list):
            found.add(_key("text", (prompt or "") + answer))
    return found


def _key(kind: str, text: Text) -> str:
    return f"{kind} {json.dumps(text, ensure_ascii=False, sort_keys=True)}"


# -- one row -> one record --------------------------------------------------------------------------------------------


def make_prompt(row: dict[str, Any], where: str) -> PromptRecord:
    """Make a record of {"prompt": text or messages} or {"messages": [...]}, and optionally "metadata" and "tools"."""
    form = choose_form(row, where, [("prompt",), ("messages",)], optional=("metadata", "tools"))
    prompt = check_chat_or_text(row[form[0]], where, form[0])
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise ValueError(f'{where}: the last message of a prompt must not be the "assistant"\'s; that one is sampled')
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f'{where}: "metadata" must be an object, got {show_value(metadata)}')
    try:
        json.dumps(metadata, ensure_ascii=False).encode()  # it goes to reward servers and into files
    except UnicodeEncodeError:
        raise ValueError(f'{where}: "metadata" holds half of a surrogate pair') from None
    except TypeError as error:  # of a table: a date, or bytes
        raise ValueError(f'{where}: "metadata" holds what JSON cannot say ({error})') from None
    return PromptRecord(_with_tools(row, prompt, where), metadata, where)


def make_pair(row: dict[str, Any], where: str) -> PairRecord:
    """Make a record of {"chosen", "rejected"}, texts or messages, and optionally "prompt", "margin" and "tools"."""
    choose_form(row, where, [("chosen", "rejected")], optional=("prompt", "margin", "tools"))
    chosen, rejected = (check_chat_or_text(row[field], where, field) for field in ("chosen", "rejected"))
    prompt = read_prompt(row, where)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f'{where}: "chosen" and "rejected" must both be text or both be messages')
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, list):
            if isinstance(prompt, str):
                raise ValueError(f'{where}: "prompt" is text but "{field}" is messages; write both in one way')
            check_answered([*(prompt or []), *answer], where, field)
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1e38:
        raise ValueError(f'{where}: "margin" must be a finite number, at least 0, got {show_value(margin)}')
    if "tools" in row and prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = (_with_tools(row, answer, where) for answer in (chosen, rejected))
    elif "tools" in row:
        prompt = _with_tools(row, "" if prompt is None else prompt, where)
    return PairRecord(prompt, chosen, rejected, float(margin), where)


def make_demonstration(row: dict[str, Any], where: str) -> SFTRecord:
    """Make a record of {"prompt", "response"}, {"messages": [...]} or {"text"}; "tools" may go with messages."""
    form = choose_form(row, where, [("prompt", "response"), ("messages",), ("text",)], optional=("tools",))
    prompt: Text | None = None
    response: str | Message
    if form == ("messages",):
        messages = check_messages(row["messages"], where, "messages")
        check_answered(messages, where, "messages")
        prompt, last = messages[:-1], messages[-1]
        response = last if "tool_calls" in last else last["content"]
    else:
        prompt = check_chat_or_text(row["prompt"], where, "prompt") if form[0] == "prompt" else None
        response = check_text(row[form[-1]], where, form[-1])
    if "tools" in row:
        prompt = _with_tools(row, "" if prompt is None else prompt, where)
    return SFTRecord(prompt, response, where)


def make_rating(row: dict[str, Any], where: str) -> RatingRecord:
    """Make a record of {"response": text, "rating": number}, and optionally "prompt"."""
    choose_form(row, where, [("response", "rating")], optional=("prompt",))
    rating = row["rating"]
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not _is_finite(rating):
        raise ValueError(f'{where}: "rating" must be a finite number, got {show_value(rating)}')
    response = check_text(row["response"], where, "response")
    return RatingRecord(read_prompt(row, where), response, float(rating), where)


def make_choice(row: dict[str, Any], where: str) -> ChoiceRecord:
    """Make a record of {"responses": [text, ...], "best": place from 0}, and optionally "prompt"."""
    choose_form(row, where, [("responses", "best")], optional=("prompt",))
    responses, best = row["responses"], row["best"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(f'{where}: "responses" must be a list of at least 2 texts, got {show_value(responses)}')
    texts = [check_text(text, where, f"responses[{i}]") for i, text in enumerate(responses)]
    if isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < len(texts):
        raise ValueError(f'{where}: "best" must be from 0 to {len(texts) - 1}, got {show_value(best)}')
    return ChoiceRecord(read_prompt(row, where), texts, best, where)


def _with_tools(row: dict[str, Any], text: Text, where: str) -> Text:
    if "tools" not in row:
        return text
    if isinstance(text, str):
        raise ValueError(f'{where}: "tools" are for chat messages, but this is text')
    return put_tools(check_tools(row["tools"], where, "tools"), text)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        return False
