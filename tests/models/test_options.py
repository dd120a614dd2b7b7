"""Memory options: bfloat16 bases under float32 masters, and rematerialisation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.adapters import AdapterConfig, init_adapter, merge, unembedding
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.layout import init_params
from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.ops.logprobs import hidden_logprobs
from ppo_jax.train.optimizer import descend, make_optimizer
from ppo_jax.types import PyTree
from tests.models.tiny import CONFIG, random_params

HALF = ModelOptions(dtype="bfloat16").of(dataclasses.replace(CONFIG, tie_embeddings=False))
BASE = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(dataclasses.replace(HALF, dtype="float32")))
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, CONFIG.vocab_size, (4, 24)))
POSITIONS = positions_from_mask(jnp.arange(24) >= jnp.array([[0], [3], [11], [1]]))
TRAINED = [AdapterConfig(kind="full"), AdapterConfig(kind="top_k", layers=2), AdapterConfig(rank=2)]


def loss(adapter: PyTree, base: PyTree = BASE, config: Any = HALF) -> jax.Array:
    hidden = apply(base, adapter, config, TOKENS, POSITIONS)
    return jnp.mean(jnp.where(POSITIONS >= 0, hidden_logprobs(hidden, unembedding(base, adapter), TOKENS), 0.0))


@pytest.mark.parametrize("adapter", TRAINED, ids=lambda adapter: adapter.kind)
def test_small_steps_reach_float32_masters_of_a_bfloat16_base(adapter: AdapterConfig) -> None:
    """A relative step of 1e-5 is a 200th of what bfloat16 can hold at 1."""
    fresh = init_adapter(jax.random.key(0), BASE, HALF, adapter)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(fresh)} == {"float32"}
    grads = jax.grad(loss)(fresh)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}
    optimizer = make_optimizer()
    stepped, _, _ = descend(fresh, grads, optimizer.init(fresh), optimizer, 3e-6, 1.0)  # weights are about 0.3
    moved = lambda tree, old: np.mean(
        jax.tree.leaves(jax.tree.map(lambda a, b: np.mean(np.asarray(a != b)), tree, old))
    )
    assert moved(stepped, fresh) > 0.4  # half of a fresh LoRA has no gradient
    if adapter.kind != "lora":  # and would have been lost in the base's dtype
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (stepped, fresh))
        assert moved(*rounded) < 0.02


@pytest.mark.parametrize("adapter", TRAINED, ids=lambda adapter: adapter.kind)
def test_a_fresh_master_is_the_bfloat16_base_bitwise(adapter: AdapterConfig) -> None:
    """Casting back what was widened is exact, so the ratio of a fresh policy to its reference is 1."""
    fresh = init_adapter(jax.random.key(0), BASE, HALF, adapter)
    table = unembedding(BASE, fresh)
    assert table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(table, unembedding(BASE, {}))
    np.testing.assert_array_equal(apply(BASE, fresh, HALF, TOKENS, POSITIONS), apply(BASE, {}, HALF, TOKENS, POSITIONS))
    merged = merge(BASE, fresh, HALF)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)


def test_bfloat16_logprobs_follow_float32() -> None:
    exact = dataclasses.replace(HALF, dtype="float32")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), BASE)
    assert float(loss({})) == pytest.approx(float(loss({}, wide, exact)), rel=2e-2)
    logits = [
        np.asarray(apply(base, {}, config, TOKENS, POSITIONS).astype(jnp.float32) @ unembedding(wide, {}).T)
        for base, config in ((BASE, HALF), (wide, exact))
    ]
    real = np.asarray(POSITIONS) >= 0
    error = np.linalg.norm((logits[0] - logits[1])[real]) / np.linalg.norm(logits[1][real])
    assert 1e-5 < error < 2e-2  # bfloat16 was there, and near


DEEP = dataclasses.replace(CONFIG, num_layers=12, intermediate_size=256)


def test_rematerialisation_gives_the_same_gradients_in_less_memory() -> None:
    params = random_params(DEEP)
    adapter = init_adapter(jax.random.key(0), params, DEEP, AdapterConfig(rank=2))
    adapter = jax.tree.map(lambda x: x + 0.01, adapter)
    tokens = jnp.tile(TOKENS, (2, 1))
    positions = jnp.tile(POSITIONS, (2, 1))

    def run(remat: Any) -> tuple[PyTree, int]:
        config = ModelOptions(remat=remat).of(DEEP)

        def mean(adapter: PyTree, params: PyTree) -> jax.Array:
            return jnp.mean(jnp.sin(apply(params, adapter, config, tokens, positions)))

        compiled = jax.jit(jax.grad(mean)).lower(adapter, params).compile()
        return compiled(adapter, params), compiled.memory_analysis().temp_size_in_bytes

    (plain, most), (dots, some), (full, least) = run("none"), run("dots"), run("full")
    assert least < 0.4 * some and some < most, (least, some, most)
    for again in (dots, full):
        for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_backward_pass_holds_no_second_copy_of_the_frozen_base(remat: Any) -> None:
    """Layers are read from the stack by index; what was read must not be kept for the backward pass."""
    config = ModelOptions(remat=remat).of(dataclasses.replace(CONFIG, num_layers=8, hidden_size=256, head_dim=64))
    base = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    adapter = jax.eval_shape(lambda b: init_adapter(jax.random.key(0), b, config, AdapterConfig(rank=1)), base)

    def mean(adapter: PyTree, base: PyTree) -> jax.Array:
        return jnp.mean(jnp.sin(apply(base, adapter, config, TOKENS[:1, :8], jnp.arange(8)[None])))

    held = jax.jit(jax.grad(mean)).lower(adapter, base).compile().memory_analysis().temp_size_in_bytes
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(base["layers"]))
    assert held < 0.5 * weights


@pytest.mark.parametrize(("field", "allowed"), [("dtype", "float32, bfloat16"), ("remat", "none, dots, full")])
def test_an_unknown_option_is_named(field: str, allowed: str) -> None:
    options = ModelOptions()
    object.__setattr__(options, field, "half")
    with pytest.raises(ValueError, match=f"{field}='half'; allowed: {allowed}"):
        options.__post_init__()
