"""Hugging Face directories at random: configurations, the index, safetensors headers, tokenizers."""

import dataclasses
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.cli.plan.programs import PlanSettings, model_config
from ppo_jax.data import render
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import hf
from ppo_jax.models.files.tokenizer import check_vocabulary, load_tokenizer
from tests.data.tokenizer import make_tokenizer
from tests.fuzz.inputs import damaged, mutated, outcome, to_json
from tests.models.tiny import CONFIG, random_params

RICH = {
    "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "layer_types": ["full_attention"] * 3,
    "sliding_window": None,
    "auto_map": {"AutoConfig": "x.X"},
    "quantization_config": None,
}  # fmt: skip
TERABYTE = 2**40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model"
    hf.save(path, CONFIG, random_params(CONFIG), make_tokenizer())
    return path


@pytest.fixture(scope="module")
def restore(model: Path) -> Callable[[], None]:
    """Puts back the files as they were."""
    good = {file: file.read_bytes() for file in model.iterdir()}

    def put_back() -> None:
        for file, content in good.items():
            file.write_bytes(content)

    return put_back


@settings(max_examples=150)
@given(data=st.data())
def test_config_json(model: Path, restore: Callable[[], None], data: st.DataObject) -> None:
    restore()
    file = model / data.draw(st.sampled_from(["config.json", "config.json", "generation_config.json"]))
    document = json.loads(file.read_text())
    content = to_json(data.draw(mutated(document | (RICH if file.name == "config.json" else {}))))
    file.write_bytes(data.draw(st.sampled_from([content, content, data.draw(damaged(content))])))
    outcome(lambda: hf.load(model), str(model))
    outcome(lambda: model_config(PlanSettings(str(model), "cpu:1")), str(model))


@settings(max_examples=60)
@given(data=st.data())
def test_the_index_of_shards(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "sharded"
    if not path.exists():
        hf.save(path, CONFIG, random_params(CONFIG), max_shard_bytes=20_000)
        (path / "good").write_bytes((path / hf.INDEX).read_bytes())
    document = json.loads((path / "good").read_text())
    names = st.sampled_from(["x" * 300, "\0", "\ud800", "../a", "", "."]).map(lambda name: f"{name}.safetensors")
    odd = names.map(lambda name: {"weight_map": {"a": name}})
    (path / hf.INDEX).write_bytes(to_json(data.draw(mutated(document) | odd)))
    outcome(lambda: hf.load(path), str(path))


@settings(max_examples=120)
@given(data=st.data())
def test_safetensors_headers(model: Path, restore: Callable[[], None], data: st.DataObject) -> None:
    restore()
    file = model / hf.SINGLE
    good = file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    if data.draw(st.booleans()):
        header = to_json(data.draw(mutated(json.loads(good[8 : 8 + length]))))
        file.write_bytes(struct.pack("<Q", len(header)) + header + good[8 + length :])
    else:
        file.write_bytes(data.draw(damaged(good, 8 + length)))
    outcome(lambda: hf.load(model), str(model))


def test_headers_that_claim_a_terabyte_allocate_nothing(model: Path, restore: Callable[[], None]) -> None:
    """In the length of the header, in a shape, in the offsets, and in the configuration that the shape fits."""
    restore()
    good, name = (model / hf.SINGLE).read_bytes(), "model.norm.weight"
    (length,) = struct.unpack("<Q", good[:8])
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    raw = json.loads((model / "config.json").read_text())

    def with_header(header: dict) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    claims = [
        struct.pack("<Q", TERABYTE) + good[8:],
        with_header(header | {name: header[name] | {"shape": [TERABYTE]}}),
        with_header(header | {name: header[name] | {"shape": [TERABYTE], "data_offsets": [0, 4 * TERABYTE]}}),
    ]
    for content, changes in [*((claim, {}) for claim in claims), (good, {"vocab_size": 2**31 - 1})]:
        (model / hf.SINGLE).write_bytes(content)
        (model / "config.json").write_text(json.dumps(raw | changes))
        outcome(lambda: hf.load(model), str(model))  # imports what it needs
        tracemalloc.start()
        with pytest.raises(ValueError, match=str(model)):
            hf.load(model)
        assert tracemalloc.get_traced_memory()[1] < 10**7
        tracemalloc.stop()


@settings(max_examples=60)
@given(data=st.data())
def test_tokenizer_files(model: Path, restore: Callable[[], None], data: st.DataObject) -> None:
    """A tokenizer that loads also works, or says by itself that a text or a chat cannot be had."""
    restore()
    file = model / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    good = file.read_bytes()
    document = mutated(json.loads(good)).map(to_json)
    file.write_bytes(data.draw(document | damaged(good)))
    tokenizer = outcome(lambda: load_tokenizer(model), str(model))
    if isinstance(tokenizer, Exception):
        return
    outcome(lambda: check_vocabulary(CONFIG, tokenizer))
    tokenizer.decode(tokenizer("ab")["input_ids"])
    outcome(lambda: render([{"role": "user", "content": "a"}], tokenizer, "here"), "here")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages + 1 }}",
        "{{ messages[9].content }}",
        "{% for",
        "{{ range(10**12) }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 10**14 }}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_chat_templates_that_fail(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    try:
        found = outcome(lambda: render([{"role": "user", "content": "a"}], tokenizer, "prompts.jsonl:3"))
    except MemoryError as error:  # it asks for too much
        found = error
    assert isinstance(found, ValueError | MemoryError) and str(found).startswith(
        "prompts.jsonl:3: the tokenizer's chat template"
    )


def test_a_tokenizer_with_code_of_its_own_is_not_run_and_asks_nothing(
    model: Path, restore: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore()
    file = model / "tokenizer_config.json"
    (model / "own.py").write_text("raise SystemExit('run')\n")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    outcome(lambda: load_tokenizer(model), str(model))
    (model / "own.py").unlink()


def test_a_tokenizer_much_smaller_than_the_model_is_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """More than 512 unused rows and more than 5 %."""
    tokenizer, count = make_tokenizer(), len(make_tokenizer().get_vocab())
    for size, warned in [(count, False), (count + 512, False), (count + 513, True), (49_152, True)]:
        check_vocabulary(_sized(size), tokenizer)
        said = [str(w.message) for w in recwarn.list]
        assert bool(said) == warned
        if warned:
            assert f"has {count} tokens, but the model's vocab_size is {size}: {size - count} embeddings" in said[0]
        recwarn.clear()


def _sized(size: int) -> ModelConfig:
    return dataclasses.replace(CONFIG, vocab_size=size)
