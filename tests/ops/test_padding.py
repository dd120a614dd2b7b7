"""No function of `ops` that takes a mask can tell how much padding there is, on which side, or what lies in it.

The table holds every such function: one that is added without an entry fails `test_every_masked_function_is_here`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax import ops
from ppo_jax.ops import advantages, kl, losses, masked, rewards

B, T = 3, 5
floats = st.floats(-5, 5, width=32)
grids = hnp.arrays(np.float32, (4, B, T), elements=floats)
some = settings(max_examples=20, deadline=None)


def over_positions(name: str) -> Callable:
    """f(four [B, T] arrays, mask) of one function of a table; per-token results come back as arrays of width T."""
    return {
        "masked_mean": lambda x, mask: masked.masked_mean(x[0], mask),
        "masked_var": lambda x, mask: masked.masked_var(x[0], mask),
        "masked_whiten": lambda x, mask: masked.masked_whiten(x[0], mask),
        "deviations": lambda x, mask: masked.deviations(x[0], mask),
        "prepare": lambda x, mask: masked.prepare(x[0], mask)[0],
        "last_token": lambda x, mask: rewards.last_token(mask),
        "shape_rewards": lambda x, mask: rewards.shape_rewards(jnp.arange(1.0, B + 1), x[0], mask, 0.3),
        "truncation_mask": lambda x, mask: rewards.truncation_mask(tokens(x[0], mask), mask, (1, 2)),
        "gae": lambda x, mask: advantages.gae(x[0], x[1], mask, 0.9, 0.8),
        "rewards_to_go": lambda x, mask: advantages.rewards_to_go(x[0], mask, 0.9),
        "response_k2": lambda x, mask: kl.response_k2(x[0], x[1], mask),
        "clipped_policy_loss": lambda x, mask: losses.clipped_policy_loss(x[0], x[1], x[2], mask, 0.2, 0.3),
        "clipped_value_loss": lambda x, mask: losses.clipped_value_loss(x[0], x[1], x[2], mask, 0.2),
        "bradley_terry_loss": lambda x, mask: losses.bradley_terry_loss(x[0], x[1], mask=mask),
        "dpo_loss": lambda x, mask: losses.dpo_loss(*x, 0.3, 0.1, mask=mask),
        "token_weights": lambda x, mask: losses.token_weights(
            mask, "sequence-mean"
        ),  # "constant" is the width, by definition
    }[name]


def tokens(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Token ids from floats; in padding always a stop id."""
    return jnp.where(mask, jnp.abs(jnp.nan_to_num(x)).astype(jnp.int32), 1)


POSITIONS = (
    "masked_mean", "masked_var", "masked_whiten", "deviations", "prepare", "last_token", "shape_rewards",
    "truncation_mask", "gae", "rewards_to_go", "clipped_policy_loss", "clipped_value_loss", "bradley_terry_loss",
    "dpo_loss", "token_weights", "response_k2",
)  # fmt: skip
ROWS = ("rloo", "grpo", "update")  # a mask over whole rows: `valid`


def test_every_masked_function_is_here() -> None:
    found: set[str] = set()
    for module in pkgutil.iter_modules(ops.__path__):
        loaded = importlib.import_module(f"ppo_jax.ops.{module.name}")
        for name, function in [*vars(loaded).items(), *vars(getattr(loaded, "RunningMoments", object)).items()]:
            if (
                name.startswith("_")
                or not inspect.isfunction(function)
                or not function.__module__.endswith(module.name)
            ):
                continue
            if {"mask", "valid"} & set(inspect.signature(function).parameters):
                found.add(name)
    assert found == {*POSITIONS, *ROWS}


def padded(x: np.ndarray, mask: np.ndarray, left: int, right: int, garbage: float) -> tuple[jax.Array, jax.Array]:
    """The same values with more slots around them, and `garbage` wherever the mask is off."""
    widths = ((0, 0), (left, right))
    wide = np.stack([np.pad(array, widths) for array in x])
    wide_mask = np.pad(mask, widths)
    return jnp.asarray(np.where(wide_mask, wide, np.float32(garbage))), jnp.asarray(wide_mask)


def same(short: object, long: object, left: int) -> None:
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if b.ndim == 2 and b.shape[1] > T:  # per position: 0 in the padding
            assert not b[:, :left].any() and not b[:, left + T :].any()
            b = b[:, left : left + T]
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POSITIONS)
def test_padding_changes_nothing(name: str) -> None:
    function = jax.jit(over_positions(name))

    @some
    @given(grids, hnp.arrays(bool, (B, T)), st.sampled_from([0, 2]), st.sampled_from([np.nan, np.inf, -1e30]))
    def check(x: np.ndarray, mask: np.ndarray, left: int, garbage: float) -> None:
        clean = np.where(mask, x, np.float32(0))
        same(function(jnp.asarray(clean), jnp.asarray(mask)), function(*padded(x, mask, left, 3 - left, garbage)), left)

    check()


@some
@given(hnp.arrays(np.float32, 12, elements=floats), hnp.arrays(bool, 12), st.sampled_from([np.nan, np.inf, -1e30]))
def test_rows_that_do_not_count_change_nothing(scores: np.ndarray, valid: np.ndarray, garbage: float) -> None:
    """Groups of 4 in which some rows are not valid: whatever stands there, and as if the groups were smaller."""
    dirty, clean = (jnp.asarray(np.where(valid, scores, np.float32(x))) for x in (garbage, 0))
    mask = jnp.asarray(valid)
    for function in (advantages.rloo, advantages.grpo):
        found = np.asarray(function(dirty, 4, valid=mask))
        np.testing.assert_array_equal(found, function(clean, 4, valid=mask))
        assert not found[~valid].any()
        for group in range(3):
            rows = np.arange(4 * group, 4 * group + 4)
            kept = rows[valid[rows]]
            if len(kept) > 1:
                alone = function(jnp.asarray(scores[kept]), len(kept))
                np.testing.assert_allclose(found[kept], alone, rtol=1e-4, atol=1e-5)
    moments = [rewards.RunningMoments.init().update(x, mask) for x in (dirty, clean)]
    assert moments[0] == moments[1]
    if valid.any():
        np.testing.assert_allclose(moments[0].mean, scores[valid].mean(), rtol=1e-4, atol=1e-5)
