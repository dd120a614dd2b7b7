"""Every kind of adapter is a plain model with other weights: values, gradients, and what stays shared."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.adapters import (
    LINEARS,
    AdapterConfig,
    Lora,
    first_layer,
    init_adapter,
    init_full,
    init_lora,
    init_top_k,
    merge,
    unembedding,
    with_gains,
)
from ppo_jax.models.layout import linear_shapes
from ppo_jax.models.transformer import apply
from ppo_jax.types import PyTree
from tests.models.tiny import CONFIG, equal, random_params

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
run = jax.jit(apply, static_argnames=("config", "layers"), compiler_options=QUICK)
WIDE = dataclasses.replace(CONFIG, head_dim=10, tie_embeddings=False, output_bias=True)
BASE, OTHER = random_params(WIDE), random_params(WIDE, seed=9)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 67, (2, 10)))
POSITIONS = jnp.asarray(np.array([[-1, -1, 0, 1, 2, 3, 4, 5, 6, 7], range(10)]))
REAL = np.asarray(POSITIONS) >= 0


def lora(count: int, targets: tuple[str, ...] = LINEARS, seed: int = 0) -> PyTree:
    """A LoRA adapter of the last `count` layers, rank 3, that is not at its start."""
    start = partial(init_lora, config=WIDE, rank=3, alpha=1.5, targets=targets, first_layer=3 - count)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), jax.eval_shape(start, jax.random.key(0))
    )


def dora(count: int, targets: tuple[str, ...] = LINEARS, seed: int = 0) -> PyTree:
    """The same with magnitudes between 1 and 3, which have nothing to do with the base."""
    rng = np.random.default_rng(seed + 1)
    return {
        "lora": {
            name: update.replace(magnitude=jnp.asarray(rng.uniform(1, 3, (count, update.b.shape[-1])), jnp.float32))
            for name, update in lora(count, targets, seed)["lora"].items()
        }
    }


def top_k(count: int) -> PyTree:
    return {"layers": jax.tree.map(lambda w: w[-count:], OTHER["layers"])}


# name: (adapter, lowest layer that it changes)
KINDS: dict[str, tuple[PyTree, int]] = {
    "base": ({}, 3),
    "lora_all": (lora(3), 0),
    "lora_top_two": (lora(2), 1),
    "lora_q_and_down": (lora(1, ("q", "down")), 2),
    "top_one": (top_k(1), 2),
    "full": (OTHER, 0),
    "one_matrix": ({"layers": {"up": OTHER["layers"]["up"][-2:]}}, 1),
    "lora_on_replaced_layers": ({**lora(2, seed=4), **top_k(2)}, 1),
    "dora_on_replaced_layers": ({**dora(2, seed=4), **top_k(2)}, 1),
    "final_norm": ({"final_norm": OTHER["final_norm"]}, 3),
    "unembedding": ({"unembedding": OTHER["unembedding"]}, 3),
    "embedding": ({"embedding": OTHER["embedding"]}, 0),
    "embedding_and_top_one": ({"embedding": OTHER["embedding"], **top_k(1), "final_norm": OTHER["final_norm"]}, 0),
    "embedding_and_lora": ({"embedding": OTHER["embedding"], **lora(2)}, 0),
}


@partial(jax.jit, compiler_options=QUICK)
def logits(params: PyTree, adapter: PyTree) -> jax.Array:
    return apply(params, adapter, WIDE, TOKENS, POSITIONS) @ unembedding(params, adapter).T


jit_merge = jax.jit(merge, static_argnums=2, compiler_options=QUICK)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_plain_model_of_its_merged_parameters(kind: str) -> None:
    adapter, first = KINDS[kind]
    assert first_layer(adapter, WIDE) == first
    merged = jit_merge(BASE, adapter, WIDE)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)
    adapted, plain, base = (np.asarray(logits(*role))[REAL] for role in ((BASE, adapter), (merged, {}), (BASE, {})))
    np.testing.assert_allclose(adapted, plain, atol=2e-4 * np.abs(adapted).max())
    difference = np.abs(adapted - base).max()
    assert difference == 0 if kind == "base" else difference > 0.1


@pytest.mark.parametrize("kind", ["lora_top_two", "top_one"])
def test_below_its_first_layer_every_role_is_the_base_and_at_it_no_longer(kind: str) -> None:
    adapter, first = KINDS[kind]

    def stream(adapter: PyTree, stop: int) -> jax.Array:
        return run(BASE, adapter, WIDE, TOKENS, POSITIONS, layers=(0, stop))

    np.testing.assert_array_equal(stream(adapter, first), stream({}, first))
    assert np.abs(stream(adapter, first + 1) - stream({}, first + 1)).max() > 0.1


@pytest.mark.parametrize("kind", ["lora_top_two", "full", "embedding_and_top_one"])
def test_a_range_in_the_middle_takes_the_adapters_own_layers(kind: str) -> None:
    """Layer 1 alone under adapter and under the merged parameters."""
    adapter, _ = KINDS[kind]
    stream = jnp.asarray(np.random.default_rng(3).normal(size=(2, 10, 32)), jnp.float32)
    alone = run(BASE, adapter, WIDE, None, POSITIONS, hidden=stream, layers=(1, 2))
    merged = run(jit_merge(BASE, adapter, WIDE), {}, WIDE, None, POSITIONS, hidden=stream, layers=(1, 2))
    np.testing.assert_allclose(np.asarray(alone)[REAL], np.asarray(merged)[REAL], atol=1e-3)


def buffers(tree: PyTree) -> set[int]:
    """The trained state is donated to every update: sharing a buffer with the base would delete the base."""
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(targets=("v", "down"), rank=1),
        AdapterConfig(layers=2, targets=("q",)),
        AdapterConfig(kind="top_k", layers=1),
        AdapterConfig(kind="full"),
    ],
    ids=str,
)
def test_a_fresh_adapter_equals_the_base_and_owns_its_arrays(adapter: AdapterConfig) -> None:
    fresh = init_adapter(jax.random.key(0), BASE, WIDE, adapter)
    np.testing.assert_array_equal(run(BASE, fresh, WIDE, TOKENS, POSITIONS), run(BASE, {}, WIDE, TOKENS, POSITIONS))
    assert first_layer(fresh, WIDE) == (3 - adapter.layers if adapter.layers else 0)
    assert not buffers(BASE) & buffers(fresh)


def test_maps_may_be_named_by_a_pattern_and_have_ranks_and_alphas_of_their_own() -> None:
    config = AdapterConfig(targets=("[qv]:2:8", "up|down:4", "o"), rank=3, alpha=6.0)
    fresh = jax.eval_shape(lambda key: init_adapter(key, BASE, WIDE, config), jax.random.key(0))["lora"]
    found = {name: (update.a.shape[-1], update.b.shape[-2], update.scale) for name, update in fresh.items()}
    assert found == {"q": (2, 2, 4), "v": (2, 2, 4), "up": (4, 4, 1.5), "down": (4, 4, 1.5), "o": (3, 3, 2)}
    everything = AdapterConfig(targets=(".*",)), AdapterConfig()
    same = (init_adapter(jax.random.key(0), BASE, WIDE, each) for each in everything)
    chex.assert_trees_all_equal(*same)


def test_lora_starts_from_uniform_a_zero_b_and_alpha_over_rank() -> None:
    draw = jax.jit(partial(init_lora, config=WIDE, rank=6, alpha=24.0, first_layer=1), compiler_options=QUICK)
    fresh = draw(jax.random.key(0))["lora"]
    assert set(fresh) == set(LINEARS)
    for name, (inputs, outputs) in linear_shapes(WIDE).items():
        a, b = np.asarray(fresh[name].a), np.asarray(fresh[name].b)
        assert a.shape == (2, inputs, 6) and b.shape == (2, 6, outputs) and fresh[name].scale == 4
        assert a.dtype == b.dtype == np.float32 and not b.any()
        bound = 1 / math.sqrt(inputs)
        assert 0.9 * bound < np.abs(a).max() <= bound and a.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert np.abs(fresh["q"].a - fresh["k"].a).max() > 0.01  # each map draws with its own key
    assert np.abs(fresh["q"].a[0] - fresh["q"].a[1]).max() > 0.01
    other = draw(jax.random.key(1))["lora"]
    assert np.abs(fresh["q"].a - other["q"].a).max() > 0.01


def test_a_merged_lora_by_hand() -> None:
    """scale 0.5: W + 0.5 * a b with a = (1, 2)', b = (3, -1)."""
    params = {"layers": {"q": jnp.ones((2, 2, 2))}, "embedding": jnp.zeros((1, 2)), "final_norm": jnp.ones(2)}
    update = Lora(a=jnp.array([[[1.0], [2.0]]]), b=jnp.array([[[3.0, -1.0]]]), scale=0.5)
    merged = merge(params, {"lora": {"q": update}}, CONFIG)["layers"]["q"]
    np.testing.assert_array_equal(merged[0], np.ones((2, 2)))  # the adapter touches the last layer
    np.testing.assert_array_equal(merged[1], [[2.5, 0.5], [4.0, 0.0]])


def test_a_merged_dora_by_hand() -> None:
    """W + a b = [[4, 0], [3, 0]]: the first output has length 5 and gets 10; the other, without weights, stays 0."""
    params = {"layers": {"q": jnp.array([[[1.0, 1.0], [0.0, 1.0]]])}, "embedding": jnp.zeros((1, 2))}
    update = Lora(jnp.ones((1, 2, 1)), jnp.array([[[3.0, -1.0]]]), 1.0, magnitude=jnp.array([[10.0, 7.0]]))
    merged = merge(params, {"lora": {"q": update}}, CONFIG)["layers"]["q"]
    np.testing.assert_allclose(merged[0], [[8.0, 0.0], [6.0, 0.0]])
    one = dataclasses.replace(CONFIG, num_layers=1)
    used = with_gains(params["layers"], {"lora": {"q": update}}, one)["lora"]["q"]
    np.testing.assert_allclose(used.gain[0, 0], 2.0)
    assert np.isfinite(used.gain).all() and used.magnitude is None
    assert with_gains(params["layers"], {"lora": {"q": used}}, one)["lora"]["q"] is used


def test_merging_keeps_the_base_type() -> None:
    half = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16)), BASE)
    for adapter in (lora(2), dora(2), top_k(1)):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(jit_merge(half, adapter, WIDE))} == {"bfloat16"}


def test_merging_leaves_the_base_as_it_was() -> None:
    before = jax.tree.map(np.array, BASE)
    merge(BASE, {**lora(2, ("q",)), "final_norm": OTHER["final_norm"]}, WIDE)
    assert equal(BASE, before)


def test_an_unembedding_of_its_own_unties_a_tied_base() -> None:
    tied = {name: array for name, array in BASE.items() if name != "unembedding"}
    assert unembedding(tied, {}) is tied["embedding"]
    assert unembedding(tied, {"embedding": OTHER["embedding"]}) is OTHER["embedding"]
    assert unembedding(BASE, {"embedding": OTHER["embedding"]}) is BASE["unembedding"]
    adapter = {"unembedding": OTHER["unembedding"]}
    assert unembedding(tied, adapter) is OTHER["unembedding"]
    assert unembedding(merge(tied, adapter, WIDE), {}) is OTHER["unembedding"]


def loss(base: PyTree, adapter: PyTree) -> jax.Array:
    """Smooth in every parameter."""
    logits = apply(base, adapter, WIDE, TOKENS, POSITIONS) @ unembedding(base, adapter).T
    return jnp.mean(jnp.sin(jnp.where(REAL[..., None], logits, 0)))


base_gradient = jax.jit(jax.grad(loss, argnums=0), compiler_options=QUICK)
adapter_gradient = jax.jit(jax.grad(loss, argnums=1), compiler_options=QUICK)
both_gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)


def test_lora_gradients_are_those_of_the_merged_weights_by_the_chain_rule() -> None:
    """W' = W + s a b: dL/da = s G b', dL/db = s a' G with G = dL/dW' of the plain merged model."""
    adapter = lora(2)
    through_adapter = adapter_gradient(BASE, adapter)["lora"]
    through_weights = base_gradient(jit_merge(BASE, adapter, WIDE), {})["layers"]
    for name, update in adapter["lora"].items():
        weight = np.asarray(through_weights[name], np.float64)[-2:]
        expected_a = update.scale * np.einsum("nio,nro->nir", weight, update.b)
        expected_b = update.scale * np.einsum("nir,nio->nro", update.a, weight)
        for found, expected in ((through_adapter[name].a, expected_a), (through_adapter[name].b, expected_b)):
            assert np.linalg.norm(expected) > 1e-3
            assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected), name


def test_a_fresh_dora_is_the_base_and_costs_nothing_where_it_is_off() -> None:
    config = AdapterConfig(layers=2, targets=("q", "down"), dora=True)
    fresh = init_adapter(jax.random.key(0), BASE, WIDE, config)
    plain = init_adapter(jax.random.key(0), BASE, WIDE, dataclasses.replace(config, dora=False))
    for name, update in fresh["lora"].items():
        np.testing.assert_allclose(update.magnitude, np.linalg.norm(BASE["layers"][name][-2:], axis=1), rtol=1e-6)
    assert equal({"lora": {name: one.replace(magnitude=None) for name, one in fresh["lora"].items()}}, plain)
    np.testing.assert_allclose(logits(BASE, fresh), logits(BASE, {}), atol=1e-4)
    assert with_gains(BASE["layers"], plain, WIDE) is plain


def test_replaced_layers_take_the_whole_gradient() -> None:
    """What the adapter replaces no longer reaches the base; below, the base would be reached if it were asked for."""
    adapter = {**top_k(2), "final_norm": OTHER["final_norm"]}
    to_base, to_adapter = both_gradients(BASE, adapter)
    expected = base_gradient(jit_merge(BASE, adapter, WIDE), {})
    for name, slope in to_adapter["layers"].items():
        np.testing.assert_allclose(slope, expected["layers"][name][1:], atol=1e-5)
        assert np.abs(slope).max() > 0
        np.testing.assert_array_equal(to_base["layers"][name][1:], 0)
        assert np.abs(to_base["layers"][name][0]).max() > 0
    np.testing.assert_allclose(to_adapter["final_norm"], expected["final_norm"], atol=1e-5)
    assert not np.asarray(to_base["final_norm"]).any()


def test_a_fresh_lora_can_leave_its_start() -> None:
    """b = 0 blocks the gradient of a, and only that; every b receives one."""
    adapter = lora(2)["lora"]
    fresh = {"lora": {name: update.replace(b=jnp.zeros_like(update.b)) for name, update in adapter.items()}}
    for name, slope in adapter_gradient(BASE, fresh)["lora"].items():
        assert not np.asarray(slope.a).any() and np.abs(slope.b).max(axis=(1, 2)).min() > 0, name


@pytest.mark.parametrize("make", [lora, dora])
def test_a_sweep_is_a_vmap_over_adapters_with_one_base(make: Callable[..., PyTree]) -> None:
    adapters = [make(2, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    swept = jax.jit(jax.vmap(lambda adapter: apply(BASE, adapter, WIDE, TOKENS, POSITIONS)), compiler_options=QUICK)
    for found, adapter in zip(swept(stacked), adapters, strict=True):
        expected = run(BASE, adapter, WIDE, TOKENS, POSITIONS)
        np.testing.assert_allclose(np.asarray(found)[REAL], np.asarray(expected)[REAL], atol=1e-3)


def unchecked_kind(kind: str) -> AdapterConfig:
    """Past the tests' own type checker, as in a run without it."""
    config = AdapterConfig()
    object.__setattr__(config, "kind", kind)
    return config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda key: unchecked_kind("qlora").__post_init__(), "kind='qlora'; allowed: lora, top_k, full"),
        (lambda key: AdapterConfig(kind="full", layers=2), "layers=2 needs kind=top_k"),
        (lambda key: AdapterConfig(kind="top_k", dora=True), "dora=True is a form of kind=lora; kind=top_k trains"),
        (lambda key: init_adapter(key, BASE, WIDE, AdapterConfig(layers=4)), r"layers=4 must lie in \[0, 3\]"),
        (lambda key: init_adapter(key, BASE, WIDE, AdapterConfig("top_k", 4)), r"layers=4 must lie in \[0, 3\]"),
        (lambda key: init_adapter(key, BASE, WIDE, AdapterConfig(layers=-1)), r"layers=-1 must lie in \[0, 3\]"),
        (lambda key: init_adapter(key, BASE, WIDE, AdapterConfig(rank=0)), "rank=0 must be at least 1"),
        (lambda key: init_lora(key, WIDE, 2, 4.0, ("q", "w")), r"\['w'\]; allowed: q, k, v, o, gate, up, down"),
        (lambda key: AdapterConfig(targets=("q_proj", "x")), "'x'.*up, down; q_proj is q here$"),
        (lambda key: AdapterConfig(targets=("q|v", "v:2")), "name v twice: q|v, v:2"),
        (lambda key: AdapterConfig(targets=("q:two",)), "'q:two' is not NAME, NAME:RANK or NAME:RANK:ALPHA: invalid"),
        (lambda key: AdapterConfig(targets=("q:0",)), "'q:0' is not .* both above 0"),
        (lambda key: AdapterConfig(targets=("q:1:nan",)), "'q:1:nan' is not .* both above 0"),
        (lambda key: AdapterConfig(targets=("(q",)), r"'\(q' is not NAME"),
        (lambda key: init_lora(key, WIDE, 2, 4.0, ()), "are empty; allowed: q, k, v, o, gate, up, down"),
        (lambda key: init_lora(key, WIDE, 2, 4.0, first_layer=3), r"first_layer=3 must lie in \[0, 3\)"),
        (lambda key: init_lora(key, WIDE, 2, 4.0, first_layer=-1), r"first_layer=-1 must lie in \[0, 3\)"),
        (lambda key: init_top_k(BASE, WIDE, 0), "k=0 layers; the model has 3"),
        (lambda key: init_top_k(BASE, WIDE, 4), "k=4 layers; the model has 3"),
    ],
)
def test_a_bad_request_is_named_with_what_is_allowed(make: Callable[[jax.Array], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(jax.random.key(0))


def test_an_adapter_of_another_model_is_refused() -> None:
    deep = {"layers": jax.tree.map(lambda w: np.concatenate([w, w]), BASE["layers"])}
    uneven = {**lora(2), **top_k(1)}
    for adapter, counts in ((deep, r"\[6\]"), (uneven, r"\[1, 2\]")):
        for use in (lambda a: first_layer(a, WIDE), lambda a: apply(BASE, a, WIDE, TOKENS, POSITIONS)):
            with pytest.raises(ValueError, match=f"stacked over {counts} layers.*at most num_layers=3"):
                use(adapter)


def test_whole_copies_are_bitwise_and_copies() -> None:
    full, top = init_full(BASE), init_top_k(BASE, WIDE, 3)
    assert equal(full, BASE) and equal(top["layers"], BASE["layers"])
    assert not buffers(BASE) & (buffers(full) | buffers(top))
