"""GGUF files of Gemma 3: a tiny one of arrays that transformers made, its tokenizer; and (long) the real one."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ppo_jax.data import gemma
from ppo_jax.models.files import gguf, hf
from ppo_jax.models.files.names import stored_tensors
from ppo_jax.models.files.tokenizer import check_vocabulary, load_tokenizer
from ppo_jax.models.transformer import apply, logits
from tests.models.families import torch_model
from tests.models.files.test_gguf import write
from tests.models.test_parity import error, torch_logits
from tests.models.tiny import equal

# What SentencePiece's BPE merges first has the highest score; bytes stand for what no token has.
BYTES = [f"<0x{number:02X}>" for number in range(256)]
WORDS = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁abc", "\n\n", "  "]
SCORES = [-9.0, -9.0, -9.0, -9.0, -1.0, -0.5, -2.0, -3.0, -4.0, -1000.0, -1000.0]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *WORDS]
TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [-1000.0] * 260 + SCORES,
    "tokenizer.ggml.token_type": [3] * 4 + [6] * 256 + [1] * 9 + [4, 4],
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": False,
}
FIELDS = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 64,
    "gemma3.embedding_length": 32,
    "gemma3.block_count": 7,
    "gemma3.feed_forward_length": 48,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 2,
    "gemma3.attention.key_length": 8,
    "gemma3.attention.value_length": 8,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 5,
    "gemma3.rope.freq_base": 1e6,
    **TOKENIZER,
}


def test_a_tiny_model_of_transformers_comes_through_a_gguf_file(tmp_path: Path) -> None:
    """Seven layers: the sixth sees everything. llama.cpp stores the norms with the 1 that transformers adds."""
    model = torch_model(
        "gemma3", num_hidden_layers=7, layer_types=None, query_pre_attn_scalar=8, vocab_size=len(TOKENS),
        eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "hf")
    expected, params = hf.load(tmp_path / "hf")
    arrays = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    tensors = {}
    for theirs, ours in zip(stored_tensors(expected), gguf.gguf_tensors(expected), strict=True):
        for layer in range(7 if ours.stacked else 1):
            array = arrays[theirs.name.format(layer)]
            tensors[ours.name.format(layer)] = array + 1 if "norm" in ours.name else array
    assert {"blk.0.post_ffw_norm.weight", "blk.6.attn_q_norm.weight", "token_embd.weight"} <= tensors.keys()
    config, loaded = hf.load(write(tmp_path / "m.gguf", FIELDS, tensors))
    assert config == expected and config.windowed == (0, 1, 2, 3, 4, 6)
    ids = np.random.default_rng(0).integers(3, 67, (1, 20))
    found = logits(loaded, {}, config, apply(loaded, {}, config, jnp.asarray(ids), jnp.arange(20)[None]))
    assert error(np.asarray(found), torch_logits(model, ids)) < 1e-4
    assert equal(loaded["layers"]["q"], params["layers"]["q"])


def test_its_tokenizer_merges_by_score(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", FIELDS, {}))

    def pieces(text: str) -> list[str]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids[1:]) == text and ids[0] == 2
        return tokenizer.convert_ids_to_tokens(ids[1:])

    assert pieces("abc") == ["abc"]  # b c before a b, then a bc
    assert pieces("ab ab") == ["ab", "▁a", "b"] or pieces("ab ab") == ["ab", "▁", "ab"]
    assert pieces(" abc") == ["▁abc"]
    assert pieces("a\n\nb  c") == ["a", "\n\n", "b", "  ", "c"]
    assert pieces("é") == ["<0xC3>", "<0xA9>"]
    assert tokenizer("<eos>").input_ids == [2, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer.ggml.add_space_prefix": True}, "llama without add_space_prefix"),
        ({"tokenizer.ggml.scores": [0.5]}, "tokenizer.ggml.scores is not a list with one number for each of 271"),
    ],
)
def test_tokenizers_that_are_not_read(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path / "m.gguf", FIELDS | fields, {}))


@pytest.mark.long
def test_gemma_3_270m(tmp_path: Path) -> None:
    """Downloads 240 MB. Logits of a text longer than the window of 512 tokens, and the tokens of a few texts."""
    path = gemma.gemma3()
    (config, params), tokenizer = hf.load(path), load_tokenizer(path)
    check_vocabulary(config, tokenizer)
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.window) == (18, 640, 262_144, 512)
    hf.save(tmp_path, config, params, tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = np.array([tokenizer("The movie was surprisingly good, although the plot is thin. " * 60).input_ids[:540]])
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits[:, -30:].numpy()
    hidden = apply(params, {}, config, jnp.asarray(ids), jnp.arange(540)[None])
    assert error(np.asarray(logits(params, {}, config, hidden[:, -30:])), theirs) < 1e-4
    for text, expected in (
        ("The movie was good.", ["The", "▁movie", "▁was", "▁good", "."]),
        ("  two\n\nnew\t12", ["  ", "two", "\n\n", "new", "\t", "1", "2"]),
        ("<start_of_turn>user\n", ["<start_of_turn>", "user", "\n"]),
    ):
        row = tokenizer(text).input_ids
        assert (
            row[0] == 2 and tokenizer.convert_ids_to_tokens(row[1:]) == expected and tokenizer.decode(row[1:]) == text
        )
