"""Roles on finished sequences: from the tokens, and from the prefix that they share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.adapters import init_lora
from ppo_jax.models.roles import before_response, role_hidden, shared_prefix
from tests.models.tiny import CONFIG, random_params

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BASE = random_params(CONFIG)
RNG = np.random.default_rng(0)
# Prompts padded on the left, responses on the right.
MASK = np.array([[1] * 9, [0, 0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 0]], bool)
TOKENS = jnp.asarray(RNG.integers(0, 67, MASK.shape))
LORA = jax.tree.map(
    lambda x: jnp.asarray(RNG.normal(0, 0.4, x.shape), jnp.float32),
    init_lora(jax.random.key(0), CONFIG, rank=2, alpha=2.0, targets=("q", "up"), first_layer=1),
)
prefix_of = jax.jit(shared_prefix, static_argnums=(1, 4), compiler_options=QUICK)
hidden_of = jax.jit(role_hidden, static_argnums=2, compiler_options=QUICK)


@pytest.mark.parametrize("adapter", ["lora", "final_norm"])
def test_a_role_from_the_shared_prefix_is_the_role_from_its_tokens(adapter: str) -> None:
    """The second adapter touches no layer, so that all L = 3 of them seem shared."""
    role = {"lora": LORA, "final_norm": {"final_norm": jnp.arange(32.0)}}[adapter]
    assert shared_prefix(BASE, CONFIG, TOKENS, jnp.asarray(MASK), 0) is None
    expected = np.asarray(hidden_of(BASE, role, CONFIG, TOKENS, jnp.asarray(MASK)))
    for depth in (1,) if adapter == "lora" else (1, 3):
        prefix = prefix_of(BASE, CONFIG, TOKENS, jnp.asarray(MASK), depth)
        found = np.asarray(hidden_of(BASE, role, CONFIG, TOKENS, jnp.asarray(MASK), prefix))
        np.testing.assert_allclose(found[MASK], expected[MASK], atol=1e-4 * np.abs(expected).max())


def test_a_role_on_one_layer_shares_nothing() -> None:
    """The last layer is the role's own, so a model of one layer starts at the tokens."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    assert shared_prefix(BASE, config, TOKENS, jnp.asarray(MASK), 1) is None


def test_response_states_are_those_before_the_tokens() -> None:
    """P = 3, T = 2: token 0 of the response sits in slot 3 and was chosen in slot 2."""
    hidden = jnp.arange(5.0).reshape(1, 5, 1)
    assert before_response(hidden, 2)[0, :, 0].tolist() == [2, 3]
