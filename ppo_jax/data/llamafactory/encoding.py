"""Conversations -> token rows by a template, piece by piece, as LLaMA-Factory makes them.

Each string of a template is tokenised by itself with the message in it, so no token spans two of them. That is the one
difference to `data.encode`, where prompt and answer are one text and the chat template is the tokenizer's own.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ppo_jax.data.chat import split_tools
from ppo_jax.data.lines import Message, Text
from ppo_jax.data.llamafactory.templates import TEMPLATES, Mark, Slots, Template
from ppo_jax.data.llamafactory.tools import FORMATS
from ppo_jax.data.options import AUTO, TemplateOptions

_THOUGHTS = ("<think>", "</think>")
_CONTENT = "{{content}}"
Pair = tuple[list[int], list[int]]  # tokens of what is asked, tokens of the answer


class Conversation(NamedTuple):
    """A conversation as a template takes it: what is said in turns, question first, and what stands before it."""

    turns: list[Message]
    system: str | None = None  # None: there is no system message
    tools: Sequence[dict[str, Any]] = ()


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A template with the tokenizer that it is used with."""

    template: Template
    tokenizer: Any

    def encode_turns(self, conversation: Conversation) -> list[Pair]:
        """Encode each question with its answer."""
        template, turns = self.template, conversation.turns
        if template.thinks and template.thinking is False:
            turns = [_forget(turn) if place % 2 else turn for place, turn in enumerate(turns)]
        pieces = self._pieces(conversation._replace(turns=turns))
        pairs = list(zip(pieces[::2], pieces[1::2], strict=True))
        if template.thinks:
            pairs = [self._with_thought(pair, turn) for pair, turn in zip(pairs, turns[1::2], strict=True)]
        return pairs

    def encode_last(self, conversation: Conversation) -> Pair:
        """Encode all that comes before the last answer, and that answer."""
        template, turns = self.template, conversation.turns
        if template.thinks:
            last = len(turns) - 1
            turns = [_forget(turn) if place % 2 and place < last else turn for place, turn in enumerate(turns)]
            if template.thinking is False:
                turns[-1] = _forget(turns[-1])
        *asked, answer = self._pieces(conversation._replace(turns=turns))
        pair = [token for piece in asked for token in piece], answer
        return self._with_thought(pair, turns[-1]) if template.thinks else pair

    @property
    def closing(self) -> list[int]:
        """What stands at the end of a row besides the template's own strings."""
        return [int(self.tokenizer.eos_token_id)] if self.template.closes_once else []

    def _pieces(self, conversation: Conversation) -> list[list[int]]:
        template = self.template
        system = conversation.system or template.default_system
        tools = FORMATS[template.tools].describe(conversation.tools) if conversation.tools else ""
        opened = bool(system or conversation.tools or conversation.system is not None)
        pieces = []
        for place, turn in enumerate(conversation.turns):
            slots, text, before = self._slots(turn), self._text(turn), []
            if not place:
                before += self._tokens(template.prefix, "")
                if opened and template.joins_system:
                    text = _fill(str(template.system[0]), system + tools) + text
                elif opened:
                    before += self._tokens(template.system, system + tools)
            pieces.append([*before, *self._tokens(slots, text)])
        return pieces

    def _slots(self, turn: Message) -> Slots:
        template = self.template
        match turn["role"]:
            case "user":
                return template.user
            case "tool":
                return template.observation or template.user
            case _:
                return (template.function or template.assistant) if turn.get("tool_calls") else template.assistant

    def _text(self, turn: Message) -> str:
        if not turn.get("tool_calls"):
            return str(turn["content"])
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in turn["tool_calls"]]
        return str(turn.get("content") or "") + FORMATS[self.template.calls].write_calls(calls)

    def _tokens(self, slots: Slots, text: str) -> list[int]:
        tokenizer, ids = self.tokenizer, list[int]()
        for slot in slots:
            if isinstance(slot, Mark):
                token = tokenizer.bos_token_id if slot is Mark.BOS else tokenizer.eos_token_id
                ids += [] if token is None else [int(token)]
            elif written := _fill(slot, text):
                ids += tokenizer(written, add_special_tokens=False)["input_ids"]
        return ids

    def _with_thought(self, pair: Pair, answer: Message) -> Pair:
        """Put empty thoughts before an answer that has none."""
        asked, answered = pair
        if any(mark in str(answer["content"]) for mark in _THOUGHTS):
            return pair
        opening, closing = _THOUGHTS
        empty = self.tokenizer(f"{opening}\n\n{closing}\n\n", add_special_tokens=False)["input_ids"]
        return (asked, [*empty, *answered]) if self.template.thinking else ([*asked, *empty], answered)


def _fill(slot: str, text: str) -> str:
    return slot.replace("{}", text, 1)


def _forget(turn: Message) -> Message:
    """Take the thoughts out of an answer."""
    opening, closing = map(re.escape, _THOUGHTS)
    said = re.sub(f"{opening}(.*?){closing}", "", str(turn["content"]), flags=re.DOTALL).lstrip("\n")
    return {**turn, "content": said}


# -- from our records ------------------------------------------------------------------------------------------------


def read_conversation(prompt: Text | None, answer: str | Message, where: str) -> Conversation:
    """Split a record into turns; raise ValueError where they are no questions with answers, one after the other."""
    if not isinstance(prompt, list):
        raise ValueError(
            f"{where}: a template is for chat messages, but this is text; leave --dataset.template.name out"
        )
    tools, messages = split_tools(prompt)
    system = None
    if messages and messages[0]["role"] in ("system", "developer"):
        system, messages = str(messages[0]["content"]), messages[1:]
    turns = [*messages, answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]
    for place, turn in enumerate(turns):
        if turn["role"] not in (("assistant",) if place % 2 else ("user", "tool")):
            raise ValueError(
                f"{where}: message {place + 1} is of the {turn['role']!r}; a template of LLaMA-Factory takes questions "
                "(user, tool) and answers (assistant) in turn, the last one an answer"
            )
    if len(turns) % 2:
        raise ValueError(f"{where}: the last message is no answer")
    return Conversation(turns, system, tools)


# -- the template and its tokenizer ----------------------------------------------------------------------------------


def make_encoder(options: TemplateOptions, tokenizer: Any) -> Encoder:
    """Make the encoder that the options name, and give the tokenizer its end token, as LLaMA-Factory does.

    Raises ValueError where there is no such template, or its end token is none of the tokenizer's.
    """
    template = read_own(tokenizer) if options.name == AUTO else TEMPLATES[options.name]
    if options.tools:
        calls = ("{}",) if template.closes_once else ("{}", Mark.EOS)
        template = template._replace(function=calls, tools=options.tools, calls=options.tools)
    if options.system is not None:
        template = template._replace(default_system=options.system)
    template = template._replace(thinking=options.thinking)
    fit_tokenizer(template, options.name, tokenizer)
    return Encoder(template, tokenizer)


def fit_tokenizer(template: Template, name: str, tokenizer: Any) -> None:
    """Make the template's first stop word the tokenizer's EOS where it replaces that."""
    if template.replaces_eos and tokenizer.eos_token != (end := template.stop_words[0]):
        if end not in tokenizer.get_vocab():
            raise ValueError(
                f"the template {name} ends answers with {end}, which is no token of this tokenizer; choose a template "
                "that fits the model"
            )
        tokenizer.eos_token = end
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the template {name} needs an EOS token, and the tokenizer has none; set tokenizer.eos_token")


def list_stops(template: Template, tokenizer: Any) -> tuple[int, ...]:
    """List the tokens that end an answer: EOS, and the template's stop words as far as they are tokens."""
    known = tokenizer.get_vocab()
    ids = [tokenizer.eos_token_id, *(known[word] for word in template.stop_words if word in known)]
    return tuple(dict.fromkeys(int(token) for token in ids))


def read_own(tokenizer: Any) -> Template:
    """Read a template off the tokenizer's own chat template; without one it is `empty`.

    Where the chat template has a system message of its own, that is told apart by what an empty one leaves out.

    Raises ValueError where the chat template takes no system message.
    """
    if not isinstance(tokenizer.chat_template, str):
        return TEMPLATES["empty"]

    def write(messages: list[Message], ask: bool) -> str:
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # the template is a program of its own
            raise ValueError(f"the tokenizer's chat template cannot be read off ({error}); name a template") from error
        return text[len(prefix) :]

    prefix = tokenizer.decode(tokenizer("")["input_ids"])
    question, answer = {"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _CONTENT}
    system = write([{"role": "system", "content": _CONTENT}], False)
    user, silent = write([question], True), write([{"role": "system", "content": ""}, question], True)
    assistant = write([question, answer], False)[len(user) :]
    thinks = _THOUGHTS[0] in assistant
    for mark in _THOUGHTS:
        assistant = assistant.replace(mark, "")
    default = ""
    if len(user) > len(silent):
        default = _find_inserted(silent, user)
        user = user[len(system.replace(_CONTENT, default, 1)) :]
    asked, answered, told = ((text.replace(_CONTENT, "{}", 1),) for text in (user, assistant.lstrip("\n"), system))
    return Template(
        asked, answered, told, prefix=(prefix,) if prefix else (), default_system=default, thinks=thinks
    )  # fmt: skip


def _find_inserted(short: str, long: str) -> str:
    """Find the characters of `long` that `short` lacks, comparing from the left."""
    place, found = 0, ""
    for number, character in enumerate(long):
        if place == len(short):
            break
        if short[place] == character:
            place += 1
        else:
            found += long[number]
    return found
