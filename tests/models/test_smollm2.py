"""The real model: SmolLM2-135M-Instruct from its GGUF file, against transformers on the same weights."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ppo_jax.data import assets
from ppo_jax.models.adapters import unembedding
from ppo_jax.models.cache import init_cache
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import hf
from ppo_jax.models.files.tokenizer import check_vocabulary, load_tokenizer
from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.types import PyTree
from tests.models.tiny import equal

TEXTS = ["The movie was", "A long, slow and in the end rather moving film about the year 1947,", "I"]
NEW = 12
run = jax.jit(apply, static_argnums=2)


class Loaded(NamedTuple):
    gguf: Path
    directory: Path  # the same model, written by us
    config: ModelConfig
    params: PyTree
    tokenizer: Any
    model: Any  # transformers, from `directory`


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    gguf, directory = assets.smollm2(), tmp_path_factory.mktemp("smollm2")
    config, params = hf.load(gguf)
    tokenizer = load_tokenizer(gguf)
    hf.save(directory, config, params, tokenizer, max_shard_bytes=300_000_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return Loaded(gguf, directory, config, params, tokenizer, model)


@jax.jit
def logits_of(params: PyTree, hidden: jax.Array) -> jax.Array:
    return hidden @ unembedding(params, {}).T


def left_padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    tokens = np.array([[2] * (width - len(row)) + row for row in rows])
    return tokens, np.array([[False] * (width - len(row)) + [True] * len(row) for row in rows])


def test_config_and_special_tokens(smollm2: Loaded) -> None:
    config, tokenizer = smollm2.config, smollm2.tokenizer
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.tie_embeddings) == (30, 576, 49152, True)
    assert (config.rope_theta, config.rope_scaling, config.norm_eps) == (100_000.0, None, 1e-5)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    check_vocabulary(config, tokenizer)


def test_round_trip_through_a_sharded_directory(smollm2: Loaded) -> None:
    assert len(list(smollm2.directory.glob("model-*.safetensors"))) == 2
    config, params = hf.load(smollm2.directory)
    assert config == smollm2.config
    assert equal(params, smollm2.params)


def test_logits_agree_to_1e_4_and_padding_changes_nothing(smollm2: Loaded) -> None:
    rows = [smollm2.tokenizer(text).input_ids for text in TEXTS]
    tokens, mask = left_padded(rows)
    hidden = run(smollm2.params, {}, smollm2.config, jnp.asarray(tokens), positions_from_mask(jnp.asarray(mask)))
    ours = np.asarray(logits_of(smollm2.params, hidden))
    for row, ids in enumerate(rows):
        with torch.no_grad():
            theirs = smollm2.model(torch.tensor([ids])).logits[0].numpy()  # alone, without padding
        found = ours[row, -len(ids) :]
        assert np.max(np.linalg.norm(found - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)) < 1e-4
        assert np.max(np.abs(found - theirs)) < 1e-4 * np.max(np.abs(theirs))


def test_greedy_text_of_the_written_directory_is_ours(smollm2: Loaded) -> None:
    """We decode with the cache, left-padded; transformers loads our directory and generates row by row."""
    rows = [smollm2.tokenizer(text).input_ids for text in TEXTS[:2]]
    tokens, mask = left_padded(rows)
    positions = np.asarray(positions_from_mask(jnp.asarray(mask)))
    cache = init_cache(smollm2.config, len(rows), tokens.shape[1] + NEW)
    hidden, cache = run(smollm2.params, {}, smollm2.config, jnp.asarray(tokens), jnp.asarray(positions), cache=cache)
    chosen = []
    for step in range(NEW):
        chosen.append(np.asarray(logits_of(smollm2.params, hidden[:, -1:])).argmax(-1))
        at = jnp.asarray(positions[:, -1:] + step + 1)
        hidden, cache = run(smollm2.params, {}, smollm2.config, jnp.asarray(chosen[-1]), at, cache=cache)
    tokenizer = load_tokenizer(smollm2.directory)
    for ids, ours in zip(rows, np.concatenate(chosen, axis=1).tolist(), strict=True):
        theirs = smollm2.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[
            0, len(ids) :
        ].tolist()
        assert ours[: len(theirs)] == theirs and len(tokenizer.decode(theirs).split()) > 4


def test_tokenizer_agrees_with_transformers_own_reading(smollm2: Loaded) -> None:
    """Its reader (which needs torch) does not split digits; no merge joins two, so the ids are equal all the same."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.gguf.parent, gguf_file=smollm2.gguf.name)
    saved = load_tokenizer(smollm2.directory)
    for text in (
        "The movie cost $12,345.67 in 2024 -- wasn't it worth it?",
        "  two  spaces\n\nnew\tlines  ",
        "naïve café, 日本語 🙂",
        "def f(x):\n    return x ** 2  # ok",
        "<|im_start|>user\nHi<|im_end|>\n",
    ):
        ids = smollm2.tokenizer(text).input_ids
        assert smollm2.tokenizer.decode(ids) == text
        assert theirs(text).input_ids == ids == saved(text).input_ids


def test_chat_template(smollm2: Loaded) -> None:
    text = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
