"""Logits agree with transformers (torch, float32) on every flag; its files are read, and ours read by it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ppo_jax.models.adapters import init_lora, merge, unembedding
from ppo_jax.models.cache import init_cache
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import hf
from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.types import PyTree
from tests.models.tiny import CONFIG, LLAMA3, equal, random_params

BASE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name: (fields of the Hugging Face config, changes to ours that must be visible in the logits)
CASES: dict[str, tuple[dict, dict]] = {
    "plain": ({}, {"norm_eps": 1e-2}),
    "multi_head": ({"num_key_value_heads": 4}, {}),
    "multi_query": ({"num_key_value_heads": 1}, {}),
    "three_per_group": ({"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}, {}),
    "head_dim": ({"head_dim": 24}, {}),
    "narrow_head_dim": ({"head_dim": 2}, {}),
    "untied": ({"tie_word_embeddings": False}, {}),
    "attention_bias": ({"attention_bias": True}, {}),
    "mlp_bias": ({"mlp_bias": True}, {}),
    "all_biases": ({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}, {}),
    "rope_theta": ({"rope_theta": 500_000.0}, {"rope_theta": 10_000.0}),
    "norm_eps": ({"rms_norm_eps": 1e-2}, {"norm_eps": 1e-5}),
    "llama3": ({"rope_scaling": LLAMA3_SCALING, "head_dim": 16}, {"rope_scaling": None}),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, {"rope_scaling": None}),
    "qwen2": ({"model_type": "qwen2"}, {}),
    "mistral": ({"model_type": "mistral", "sliding_window": None}, {}),
}
TOKENS = np.random.default_rng(0).integers(0, 67, (2, 60))
# Tiny programs are compiled many times and run once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
run = jax.jit(apply, static_argnums=2, compiler_options=QUICK)


@jax.jit
def _logits(params: PyTree, hidden: jax.Array) -> jax.Array:
    return hidden.astype(jnp.float32) @ unembedding(params, {}).astype(jnp.float32).T


def logits(config: ModelConfig, params: PyTree, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    positions = positions_from_mask(jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask))
    return np.asarray(_logits(params, run(params, {}, config, jnp.asarray(tokens), positions)))


def torch_logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        given = None if mask is None else torch.tensor(mask.astype(np.int64))
        return model(torch.tensor(tokens), attention_mask=given).logits.numpy()


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest relative error of a position's logits, |ours - theirs| / |theirs| in the Euclidean norm."""
    return float(np.max(np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)))


def torch_model(fields: dict) -> torch.nn.Module:
    """A random transformers model in which biases and norms matter."""
    config = transformers.AutoConfig.for_model(**({"model_type": "llama"} | BASE | fields))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_transformers(name: str, tmp_path: Path) -> None:
    fields, visible = CASES[name]
    model = torch_model(fields)
    theirs = torch_logits(model, TOKENS)
    model.save_pretrained(tmp_path / "theirs")
    config, params = hf.load(tmp_path / "theirs")
    assert error(logits(config, params, TOKENS), theirs) < 1e-5
    if visible:  # the comparison can fail: a wrong flag shows
        assert error(logits(dataclasses.replace(config, **visible), params, TOKENS), theirs) > 1e-3

    # Written by us, it is the same model to transformers, bit by bit, and to us.
    hf.save(tmp_path / "ours", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    np.testing.assert_array_equal(torch_logits(again, TOKENS), theirs)
    assert hf.load(tmp_path / "ours")[0] == config
    assert equal(hf.load(tmp_path / "ours")[1], params)


@pytest.mark.parametrize("key", ["q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias"])
def test_every_bias_matters(key: str) -> None:
    """Softmax would cancel a constant added to all keys, but RoPE turns it with the position: k_bias counts too."""
    config = dataclasses.replace(CONFIG, attention_bias=True, output_bias=True, mlp_bias=True)
    params = random_params(config)
    layers = params["layers"] | {key: jnp.zeros_like(params["layers"][key])}
    assert error(logits(config, params | {"layers": layers}, TOKENS), logits(config, params, TOKENS)) > 1e-3


def test_bfloat16_weights_follow_transformers_in_bfloat16(tmp_path: Path) -> None:
    """Rounding noise only: bfloat16 has 8 bits of mantissa, so a few times 2^-8 after three layers."""
    torch_model({}).save_pretrained(tmp_path)
    exact = torch_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), TOKENS)
    config, params = hf.load(tmp_path, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert error(logits(config, params, TOKENS), exact) < 0.1
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    hf.save(tmp_path / "half", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_left_padding_changes_nothing(name: str, tmp_path: Path) -> None:
    model = torch_model(CASES[name][0])
    model.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    lengths = np.array([60, 37, 1])
    mask = np.arange(60)[None] >= 60 - lengths[:, None]
    tokens = np.where(mask, np.random.default_rng(1).integers(0, 67, mask.shape), 66)
    padded = logits(config, params, tokens, mask)
    for row, length in enumerate(lengths):
        alone = logits(config, params, tokens[row : row + 1, -length:])
        assert error(padded[row : row + 1, -length:], alone) < 1e-5
        theirs = torch_logits(model, tokens[row : row + 1, -length:])
        assert error(padded[row : row + 1, -length:], theirs) < 1e-5
    # What the padding holds is never read.
    other = logits(config, params, np.where(mask, tokens, 3), mask)
    np.testing.assert_array_equal(other[mask], padded[mask])


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, rope_scaling=LLAMA3, num_kv_heads=1)])
def test_decoding_with_a_cache_is_the_full_pass(config: ModelConfig) -> None:
    params = random_params(config)
    mask = jnp.arange(20)[None] >= jnp.array([0, 7, 3])[:, None]
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 67, mask.shape))
    full, positions = np.asarray(logits(config, params, tokens, mask)), positions_from_mask(mask)
    hidden, cache = run(params, {}, config, tokens[:, :9], positions[:, :9], cache=init_cache(config, 3, 20))
    pieces = [hidden]
    for t in range(9, 20):
        hidden, cache = run(params, {}, config, tokens[:, t : t + 1], positions[:, t : t + 1], cache=cache)
        pieces.append(hidden)
    stepwise = np.asarray(_logits(params, jnp.concatenate(pieces, axis=1)))
    assert error(stepwise[mask], full[mask]) < 1e-5


def test_a_merged_adapter_is_a_plain_model_to_transformers(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    adapter = init_lora(jax.random.key(0), CONFIG, rank=3, alpha=6.0, first_layer=1)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), adapter)
    tokens = jnp.asarray(TOKENS)
    positions = positions_from_mask(jnp.ones(tokens.shape, bool))
    adapted = np.asarray(_logits(params, run(params, adapter, CONFIG, tokens, positions)))
    assert error(adapted, logits(CONFIG, params, TOKENS)) > 0.1
    hf.save(tmp_path, CONFIG, merge(params, adapter, CONFIG))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(adapted, torch_logits(model, TOKENS)) < 1e-4
