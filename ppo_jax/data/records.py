"""The user's files -> records: JSON lines, or plain text with one entry per line.

What is wrong in a file is a ValueError that names the file, the line and the field. A text is a string, or a chat:
a list of {"role": ..., "content": ...} messages.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax import plain_json

Text = str | list[dict[str, str]]  # plain text, or chat messages

LONGEST_LINE = 1 << 24  # bytes of one record
ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGES = '[{"role": ..., "content": ...}, ...]'


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


def read_prompts(path: str | Path) -> list[PromptRecord]:
    """Prompts: one text per line of a .txt file, otherwise one JSON object per line.

    {"prompt": text} or {"messages": [...]}, and optionally "metadata": {...}.

    Raises:
      ValueError: a line is not that; the message names file, line and field.
      FileNotFoundError: there is no such file.
    """
    if Path(path).suffix == ".txt":
        return [PromptRecord(_text(line, where, "prompt"), {}, where) for where, line in _lines(path)]
    records = []
    for where, line in _objects(path):
        form = _form(line, where, [("prompt",), ("messages",)], optional=("metadata",))
        prompt = _chat_or_text(line[form[0]], where, form[0])
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            raise ValueError(
                f'{where}: the last message of a prompt must not be the "assistant"\'s; that one is sampled'
            )
        metadata = line.get("metadata", {})
        if not isinstance(metadata, dict):
            raise ValueError(f'{where}: "metadata" must be an object, got {_shown(metadata)}')
        try:
            json.dumps(metadata, ensure_ascii=False).encode()  # it goes to reward servers and into files
        except UnicodeEncodeError:
            raise ValueError(f'{where}: "metadata" holds half of a surrogate pair') from None
        records.append(PromptRecord(prompt, metadata, where))
    return records


def read_pairs(path: str | Path) -> list[PairRecord]:
    """Preferences, one JSON object per line: {"chosen": text, "rejected": text}, optionally "prompt" and "margin".

    Each text is a string or a list of messages; the answers are both the one or both the other. Strings are joined
    as they are, so a space between prompt and answer belongs to one of them.

    Raises: as `read_prompts`.
    """
    records = []
    for where, line in _objects(path):
        _form(line, where, [("chosen", "rejected")], optional=("prompt", "margin"))
        chosen, rejected = (_chat_or_text(line[field], where, field) for field in ("chosen", "rejected"))
        prompt = _chat_or_text(line["prompt"], where, "prompt") if "prompt" in line else None
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise ValueError(f'{where}: "chosen" and "rejected" must both be text or both be messages')
        for field, answer in (("chosen", chosen), ("rejected", rejected)):
            if isinstance(answer, list):
                if isinstance(prompt, str):
                    raise ValueError(f'{where}: "prompt" is text but "{field}" is messages; write both in one way')
                _check_answered([*(prompt or []), *answer], where, field)
        margin = line.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1e38:
            raise ValueError(f'{where}: "margin" must be a finite number, at least 0, got {_shown(margin)}')
        records.append(PairRecord(prompt, chosen, rejected, float(margin), where))
    return records


def read_sft(path: str | Path) -> list[SFTRecord]:
    """Demonstrations: one text per line of a .txt file, otherwise one JSON object per line.

    {"prompt": text or messages, "response": text}, {"messages": [...]} (the last one, the assistant's, is the
    response) or {"text": text} (all of it is learnt).

    Raises: as `read_prompts`.
    """
    if Path(path).suffix == ".txt":
        return [SFTRecord(None, _text(line, where, "text"), where) for where, line in _lines(path)]
    records = []
    for where, line in _objects(path):
        form = _form(line, where, [("prompt", "response"), ("messages",), ("text",)])
        prompt: Text | None = None
        if form == ("messages",):
            messages = _messages(line["messages"], where, "messages")
            _check_answered(messages, where, "messages")
            prompt, response = messages[:-1], messages[-1]["content"]
        else:
            prompt = _chat_or_text(line["prompt"], where, "prompt") if form[0] == "prompt" else None
            response = _text(line[form[-1]], where, form[-1])
        records.append(SFTRecord(prompt, response, where))
    return records


def _lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """("file:line", line) for each line of a UTF-8 file; blank lines at the end are ignored."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    blank: list[int] = []  # lines that are skipped unless another follows
    number = 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{where}: longer than {LONGEST_LINE} bytes; a line holds one record")
            if not line.strip():
                blank.append(number)
                continue
            yield from ((f"{path}:{skipped}", "") for skipped in blank)
            blank.clear()
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield where, line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}; "
                    "convert the file, for example with `iconv -t UTF-8`"
                ) from error
    if number == len(blank):
        raise ValueError(f"{path}: the file is empty")


def _objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) for each line of a JSON Lines file."""
    for where, line in _lines(path):
        try:
            value = plain_json.loads(line)
        except ValueError as error:  # also an integer of thousands of digits
            raise ValueError(
                f"{where}: not JSON ({error}); each line must be one JSON object: {_shown(line)}"
            ) from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: each line must be one JSON object, got {_shown(value)}")
        yield where, value


def _form(
    line: dict[str, Any], where: str, forms: Sequence[tuple[str, ...]], optional: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The one of `forms` (sets of required fields) that this line has; ValueError if none, several, or more fields."""
    allowed = " or ".join(" and ".join(f'"{field}"' for field in form) for form in forms)
    if optional:
        allowed += "; optional: " + ", ".join(f'"{field}"' for field in optional)
    known = [*(field for form in forms for field in form), *optional]
    for field in line:
        if field not in known:
            near = difflib.get_close_matches(field[:60], known, n=1)
            hint = f' (did you mean "{near[0]}"?)' if near else ""
            raise ValueError(f'{where}: unknown field "{_shown(field)[1:-1]}"{hint}; allowed: {allowed}')
    given = {field for field in line if field not in optional}
    for form in forms:
        if given == set(form):
            return form
    raise ValueError(f"{where}: has {', '.join(sorted(given)) or 'no text'}; allowed: {allowed}")


def _chat_or_text(value: Any, where: str, field: str) -> Text:
    return (
        _text(value, where, field) if isinstance(value, str) and field != "messages" else _messages(value, where, field)
    )


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{field}" must be text, got {_shown(value)}')
    if not value.strip():
        raise ValueError(f'{where}: "{field}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{where}: "{field}" holds half of a surrogate pair at character {error.start}') from error
    return value


def _messages(value: Any, where: str, field: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        kind = "a list of messages" if field == "messages" else "text or a list of messages"
        raise ValueError(f'{where}: "{field}" must be {kind}, {_MESSAGES}; got {_shown(value)}')
    for number, message in enumerate(value):
        at = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f'{where}: "{at}" must be {{"role": ..., "content": ...}}, got {_shown(message)}')
        _form(message, f"{where}: {at}", [("role", "content")])
        if message["role"] not in ROLES:
            raise ValueError(f'{where}: "{at}.role" is {_shown(message["role"])}; allowed: {", ".join(ROLES)}')
        _text(message["content"], where, f"{at}.content")
    return value


def _check_answered(messages: list[dict[str, str]], where: str, field: str) -> None:
    if messages[-1]["role"] != "assistant":
        raise ValueError(f'{where}: the last message of "{field}" must be the assistant\'s, the response')
    if len(messages) == 1:
        raise ValueError(f'{where}: "{field}" has only a response; put the messages it answers before it')


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
