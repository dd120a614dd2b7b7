"""Chats as the tokenizer's own template writes them, and the token with which it ends an answer."""

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from ppo_jax.data.lines import Message, Text

TOOLS = "tools"  # the role of the first entry of a conversation that has tools, {"role", "tools"}; never a message
_moments: list[datetime] = []  # what templates take for now, innermost last; none: the clock. Threads see it too.
# transformers hands nothing but data to a template, so a function of its own says the moment in place of the clock's.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set text = namespace(is=format) -%}{%- for sign, value in moment.items() -%}"
    "{%- set text.is = text.is.replace(sign, value) -%}{%- endfor -%}{{ text.is }}{%- endmacro +%}"
)
_SIGNS = [f"%{way}{sign}" for way in ("", "-") for sign in "aAbBcdDeFHIjklmMpPrRsSTuUVwWxXyYzZ"]
_PROBE = "answer"  # what a probe of a template says


def put_tools(tools: list[dict[str, Any]], messages: list[Message]) -> list[Message]:
    """Put tools before the messages that may call them, so that they go wherever these go; none: the messages alone."""
    return [{"role": TOOLS, "tools": tools}, *messages] if tools else messages


def split_tools(messages: list[Message]) -> tuple[list[dict[str, Any]], list[Message]]:
    """Split a conversation into (its tools, its messages)."""
    known = bool(messages) and messages[0]["role"] == TOOLS
    return (messages[0]["tools"], messages[1:]) if known else ([], messages)


@contextlib.contextmanager
def use_date(day: str) -> Iterator[None]:
    """Inside the block, templates that ask for date or time (`strftime_now`) get those of `day`; "": the clock's.

    A run's prompts are so the same on every day that it goes on.

    Args:
      day: as ISO 8601 writes it, 2026-11-28, with a time behind it or without (midnight).

    Raises ValueError where it is none.
    """
    try:
        moment = datetime.fromisoformat(day) if day else None
    except ValueError as error:
        raise ValueError(f"date={day!r} must be a day, as 2026-11-28 ({error})") from None
    if moment is None:
        yield
        return
    _moments.append(moment)
    try:
        yield
    finally:
        _moments.pop()


def current_moment() -> datetime:
    """Give the moment of `use_date`, else the clock's."""
    return _moments[-1] if _moments else datetime.now()


def render(text: Text, tokenizer: Any, where: str = "", add_generation_prompt: bool = True) -> str:
    """Render chat messages as the string that the model was trained on (the tokenizer's template); plain text as it is.

    Raises:
      ValueError: the tokenizer has no chat template; or its template refuses these messages, or leaves the system
        message, the tools or what they said out.
    """
    if isinstance(text, str):
        return text
    at = f"{where}: " if where else ""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{at}these are chat messages, but the tokenizer has no chat template; use plain text (of "
            "instruction and output: --dataset.template.name alpaca, or --dataset.columns prompt=instruction "
            "response=output), or a tokenizer with one (chat_template.jinja or tokenizer_config.json in the model's "
            "folder), or give one with --chat-template FILE"
        )
    tools, messages = split_tools(text)
    more = template_options(tokenizer, tools)

    def write(said: list[Message]) -> str:
        return str(
            tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=add_generation_prompt, **more)
        )

    try:
        rendered = write(messages)
    except MemoryError as error:  # not to be taken for a mistake in the messages
        raise MemoryError(f"{at}the tokenizer's chat template asks for more memory than there is") from error
    except Exception as error:  # the template is a program in a sandbox: it may add a list to a number, or recurse
        what = _find_refused(messages, write)
        raise ValueError(f"{at}the tokenizer's chat template refuses {what}: {error}") from error
    if left := _find_left_out(tools, messages, rendered):
        raise ValueError(f"{at}the tokenizer's chat template leaves {left} out; {_ANOTHER}")
    return rendered


def template_options(tokenizer: Any, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """List what a template is given besides the messages: the tools, and the moment of `use_date`."""
    more: dict[str, Any] = {"tools": tools} if tools else {}
    if _moments and "strftime_now" in (template := tokenizer.get_chat_template()):
        moment = {sign: _moments[-1].strftime(sign) for sign in _SIGNS}
        more |= {"chat_template": _CLOCK + template, "moment": moment}
    return more


_SYSTEM = ("system", "developer")
_ANOTHER = "take them out of the data, or give a template that knows them: --chat-template FILE"


def _find_refused(messages: list[Message], write: Callable[[list[Message]], str]) -> str:
    """Say what of the messages a template refuses, where they would pass without their system message."""
    without = [message for message in messages if message["role"] not in _SYSTEM]
    if without and len(without) < len(messages):
        with contextlib.suppress(Exception):
            write(without)
            return (
                "a system message (it takes these messages without one: put its text before the first question, or "
                "give a template that knows it with --chat-template FILE)"
            )
    return "these messages"


def _find_left_out(tools: list[dict[str, Any]], messages: list[Message], rendered: str) -> str:
    """Say what a template passed over in silence; "" if nothing."""

    def lacks(text: str) -> bool:
        text = text.strip()
        return text not in rendered and json.dumps(text)[1:-1] not in rendered

    if any(lacks(tool["function"]["name"]) for tool in tools):
        return "the tools"
    for message in messages:
        if message["role"] in _SYSTEM and lacks(message["content"]):
            return "the system message"
        if message["role"] == "tool" and lacks(message["content"]):
            return "what a tool said"
        if any(lacks(call["function"]["name"]) for call in message.get("tool_calls", ())):
            return "the calls of tools"
    return ""


def read_template(path: Path, tokenizer: Any) -> str:
    """Read a file with a chat template (Jinja) for a tokenizer; raise ValueError or FileNotFoundError if it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"--chat-template {path} is not a file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template {path}: not UTF-8: {error.reason}") from error
    if "messages" not in text:
        raise ValueError(f"--chat-template {path}: no chat template, which writes `messages` (Jinja)")
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": _PROBE}], chat_template=text, tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--chat-template {path}, line {error.lineno}: {error.message}") from error
    except Exception:  # of another kind of conversation: `render` says so of the user's own
        return text
    return text


def turn_closing(tokenizer: Any) -> str:
    """Find what the chat template writes behind an answer, such as <|im_end|> and a line break; "" if nothing."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    asked = [{"role": "user", "content": "question"}]
    try:
        whole = render([*asked, {"role": "assistant", "content": _PROBE}], tokenizer, add_generation_prompt=False)
    except ValueError:  # a template of another kind of conversation
        return ""
    return whole.rpartition(_PROBE)[2] if _PROBE in whole else ""


def turn_end(tokenizer: Any) -> int | None:
    """Find the token with which the chat template ends an answer, the first special one that it writes behind it.

    It need not be the tokenizer's EOS, which ends a text. None: there is no template, or it writes no such token.
    """
    closing = turn_closing(tokenizer)
    known = getattr(tokenizer, "added_tokens_decoder", {})
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"] if closing else []
    return next((int(i) for i in ids if i in known or i == tokenizer.eos_token_id), None)


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """List the tokens that end an answer: the chat template's, and EOS, as far as there are these."""
    found = (turn_end(tokenizer), tokenizer.eos_token_id)
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def write_answer(
    messages: list[Message], answer: str | Message, tokenizer: Any, end: int | None, where: str = ""
) -> tuple[str, str]:
    """Write (the messages as a prompt, the answer behind them as the template has it, without the token that ends it).

    A template may trim an answer, or put a blank before it. Where it writes answers in another way than its own prompts
    lead to, or leaves some of the answer out, the answer stays as it is; one that is a message, since it calls tools,
    is an error then.

    Args:
      end: `turn_end` of the tokenizer.
    """
    before, calls = render(messages, tokenizer, where), isinstance(answer, dict)
    turn: Message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
    whole = render([*messages, turn], tokenizer, where, add_generation_prompt=False)
    written = whole.removeprefix(before)
    if end is None:
        written = written.removesuffix(turn_closing(tokenizer))
    else:
        written, _, _ = written.rpartition(str(tokenizer.convert_ids_to_tokens(end)))
    if whole.startswith(before) and turn["content"].strip() in written and (written or not calls):
        return before, written
    if isinstance(answer, dict):
        raise ValueError(
            f"{where}: the tokenizer's chat template writes calls of tools in another way than its own prompts lead "
            f"to, so they cannot be learnt; {_ANOTHER}"
        )
    return before, answer
