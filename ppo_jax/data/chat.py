"""Chats as the tokenizer's own template writes them, and the token with which it ends an answer."""

from typing import Any

from ppo_jax.data.lines import Text

_PROBE = "answer"  # what a probe of a template says


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
    try:
        rendered = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=add_generation_prompt)
    except MemoryError:
        raise
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
