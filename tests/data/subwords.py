"""Real tokenizers with tokens of several characters, whose merges are written out: what each gives can be worked out.

blank     a "▁" before every text, as Llama 2's: by the normalizer, and BPE over the whole text
first     the same by a pre-tokenizer, before the first word only
bytes     byte-level BPE as GPT-2's and its followers': no blank, words cut by a regular expression
"""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

KINDS = ("blank", "first", "bytes")
MERGES = ["t h", "th e", "_ the", "r i", "_ ri", "v e", "ve r", "_ri ver", "i s", "_ is", "_ r"]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_subwords(kind: str) -> Any:
    """One of KINDS. Words: the, ri, river, is, each behind a blank too, and ver; every other character is a token."""
    blank = "Ġ" if kind == "bytes" else "▁"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bytes" else [*"▁theriversan|<>/.: k", "\n"]
    special = ["<unk>", "<s>", "</s>"]
    pieces = list(dict.fromkeys([*special, *alphabet]))
    merges = [(a, b) for a, b in (merge.replace("_", blank).split() for merge in MERGES)]
    pieces += [a + b for a, b in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if kind == "blank":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )  # fmt: skip
    elif kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT
    return fast


def pieces(tokenizer: Any, row: list[int]) -> list[str]:
    """The row's tokens with a blank written as "_" and a line break as "/"."""
    found = tokenizer.convert_ids_to_tokens(row)
    return [p.replace("▁", "_").replace("Ġ", "_").replace("Ċ", "/").replace("\n", "/") for p in found]
