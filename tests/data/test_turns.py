"""All answers of a conversation in one row: by the template's marks, and by what it writes before and after each."""

from typing import Any

import pytest

from ppo_jax.data import SFTRecord, encode_sft
from ppo_jax.data.chat import render
from ppo_jax.data.encode import expand_turns
from ppo_jax.data.turns import encode_turns
from tests.data.test_chat import ASK, CHATML, END, THOUGHTS, chatting

SAID = [*ASK, {"role": "assistant", "content": "ri"}, {"role": "user", "content": "is"}]
RECORD = SFTRecord(SAID, "river", "f:1")
# As CHATML; marks the answers with what ends them.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learnt(tokenizer: Any, encoded: Any, row: int = 0) -> str:
    ids = [i for i, on in zip(encoded.rows[row], encoded.masks[row], strict=True) if on]
    return tokenizer.decode(ids).replace(" ", "")


@pytest.mark.parametrize("kind", ["blank", "first", "bytes"])
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_every_answer_is_learnt_and_nothing_else(template: str, kind: str) -> None:
    tokenizer = chatting(template, kind)
    encoded = encode_turns([RECORD], tokenizer, 999)
    assert learnt(tokenizer, encoded) == f"ri{END}river{END}"
    whole = render([*SAID, {"role": "assistant", "content": "river"}], tokenizer, add_generation_prompt=False)
    assert encoded.rows[0] == tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    # Each answer's tokens are those that are learnt where it is the last one.
    ids = [i for i, on in zip(encoded.rows[0], encoded.masks[0], strict=True) if on]
    alone = encode_sft(expand_turns([RECORD]), tokenizer, 999)
    assert ids == [i for row, start in zip(alone.rows, alone.starts, strict=True) for i in row[start:]]
    assert encoded.starts[0] == alone.starts[0]


def test_one_answer_and_plain_text_are_as_without(tmp_path: Any) -> None:
    tokenizer = chatting(CHATML)
    records = [SFTRecord(ASK, "ri", "f:1"), SFTRecord("the", " ri", "f:2"), SFTRecord(None, "the", "f:3")]
    encoded, plain = encode_turns(records, tokenizer, 99), encode_sft(records, tokenizer, 99)
    assert (encoded.rows, encoded.starts) == (plain.rows, plain.starts)
    assert encoded.masks == [
        [place >= start for place in range(len(row))] for row, start in zip(plain.rows, plain.starts, strict=True)
    ]


def test_a_template_that_rewrites_earlier_answers_is_refused() -> None:
    said = [*ASK, {"role": "assistant", "content": "the</think>ri"}, *ASK]
    with pytest.raises(ValueError, match="f:1: the chat template writes an answer in another way .* --turns all"):
        encode_turns([SFTRecord(said, "river", "f:1")], chatting(THOUGHTS), 999)


def test_long_conversations() -> None:
    tokenizer = chatting(CHATML)
    full = encode_turns([RECORD], tokenizer, 999)
    size = len(full.rows[0])
    cut = encode_turns([RECORD], tokenizer, size - 3, "truncate_left")
    assert (cut.rows[0], cut.masks[0], cut.too_long) == (full.rows[0][3:], full.masks[0][3:], 1)
    short = SFTRecord(ASK, "ri", "f:2")
    assert encode_turns([RECORD, short], tokenizer, size - 1, "drop").kept == [1]
    with pytest.raises(ValueError, match="1 of 1 texts are longer than"):
        encode_turns([RECORD], tokenizer, size - 1)
