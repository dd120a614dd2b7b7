"""The user's files -> records: JSON lines, or plain text with one entry per line.

What is wrong in a file is a ValueError that names the file, the line and the field. A text is a string, or a chat:
a list of {"role": ..., "content": ...} messages.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.data.lines import (
    Text,
    check_answered,
    check_chat_or_text,
    check_messages,
    check_text,
    choose_form,
    read_lines,
    read_objects,
    read_prompt,
    show_value,
)


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


class PromptRecord(NamedTuple):
    prompt: Text
    metadata: dict[str, Any]  # whatever the user wants to find again beside the response
    where: str  # "file:line"


class PairRecord(NamedTuple):
    prompt: Text | None  # None: the two texts stand alone
    chosen: Text  # messages: the last one is the assistant's, earlier ones follow the prompt
    rejected: Text
    margin: float  # by how much the chosen one is better; 0 if the file does not say
    where: str


class SFTRecord(NamedTuple):
    prompt: Text | None  # None: plain text, all of which is learnt
    response: str
    where: str


Record = PromptRecord | PairRecord | SFTRecord | RatingRecord | ChoiceRecord


def identities(record: Record) -> set[str]:
    """List what makes two records one, for a measurement on held-out ones: they share the prompt, or one of the texts.

    The prompt of an answer in messages is all that comes before its last one.
    """
    prompt = record.prompt
    match record:
        case PromptRecord():
            answers: list[Text] = []
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
        elif not isinstance(prompt, list):
            found.add(_key("text", (prompt or "") + answer))
    return found


def _key(kind: str, text: Text) -> str:
    return f"{kind} {json.dumps(text, ensure_ascii=False, sort_keys=True)}"


def read_prompts(path: str | Path) -> list[PromptRecord]:
    """Read prompts: one text per line of a .txt file, otherwise one JSON object per line.

    {"prompt": text} or {"messages": [...]}, and optionally "metadata": {...}.

    Raises:
      ValueError: a line is not that; the message names file, line and field.
      FileNotFoundError: there is no such file.
    """
    if Path(path).suffix == ".txt":
        return [PromptRecord(check_text(line, where, "prompt"), {}, where) for where, line in read_lines(path)]
    records = []
    for where, line in read_objects(path):
        form = choose_form(line, where, [("prompt",), ("messages",)], optional=("metadata",))
        prompt = check_chat_or_text(line[form[0]], where, form[0])
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            raise ValueError(
                f'{where}: the last message of a prompt must not be the "assistant"\'s; that one is sampled'
            )
        metadata = line.get("metadata", {})
        if not isinstance(metadata, dict):
            raise ValueError(f'{where}: "metadata" must be an object, got {show_value(metadata)}')
        try:
            json.dumps(metadata, ensure_ascii=False).encode()  # it goes to reward servers and into files
        except UnicodeEncodeError:
            raise ValueError(f'{where}: "metadata" holds half of a surrogate pair') from None
        records.append(PromptRecord(prompt, metadata, where))
    return records


def read_pairs(path: str | Path) -> list[PairRecord]:
    """Read preferences, a JSON object per line: {"chosen": text, "rejected": text}, optionally "prompt" and "margin".

    Each text is a string or a list of messages; the answers are both the one or both the other. Strings are joined
    as they are, so a space between prompt and answer belongs to one of them.

    Raises: as `read_prompts`.
    """
    records = []
    for where, line in read_objects(path):
        choose_form(line, where, [("chosen", "rejected")], optional=("prompt", "margin"))
        chosen, rejected = (check_chat_or_text(line[field], where, field) for field in ("chosen", "rejected"))
        prompt = check_chat_or_text(line["prompt"], where, "prompt") if "prompt" in line else None
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise ValueError(f'{where}: "chosen" and "rejected" must both be text or both be messages')
        for field, answer in (("chosen", chosen), ("rejected", rejected)):
            if isinstance(answer, list):
                if isinstance(prompt, str):
                    raise ValueError(f'{where}: "prompt" is text but "{field}" is messages; write both in one way')
                check_answered([*(prompt or []), *answer], where, field)
        margin = line.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1e38:
            raise ValueError(f'{where}: "margin" must be a finite number, at least 0, got {show_value(margin)}')
        records.append(PairRecord(prompt, chosen, rejected, float(margin), where))
    return records


def read_sft(path: str | Path) -> list[SFTRecord]:
    """Read demonstrations: one text per line of a .txt file, otherwise one JSON object per line.

    {"prompt": text or messages, "response": text}, {"messages": [...]} (the last one, the assistant's, is the
    response) or {"text": text} (all of it is learnt).

    Raises: as `read_prompts`.
    """
    if Path(path).suffix == ".txt":
        return [SFTRecord(None, check_text(line, where, "text"), where) for where, line in read_lines(path)]
    records = []
    for where, line in read_objects(path):
        form = choose_form(line, where, [("prompt", "response"), ("messages",), ("text",)])
        prompt: Text | None = None
        if form == ("messages",):
            messages = check_messages(line["messages"], where, "messages")
            check_answered(messages, where, "messages")
            prompt, response = messages[:-1], messages[-1]["content"]
        else:
            prompt = check_chat_or_text(line["prompt"], where, "prompt") if form[0] == "prompt" else None
            response = check_text(line[form[-1]], where, form[-1])
        records.append(SFTRecord(prompt, response, where))
    return records


def read_ratings(path: str | Path) -> list[RatingRecord]:
    """Read rated responses, a JSON object per line: {"response": text, "rating": number}, optionally "prompt".

    Raises:
      ValueError: a line is not that; the message names file, line and field.
      FileNotFoundError: there is no such file.
    """
    records = []
    for where, line in read_objects(path):
        choose_form(line, where, [("response", "rating")], optional=("prompt",))
        rating = line["rating"]
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
            raise ValueError(f'{where}: "rating" must be a finite number, got {show_value(rating)}')
        records.append(
            RatingRecord(
                read_prompt(line, where), check_text(line["response"], where, "response"), float(rating), where
            )
        )
    return records


def read_choices(path: str | Path) -> list[ChoiceRecord]:
    """Read best of n, a JSON object per line: {"responses": [text, ...], "best": place from 0}, optionally "prompt".

    Raises: as `read_ratings`.
    """
    records = []
    for where, line in read_objects(path):
        choose_form(line, where, [("responses", "best")], optional=("prompt",))
        responses, best = line["responses"], line["best"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise ValueError(f'{where}: "responses" must be a list of at least 2 texts, got {show_value(responses)}')
        texts = [check_text(text, where, f"responses[{i}]") for i, text in enumerate(responses)]
        if isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < len(texts):
            raise ValueError(f'{where}: "best" must be from 0 to {len(texts) - 1}, got {show_value(best)}')
        records.append(ChoiceRecord(read_prompt(line, where), texts, best, where))
    return records
