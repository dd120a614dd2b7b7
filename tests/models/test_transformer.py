"""The trunk: padding anywhere, layer ranges, rematerialisation, number formats, errors."""

import dataclasses
import inspect
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.adapters import init_lora
from ppo_jax.models.block import rms_norm
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.transformer import apply, logits, positions_from_mask
from ppo_jax.types import PyTree
from tests.models.tiny import CONFIG, LLAMA3, random_params

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
run = jax.jit(apply, static_argnames=("config", "layers"), compiler_options=QUICK)
PARAMS = random_params(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 67, (2, 12))
POSITIONS = jnp.broadcast_to(jnp.arange(12), (2, 12))


def hidden_of(
    tokens: np.ndarray, mask: np.ndarray, params: PyTree = PARAMS, config: ModelConfig = CONFIG
) -> np.ndarray:
    """Hidden states of the base, [B, S, D]."""
    return np.asarray(run(params, {}, config, jnp.asarray(tokens), positions_from_mask(jnp.asarray(mask))))


def random_lora(first_layer: int, config: ModelConfig = CONFIG) -> PyTree:
    rng = np.random.default_rng(1)
    lora = init_lora(jax.random.key(0), config, rank=3, alpha=6.0, first_layer=first_layer)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), lora)


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """Every equation of a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1], [-1, -1, 0, 1]),
        ([1, 1, 0, 0], [0, 1, -1, -1]),
        ([0, 1, 0, 1], [-1, 0, -1, 1]),
        ([0, 0, 0, 0], [-1, -1, -1, -1]),
    ],
)
def test_positions_count_real_tokens(mask: list[int], expected: list[int]) -> None:
    positions = positions_from_mask(jnp.array([mask], bool))
    assert positions.tolist() == [expected] and positions.dtype == jnp.int32


# The 7 real tokens of one row, in 12 slots: on the left, on the right, and scattered.
LAYOUTS = {"left": range(5, 12), "right": range(7), "inside": [0, 1, 4, 5, 8, 9, 11]}


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_padding_changes_nothing_wherever_it_lies(scaling: object) -> None:
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    alone = hidden_of(TOKENS[:1, :7], np.ones((1, 7), bool), config=config)[0]
    tokens, mask = np.full((3, 12), 66), np.zeros((3, 12), bool)
    for row, slots in enumerate(LAYOUTS.values()):
        tokens[row, list(slots)], mask[row, list(slots)] = TOKENS[0, :7], True
    padded = hidden_of(tokens, mask, config=config)
    for row in range(3):
        np.testing.assert_allclose(padded[row][mask[row]], alone, atol=2e-5)
    # The comparison can fail: read as tokens, the padding shows.
    assert np.abs(hidden_of(tokens, np.ones_like(mask), config=config)[0, 5:] - alone).max() > 0.1


@pytest.mark.parametrize("garbage", [3, 66, 67, 10**9, -1, -100])
def test_what_the_padding_holds_is_never_read(garbage: int) -> None:
    """Also ids outside the vocabulary: a tokenizer's pad id may lie beyond the embedding."""
    mask = np.array([[0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0]] * 2, bool)
    found = hidden_of(np.where(mask, TOKENS, garbage), mask)
    np.testing.assert_array_equal(found[mask], hidden_of(np.where(mask, TOKENS, 0), mask)[mask])


def test_a_row_without_a_token_stays_finite_and_disturbs_nobody() -> None:
    mask = np.array([[True] * 12, [False] * 12])
    found = hidden_of(TOKENS, mask)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], hidden_of(TOKENS, np.ones_like(mask))[0], atol=1e-6)

    def loss(params: PyTree) -> jax.Array:
        hidden = apply(params, {}, CONFIG, jnp.asarray(TOKENS), positions_from_mask(jnp.asarray(mask)))
        return jnp.sum(jnp.where(mask[..., None], hidden, 0))

    slopes = jax.jit(jax.grad(loss), compiler_options=QUICK)(PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_causality() -> None:
    mask, changed = np.ones((2, 12), bool), TOKENS.copy()
    changed[:, 6] += 1 - 2 * (changed[:, 6] == 66)
    before, after = hidden_of(TOKENS, mask), hidden_of(changed, mask)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after)[:, 6:].max(axis=-1) > 1e-3).all()


def test_rms_norm_by_hand() -> None:
    """x = (3, 4): mean square 12.5; with eps 3.5 the root is 4."""
    found = rms_norm(jnp.array([3.0, 4.0]), jnp.array([2.0, 10.0]), 3.5)
    np.testing.assert_allclose(found, [3 / 4 * 2, 4 / 4 * 10], rtol=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    """One rounding at the end: within half a unit in the last place of the exact result, at any magnitude."""
    x = (jax.random.normal(jax.random.key(0), (4, 4096)) * jnp.array([[1e-15], [1.0], [300.0], [1e20]])).astype(
        jnp.bfloat16
    )
    weight = jax.random.normal(jax.random.key(1), (4096,)).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact *= np.asarray(weight, np.float64) / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-30)
    found = rms_norm(x, weight, 1e-30)
    assert found.dtype == jnp.bfloat16
    rows = [0, 1, 2]  # (1e20)^2 overflows float32: that row only shows that nothing is hidden
    np.testing.assert_allclose(np.asarray(found, np.float64)[rows], exact[rows], rtol=2**-8)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("kind", ["base", "lora", "full"])
def test_layer_ranges_compose(kind: str, split: int) -> None:
    adapter = {"base": {}, "lora": random_lora(1), "full": random_params(CONFIG, seed=5)}[kind]
    tokens = jnp.asarray(TOKENS)
    whole = run(PARAMS, adapter, CONFIG, tokens, POSITIONS)
    raw = run(PARAMS, adapter, CONFIG, tokens, POSITIONS, layers=(0, split))
    rest = run(PARAMS, adapter, CONFIG, None, POSITIONS, hidden=raw, layers=(split, 3))
    np.testing.assert_allclose(rest, whole, atol=1e-5)
    if kind != "base":  # the upper range carries the adapter
        assert np.abs(run(PARAMS, {}, CONFIG, None, POSITIONS, hidden=raw, layers=(split, 3)) - whole).max() > 0.1


def test_each_layer_alone_and_where_the_final_norm_belongs() -> None:
    """The stream between ranges is raw: its first piece is the embedding plus one layer's updates."""
    stream = run(PARAMS, {}, CONFIG, jnp.asarray(TOKENS), POSITIONS, layers=(0, 1))
    stream = run(PARAMS, {}, CONFIG, None, POSITIONS, hidden=stream, layers=(1, 2))
    one_layer = dataclasses.replace(CONFIG, num_layers=1)
    params = PARAMS | {"layers": jax.tree.map(lambda w: w[2:], PARAMS["layers"]), "final_norm": jnp.ones(32)}
    # Layer 2 as a model of its own, fed by an embedding table that holds the stream, one row per slot.
    params["embedding"] = stream.reshape(24, 32)
    alone = run(params, {}, one_layer, jnp.arange(24).reshape(2, 12), POSITIONS)
    whole = run(PARAMS, {}, CONFIG, jnp.asarray(TOKENS), POSITIONS)
    np.testing.assert_allclose(alone * PARAMS["final_norm"], whole, atol=1e-5)


def test_a_bad_range_is_named_with_what_is_allowed() -> None:
    tokens, hidden = jnp.asarray(TOKENS), jnp.zeros((2, 12, 32))
    for layers in ((0, 4), (0, 0), (-1, 2)):
        with pytest.raises(ValueError, match=rf"layers \[{layers[0]}, {layers[1]}\) is empty or not within \[0, 3\)"):
            apply(PARAMS, {}, CONFIG, tokens, POSITIONS, layers=layers)
    for layers in ((3, 3), (2, 1), (1, 4)):
        with pytest.raises(ValueError, match=r"not within \[0, 3\)"):
            apply(PARAMS, {}, CONFIG, None, POSITIONS, hidden=hidden, layers=layers)


def test_a_mask_in_the_place_of_positions_is_refused() -> None:
    unchecked = inspect.unwrap(apply)  # without the types that tests check
    with pytest.raises(TypeError, match=r"those of a mask are models.transformer.positions_from_mask\(mask\)"):
        unchecked(PARAMS, {}, CONFIG, jnp.asarray(TOKENS), jnp.ones((2, 12), bool))


def test_tokens_for_the_first_layer_and_hidden_states_for_the_others() -> None:
    tokens, hidden = jnp.asarray(TOKENS), jnp.zeros((2, 12, 32))
    for given, layers in (
        ({"tokens": tokens, "hidden": hidden}, (0, 3)),
        ({"tokens": None}, (0, 3)),
        ({"tokens": None, "hidden": hidden}, (0, 3)),
        ({"tokens": tokens}, (1, 3)),
        ({"tokens": tokens, "hidden": hidden}, (1, 3)),
    ):
        with pytest.raises(ValueError, match="give tokens when start is 0, else hidden"):
            apply(PARAMS, {}, CONFIG, positions=POSITIONS, layers=layers, **given)


def test_rematerialisation_changes_nothing_but_is_there() -> None:
    saved = dataclasses.replace(CONFIG, remat="full")
    adapter = random_lora(1)

    def loss(adapter: PyTree, config: ModelConfig) -> jax.Array:
        return jnp.sum(jnp.sin(apply(PARAMS, adapter, config, jnp.asarray(TOKENS), POSITIONS)))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options=QUICK)
    plain, again = gradient(adapter, CONFIG), gradient(adapter, saved)
    for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)

    def products(config: ModelConfig) -> int:
        jaxpr = jax.make_jaxpr(jax.grad(lambda a: loss(a, config)))(adapter).jaxpr
        return sum(e.primitive.name == "dot_general" for e in equations(jaxpr))

    assert products(CONFIG) < products(dataclasses.replace(CONFIG, remat="dots")) < products(saved)


@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_bfloat16_keeps_norms_softmax_and_angles_in_float32(params_dtype: str) -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16", attention_bias=True, output_bias=True, mlp_bias=True)
    params = random_params(dataclasses.replace(config, dtype=params_dtype))
    program = jax.make_jaxpr(lambda p, a: apply(p, a, config, jnp.asarray(TOKENS), POSITIONS))
    jaxpr = program(params, random_lora(1, config)).jaxpr
    assert jaxpr.outvars[0].aval.dtype == jnp.bfloat16
    found: dict[str, set] = {}
    for equation in equations(jaxpr):
        if equation.invars:
            found.setdefault(equation.primitive.name, set()).add(str(equation.invars[0].aval.dtype))
    for name in ("rsqrt", "exp", "cos", "sin"):  # norms, softmax, angles
        assert found[name] == {"float32"}, name
    # Matrix products and the activation run in bfloat16, whatever the parameters are stored in.
    assert found["dot_general"] == {"bfloat16"} and found["logistic"] == {"bfloat16"}


def test_bfloat16_follows_float32() -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    exact, mask = hidden_of(TOKENS, np.ones_like(TOKENS, bool)), np.ones_like(TOKENS, bool)
    found = hidden_of(TOKENS, mask, config=config).astype(np.float32)
    error = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 1e-4 < error.max() < 0.06  # a few times 2^-8, and not float32 in disguise


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_hidden_times_the_roles_own_unembedding(tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params, other = random_params(config), random_params(config, seed=1)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 32)), jnp.float32)
    name = "embedding" if tied else "unembedding"
    for adapter, table in (({}, params[name]), ({name: other[name]}, other[name])):
        found = logits(params, adapter, config, hidden)
        assert found.shape == (2, 3, 67) and found.dtype == jnp.float32
        np.testing.assert_allclose(found, np.asarray(hidden) @ np.asarray(table).T, rtol=1e-5, atol=1e-5)


def test_logits_of_bfloat16_are_kept_in_float32() -> None:
    """1 + 2^-9 has no bfloat16: products are added up, and handed over, in float32."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    table = jnp.zeros((67, 32), jnp.bfloat16).at[5, :2].set(jnp.array([1.0, 2.0**-9], jnp.bfloat16))
    found = logits({"embedding": table}, {}, config, jnp.ones((1, 32), jnp.bfloat16))
    assert found[0, 5] == 1 + 2**-9 and not found[0, 6]


def test_gradients_are_those_of_finite_differences() -> None:
    """Directional derivative of a smooth loss of the whole trunk, central differences."""
    direction = random_params(CONFIG, seed=7)

    def loss(step: float) -> jax.Array:
        moved = jax.tree.map(lambda x, d: x + step * d, PARAMS, direction)
        return jnp.mean(jnp.sin(apply(PARAMS, moved, CONFIG, jnp.asarray(TOKENS), POSITIONS)))

    step = 1e-3
    both = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    numeric = (both(step)[0] - both(-step)[0]) / (2 * step)
    assert float(both(0.0)[1]) == pytest.approx(float(numeric), rel=0.01)
    assert abs(float(numeric)) > 0.01
