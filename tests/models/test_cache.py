"""The cache: what is written where, what is never read, and decoding in pieces of any size and layer range."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.adapters import init_lora, init_magnitudes, init_top_k
from ppo_jax.models.cache import Cache, init_cache, unstacked
from ppo_jax.models.transformer import apply, positions_from_mask, unstack
from ppo_jax.types import PyTree
from tests.models.tiny import CONFIG, random_params

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
run = jax.jit(apply, static_argnames=("config", "layers", "fresh"), compiler_options=QUICK)
PARAMS = random_params(CONFIG)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 67, (3, 11)))
# Left-padded prompts of 5 slots; the third row ends early.
MASK = np.array([[1] * 11, [0, 0, 1, 1, 1] + [1] * 6, [0, 0, 0, 0, 1] + [1, 1, 0, 0, 0, 0]], bool)
POSITIONS = positions_from_mask(jnp.asarray(MASK))


def random_lora(first_layer: int) -> PyTree:
    fresh = init_lora(jax.random.key(0), CONFIG, rank=2, alpha=4.0, first_layer=first_layer)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), fresh)


ADAPTER = random_lora(1)


def decode(sizes: list[int], cache: Cache, split: int | None = None) -> tuple[np.ndarray, Cache]:
    """TOKENS through the cache in pieces of these sizes; each in two layer ranges if there is a `split`."""
    outputs, start = [], 0
    for size in sizes:
        tokens, positions = TOKENS[:, start : start + size], POSITIONS[:, start : start + size]
        if split is None:
            hidden, cache = run(PARAMS, ADAPTER, CONFIG, tokens, positions, cache=cache)
        else:
            hidden, cache = run(PARAMS, ADAPTER, CONFIG, tokens, positions, cache=cache, layers=(0, split))
            hidden, cache = run(PARAMS, ADAPTER, CONFIG, None, positions, cache=cache, hidden=hidden, layers=(split, 3))
        outputs.append(np.asarray(hidden))
        start += size
    return np.concatenate(outputs, axis=1), cache


@pytest.fixture(scope="module")
def full() -> np.ndarray:
    return np.asarray(run(PARAMS, ADAPTER, CONFIG, TOKENS, POSITIONS))


def test_an_empty_cache() -> None:
    cache = init_cache(dataclasses.replace(CONFIG, dtype="bfloat16"), batch=3, slots=7)
    assert cache.keys.shape == cache.values.shape == (3, 3, 2, 7, 8)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert (cache.positions == -1).all() and cache.positions.shape == (3, 7) and cache.length == 0


@pytest.mark.parametrize("sizes", [[5, 1, 1, 1, 1, 1, 1], [11], [5, 4, 2]])
def test_pieces_of_any_size_equal_the_full_pass_under_an_adapter(sizes: list[int], full: np.ndarray) -> None:
    found, cache = decode(sizes, init_cache(CONFIG, 3, 11))
    np.testing.assert_allclose(found[MASK], full[MASK], atol=3e-5)
    assert cache.length == 11
    np.testing.assert_array_equal(cache.positions, POSITIONS)


@pytest.mark.parametrize("split", [1, 2])
def test_layer_ranges_share_the_slots_of_a_pass(split: int, full: np.ndarray) -> None:
    found, cache = decode([5, 1, 5], init_cache(CONFIG, 3, 11), split)
    np.testing.assert_allclose(found[MASK], full[MASK], atol=3e-5)
    whole = decode([5, 1, 5], init_cache(CONFIG, 3, 11))[1]
    for left, right in zip(cache, whole, strict=True):
        np.testing.assert_allclose(left, right, atol=3e-5)


def test_the_length_grows_with_the_last_layer() -> None:
    cache = init_cache(CONFIG, 3, 11)
    hidden, cache = run(PARAMS, {}, CONFIG, TOKENS[:, :5], POSITIONS[:, :5], cache=cache, layers=(0, 2))
    assert cache.length == 0 and cache.keys[:2, :, :, :5].any() and not cache.keys[2].any()
    _, cache = run(PARAMS, {}, CONFIG, None, POSITIONS[:, :5], cache=cache, hidden=hidden, layers=(2, 3))
    assert cache.length == 5 and cache.keys[2, :, :, :5].any()


def test_one_step_writes_one_slot() -> None:
    _, before = decode([5], init_cache(CONFIG, 3, 11))
    _, after = run(PARAMS, ADAPTER, CONFIG, TOKENS[:, 5:6], POSITIONS[:, 5:6], cache=before)
    for left, right in ((before.keys, after.keys), (before.values, after.values)):
        changed = np.asarray(left != right).any(axis=(0, 1, 2, 4))
        assert changed.tolist() == [False] * 5 + [True] + [False] * 5
    assert after.length == 6


def test_what_unwritten_and_padded_slots_hold_is_never_read() -> None:
    """A cache of more slots than tokens, filled with garbage where nothing is or should be seen."""
    _, cache = decode([5], init_cache(CONFIG, 3, 20))
    unseen = np.asarray(cache.positions < 0)[None, :, None, :, None]
    assert unseen.sum() == 3 * 15 + 2 + 4  # 15 unwritten slots each, and the rows' left padding
    poisoned = cache._replace(keys=jnp.where(unseen, 1e4, cache.keys), values=jnp.where(unseen, -1e4, cache.values))
    step = (TOKENS[:, 5:6], POSITIONS[:, 5:6])
    clean, dirty = (run(PARAMS, ADAPTER, CONFIG, *step, cache=c)[0] for c in (cache, poisoned))
    np.testing.assert_array_equal(clean, dirty)


def test_an_ended_row_writes_padding_that_nobody_reads(full: np.ndarray) -> None:
    """The third row ended: its tokens come at position -1, and its neighbours' states are as without it."""
    _, cache = decode([5, 1, 1, 1], init_cache(CONFIG, 3, 11))
    assert cache.positions[2].tolist() == [-1] * 4 + [0, 1, 2] + [-1] * 4
    found, _ = run(PARAMS, ADAPTER, CONFIG, TOKENS[:, 8:9], POSITIONS[:, 8:9], cache=cache)
    np.testing.assert_allclose(found[:2, 0], full[:2, 8], atol=3e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("split", [None, 1, 2])
def test_the_first_tokens_may_attend_among_themselves(split: int | None, full: np.ndarray) -> None:
    garbage = init_cache(CONFIG, 3, 11)._replace(keys=jnp.full((3, 3, 2, 11, 8), 1e4))  # an empty cache is never read
    first = {"cache": garbage, "fresh": True}
    tokens, positions = TOKENS[:, :5], POSITIONS[:, :5]
    if split is None:
        hidden, cache = run(PARAMS, ADAPTER, CONFIG, tokens, positions, **first)
    else:
        hidden, cache = run(PARAMS, ADAPTER, CONFIG, tokens, positions, **first, layers=(0, split))
        rest = first | {"cache": cache, "hidden": hidden, "layers": (split, 3)}
        hidden, cache = run(PARAMS, ADAPTER, CONFIG, None, positions, **rest)
    np.testing.assert_allclose(np.asarray(hidden)[MASK[:, :5]], full[:, :5][MASK[:, :5]], atol=1e-5)
    later, cache = run(PARAMS, ADAPTER, CONFIG, TOKENS[:, 5:], POSITIONS[:, 5:], cache=cache)
    assert cache.length == 11
    np.testing.assert_allclose(np.asarray(later)[MASK[:, 5:]], full[:, 5:][MASK[:, 5:]], atol=3e-5)


@pytest.mark.parametrize("kind", ["none", "lora", "dora", "top_k", "full"])
def test_layers_apart_give_what_the_stack_gives(kind: str) -> None:
    """After a prefill by the stack, whose cache has room for it alone."""
    other = random_params(CONFIG, seed=3)
    dora = init_magnitudes(other["layers"], ADAPTER, CONFIG)  # lengths of another base
    adapter = {"none": {}, "lora": ADAPTER, "dora": dora, "top_k": init_top_k(other, CONFIG, 2), "full": other}[kind]
    parts = [slice(0, 5), slice(5, 6), slice(6, 11)]
    full = np.asarray(run(PARAMS, adapter, CONFIG, TOKENS, POSITIONS))
    cache = init_cache(CONFIG, 3, 5)
    _, cache = run(PARAMS, adapter, CONFIG, TOKENS[:, parts[0]], POSITIONS[:, parts[0]], cache=cache, fresh=True)
    params, apart = unstack(PARAMS, adapter, CONFIG)
    cache = unstacked(cache, 11)
    for part in parts[1:]:
        found, cache = run(params, apart, CONFIG, TOKENS[:, part], POSITIONS[:, part], cache=cache)
        np.testing.assert_allclose(np.asarray(found)[MASK[:, part]], full[:, part][MASK[:, part]], atol=3e-5)
    assert cache.length == 11
    np.testing.assert_array_equal(cache.positions, POSITIONS)


def test_layers_apart_hold_matrices_in_the_activations_dtype() -> None:
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    base = random_params(half)
    params, adapter = unstack(base, random_params(CONFIG), half)
    kinds = {name: array.dtype for name, array in params["layers"][0].items()}
    assert kinds["q"] == kinds["down"] == jnp.bfloat16 and kinds["attention_norm"] == jnp.float32
    assert adapter["embedding"].dtype == jnp.float32 and adapter["lora"] == ({}, {}, {})


def test_a_donated_cache_is_updated_in_place() -> None:
    cache = init_cache(CONFIG, 3, 11)
    step = jax.jit(
        lambda cache, tokens, positions: apply(PARAMS, ADAPTER, CONFIG, tokens, positions, cache=cache),
        donate_argnums=0,
    )
    memory = step.lower(cache, TOKENS[:, :1], POSITIONS[:, :1]).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == size  # every output array of the cache is an input's buffer


def test_more_tokens_than_slots_is_an_error() -> None:
    with pytest.raises((TypeError, ValueError), match="dynamic_update_slice"):
        apply(PARAMS, {}, CONFIG, TOKENS, POSITIONS, cache=init_cache(CONFIG, 3, 10))
