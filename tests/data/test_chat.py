"""Chats in the words of their template: which token ends an answer, and how it is written."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ppo_jax.data import PairRecord, SFTRecord, encode_pairs, encode_prompts, encode_sft
from ppo_jax.data.chat import end_ids, put_tools, read_template, render, turn_closing, turn_end, write_answer
from ppo_jax.data.encode import expand_turns
from ppo_jax.data.turns import encode_turns
from ppo_jax.models.files import hf
from ppo_jax.models.files.tokenizer import rows_without_token
from ppo_jax.models.pretrained import load_model
from tests.data.subwords import make_subwords, pieces
from tests.data.tokenizer import EOS, make_tokenizer
from tests.models.tiny import random_params
from tests.small import SMALL

ASK = [{"role": "user", "content": "a"}]
END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Trims an answer and puts blanks around it, as Llama 2's.
BLANKS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
# Leaves the thoughts of earlier answers out, as Qwen 3's.
THOUGHTS = CHATML.replace(
    "m['content'] }}", "m['content'] if loop.last else m['content'].split('</think>')[-1] }}"
)  # fmt: skip


def chatting(template: str, kind: str = "blank") -> Any:
    """A tokenizer whose EOS is </s>, whatever ends a turn of its template."""
    tokenizer = make_subwords(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END]})
    tokenizer.chat_template = template
    return tokenizer


def test_the_token_that_ends_a_turn() -> None:
    tokenizer = chatting(CHATML)
    end = tokenizer.convert_tokens_to_ids(END)
    assert turn_closing(tokenizer) == f"{END}\n" and turn_end(tokenizer) == end != tokenizer.eos_token_id
    assert end_ids(tokenizer) == (end, tokenizer.eos_token_id)
    assert turn_end(chatting(BLANKS)) == tokenizer.eos_token_id
    assert turn_end(make_tokenizer()) == EOS and end_ids(make_tokenizer()) == (EOS,)
    assert turn_end(make_tokenizer(chat=False)) is None and end_ids(make_tokenizer(chat=False)) == (EOS,)
    without = chatting("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    assert turn_closing(without) == "\n" and turn_end(without) is None  # EOS ends an answer, as of a text
    assert turn_end(chatting("{{ raise_exception('no') }}")) is None


@pytest.mark.parametrize("kind", ["blank", "first", "bytes"])
def test_an_answer_is_closed_as_its_template_closes_it(kind: str) -> None:
    """In a chat by the template's token, in a text by EOS; once, whatever the answer spells."""
    tokenizer = chatting(CHATML, kind)
    rows = encode_sft(
        [SFTRecord(ASK, text, "") for text in ("ri", f"ri{END}", "ri</s>")] + [SFTRecord("a", "ri", "")], tokenizer, 99
    ).rows
    assert rows[0] == rows[1] == rows[2]
    assert pieces(tokenizer, rows[0])[-3:] == ["/", "ri", END]
    assert pieces(tokenizer, rows[3])[-2:] == ["ri", "</s>"]
    whole = render([*ASK, {"role": "assistant", "content": "ri"}], tokenizer, add_generation_prompt=False)
    assert rows[0] == tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    answer = [{"role": "assistant", "content": "ri"}]
    for record in (PairRecord(ASK, "ri", "the", 0.0, ""), PairRecord(ASK, answer, answer, 0.0, "")):
        assert encode_pairs([record], tokenizer, 99).chosen == [rows[0]]
        assert encode_pairs([record], tokenizer, 99, eos=False).chosen == [rows[0][:-1]]


def test_a_tokenizer_without_eos_closes_chats() -> None:
    tokenizer = chatting(CHATML)
    tokenizer.eos_token = None
    assert pieces(tokenizer, encode_sft([SFTRecord(ASK, "ri", "")], tokenizer, 99).rows[0])[-1] == END
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        encode_sft([SFTRecord("a", "ri", "")], tokenizer, 99)


def test_an_answer_is_written_as_the_template_writes_it() -> None:
    tokenizer = chatting(BLANKS)
    end = turn_end(tokenizer)
    assert write_answer(ASK, "ri\n", tokenizer, end) == ("<s>[INST] a [/INST]", " ri ")
    row = encode_sft([SFTRecord(ASK, "ri", "")], tokenizer, 99)
    assert pieces(tokenizer, row.rows[0][row.starts[0] :]) == ["_ri", "_", "</s>"]
    # A template that says less than the answer, or that goes on in another way than its prompts end: it stays.
    cut = chatting(CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}"))
    assert write_answer(ASK, "the</think>ri", cut, turn_end(cut))[1] == "the</think>ri"
    other = chatting(CHATML.replace("assistant\n{% endif", "assistant\nthe{% endif"))
    before, answer = write_answer(ASK, "ri", other, turn_end(other))
    assert before.endswith("assistant\nthe") and answer == "ri"


@pytest.mark.parametrize("template", [CHATML, THOUGHTS])
def test_all_answers_of_a_conversation_are_learnt_where_the_policy_gives_them(template: str) -> None:
    """A row for each, which begins with the prompt that the policy has when it writes that answer."""
    said = [*ASK, {"role": "assistant", "content": "the</think>ri"}, {"role": "user", "content": "is"},
            {"role": "assistant", "content": "ver"}]  # fmt: skip
    record = SFTRecord([*said, *ASK], "river", "f:1")
    expanded = expand_turns([record, SFTRecord(None, "text", "f:2")])
    responses = ["the</think>ri", "ver", "river", "text"]
    assert [r.response for r in expanded] == responses and [len(r.prompt or []) for r in expanded] == [1, 3, 5, 0]
    assert expanded[2:] == [record, SFTRecord(None, "text", "f:2")]
    tokenizer = chatting(template)
    encoded = encode_sft(expanded[:3], tokenizer, 999)
    asked = encode_prompts([said[:1], said[:3], [*said, *ASK]], tokenizer, 999).rows
    for row, start, prompt, answer in zip(encoded.rows, encoded.starts, asked, expanded, strict=False):
        assert row[:start] == prompt
        assert tokenizer.decode(row[start:]).replace(" ", "") == answer.response + END


def test_a_model_stops_where_its_template_ends_a_turn(tmp_path: Path) -> None:
    """And says so to everybody who loads what becomes of it."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END]})
    tokenizer.chat_template = CHATML
    config = dataclasses.replace(SMALL, vocab_size=len(tokenizer))
    hf.save(tmp_path / "model", config, random_params(config), tokenizer)
    model = load_model(tmp_path / "model")
    end = tokenizer.convert_tokens_to_ids(END)
    assert model.stop_ids == tuple(sorted((EOS, end)))
    hf.save(tmp_path / "out", model.config, model.params, model.tokenizer)
    assert set(hf.load(tmp_path / "out")[0].eos_token_ids) == {EOS, end}


def test_rows_without_a_token_are_known_when_a_model_is_loaded(tmp_path: Path) -> None:
    """Those behind the last token, and a gap; of an id that the vocabulary by text leaves out the tokenizer knows."""
    tokenizer = make_tokenizer()
    wide = dataclasses.replace(SMALL, vocab_size=40)
    hf.save(tmp_path, wide, random_params(wide), tokenizer)
    assert load_model(tmp_path).config == dataclasses.replace(wide, tokenless=((len(tokenizer), 40),))
    assert rows_without_token(len(tokenizer), tokenizer) == ()

    class Gap:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 3, "c": 5}

        def convert_ids_to_tokens(self, token_id: int) -> str | None:
            if token_id > 6:
                raise IndexError
            return "a" if token_id == 1 else None

    assert rows_without_token(9, Gap()) == ((2, 3), (4, 5), (6, 9))


# -- system messages, tools, templates of the user ---------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "the"}
TOOLS = [{"type": "function", "function": {"name": "river", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "river",
        "arguments": {"x": 1}}}]}  # fmt: skip
WITH_TOOLS = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML.replace(
    "m['content'] }}",
    "m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}",
)


def test_tools_reach_a_template_that_knows_them() -> None:
    tokenizer = chatting(WITH_TOOLS, "bytes")
    asked = put_tools(TOOLS, ASK)
    text = render(asked, tokenizer)
    assert text.startswith("<|im_start|>tools\n[") and '"river"' in text and text.endswith("assistant\n")
    assert render(put_tools([], ASK), tokenizer) == render(ASK, tokenizer)
    before, written = write_answer(asked, CALL, tokenizer, turn_end(tokenizer))
    assert before == text and written.startswith("<call>{") and END not in written
    row = encode_sft([SFTRecord(asked, CALL, "f:1")], tokenizer, 999)
    assert tokenizer.decode(row.rows[0][row.starts[0] :]) == written + END
    told = [*asked, CALL, {"role": "tool", "content": "ri"}]
    assert "tool\nri<|im_end|>" in render(told, tokenizer)
    expanded = expand_turns([SFTRecord(told, "ver", "f:1")])
    assert [r.response for r in expanded] == [CALL, "ver"] and expanded[0].prompt == asked


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            CHATML,
            put_tools(TOOLS, ASK),
            "f:1: the tokenizer's chat template leaves the tools out; .*--chat-template FILE",
        ),
        (CHATML, [*ASK, CALL], "leaves the calls of tools out"),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'tool' }}"),
            [*ASK, {"role": "tool", "content": "ri"}],
            "leaves what a tool said out",
        ),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'system' }}"),
            [SYSTEM, *ASK],
            "leaves the system message out",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
            [SYSTEM, *ASK],
            "f:1: the tokenizer's chat template refuses a system message .*: no system",
        ),
        ("{{ raise_exception('never') }}", [SYSTEM, *ASK], "refuses these messages: never"),
    ],
)
def test_what_a_template_cannot_say_is_an_error(template: str, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(messages, chatting(template), "f:1")


def test_a_template_of_the_users_own(tmp_path: Path) -> None:
    """It is the tokenizer's from then on, also for what ends a turn, and goes where the model goes."""
    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END]})
    config = dataclasses.replace(SMALL, vocab_size=len(tokenizer))
    hf.save(tmp_path / "model", config, random_params(config), tokenizer)
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    model = load_model(tmp_path / "model", template=file)
    assert tokenizer.convert_tokens_to_ids(END) in model.stop_ids
    assert render(ASK, model.tokenizer) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    for content, message in [(b"{% if messages %}", "line 1: "), (b"text", "no chat template"), (b"\xff", "not UTF-8")]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"--chat-template .*chat.jinja.*{message}"):
            read_template(file, tokenizer)
    with pytest.raises(FileNotFoundError, match="--chat-template .*none is not a file"):
        read_template(tmp_path / "none", tokenizer)


def test_a_template_of_transcripts_gives_them_back() -> None:
    """HH-RLHF's: no token ends a turn, so EOS does, and the blank before an answer is the template's."""
    tokenizer = chatting(
        "{% for m in messages %}{{ '\\n\\nHuman: ' if m.role == 'user' else '\\n\\nAssistant: ' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}",
        "bytes",
    )
    encoded = encode_sft([SFTRecord(ASK, "ri", "f:1")], tokenizer, 99)
    assert tokenizer.decode(encoded.rows[0]) == "\n\nHuman: a\n\nAssistant: ri</s>"
    assert pieces(tokenizer, encoded.rows[0][encoded.starts[0] :]) == ["_ri", "</s>"]
    assert encode_turns([SFTRecord(ASK, "ri", "f:1")], tokenizer, 99).rows == encoded.rows
