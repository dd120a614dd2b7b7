"""A base in 8 or 4 bits: how far its numbers move, what is trained on it, and where it lies."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from ppo_jax.models.adapters import (
    AdapterConfig,
    init_adapter,
    init_full,
    init_lora,
    init_magnitudes,
    init_top_k,
    merge,
    merge_one,
)
from ppo_jax.models.cache import init_cache, unstacked
from ppo_jax.models.config import ModelConfig, ModelOptions, Quantise
from ppo_jax.models.files import hf, peft
from ppo_jax.models.layout import init_params, linear_shapes
from ppo_jax.models.placement import gathered, shardings
from ppo_jax.models.quantised import BLOCK, Quantised, dequantise, quantise, quantise_params
from ppo_jax.models.transformer import apply, logits, positions_from_mask, unstack
from ppo_jax.parallel.mesh import MeshConfig, make_mesh
from ppo_jax.types import PyTree
from tests.models.tiny import CONFIG as TINY
from tests.models.tiny import random_params
from tests.train.toy import noisy

CONFIG = dataclasses.replace(TINY, vocab_size=68, intermediate_size=64)  # whole blocks of inputs
BASE = random_params(CONFIG)
BASE["layers"] |= {name: 0.5 * BASE["layers"][name] for name in linear_shapes(CONFIG)}  # or rounding drives it apart
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, CONFIG.vocab_size, (2, 12)))
POSITIONS = positions_from_mask(jnp.arange(12) >= jnp.array([[0], [3]]))
KINDS: tuple[Quantise, ...] = ("int8", "int4")


@functools.cache
def model(kind: Quantise) -> tuple[ModelConfig, PyTree, PyTree]:
    """The configuration, the base in codes, and what the codes stand for as a plain base."""
    config = ModelOptions(quantise=kind).of(CONFIG)
    coded = quantise_params(config, BASE)
    return config, coded, merge(coded, {}, config)


@functools.partial(jax.jit, static_argnums=2)
def compute(base: PyTree, adapter: PyTree, config: ModelConfig) -> jax.Array:
    return logits(base, adapter, config, apply(base, adapter, config, TOKENS, POSITIONS))


def error(found: jax.Array, expected: jax.Array) -> float:
    """Of the rows' own tokens, relative."""
    own = np.asarray(POSITIONS) >= 0
    return float(np.linalg.norm((found - expected)[own]) / np.linalg.norm(np.asarray(expected)[own]))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_codes_and_scales_of_a_matrix_by_hand() -> None:
    """A step of 0.01: 1.275 is 127.5 steps, which 127 is nearest to of what there is; 0.634 is 63.4 of them."""
    weight = jnp.array([[[1.275, 0.0, 5.1], [-0.634, 0.0, -0.039], [0.014, 0.0, 0.021], [0.006, 0.0, -5.0]]])
    found = quantise(weight, "int8")
    assert found.codes.dtype == jnp.int8 and found.scales.shape == (1, 1, 3)
    np.testing.assert_array_equal(found.codes[0], [[127, 0, 127], [-63, 0, -1], [1, 0, 1], [1, 0, -125]])
    np.testing.assert_allclose(found.scales[0, 0, ::2], [0.01, 0.04], rtol=1e-6)
    np.testing.assert_allclose(dequantise(found, jnp.float32)[0, :, 0], [1.27, -0.63, 0.01, 0.01], rtol=1e-6)


@pytest.mark.parametrize(("kind", "codes", "blocks"), [("int8", 255, 1), ("int4", 15, 3)])
def test_no_number_moves_by_more_than_half_a_step(kind: Quantise, codes: int, blocks: int) -> None:
    """A step is 2 max |w| / 255 of an output's inputs, or / 15 of 32 of them: the bound is reached, and kept."""
    weight = jnp.asarray(np.random.default_rng(0).standard_t(3, (2, 3 * BLOCK, 5)), jnp.float32)
    found = quantise(weight, kind)
    groups = np.asarray(weight).reshape(2, blocks, -1, 5)
    step = 2 * np.abs(groups).max(axis=2) / codes
    np.testing.assert_allclose(found.scales, step, rtol=1e-6)
    back = np.asarray(dequantise(found, jnp.float32))
    moved = np.abs(back.reshape(groups.shape) - groups) / step[:, :, None]
    assert 0.49 < moved.max() <= 0.5 + 1e-4
    theirs = qwix.QArray(found.codes, found.scales)
    np.testing.assert_allclose(back, qwix.dequantize(theirs), rtol=1e-6)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.03), ("int4", 0.4)])
def test_logits_stay_near_those_of_the_float_model(kind: Quantise, most: float) -> None:
    config, coded, plain = model(kind)
    found = compute(coded, {}, config)
    assert error(found, compute(plain, {}, CONFIG)) < 1e-5
    assert most / 10 < error(found, compute(BASE, {}, CONFIG)) < most
    assert set(linear_shapes(config)) == {k for k, x in coded["layers"].items() if isinstance(x, Quantised)}
    assert all(coded[name] is BASE[name] for name in ("embedding", "final_norm"))


def test_in_bfloat16_codes_are_exact() -> None:
    """Products of codes lose nothing but what their sums do: nearer than a base rounded to bfloat16 after scaling."""
    half = ModelOptions("bfloat16", quantise="int8").of(CONFIG)
    coded = quantise_params(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE))
    assert error(compute(coded, {}, half), compute(merge(coded, {}, half), {}, CONFIG)) < 0.03


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_adapters_as_through_the_plain_base(kind: Quantise) -> None:
    config, coded, plain = model(kind)
    for fresh in (init_lora(jax.random.key(1), config, 2, 3.0, first_layer=1), init_top_k(coded, config, 2)):
        adapter = noisy(fresh)

        def loss(adapter: PyTree, base: PyTree, config: ModelConfig) -> jax.Array:
            return jnp.mean(jnp.sin(compute(base, adapter, config)))

        found, expected = jax.grad(loss)(adapter, coded, config), jax.grad(loss)(adapter, plain, CONFIG)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


def test_whole_layers_start_at_what_the_codes_stand_for() -> None:
    config, coded, plain = model("int8")
    top = init_top_k(coded, config, 2)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(top)} == {"float32"}
    np.testing.assert_array_equal(top["layers"]["down"], plain["layers"]["down"][-2:])
    assert error(compute(coded, top, config), compute(coded, {}, config)) < 1e-5


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.5), ("int4", 0.75)])
def test_neither_pass_holds_a_plain_copy_of_the_base(kind: Quantise, most: float) -> None:
    """One layer at a time is widened; what was must not be kept for the backward pass.

    On CPUs XLA gives every code of 4 bits a byte for the time of a loop: a quarter of the plain base.
    """
    config = ModelOptions(quantise=kind).of(dataclasses.replace(CONFIG, num_layers=8, hidden_size=256, head_dim=64))
    base = jax.eval_shape(lambda: quantise_params(config, init_params(jax.random.key(0), config)))
    adapter = jax.eval_shape(lambda b: init_adapter(jax.random.key(0), b, config, AdapterConfig(rank=1)), base)

    def mean(adapter: PyTree, base: PyTree) -> jax.Array:
        return jnp.mean(jnp.sin(apply(base, adapter, config, TOKENS[:1, :8], jnp.arange(8)[None])))

    held = jax.jit(jax.grad(mean)).lower(adapter, base).compile().memory_analysis()
    plain = sum(4 * config.num_layers * inputs * outputs for inputs, outputs in linear_shapes(config).values())
    assert held.temp_size_in_bytes < most * plain
    assert held.argument_size_in_bytes < 0.3 * plain


def test_a_merged_model_computes_what_the_role_does() -> None:
    config, coded, _ = model("int8")
    adapter = noisy(init_lora(jax.random.key(1), config, 2, 3.0, first_layer=1))
    merged = merge(coded, adapter, config)
    assert error(compute(merged, {}, CONFIG), compute(coded, adapter, config)) < 1e-5
    dora = jax.tree.map(lambda x: 1.2 * x, init_magnitudes(coded["layers"], adapter, config))
    assert error(compute(merge(coded, dora, config), {}, CONFIG), compute(coded, dora, config)) < 1e-5
    np.testing.assert_allclose(merge_one(coded, adapter, "layers.up", 2), merged["layers"]["up"][2], rtol=1e-6)
    np.testing.assert_array_equal(merge_one(coded, adapter, "layers.up", 0), merged["layers"]["up"][0])


# -- decoding, files and meshes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_layers_apart_reads_the_same_codes(kind: Quantise) -> None:
    config, coded, _ = model(kind)
    adapter = noisy(init_lora(jax.random.key(1), config, 2, 3.0, first_layer=1))
    whole = apply(coded, adapter, config, TOKENS, POSITIONS)
    decoder = unstack(coded, adapter, config)
    assert decoder[0]["layers"][1]["q"].codes.dtype == jnp.dtype(kind)
    cache = unstacked(init_cache(config, 2, 12), 12)
    hidden, cache = apply(*decoder, config, TOKENS[:, :11], POSITIONS[:, :11], cache=cache)
    last, _ = apply(*decoder, config, TOKENS[:, 11:], POSITIONS[:, 11:], cache=cache)
    assert error(jnp.concatenate([hidden, last], axis=1), whole) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_read_into_codes_on_one_device_and_on_eight(kind: Quantise, tmp_path: Path) -> None:
    config, coded, _ = model(kind)
    hf.save(tmp_path, CONFIG, BASE)
    found, alone = hf.load(tmp_path, quantise=kind)
    assert found.quantise == kind
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, placed = hf.load(tmp_path, mesh=mesh, quantise=kind)
    wanted = shardings(coded, mesh)
    for one, two, three, place in zip(*map(jax.tree.leaves, (coded, alone, placed, wanted)), strict=True):
        assert one.dtype == two.dtype == three.dtype and three.sharding == place
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
        np.testing.assert_array_equal(np.asarray(one), np.asarray(three))
    specs = wanted["layers"]["down"]
    assert tuple(specs.codes.spec) == (None, "tensor", "fsdp")
    assert tuple(specs.scales.spec) == ((None, None, "fsdp") if kind == "int8" else (None, "tensor", "fsdp"))
    with jax.set_mesh(mesh):
        assert error(compute(placed, {}, config), compute(coded, {}, config)) < 1e-5
        assert error(jax.jit(lambda b: compute(gathered(b), {}, config))(placed), compute(coded, {}, config)) < 1e-5


def test_an_adapter_is_merged_before_its_base_is_quantised(tmp_path: Path) -> None:
    config, _, _ = model("int8")
    adapter = noisy(init_lora(jax.random.key(1), config, 2, 3.0))
    hf.save(tmp_path / "base", CONFIG, BASE)
    peft.save(tmp_path / "adapter", adapter, config, str(tmp_path / "base"))
    _, found = hf.load(tmp_path / "adapter", quantise="int8")
    expected = quantise_params(config, merge(BASE, adapter, CONFIG))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-5, atol=1)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, coded, _ = model("int8")
    with pytest.raises(ValueError, match="those of --compute.quantise are frozen: train lora or top_k, or leave"):
        init_full(coded)
    with pytest.raises(ValueError, match="int4 takes inputs by 32, and a map of this model has 48; int8 takes any"):
        quantise_params(ModelOptions(quantise="int4").of(TINY), random_params(TINY))
    with pytest.raises(ValueError, match="quantise='nf4'; allowed: none, int8, int4"):
        object.__setattr__(options := ModelOptions(), "quantise", "nf4")
        options.__post_init__()
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"--compute.quantise int8 needs qwix: pip install"):
        quantise(jnp.ones((1, 4, 4)), "int8")
