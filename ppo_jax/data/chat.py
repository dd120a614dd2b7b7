"""Chats as the tokenizer's own template writes them, and the token with which it ends an answer."""

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from ppo_jax.data.lines import Text

_moments: list[datetime] = []  # what templates take for now, innermost last; none: the clock. Threads see it too.
# transformers hands nothing but data to a template, so a function of its own says the moment in place of the clock's.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set text = namespace(is=format) -%}{%- for sign, value in moment.items() -%}"
    "{%- set text.is = text.is.replace(sign, value) -%}{%- endfor -%}{{ text.is }}{%- endmacro +%}"
)
_SIGNS = [f"%{way}{sign}" for way in ("", "-") for sign in "aAbBcdDeFHIjklmMpPrRsSTuUVwWxXyYzZ"]
_PROBE = "answer"  # what a probe of a template says


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


def render(text: Text, tokenizer: Any, where: str = "", add_generation_prompt: bool = True) -> str:
    """Render chat messages as the string that the model was trained on (the tokenizer's template); plain text as it is.

    Raises:
      ValueError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if isinstance(text, str):
        return text
    at = f"{where}: " if where else ""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{at}these are chat messages, but the tokenizer has no chat template; use plain text, or a tokenizer "
            "with one (chat_template.jinja or tokenizer_config.json in the model's folder)"
        )
    clock: dict[str, Any] = {}
    if _moments and "strftime_now" in (template := tokenizer.get_chat_template()):
        moment = {sign: _moments[-1].strftime(sign) for sign in _SIGNS}
        clock = {"chat_template": _CLOCK + template, "moment": moment}
    try:
        rendered = tokenizer.apply_chat_template(
            text, tokenize=False, add_generation_prompt=add_generation_prompt, **clock
        )
    except MemoryError as error:  # not to be taken for a mistake in the messages
        raise MemoryError(f"{at}the tokenizer's chat template asks for more memory than there is") from error
    except Exception as error:  # the template is a program in a sandbox: it may add a list to a number, or recurse
        raise ValueError(f"{at}the tokenizer's chat template refuses these messages: {error}") from error
    return str(rendered)


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
    messages: list[dict[str, str]], answer: str, tokenizer: Any, end: int | None, where: str = ""
) -> tuple[str, str]:
    """Write (the messages as a prompt, the answer behind them as the template has it, without the token that ends it).

    A template may trim an answer, or put a blank before it. Where it writes answers in another way than its own prompts
    lead to, or leaves some of the answer out, the answer stays as it is.

    Args:
      end: `turn_end` of the tokenizer.
    """
    before = render(messages, tokenizer, where)
    if end is None:
        return before, answer
    turn = {"role": "assistant", "content": answer}
    whole = render([*messages, turn], tokenizer, where, add_generation_prompt=False)
    written, _, _ = whole.removeprefix(before).rpartition(str(tokenizer.convert_ids_to_tokens(end)))
    return before, written if whole.startswith(before) and answer.strip() in written else answer
