"""Hugging Face directories: bitwise round trips, and a clear ValueError for every damage."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ppo_jax.models.files import hf
from ppo_jax.models.files.tokenizer import check_vocabulary, load_tokenizer
from tests.models.tiny import CONFIG, LLAMA3, equal, random_params

PARAMS = random_params(CONFIG)
WIDE = dataclasses.replace(
    CONFIG, attention_bias=True, output_bias=True, mlp_bias=True, tie_embeddings=False, head_dim=10, rope_scaling=LLAMA3
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    hf.save(path, CONFIG, PARAMS)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A model directory that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    vocab = {f"w{i}": i for i in range(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="w0")), eos_token="w2")


def edit(path: Path, name: str, **fields: object) -> None:
    file = path / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def retensor(path: Path, **changes: np.ndarray | None) -> None:
    """Rewrites the weights with some tensors replaced, added or (None) removed; "__" stands for "."."""
    tensors = load_file(path / hf.SINGLE) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path / hf.SINGLE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["plain", "biased"])
def test_round_trip_is_bitwise(config, dtype: str, tmp_path: Path) -> None:
    config = dataclasses.replace(config, dtype=dtype)
    params = random_params(config)
    hf.save(tmp_path, config, params)
    again, loaded = hf.load(tmp_path, dtype)
    assert again == config
    assert equal(loaded, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}


def test_shards_hold_the_same_bits_and_obey_their_limit(tmp_path: Path) -> None:
    limit = 12_000
    hf.save(tmp_path, WIDE, params := random_params(WIDE), max_shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / hf.INDEX).read_text())
    assert len(shards) > 3 and not (tmp_path / hf.SINGLE).exists()
    assert [s.name for s in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= limit
        assert {index["weight_map"][name] for name in tensors} == {shard.name}
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert equal(hf.load(tmp_path)[1], params)


def test_linear_weights_are_transposed_and_layers_unstacked(saved: Path) -> None:
    tensors = load_file(saved / hf.SINGLE)
    layer = "model.layers.1.self_attn."
    assert tensors[f"{layer}k_proj.weight"].shape == (16, 32)  # [K*H, D]: torch.nn.Linear keeps [out, in]
    np.testing.assert_array_equal(tensors[f"{layer}k_proj.weight"], PARAMS["layers"]["k"][1].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], PARAMS["embedding"])
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("stored", [np.float16, np.float64, jnp.bfloat16])
def test_other_float_types_are_converted(stored: type, copy: Path) -> None:
    value = np.linspace(0.5, 1.5, 32).astype(stored)
    retensor(copy, model__norm__weight=value)
    for dtype in ("float32", "bfloat16"):
        _, params = hf.load(copy, dtype)
        np.testing.assert_array_equal(params["final_norm"], value.astype(jnp.dtype(dtype)))


def test_eos_of_the_generation_config_wins(copy: Path) -> None:
    edit(copy, "generation_config.json", eos_token_id=[5, 7])
    assert hf.load(copy)[0].eos_token_ids == (5, 7)
    (copy / "generation_config.json").unlink()
    assert hf.load(copy)[0].eos_token_ids == (2,)


def test_a_copy_of_the_tied_embedding_is_accepted_and_another_matrix_is_not(copy: Path) -> None:
    embedding = np.asarray(PARAMS["embedding"])
    retensor(copy, lm_head__weight=embedding, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32))
    assert equal(hf.load(copy)[1], PARAMS)
    retensor(copy, lm_head__weight=embedding + 1)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf.load(copy)


def test_save_refuses_to_replace_a_model_unless_told(copy: Path) -> None:
    with pytest.raises(FileExistsError, match="already holds a model"):
        hf.save(copy, CONFIG, PARAMS)
    other = random_params(CONFIG, seed=1)
    hf.save(copy, CONFIG, other, overwrite=True, max_shard_bytes=20_000)
    assert equal(hf.load(copy)[1], other)  # and the single file of before is gone
    hf.save(copy, CONFIG, PARAMS, overwrite=True)
    assert equal(hf.load(copy)[1], PARAMS)
    assert not list(copy.glob("*-of-*"))


def test_save_refuses_parameters_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parameter layers.q has shape"):
        hf.save(tmp_path / "x", dataclasses.replace(CONFIG, head_dim=16), PARAMS)
    assert not (tmp_path / "x").exists()


def test_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    hf.save(tmp_path, CONFIG, PARAMS, tokenizer(67))
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer(67).get_vocab() and loaded.eos_token == "w2"
    saved_class = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert saved_class == "PreTrainedTokenizerFast"  # known to transformers 4 and 5


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    check_vocabulary(CONFIG, tokenizer(67))
    with pytest.raises(ValueError, match="token 'w67' has id 67, but the model's vocab_size is 67"):
        check_vocabulary(CONFIG, tokenizer(68))
    with pytest.raises(ValueError, match="w67"):
        hf.save(tmp_path, CONFIG, PARAMS, tokenizer(68))


def test_missing_and_damaged_tokenizers(saved: Path, copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        load_tokenizer(saved)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        load_tokenizer(copy)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a Hugging Face directory"):
        hf.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="could not be fetched from the Hugging Face hub.*Give the path"):
        hf.load("ppo-jax-tests/no-such-model")
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="file.bin is a file; give"):
        hf.load(tmp_path / "file.bin")


@pytest.mark.parametrize("name", ["config.json", hf.SINGLE])
def test_a_missing_file_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        hf.load(copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / hf.SINGLE).rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle"):
        hf.load(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"[" * 100_000, b"\xff\xfe{}"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_not_a_json_object(name: str, content: bytes, copy: Path) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not (JSON|a JSON object)"):
        hf.load(copy)


def test_a_config_says_nothing_twice(copy: Path) -> None:
    """The parser of Python would take the last."""
    file = copy / "config.json"
    file.write_text(file.read_text().replace("{", '{"hidden_size": 8,', 1))
    with pytest.raises(ValueError, match="config.json: the key 'hidden_size' stands twice in one object"):
        hf.load(copy)


def test_an_unsupported_config_names_file_and_field(copy: Path) -> None:
    edit(copy, "config.json", hidden_act="relu")
    with pytest.raises(ValueError, match=r"model/config.json: hidden_act='relu' is not supported"):
        hf.load(copy)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    retensor(copy, model__layers__2__mlp__up_proj__weight=None)
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj.weight \(48, 32\) is missing"):
        hf.load(copy)


def test_a_surplus_tensor_is_named(copy: Path) -> None:
    retensor(copy, score__weight=np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="1 tensors have no place in the model: score.weight"):
        hf.load(copy)


def test_more_layers_in_the_file_than_in_the_config(copy: Path) -> None:
    edit(copy, "config.json", num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"9 tensors have no place in the model: model.layers.2\."):
        hf.load(copy)


def test_a_wrong_shape_is_named_with_both_shapes(copy: Path) -> None:
    edit(copy, "config.json", vocab_size=68)
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight has shape \(67, 32\), the configuration implies \(68, 32\)"
    ):
        hf.load(copy)


def test_an_integer_tensor_is_refused(copy: Path) -> None:
    retensor(copy, model__norm__weight=np.ones(32, np.int8))
    with pytest.raises(
        ValueError, match="model.norm.weight in model.safetensors is I8; supported: F64, F32, F16, BF16"
    ):
        hf.load(copy)


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({"a": "model-00002-of-00002.safetensors"}, FileNotFoundError, "model-00002-of-00002.safetensors is missing"),
        ({"a": "../model.safetensors"}, ValueError, "which is not a safetensors file beside it"),
        ({"a": "weights.bin"}, ValueError, "which is not a safetensors file beside it"),
        ({}, ValueError, "weight_map is not an object with entries"),
        ([], ValueError, "weight_map is not an object with entries"),
    ],
)
def test_a_shard_index_that_is_wrong(weight_map: object, error: type, message: str, copy: Path) -> None:
    (copy / hf.SINGLE).unlink()
    (copy / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=message):
        hf.load(copy)


def test_a_tensor_in_two_shards(copy: Path) -> None:
    (copy / hf.SINGLE).rename(copy / "a.safetensors")
    shutil.copy(copy / "a.safetensors", copy / "b.safetensors")
    (copy / hf.INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(ValueError, match="b.safetensors: tensor .* is also in a.safetensors"):
        hf.load(copy)


@pytest.mark.parametrize("length", [2**40, 2**63, 0, 1])
def test_a_header_length_that_lies(length: int, copy: Path) -> None:
    content = (copy / hf.SINGLE).read_bytes()
    (copy / hf.SINGLE).write_bytes(struct.pack("<Q", length) + content[8:])
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file"):
        hf.load(copy)


@given(st.data())
def test_truncated_weights_are_a_clear_error(saved: Path, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    content = (saved / hf.SINGLE).read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    path = Path(shutil.copytree(saved, tmp_path_factory.mktemp("cut") / "model"))
    (path / hf.SINGLE).write_bytes(content[:cut])
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file"):
        hf.load(path)


@given(st.data())
def test_a_damaged_header_is_a_clear_error_or_changes_nothing(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data
) -> None:
    """Overwrites bytes of the header: either the damage is found, or what is read is well-formed."""
    content = bytearray((saved / hf.SINGLE).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = Path(shutil.copytree(saved, tmp_path_factory.mktemp("bytes") / "model"))
    (path / hf.SINGLE).write_bytes(content)
    try:
        _, params = hf.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PARAMS)
