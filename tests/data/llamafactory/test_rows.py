"""Rows by templates are LLaMA-Factory's own, row for row; and its data sets are read by its registry."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_jax.data.chat import put_tools, use_date
from ppo_jax.data.llamafactory import registry, rows
from ppo_jax.data.llamafactory.encoding import Conversation, make_encoder, read_conversation, read_own
from ppo_jax.data.options import TemplateOptions
from ppo_jax.data.reading import read_records
from ppo_jax.data.records import PairRecord, PromptRecord, SFTRecord
from tests.cli.llamafactory.tiny import DATA, FIXTURE, load_tokenizer

GOLDEN = json.loads((FIXTURE / "rows.json").read_text())
IGNORED = -100


def digest(row: Any) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def labels(row: list[int], mask: list[bool]) -> list[int]:
    return [token if learnt else IGNORED for token, learnt in zip(row, mask, strict=True)]


def make_rows(case: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Make the rows of a golden case, as its loader names them."""
    given, path = case["arguments"], f"{DATA}/dataset_info.json:{case['dataset']}"
    encoder, length = make_encoder(TemplateOptions(given["template"]), load_tokenizer()), given["cutoff_len"]
    if case["stage"] == "sft":
        demonstrations = read_records("demonstrations", path).records
        turns = rows.encode_demonstrations(demonstrations, encoder, length, "share", given.get("mask_history", False))
        pairs = zip(turns.rows, turns.masks, strict=True)
        return [{"input_ids": row, "labels": labels(row, mask)} for row, mask in pairs]
    if case["stage"] == "ppo":
        prompts = rows.encode_prompts(read_records("prompts", path).records, encoder, length, "share")
        return [{"input_ids": list(row)} for row in prompts.rows]
    found = rows.encode_preferences(read_records("preference pairs", path).records, encoder, length, "share")
    made = []
    for sides, starts in zip(zip(found.chosen, found.rejected, strict=True), found.starts, strict=True):
        row: dict[str, list[int]] = {}
        for name, side, start in zip(("chosen", "rejected"), sides, starts, strict=True):
            row |= {f"{name}_input_ids": side, f"{name}_labels": [IGNORED] * start + side[start:]}
        made.append(row)
    return made


@pytest.mark.parametrize("template", sorted({case["arguments"]["template"] for case in GOLDEN}))
def test_rows_are_those_of_its_own_loader(template: str) -> None:
    """Of five data sets: history, system messages, tools and calls, thoughts, rows that it drops, both lengths."""
    with use_date("2026-11-28"):
        for case in GOLDEN:
            if case["arguments"]["template"] == template:
                made = [digest(row) for row in make_rows(case)]
                assert made == case["rows"], {key: case[key] for key in ("dataset", "stage", "arguments")}


@pytest.mark.parametrize(
    ("asked", "answered", "room", "kept"),
    [
        (10, 4, 100, (10, 4)),  # all fits
        (100, 4, 10, (6, 4)),  # a short answer stays whole
        (4, 100, 10, (4, 6)),  # a short prompt stays whole
        (60, 40, 10, (6, 4)),  # both are long: 10 * 40 / 100 of the answer
        (7, 14, 10, (4, 6)),  # rounded down: 6.67
        (5, 5, 10, (5, 5)),  # 2 * 5 is not less than 10, and each gets its half
    ],
)
def test_prompt_and_answer_share_the_room(asked: int, answered: int, room: int, kept: tuple[int, int]) -> None:
    assert rows.share_room(asked, answered, room) == kept


def test_what_is_too_long_may_also_be_an_error_or_dropped() -> None:
    encoder = make_encoder(TemplateOptions("smollm"), load_tokenizer())
    records = [SFTRecord([{"role": "user", "content": text}], "ok", f"f:{i}") for i, text in enumerate(("a", 90 * "x"))]
    with pytest.raises(ValueError, match=r"1 of 2 texts are longer than 40 tokens.*f:1"):
        rows.encode_demonstrations(records, encoder, 40)
    assert rows.encode_demonstrations(records, encoder, 40, "drop").kept == [0]
    with pytest.raises(ValueError, match="truncate_left does not go with --dataset.template.name"):
        rows.encode_demonstrations(records, encoder, 40, "truncate_left")
    prompts = [PromptRecord(record.prompt or "", {}, record.where) for record in records]
    shared = rows.encode_prompts(prompts, encoder, 40, "share")
    assert shared.too_long == 1 and len(shared.rows[1]) < 40 and shared.rows[1] == encoder.encode_last(
        Conversation([{"role": "user", "content": 90 * "x"}, {"role": "assistant", "content": ""}])
    )[0][: len(shared.rows[1])]  # fmt: skip


def test_pairs_of_plain_text_have_no_template() -> None:
    encoder = make_encoder(TemplateOptions("empty"), load_tokenizer())
    with pytest.raises(ValueError, match=r"f:1: a template is for chat messages, but this is text"):
        rows.encode_preferences([PairRecord("a", "b", "c", 0.0, "f:1")], encoder, 40)


def test_turns_must_alternate() -> None:
    user, answer = {"role": "user", "content": "a"}, "b"
    with pytest.raises(ValueError, match=r"f:1: message 2 is of the 'user'"):
        read_conversation([user, user], answer, "f:1")
    told = read_conversation(put_tools([{"name": "f"}], [{"role": "system", "content": "s"}, user]), answer, "f:1")
    assert told.system == "s" and list(told.tools) == [{"name": "f"}] and len(told.turns) == 2


def test_a_template_needs_its_end_token() -> None:
    tokenizer = load_tokenizer()
    with pytest.raises(ValueError, match="there are: auto, alpaca"):
        TemplateOptions("pi")
    granite = make_encoder(TemplateOptions("granite3"), tokenizer)
    assert granite.template.stop_words == () and tokenizer.eos_token == "</s>"
    make_encoder(TemplateOptions("llama3"), tokenizer)
    assert tokenizer.eos_token == "<|eot_id|>"
    with pytest.raises(ValueError, match="name too"):
        TemplateOptions(system="x")


def test_the_tokenizers_own_template_is_read_off() -> None:
    """A chat template with a system message of its own becomes the template that writes the same strings."""
    tokenizer = load_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = read_own(tokenizer)
    assert found.default_system == "Be good." and found.assistant == ("{}<|im_end|>\n",)
    assert found.user == ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",)
    assert found.system == ("<|im_start|>system\n{}<|im_end|>\n",)
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0].role == 'system' else 'x' }}"
    with pytest.raises(ValueError, match="cannot be read off"):
        read_own(tokenizer)


# -- dataset_info.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"script_url": "x"}, "script_url: loading scripts are not run"),
        ({"ms_hub_url": "a/b"}, "ms_hub_url: the hub of ModelScope is not read"),
        ({"file_name": "a.json", "columns": {"images": "i"}}, "columns.images holds images"),
        ({"file_name": "a.json", "num_samples": 3}, "num_samples takes a random part"),
        ({"file_name": "a.json", "formatting": "openai"}, "formatting 'openai' is not known"),
        ({"file_name": "a.json", "colums": {}}, "unknown field 'colums'"),
        ({"file_name": "a.json", "columns": {"promt": "x"}}, "columns must be an object with some of prompt"),
        ({"file_name": "wiki.txt"}, "plain text, for LLaMA-Factory's stage pt alone"),
        ({}, "there is no file_name and no hf_hub_url"),
    ],
)
def test_an_entry_that_cannot_be_had_is_refused_by_name(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"one": entry}))
    with pytest.raises(ValueError, match=message):
        registry.read_entry(tmp_path / "dataset_info.json", "one")


def test_where_data_sets_are() -> None:
    assert registry.split_name("data/dataset_info.json:a/b") == (Path("data/dataset_info.json"), "a/b")
    assert registry.split_name("data/other.json:a") is None
    with pytest.raises(ValueError, match="names no data set 'none'; it has: instructions, talks"):
        read_records("prompts", f"{DATA}/dataset_info.json:none")
    with pytest.raises(ValueError, match=r"choices holds preference pairs .*this stage takes demonstrations"):
        read_records("demonstrations", f"{DATA}/dataset_info.json:choices")


def test_rows_that_it_drops_are_counted() -> None:
    found = read_records("demonstrations", f"{DATA}/dataset_info.json:talks")
    assert found.notice.endswith(
        "talks: 4 demonstrations, ShareGPT form, 2 skipped: questions and answers do not take turns (first at "
        f"{DATA}/talks.json, row 3)"
    )


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["human", "gpt", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "value", "name"]), inner),
    max_leaves=8,
)
FIELDS = ("instruction", "input", "output", "history", "system", "conversations", "tools", "chosen", "rejected")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.dictionaries(st.sampled_from(FIELDS), ANY),
    form=st.sampled_from(["alpaca", "sharegpt"]),
    ranking=st.booleans(),
)
def test_a_row_of_anything_is_a_record_or_a_value_error(
    row: dict[str, Any], form: str, ranking: bool, tmp_path: Path
) -> None:
    columns = {
        "prompt": "instruction", "query": "input", "response": "output", "messages": "conversations",
        **{name: name for name in ("history", "system", "tools", "chosen", "rejected")},
    }  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([row], allow_nan=True))
    entry = {"file_name": "rows.json", "formatting": form, "ranking": ranking, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"it": entry}))
    for stage in ("preference pairs",) if ranking else ("demonstrations", "prompts"):
        try:
            found = read_records(stage, f"{tmp_path}/dataset_info.json:it").records
        except ValueError as error:
            assert "rows.json" in str(error) or "dataset_info.json" in str(error)
        else:
            assert len(found) == 1 and json.dumps(found[0].prompt)
