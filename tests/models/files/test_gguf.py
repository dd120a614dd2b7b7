"""GGUF files written by the `gguf` package come back as the model they were made from; damage is a ValueError."""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import gguf as gguf_package
import jax
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from ppo_jax.models.config import ModelConfig, RopeScaling
from ppo_jax.models.files import gguf, gguf_container, hf
from ppo_jax.models.files.tokenizer import load_tokenizer
from ppo_jax.models.layout import TENSORS
from tests.models.tiny import CONFIG, equal, random_params

WIDE = dataclasses.replace(
    CONFIG, attention_bias=True, output_bias=True, mlp_bias=True, tie_embeddings=False, head_dim=10
)
# A byte-level tokenizer of 256 bytes, three merges and two control tokens.
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "<|im|>", *sorted(ByteLevel.alphabet()), "12", "ab", "Ġab"],
    "tokenizer.ggml.token_type": [3, 3] + [1] * 259,
    "tokenizer.ggml.merges": ["1 2", "a b", "Ġ ab"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}<|im|>{{ m.content }}<|end|>{% endfor %}",
}
LINEARS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
LINEARS |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: of each head, rows (0, H/2, 1, H/2 + 1, ...)."""
    width = weight.shape[0] // heads
    order = [head * width + row for head in range(heads) for j in range(width // 2) for row in (j, j + width // 2)]
    return weight[order]


def tensors_of(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """The tensors of a model under llama.cpp's names and in its order of rows."""
    tensors = {"token_embd.weight": params["embedding"], "output_norm.weight": params["final_norm"]}
    if "unembedding" in params:
        tensors["output.weight"] = params["unembedding"]
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    for i in range(config.num_layers):
        layer = {name: np.asarray(value[i]) for name, value in params["layers"].items()}
        tensors[f"blk.{i}.attn_norm.weight"] = layer["attention_norm"]
        tensors[f"blk.{i}.ffn_norm.weight"] = layer["mlp_norm"]
        for ours, theirs in LINEARS.items():
            for key, kind in ((ours, "weight"), (f"{ours}_bias", "bias")):
                if key in layer:
                    value = layer[key].T
                    tensors[f"blk.{i}.{theirs}.{kind}"] = permute(value, heads[ours]) if ours in heads else value
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def fields_of(config: ModelConfig) -> dict[str, Any]:
    return {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_positions,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write(path: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray], kind: str = "F32") -> Path:
    """Writes with the package's own writer. A field that is None is left out."""
    writer = gguf_package.GGUFWriter(path, fields.get("general.architecture", "llama"))
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str) and key != "general.architecture":
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    quantised = gguf_package.GGMLQuantizationType[kind]
    for name, value in tensors.items():
        if kind == "F32" or value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, quantize(value, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write(path, fields_of(CONFIG) | TOKENIZER, tensors_of(CONFIG, random_params(CONFIG)))


@pytest.mark.parametrize("config", [CONFIG, WIDE, dataclasses.replace(CONFIG, num_kv_heads=4)])
def test_the_model_comes_back(config: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, rope_theta=100_000.0, norm_eps=1e-5)
    params = random_params(config)
    path = write(tmp_path / "m.gguf", fields_of(config), tensors_of(config, params))
    again, loaded = hf.load(path)
    assert again == config  # norm_eps too, although the file holds 9.9999997e-06
    assert equal(loaded, params)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_transformers_reads_the_same_weights(kind: str, tmp_path: Path) -> None:
    """transformers has a GGUF reader of its own: expansion, names, transposes and permutation agree bit by bit."""
    config = dataclasses.replace(CONFIG, intermediate_size=64, tie_embeddings=False)
    fields = fields_of(config) | TOKENIZER | {"general.architecture": "llama"}
    path = write(tmp_path / "m.gguf", fields, tensors_of(config, random_params(config)), kind)
    hf.save(tmp_path / "ours", *hf.load(path))
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.float()), name


def test_permutation_by_hand() -> None:
    """One head of width 6: llama.cpp's rows 0 1 2 3 4 5 are Hugging Face's 0 3 1 4 2 5."""
    theirs = np.array([0, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(gguf.unpermute(theirs, 1), [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(gguf.unpermute(np.concatenate([theirs, theirs + 6])[:, None], 2)[:, 0], range(12))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_tensors_are_expanded(kind: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, intermediate_size=64)
    tensors = tensors_of(config, random_params(config))
    path = write(tmp_path / "m.gguf", fields_of(config), tensors, kind)
    _, params = hf.load(path)
    quantised = gguf_package.GGMLQuantizationType[kind]
    down = tensors["blk.1.ffn_down.weight"]
    expected = dequantize(quantize(down, quantised), quantised)
    np.testing.assert_array_equal(params["layers"]["down"][1], expected.T)
    assert 0 < np.max(np.abs(expected - down)) < 0.2
    _, half = hf.load(path, "bfloat16")
    assert equal(half, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params))


def test_head_width_and_vocabulary_follow_from_the_shapes(tmp_path: Path) -> None:
    fields = fields_of(CONFIG) | {"llama.vocab_size": None, "llama.rope.dimension_count": None}
    fields |= {"llama.attention.key_length": None, "llama.attention.value_length": None}
    config, _ = hf.load(write(tmp_path / "m.gguf", fields, tensors_of(CONFIG, random_params(CONFIG))))
    assert config == CONFIG


def test_linear_scaling(tmp_path: Path) -> None:
    fields = fields_of(CONFIG) | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    config, _ = hf.load(write(tmp_path / "m.gguf", fields, tensors_of(CONFIG, random_params(CONFIG))))
    assert config.rope_scaling == RopeScaling("linear", 2.5)


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    """Llama 3.1: theta 500000, factor 8, limits 1 and 4 of 8192 positions; H = 16 so 8 frequencies.

    Turns within 8192 positions are t_i = 8192 * 500000^(-i/8) / (2 pi) = 1303.8, 252.8, 49.0, 9.51, 1.844, 0.358,
    0.0693, 0.0134. Above 4 turns the divisor is 1, below 1 it is 8; at 1.844, s = (1.844 - 1) / 3 = 0.2813 and the
    divisor is 1 / ((1 - s) / 8 + s) = 2.6931.
    """
    config = dataclasses.replace(CONFIG, head_dim=16, rope_theta=500_000.0)
    tensors = tensors_of(config, random_params(config))
    turns = 8192 * 500_000.0 ** (-np.arange(8) / 8) / (2 * np.pi)
    smooth = (turns[4] - 1) / 3
    assert abs(1 / ((1 - smooth) / 8 + smooth) - 2.69) < 0.01
    divisors = np.array([1, 1, 1, 1, 1 / ((1 - smooth) / 8 + smooth), 8, 8, 8], np.float32)
    path = write(tmp_path / "m.gguf", fields_of(config), tensors | {"rope_freqs.weight": divisors})
    assert hf.load(path)[0].rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    divisors[4] = 4.0
    path = write(tmp_path / "n.gguf", fields_of(config), tensors | {"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match="rope_freqs.weight is not llama3 scaling"):
        hf.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma"}, "general.architecture='gemma' is not supported; supported: llama"),
        ({"llama.expert_count": 8}, "llama.expert_count=8: mixtures of experts"),
        ({"llama.logit_scale": 0.5}, "metadata llama.logit_scale=0.5 is not supported"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4 differs from the head width 8"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length=4 differs"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.type='yarn'"),
        ({"llama.block_count": None}, "llama.block_count=None is not a positive integer"),
        ({"llama.block_count": 2}, "9 tensors have no place in the model: blk.2."),
        ({"llama.block_count": 4}, "tensor blk.3.attn_norm.weight (32,) is missing"),
        ({"llama.attention.head_count": [4, 4, 4]}, "llama.attention.head_count=[4, 4, 4] is not a positive"),
        (
            {"llama.feed_forward_length": 32},
            "tensor blk.0.ffn_gate.weight has shape (48, 32), the configuration implies",
        ),
        ({"llama.vocab_size": 66}, "tensor token_embd.weight has shape (67, 32), the configuration implies (66, 32)"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "layer_norm_rms_epsilon=0.0 is not a positive number"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", fields_of(CONFIG) | changes, tensors_of(CONFIG, random_params(CONFIG)))
    with pytest.raises(ValueError) as error:
        hf.load(path)
    assert str(path) in str(error.value) and message in str(error.value)


def tokenizer_of(tmp_path: Path, **changes: Any) -> Any:
    fields = fields_of(CONFIG) | TOKENIZER | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return load_tokenizer(write(tmp_path / "t.gguf", fields, {}))


def test_tokenizer_splits_digits_then_words(tmp_path: Path) -> None:
    tokens = lambda tokenizer, text: tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    smollm = tokenizer_of(tmp_path)
    assert tokens(smollm, "ab ab 12<|end|>") == ["ab", "Ġab", "Ġ", "1", "2", "<|end|>"]
    assert tokens(tokenizer_of(tmp_path, pre="gpt-2"), "12") == ["12"]
    assert tokens(tokenizer_of(tmp_path, add_bos_token=True), "ab") == ["<|im|>", "ab"]
    assert (smollm.bos_token_id, smollm.eos_token_id, smollm.pad_token, len(smollm)) == (1, 0, None, 261)
    assert smollm.decode([1, 259, 260, 0], skip_special_tokens=True) == "ab ab"


def test_chat_template_comes_from_the_file(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer_of(tmp_path).apply_chat_template(messages, tokenize=False) == "<|im|>ab<|end|>"


@given(st.text())
def test_every_text_survives_the_tokenizer(good: Path, text: str) -> None:
    if good not in _TOKENIZERS:
        _TOKENIZERS[good] = load_tokenizer(good)
    tokenizer = _TOKENIZERS[good]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


_TOKENIZERS: dict[Path, Any] = {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model='llama' with tokenizer.ggml.pre='smollm' is not supported"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre='llama-bpe' is not supported"),
        ({"tokens": None}, "tokenizer.ggml.tokens is not a list of strings"),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges is not a list of strings"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges: 'ab' is not a pair of tokens"),
        ({"merges": ["x yz"]}, "tokenizer.ggml.merges do not fit tokenizer.ggml.tokens"),
        ({"padding_token_id": 261}, "tokenizer.ggml.padding_token_id=261 is beyond the 261 tokens"),
        ({"padding_token_id": "x"}, "tokenizer.ggml.padding_token_id='x' is not a token id"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        tokenizer_of(tmp_path, **changes)
    assert message in str(error.value)


def header(version: int, tensors: int, fields: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "shorter than a header"),
        (b"GGML" + bytes(40), "it does not begin with GGUF"),
        (header(1, 0, 0), "GGUF version 1 "),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "GGUF version 50331648 .* little-endian"),
        (header(3, 0, 2**63), "claims 9223372036854775808 metadata fields; at most 16384"),
        (header(3, 2**63, 0), "claims 9223372036854775808 tensors; at most 262144"),
        (header(3, 0, 1), "cut short in its header"),
        (header(3, 0, 1) + struct.pack("<Q", 2**40), "a string of 1099511627776 bytes in the header does not fit"),
        (header(3, 0, 1) + field(b"a", 99, b""), "metadata field 'a': unknown value type 99"),
        (header(3, 0, 1) + field(b"a", 9, struct.pack("<IQ", 4, 2**60)), "an array of 1152921504606846976 values"),
        (header(3, 0, 1) + field(b"a", 9, struct.pack("<IQ", 8, 2**60)), "an array of 1152921504606846976 values"),
        (header(3, 0, 1) + field(b"a", 9, struct.pack("<IQ", 9, 1)), "unsupported array of value type 9"),
        (header(3, 0, 2) + 2 * field(b"a", 4, bytes(4)), "metadata field 'a' occurs twice"),
        (header(3, 0, 1) + field(b"\xff", 4, bytes(4)), "codec can't decode"),
        (header(3, 0, 1) + field(b"general.alignment", 4, bytes(4)), "general.alignment=0"),
        (header(3, 1, 0) + tensor(b"w", [1] * 5, 0, 0), "tensor 'w' has 5 dimensions"),
        (header(3, 1, 0) + tensor(b"w", [4], 77, 0), "tensor 'w' has the unknown type 77"),
        (
            header(3, 1, 0) + tensor(b"w", [33, 2], 8, 0),
            r"tensor 'w' of shape \(2, 33\) does not consist of blocks of 32",
        ),
        (header(3, 1, 0) + tensor(b"w", [2**60, 2**60], 0, 0), "tensor 'w' ends beyond the end of the file"),
        (header(3, 1, 0) + tensor(b"w", [4], 0, 2**60), "tensor 'w' ends beyond the end of the file"),
        (header(3, 2, 0) + 2 * tensor(b"w", [1], 0, 0) + bytes(64), "tensor 'w' occurs twice"),
    ],
)
def test_a_damaged_file_is_a_clear_error(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    for read in (hf.load, load_tokenizer):
        with pytest.raises(ValueError, match=f"bad.gguf: .*{message}"):
            read(path)


@given(st.data())
def test_a_truncated_file_is_a_clear_error(good: Path, data: st.DataObject) -> None:
    content = good.read_bytes()
    path = good.with_name("cut.gguf")
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 33))])  # the last 32 bytes may be padding
    with pytest.raises(ValueError, match="cut.gguf: "):
        hf.load(path)


@given(st.data())
def test_damaged_bytes_are_a_clear_error_or_a_well_formed_model(good: Path, data: st.DataObject) -> None:
    content = bytearray(good.read_bytes())
    places = st.one_of(st.integers(0, 1500), st.integers(len(content) - 36_000, len(content) - 30_000))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    path = good.with_name("bytes.gguf")
    path.write_bytes(content)
    for read in (hf.load, load_tokenizer):
        try:
            read(path)
        except ValueError as error:
            assert str(path) in str(error)


def test_the_gguf_package_reads_the_same(good: Path) -> None:
    """Our reader of the container against the package's own, field by field and tensor by tensor."""
    metadata, tensors = gguf_container.read(good)
    theirs = gguf_package.GGUFReader(good)
    assert metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(tensors) == [t.name for t in theirs.tensors]
    for found in theirs.tensors:
        np.testing.assert_array_equal(gguf_container.dequantize(found.name, tensors[found.name]), found.data)


def test_every_array_of_a_model_has_a_name_in_a_file() -> None:
    """Of the families that are read; the positions are GPT-2's, the biases of norms GPT-2's and GPT-NeoX's."""
    names = {tensor.name.removesuffix("_bias") for tensor in TENSORS}
    assert set(gguf.NAMES) == names - {"positions"}
