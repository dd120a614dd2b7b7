"""The lines of JSON-lines files, and what they may say: checked objects, chat messages and texts."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.disk import RepeatedKey, parse_json

Message = dict[str, Any]  # role and content; an assistant's may have tool_calls, a tool's the name it answers for
Text = str | list[Message]  # plain text, or chat messages
LONGEST_LINE = 1 << 24  # bytes of one record
ROLES = ("system", "developer", "user", "assistant", "tool")
# First bytes of files that are no text, and what makes lines of them.
_BINARY = {
    b"ARROW1": ("an Arrow file", "datasets.Dataset.from_file(FILE).to_json(OUT)"),
    b"\x1f\x8b": ("compressed by gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd"),
    b"\xfd7zXZ\x00": ("compressed by xz", "unxz"),
    b"BZh": ("compressed by bzip2", "bunzip2"),
    b"PK\x03\x04": ("a ZIP archive (or a spreadsheet)", "unzip"),
    b"SQLite format 3": ("an SQLite database", "sqlite3 with .mode json"),
}
_MESSAGES = '[{"role": ..., "content": ...}, ...]'


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", line) for each line of a UTF-8 file; blank lines at the end are ignored."""
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
                _check_text_file(path, line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield where, line.decode()
            except UnicodeDecodeError as error:
                wide = "-f UTF-16 " if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise ValueError(
                    f"{where}: not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}; "
                    f"convert the file, for example with `iconv {wide}-t UTF-8`"
                ) from error
    if number == len(blank):
        raise ValueError(f"{path}: the file is empty")


def _check_text_file(path: Path, first: bytes) -> None:
    """Raise ValueError where a file's first line is that of a file that holds no lines of text."""
    if first.startswith(b"PAR1"):
        raise ValueError(f"{path}: this is no text but a Parquet file; name it FILE.parquet")
    found = next((what for magic, what in _BINARY.items() if first.startswith(magic)), None)
    if found:
        raise ValueError(f"{path}: this is no text but {found[0]}; convert it, for example with {found[1]}")


def _guess(where: str, line: str) -> str:
    """Say what a file is whose first line is no JSON object, where that can be told."""
    path, _, number = where.rpartition(":")
    if number != "1":
        return ""
    if re.fullmatch(r'"?\w+"?([,;\t]"?\w+"?)+', line):
        return ". It looks like a table (CSV): name it FILE.csv"
    if line.startswith("["):
        return ". It looks like one JSON array: name it FILE.json, or put each of its objects on a line"
    return ""


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) for each line of a JSON Lines file."""
    for where, line in read_lines(path):
        try:
            value = parse_json(line)
        except RepeatedKey as error:
            raise ValueError(f"{where}: {error}; each key may stand there once: {show_value(line)}") from error
        except ValueError as error:  # also an integer of thousands of digits
            raise ValueError(
                f"{where}: not JSON ({error}); each line must be one JSON object: {show_value(line)}"
                + _guess(where, line)
            ) from error
        if not isinstance(value, dict):
            raise ValueError(
                f"{where}: each line must be one JSON object, got {show_value(value)}" + _guess(where, line)
            )
        yield where, value


def choose_form(
    line: dict[str, Any], where: str, forms: Sequence[tuple[str, ...]], optional: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Choose the one of `forms` (sets of required fields) a line has; ValueError if none, several, or more fields."""
    allowed = " or ".join(" and ".join(f'"{field}"' for field in form) for form in forms)
    if optional:
        allowed += "; optional: " + ", ".join(f'"{field}"' for field in optional)
    known = [*(field for form in forms for field in form), *optional]
    for field in line:
        if field not in known:
            near = difflib.get_close_matches(field[:60], known, n=1)
            hint = f' (did you mean "{near[0]}"?)' if near else ""
            raise ValueError(f'{where}: unknown field "{show_value(field)[1:-1]}"{hint}; allowed: {allowed}')
    given = {field for field in line if field not in optional}
    for form in forms:
        if given == set(form):
            return form
    raise ValueError(f"{where}: has {', '.join(sorted(given)) or 'no text'}; allowed: {allowed}")


def check_chat_or_text(value: Any, where: str, field: str) -> Text:
    return (
        check_text(value, where, field)
        if isinstance(value, str) and field != "messages"
        else check_messages(value, where, field)
    )


def check_text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{field}" must be text, got {show_value(value)}')
    if not value.strip():
        raise ValueError(f'{where}: "{field}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{where}: "{field}" holds half of a surrogate pair at character {error.start}') from error
    return value


def check_messages(value: Any, where: str, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        kind = "a list of messages" if field == "messages" else "text or a list of messages"
        raise ValueError(f'{where}: "{field}" must be {kind}, {_MESSAGES}; got {show_value(value)}')
    return [check_message(message, where, f"{field}[{number}]") for number, message in enumerate(value)]


def check_message(message: Any, where: str, at: str) -> Message:
    """Check one message: role and content; what a tool said may name it, and an assistant may call some."""
    if not isinstance(message, dict):
        raise ValueError(f'{where}: "{at}" must be {{"role": ..., "content": ...}}, got {show_value(message)}')
    calls = message.get("tool_calls") if message.get("role") == "assistant" else None
    if calls:
        choose_form(message, f"{where}: {at}", [("role", "tool_calls")], optional=("content",))
        content = message.get("content") or ""  # there may be none beside the calls
        if content:
            check_text(content, where, f"{at}.content")
        return {"role": "assistant", "content": content, "tool_calls": check_calls(calls, where, f"{at}.tool_calls")}
    more = {"tool": ("name", "tool_call_id"), "assistant": ("tool_calls",)}.get(str(message.get("role")), ())
    choose_form(message, f"{where}: {at}", [("role", "content")], optional=more)
    if message["role"] not in ROLES:
        raise ValueError(f'{where}: "{at}.role" is {show_value(message["role"])}; allowed: {", ".join(ROLES)}')
    checked = {"role": message["role"], "content": check_text(message["content"], where, f"{at}.content")}
    return checked | {key: check_text(message[key], where, f"{at}.{key}") for key in more[:2] if message.get(key)}


def check_answered(messages: list[dict[str, str]], where: str, field: str) -> None:
    if messages[-1]["role"] != "assistant":
        raise ValueError(f'{where}: the last message of "{field}" must be the assistant\'s, the response')
    if len(messages) == 1:
        raise ValueError(f'{where}: "{field}" has only a response; put the messages it answers before it')


def show_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_prompt(line: dict[str, Any], where: str) -> Text | None:
    """Read the field `prompt` of a line, checked; None where there is none."""
    return check_chat_or_text(line["prompt"], where, "prompt") if "prompt" in line else None


# -- tools -------------------------------------------------------------------------------------------------------------


def check_tools(value: Any, where: str, field: str) -> list[dict[str, Any]]:
    """Check a list of function descriptions, which may be written as JSON text; each becomes {"type", "function"}."""
    value = _parse(value, where, field)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise ValueError(f'{where}: "{field}" must be a list of {{"name", "parameters"}}, got {show_value(value)}')
    tools = []
    for number, tool in enumerate(value):
        at = f"{field}[{number}]"
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict):
            raise ValueError(
                f'{where}: "{at}" must describe a function, {{"name", "parameters"}}; got {show_value(tool)}'
            )
        check_text(function.get("name"), where, f"{at}.name")
        _check_plain(function, where, at)
        tools.append({"type": "function", "function": function})
    return tools


def check_calls(value: Any, where: str, field: str) -> list[dict[str, Any]]:
    """Check the calls of an assistant's message; arguments that are written as JSON text become an object."""
    if not isinstance(value, list):
        raise ValueError(f'{where}: "{field}" must be a list of calls, got {show_value(value)}')
    calls = []
    for number, call in enumerate(value):
        at = f"{field}[{number}]"
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict):
            raise ValueError(f'{where}: "{at}" must be {{"function": {{"name", "arguments"}}}}, got {show_value(call)}')
        check_text(function.get("name"), where, f"{at}.name")
        arguments = _parse(function.get("arguments", {}), where, f"{at}.arguments")
        if not isinstance(arguments, dict):
            raise ValueError(f'{where}: "{at}.arguments" must be an object, got {show_value(arguments)}')
        _check_plain(arguments, where, f"{at}.arguments")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
        if isinstance(call.get("id"), str):
            calls[-1]["id"] = check_text(call["id"], where, f"{at}.id")
    return calls


def _parse(value: Any, where: str, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else []
    except ValueError as error:
        raise ValueError(f'{where}: "{field}" is text, but no JSON ({error}): {show_value(value)}') from error


def _check_plain(value: Any, where: str, field: str) -> None:
    """Raise ValueError for what JSON cannot say."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f'{where}: "{field}" holds what JSON cannot say ({error})') from error
