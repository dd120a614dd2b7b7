"""A real tokenizer with one token per character, small enough to work its output out by hand."""

from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .:\n"
BOS, EOS = 0, 1
CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def ids(text: str) -> list[int]:
    """The ids of a text without special tokens: a is 2, b is 3, and so on."""
    return [2 + CHARACTERS.index(character) for character in text]


def make_tokenizer(bos: bool = False, chat: bool = True) -> Any:
    """One token per character; `bos`: the tokenizer puts <s> before every text, as Llama's does."""
    vocabulary = {"<s>": BOS, "</s>": EOS, **{character: 2 + i for i, character in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT
    return fast
