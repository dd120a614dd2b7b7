"""One row of another form -> rows of our own, with what is wrong said in the words of the file."""

import math
from typing import Any

from ppo_jax.data.lines import (
    Message,
    Text,
    check_calls,
    check_chat_or_text,
    check_message,
    check_messages,
    check_text,
    check_tools,
    choose_form,
    show_value,
)

Row = dict[str, Any]
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
_ANSWER = "\n\nAssistant:"
_QUESTION = "\n\nHuman:"


class Skip(ValueError):
    """A whole row that teaches nothing; the message says why, and it is counted."""


def keep(row: Row, where: str) -> list[Row]:
    """Leave a row of our own as it is."""
    return [row]


# -- Alpaca ----------------------------------------------------------------------------------------------------------


def alpaca_messages(row: Row, where: str) -> list[Message]:
    """Make a conversation of system, history ([question, answer] pairs), and the instruction with its input below."""
    messages = _system(row, where)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f'{where}: "history" must be a list of [question, answer], got {show_value(history)}')
    for number, turn in enumerate(history):
        at = f"history[{number}]"
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f'{where}: "{at}" must be [question, answer], got {show_value(turn)}')
        messages += [_say("user", turn[0], where, f"{at}[0]"), _say("assistant", turn[1], where, f"{at}[1]")]
    asked = check_text(row["instruction"], where, "instruction")
    if row.get("input"):
        more = row["input"]
        if not isinstance(more, str) or more.strip():
            asked += "\n" + check_text(more, where, "input")
    return [*messages, {"role": "user", "content": asked}]


def alpaca_demonstration(row: Row, where: str) -> list[Row]:
    if not row["output"].strip():
        raise Skip('"output" is empty')
    return [{"prompt": alpaca_messages(row, where), "response": check_text(row["output"], where, "output")}]


def alpaca_pair(row: Row, where: str) -> list[Row]:
    sides = {name: _filled(row[name], where, name) for name in ("chosen", "rejected")}
    return [{"prompt": alpaca_messages(row, where), **_different(sides)}]


def alpaca_prompt(row: Row, where: str) -> list[Row]:
    prompt: Row = {"prompt": alpaca_messages(row, where)}
    if row.get("output"):
        prompt["metadata"] = {"answer": check_text(row["output"], where, "output")}
    return [prompt]


# -- ShareGPT --------------------------------------------------------------------------------------------------------


def turn_message(turn: Any, where: str, at: str) -> Message:
    """Read {"from": speaker, "value": text}; the value of function_call is JSON, {"name", "arguments"}."""
    if not isinstance(turn, dict):
        raise ValueError(f'{where}: "{at}" must be {{"from": ..., "value": ...}}, got {show_value(turn)}')
    choose_form(turn, f"{where}: {at}", [("from", "value")])
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(f'{where}: "{at}.from" is {show_value(speaker)}; allowed: {", ".join(SPEAKERS)}')
    if isinstance(turn["value"], str) and not turn["value"].strip():
        raise Skip("a turn is empty")
    if speaker != "function_call":
        return _say(SPEAKERS[speaker], turn["value"], where, f"{at}.value")
    called = check_tools(turn["value"], where, f"{at}.value")  # the same list of functions, or a single one
    return {"role": "assistant", "content": "", "tool_calls": check_calls(called, where, f"{at}.value")}


def sharegpt_messages(row: Row, where: str) -> list[Message]:
    turns = row["conversations"]
    messages = [turn_message(turn, where, f"conversations[{number}]") for number, turn in enumerate(turns)]
    return [*_system(row, where), *messages]


def sharegpt_demonstration(row: Row, where: str) -> list[Row]:
    messages = sharegpt_messages(row, where)
    _ends_answered(messages)
    return [_with_tools(row, {"messages": messages}, where, messages)]


def sharegpt_pair(row: Row, where: str) -> list[Row]:
    prompt = sharegpt_messages(row, where)
    sides = {name: [turn_message(row[name], where, name)] for name in ("chosen", "rejected")}
    for name, (message,) in sides.items():
        if message["role"] != "assistant":
            raise ValueError(f'{where}: "{name}.from" is {show_value(row[name]["from"])}; an answer is of "gpt"')
    return [_with_tools(row, {"prompt": prompt, **_different(sides)}, where, prompt)]


def sharegpt_prompt(row: Row, where: str) -> list[Row]:
    messages = sharegpt_messages(row, where)
    prompt: Row = {"prompt": messages}
    if messages[-1]["role"] == "assistant":
        prompt = {"prompt": messages[:-1], "metadata": {"answer": messages[-1]["content"]}}
    if not prompt["prompt"]:
        raise Skip("there is nothing before the answer")
    return [_with_tools(row, prompt, where, messages)]


def conversations_to_messages(row: Row, where: str) -> list[Row]:
    messages = check_messages(row["conversations"], where, "conversations")
    _ends_answered(messages)
    return [_with_tools(row, {"messages": messages}, where, messages)]


# -- TRL -------------------------------------------------------------------------------------------------------------


def trl_sides(row: Row, where: str) -> tuple[Text, Text]:
    """Read prompt and completion, both text or both messages; a completion may also be text behind messages."""
    prompt, completion = (check_chat_or_text(row[name], where, name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, list):
        raise ValueError(f'{where}: "prompt" is text but "completion" is messages; write both in one way')
    return prompt, completion


def trl_demonstration(row: Row, where: str) -> list[Row]:
    prompt, completion = trl_sides(row, where)
    if isinstance(completion, str):
        return [_with_tools(row, {"prompt": prompt, "response": completion}, where, prompt)]
    messages = [*prompt, *completion]
    _ends_answered(messages)
    return [_with_tools(row, {"messages": messages}, where, messages)]


def trl_prompt(row: Row, where: str) -> list[Row]:
    prompt, completion = trl_sides(row, where)
    answer = completion if isinstance(completion, str) else completion[-1]["content"]
    return [_with_tools(row, {"prompt": prompt, "metadata": {"answer": answer}}, where, prompt)]


# -- HH-RLHF and UltraFeedback ---------------------------------------------------------------------------------------


def transcript_messages(text: str, where: str, field: str) -> list[Message]:
    """Split a transcript, "\\n\\nHuman: ...\\n\\nAssistant: ...", into its turns."""
    check_text(text, where, field)
    messages: list[Message] = []
    rest = "\n\n" + text.lstrip()
    while rest:
        role, mark = ("user", _QUESTION) if rest.startswith(_QUESTION) else ("assistant", _ANSWER)
        rest = rest[len(mark) :]
        stops = [place for place in (rest.find(_QUESTION), rest.find(_ANSWER)) if place >= 0]
        stop = min(stops, default=len(rest))
        said, rest = rest[:stop].strip(), rest[stop:]
        if not said:
            raise Skip(f'a turn of "{field}" is empty')
        messages.append({"role": role, "content": said})
    return messages


def hh_pair(row: Row, where: str) -> list[Row]:
    sides = {name: transcript_messages(row[name], where, name) for name in ("chosen", "rejected")}
    for messages in sides.values():
        _ends_answered(messages)
    return [_different(sides)]


def hh_prompt(row: Row, where: str) -> list[Row]:
    messages = transcript_messages(row["chosen"], where, "chosen")
    _ends_answered(messages)
    return [{"prompt": messages[:-1], "metadata": {"answer": messages[-1]["content"]}}]


def binarised_pair(row: Row, where: str) -> list[Row]:
    """Read chosen and rejected, each a whole conversation that begins with the prompt. The scores are not read."""
    for name in ("chosen", "rejected"):
        if not str(row[name][-1].get("content", "")).strip():
            raise Skip("an answer is empty")
    sides = {name: check_messages(row[name], where, name) for name in ("chosen", "rejected")}
    for name, messages in sides.items():
        asked = [message["content"].strip() for message in messages[:-1]]
        if row["prompt"].strip() not in asked:
            raise ValueError(f'{where}: "{name}" must begin with the text of "prompt", got {show_value(messages)}')
        _ends_answered(messages)
    return [_different(sides)]


def ultrafeedback_ratings(row: Row, where: str) -> list[Row]:
    """Make each completion a rated response: its overall_score is the rating."""
    prompt = [_say("user", row["instruction"], where, "instruction")]
    found = []
    for number, completion in enumerate(row["completions"]):
        at = f"completions[{number}]"
        score = completion.get("overall_score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not _is_finite(score):
            raise ValueError(f'{where}: "{at}.overall_score" must be a finite number, got {show_value(score)}')
        response = completion["response"]
        if isinstance(response, str) and not response.strip():
            continue  # some models said nothing
        found.append({"prompt": prompt, "response": check_text(response, where, f"{at}.response"), "rating": score})
    if not found:
        raise Skip("no completion has a text")
    return found


# -- KTO -------------------------------------------------------------------------------------------------------------


def kto_rating(row: Row, where: str) -> list[Row]:
    """Rate what is labelled true 1, else 0."""
    prompt, completion = trl_sides(row, where)
    if isinstance(completion, list):
        _ends_answered(completion)
        assert isinstance(prompt, list)
        prompt, completion = [*prompt, *completion[:-1]], completion[-1]["content"]
    return [{"prompt": prompt, "response": completion, "rating": float(row["label"])}]


def kto_conversation(row: Row, where: str) -> list[Row]:
    turns = "conversations" in row
    messages = sharegpt_messages(row, where) if turns else check_messages(row["messages"], where, "messages")
    _ends_answered(messages)
    label = row["label"] if "label" in row else row["kto_tag"]
    return [{"prompt": messages[:-1], "response": messages[-1]["content"], "rating": float(label)}]


# -- parts -----------------------------------------------------------------------------------------------------------


def _say(role: str, text: Any, where: str, at: str) -> Message:
    return check_message({"role": role, "content": check_text(text, where, at)}, where, at)


def _system(row: Row, where: str) -> list[Message]:
    system = row.get("system", "")
    return [] if system == "" else [_say("system", system, where, "system")]


def _filled(text: str, where: str, field: str) -> str:
    if not text.strip():
        raise Skip(f'"{field}" is empty')
    return check_text(text, where, field)


def _different(sides: Row) -> Row:
    if sides["chosen"] == sides["rejected"]:
        raise Skip("chosen and rejected are the same")
    return sides


def _ends_answered(messages: list[Message]) -> None:
    if messages[-1]["role"] != "assistant":
        raise Skip("the last turn is no answer")
    if len(messages) == 1:
        raise Skip("there is nothing before the answer")


def _with_tools(row: Row, found: Row, where: str, messages: Text) -> Row:
    tools = check_tools(row["tools"], where, "tools") if row.get("tools") else []
    if tools and isinstance(messages, str):
        raise ValueError(f'{where}: "tools" are for chat messages, but this is text')
    return found | ({"tools": tools} if tools else {})


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        return False
