"""dataset_info.json: the data sets that a folder of LLaMA-Factory names, and their rows as records.

`FOLDER/dataset_info.json:NAME` is a data set wherever a file of data may be given. Its entry says which file or name on
the hub it is, of which form (alpaca, sharegpt), and what its columns and speakers are called. Rows become records as
LLaMA-Factory reads them; those that it drops are skipped and counted.
"""

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.data.chat import put_tools
from ppo_jax.data.converters import Skip
from ppo_jax.data.disk import parse_json
from ppo_jax.data.lines import Message, Text, show_value
from ppo_jax.data.records import PairRecord, PromptRecord, Record, SFTRecord
from ppo_jax.data.sources import HUB, open_table

Row = dict[str, Any]
FILE = "dataset_info.json"
_NAMED = re.compile(rf"(?P<file>(.*/)?{re.escape(FILE)}):(?P<name>.+)", re.DOTALL)
_DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_COLUMNS = (*_DEFAULT_COLUMNS, "history", "system", "tools", "chosen", "rejected", "kto_tag")
_MEDIA = ("images", "videos", "audios")
_DEFAULT_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_FIELDS = {
    *("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"),
    *("formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags"),
}


class Entry(NamedTuple):
    """A data set of dataset_info.json."""

    name: str
    sources: tuple[str, ...]  # files, or a name of the hub
    split: str
    form: str  # alpaca or sharegpt
    ranking: bool
    columns: dict[str, str | None]
    tags: dict[str, str | None]


def split_name(path: str | Path) -> tuple[Path, str] | None:
    """Split `FOLDER/dataset_info.json:NAME`; None where a path is not of that form."""
    match = _NAMED.fullmatch(str(path))
    return (Path(match["file"]), match["name"]) if match else None


def read_entry(file: Path, name: str) -> Entry:
    """Read one entry.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no such entry, or one that is not supported; the message names the field.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file")
    try:
        every = parse_json(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    found = every.get(name) if isinstance(every, dict) else None
    at = f"{file}: {name}"
    if not isinstance(found, dict):
        raise ValueError(f"{file} names no data set {name!r}; it has: {', '.join(list(every)[:40])}")
    if unknown := sorted(set(found) - _FIELDS):
        raise ValueError(f"{at}: unknown field {unknown[0]!r}; allowed: {', '.join(sorted(_FIELDS))}")
    columns, tags = (found.get(part) or {} for part in ("columns", "tags"))
    for part, given, allowed in (("columns", columns, (*_COLUMNS, *_MEDIA)), ("tags", tags, tuple(_DEFAULT_TAGS))):
        if not isinstance(given, dict) or set(given) - set(allowed):
            raise ValueError(
                f"{at}: {part} must be an object with some of {', '.join(allowed)}; got {show_value(given)}"
            )
    if media := [column for column in _MEDIA if columns.get(column)]:
        raise ValueError(f"{at}: columns.{media[0]} holds {media[0]}, and only text is read")
    if found.get("num_samples") is not None:
        raise ValueError(f"{at}: num_samples takes a random part of a file; take its first rows with max_samples")
    if (form := found.get("formatting", "alpaca")) not in ("alpaca", "sharegpt"):
        raise ValueError(f"{at}: formatting {show_value(form)} is not known; allowed: alpaca, sharegpt")
    return Entry(
        name,
        _list_sources(file, found, at),
        found.get("split") or "train",
        form,
        bool(found.get("ranking", False)),
        {key: columns.get(key) if "columns" in found else _DEFAULT_COLUMNS.get(key) for key in _COLUMNS},
        {key: tags.get(key) if "tags" in found else default for key, default in _DEFAULT_TAGS.items()},
    )


def _list_sources(file: Path, found: Row, at: str) -> tuple[str, ...]:
    if found.get("hf_hub_url"):
        if found.get("folder"):
            raise ValueError(f"{at}: folder chooses a part of a data set of the hub, which is not supported")
        subset = f"/{found['subset']}" if found.get("subset") else ""
        return (f"{HUB}{found['hf_hub_url']}{subset}",)
    for field, why in (
        ("ms_hub_url", "the hub of ModelScope is not read"),
        ("om_hub_url", "the hub of Modelers is not read"),
        ("script_url", "loading scripts are not run"),
        ("cloud_file_name", "files of S3 and GCS are not read"),
    ):
        if found.get(field):
            raise ValueError(f"{at}: {field}: {why}; give file_name or hf_hub_url")
    if not isinstance(found.get("file_name"), str):
        raise ValueError(f"{at}: there is no file_name and no hf_hub_url")
    path = file.parent / found["file_name"]
    names = sorted(path.iterdir()) if path.is_dir() else [path]
    for one in names:
        if one.suffix == ".txt":
            raise ValueError(f"{at}: {one} is plain text, for LLaMA-Factory's stage pt alone")
    return tuple(map(str, names))


# -- rows ------------------------------------------------------------------------------------------------------------


def read_rows(entry: Entry, stage: str, max_samples: int | None) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Yield (where, make) of each row; `make()` makes the record of a stage, or raises `Skip` or ValueError.

    Raises ValueError where the data set is of another stage.
    """
    if entry.columns["kto_tag"]:
        raise ValueError(f"{entry.name} is for KTO (columns.kto_tag), which is not had here")
    if entry.ranking != (stage == "preference pairs"):
        kind = "preference pairs (ranking: true), for dpo and rm" if entry.ranking else "no preference pairs (ranking)"
        raise ValueError(f"{entry.name} holds {kind}; this stage takes {stage}")
    makers = {"demonstrations": _make_demonstration, "preference pairs": _make_pair, "prompts": _make_prompt}
    if stage not in makers:
        raise ValueError(f"{entry.name}: {FILE} has no {stage}")
    rows = (row for source in entry.sources for row in open_table(source, entry.split).rows)
    for where, row in islice(rows, max_samples):
        yield where, lambda row=row, where=where: makers[stage](entry, row, where)  # type: ignore[misc]


class _Aligned(NamedTuple):
    prompt: list[Message]  # with tools and system message before it
    answers: list[Message]


def _make_demonstration(entry: Entry, row: Row, where: str) -> SFTRecord:
    prompt, answers = _align(entry, row, where)
    if len(answers) != 1:
        raise Skip("there is no answer")
    return SFTRecord(prompt, _bare(answers[0]), where)


def _make_pair(entry: Entry, row: Row, where: str) -> PairRecord:
    prompt, answers = _align(entry, row, where)
    if len(answers) != 2:
        raise Skip("there are no two answers")
    chosen, rejected = (answer["content"] if "tool_calls" not in answer else [answer] for answer in answers)
    return PairRecord(prompt, _as_text(chosen), _as_text(rejected), 0.0, where)


def _make_prompt(entry: Entry, row: Row, where: str) -> PromptRecord:
    prompt, answers = _align(entry, row, where)
    return PromptRecord(prompt, {"answer": _bare(answers[0])} if answers else {}, where)


def _as_text(answer: Any) -> Text:
    return answer if isinstance(answer, list) else str(answer)


def _bare(answer: Message) -> str | Message:
    return answer if "tool_calls" in answer else str(answer["content"])


def _align(entry: Entry, row: Row, where: str) -> _Aligned:
    align = _align_alpaca if entry.form == "alpaca" else _align_sharegpt
    turns, answers, system = align(entry, row, where)
    if len(turns) % 2 != 1:
        raise Skip("questions and answers do not take turns")
    tools = _read_tools(_get(entry, row, "tools"), where)
    if system or tools == []:  # tools that are written down, but none, leave an empty system message
        turns = [{"role": "system", "content": system or ""}, *turns]
    return _Aligned(put_tools(tools or [], turns), answers)


def _get(entry: Entry, row: Row, column: str) -> Any:
    name = entry.columns[column]
    return row.get(name) if name else None


def _align_alpaca(entry: Entry, row: Row, where: str) -> tuple[list[Message], list[Message], str]:
    turns: list[Message] = []
    history = _get(entry, row, "history")
    for pair in history if isinstance(history, list) else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f'{where}: "{entry.columns["history"]}" must be a list of [question, answer]')
        turns += [_say(role, text, where) for role, text in zip(("user", "assistant"), pair, strict=True)]
    asked = [_get(entry, row, column) for column in ("prompt", "query")]
    turns.append(_say("user", "\n".join(_text(text, where) for text in asked if text), where))
    if entry.ranking:
        sides = [_get(entry, row, column) for column in ("chosen", "rejected")]
        both = sides if all(isinstance(side, str) for side in sides) else []
        answers = [_say("assistant", side, where) for side in both]
    else:
        answer = _get(entry, row, "response")
        answers = [_say("assistant", answer, where)] if isinstance(answer, str) else []
    return turns, answers, _text(_get(entry, row, "system") or "", where)


def _align_sharegpt(entry: Entry, row: Row, where: str) -> tuple[list[Message], list[Message], str]:
    tags, messages = entry.tags, _get(entry, row, "messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(
            f'{where}: "{entry.columns["messages"]}" must be a list of messages, got {show_value(messages)}'
        )
    role, content = str(tags["role_tag"]), str(tags["content_tag"])
    system = _text(_get(entry, row, "system") or "", where)
    if messages and tags["system_tag"] and messages[0].get(role) == tags["system_tag"]:
        system, messages = _text(messages[0].get(content), where), messages[1:]
    turns = [_read_turn(entry, message, place, where) for place, message in enumerate(messages)]
    if len(turns) % 2 != entry.ranking or not turns:
        raise Skip("questions and answers do not take turns")
    if not entry.ranking:
        return turns[:-1], turns[-1:], system
    sides = [_get(entry, row, column) for column in ("chosen", "rejected")]
    if not all(isinstance(side, dict) for side in sides):
        raise Skip("there are no two answers")
    return turns, [_read_turn(entry, side, 1, where) for side in sides], system


def _read_turn(entry: Entry, message: Row, place: int, where: str) -> Message:
    """Read one message; those at odd places answer."""
    tags = entry.tags
    speaker, said = message.get(str(tags["role_tag"])), message.get(str(tags["content_tag"]))
    if place % 2 and speaker is not None and speaker == tags["function_tag"]:
        return _read_calls(_text(said, where), where)
    allowed = {"assistant": "assistant_tag"} if place % 2 else {"user": "user_tag", "tool": "observation_tag"}
    for role, tag in allowed.items():
        if speaker is not None and speaker == tags[tag]:
            return _say(role, said, where)
    raise Skip("questions and answers do not take turns")


def _read_calls(text: str, where: str) -> Message:
    """Read calls of tools, written as JSON; thoughts may stand around them."""
    thought = re.search(r"<think>(.*)</think>", text, re.DOTALL)
    found = _parse(text.replace(thought[0], "") if thought else text, where, "a call of tools")
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise ValueError(f'{where}: a call of tools must be {{"name", "arguments"}}, got {show_value(call)}')
    written = [
        {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls
    ]
    return {"role": "assistant", "content": thought[0] if thought else "", "tool_calls": written}


def _read_tools(value: Any, where: str) -> list[Row] | None:
    """Read descriptions of tools; None where there are none written down."""
    if not value:
        return None
    tools = _parse(value, where, "the tools") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: the tools must be a list of functions, got {show_value(tools)}")
    return tools


def _parse(text: str, where: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: {what} must be JSON ({error}): {show_value(text)}") from error


def _say(role: str, text: Any, where: str) -> Message:
    return {"role": role, "content": _text(text, where)}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: text is wanted, got {show_value(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: a text holds half of a surrogate pair at character {error.start}") from error
    return value
