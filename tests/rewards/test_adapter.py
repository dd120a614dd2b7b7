"""The adapter reward: the last token of the text, whatever the padding, the prefix or the stop token."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.adapters import init_lora
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.roles import shared_prefix
from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.rewards.adapter import RewardRole, adapter_reward, score_tokens, text_mask
from ppo_jax.types import Frozen, Rollout
from tests.models.tiny import CONFIG, random_params
from tests.train.toy import noisy

BASE = random_params(CONFIG)
ROWS = ([5, 9, 11], [7], [3, 4, 5, 6, 8, 10], [12, 2, 13, 14])  # 2 is CONFIG's end token: here a token of the text
score = jax.jit(score_tokens, static_argnums=(2,))


def role(first_layer: int = 1, config=CONFIG) -> RewardRole:
    head = noisy(RewardHead().init(jax.random.key(1), jnp.zeros((1, config.hidden_size)))["params"], 3, 0.5)
    if first_layer == config.num_layers:
        return RewardRole({}, head)
    adapter = init_lora(jax.random.key(0), config, 2, 4.0, ("q", "down"), first_layer)
    return RewardRole(noisy(adapter, 2, 0.2), head)


def padded(side: str, slots: int = 8) -> tuple[jax.Array, jax.Array]:
    """ROWS with random ids as padding on one side, or spread over all slots."""
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, CONFIG.vocab_size, (len(ROWS), slots)), np.zeros((len(ROWS), slots), bool)
    for i, row in enumerate(ROWS):
        at = {
            "left": np.arange(slots - len(row), slots),
            "right": np.arange(len(row)),
            "anywhere": np.sort(rng.choice(slots, len(row), replace=False)),
        }[side]
        tokens[i, at], mask[i, at] = row, True
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


run = jax.jit(apply, static_argnums=2)


def alone(role: RewardRole, row: list[int], config=CONFIG) -> float:
    """The score of one unpadded text, by the definition of the head."""
    tokens = jnp.asarray([row], jnp.int32)
    hidden = run(BASE, role.adapter, config, tokens, positions_from_mask(jnp.ones((1, len(row)), bool)))
    raw = np.asarray(hidden, np.float64)[0, -1] @ np.asarray(role.head["reward"]["kernel"], np.float64)[:, 0]
    return float(role.head["gain"]) * raw + float(role.head["bias"])


def test_padding_changes_no_score():
    expected = [alone(role(), row) for row in ROWS]
    assert np.ptp(expected) > 0.1
    for side in ("left", "right", "anywhere"):
        np.testing.assert_allclose(score(BASE, role(), CONFIG, *padded(side)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first_layer", [1, 2, 3])
def test_a_shared_prefix_changes_no_score(first_layer: int, prefix_layers: int = 2):
    """Also where the reward's adapter starts below the prefix, which then is not its own."""
    tokens, mask = padded("right")
    prefix = shared_prefix(BASE, CONFIG, tokens, mask, prefix_layers)
    chosen = role(first_layer)
    expected = score(BASE, chosen, CONFIG, tokens, mask)
    np.testing.assert_allclose(score(BASE, chosen, CONFIG, tokens, mask, prefix), expected, rtol=1e-4, atol=1e-5)
    if first_layer >= prefix_layers:  # and it is really read
        other = score(BASE, chosen, CONFIG, tokens, mask, noisy(prefix, 4))
        assert np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize("depth", [1, 2])
def test_a_trunk_that_ends_at_or_below_the_prefix_computes_its_own(depth: int):
    """The policy shares 2 of 3 layers; a reward model of so few layers has its final norm where they end."""
    trunk = dataclasses.replace(CONFIG, num_layers=depth)
    tokens, mask = padded("left")
    prefix = shared_prefix(BASE, CONFIG, tokens, mask, 2)
    for first_layer in (depth - 1, depth):
        chosen = role(first_layer, trunk)
        found = score(BASE, chosen, trunk, tokens, mask, prefix)
        np.testing.assert_allclose(found[0], alone(chosen, ROWS[0], trunk), rtol=1e-4, atol=1e-5)


PAD, STOP, OTHER_STOP = 0, 2, 6


def rollout() -> Rollout:
    """Two prompt slots, three response slots: stopped at once, stopped late, cut, stopped by the other id."""
    tokens = jnp.asarray(
        [[PAD, 5, STOP, PAD, PAD], [4, 3, 7, PAD, STOP], [PAD, 9, 8, 7, 5], [2, 6, 1, 6, 3]], jnp.int32
    )
    prompt_mask = jnp.asarray([[0, 1], [1, 1], [0, 1], [1, 1]], bool)
    response_mask = jnp.asarray([[1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
    zeros = jnp.zeros((4, 3))
    ended = jnp.asarray([True, True, False, True])
    return Rollout(tokens, prompt_mask, response_mask, zeros, zeros, zeros, ended, jnp.arange(4))


def test_text_mask_hides_the_stop_token_and_keeps_what_looks_like_padding():
    expected = np.array([[0, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(text_mask(rollout(), (STOP, OTHER_STOP)), expected)


def test_without_stop_ids_all_sampled_tokens_are_text():
    np.testing.assert_array_equal(text_mask(rollout(), ()), rollout().mask)


def test_a_stop_id_in_the_prompt_is_text():
    assert text_mask(rollout(), (STOP, OTHER_STOP))[3, 0] and text_mask(rollout(), (STOP, OTHER_STOP))[3, 1]


@pytest.mark.parametrize("prefix_layers", [0, 1])
def test_rollouts_are_scored_as_their_texts_alone(prefix_layers: int):
    """Prompt and response, from left-padded rollouts; a response that stopped at once leaves the prompt."""
    texts = ([5], [4, 3, 7, PAD], [9, 8, 7, 5], [2, 6, 1])
    drawn, chosen = rollout(), role(first_layer=1)
    prefix = shared_prefix(BASE, CONFIG, drawn.tokens, drawn.mask, prefix_layers)
    reward = adapter_reward(CONFIG, (STOP, OTHER_STOP))
    run = jax.jit(partial(reward, prefix_layers=prefix_layers))
    scores = run(Frozen(BASE, chosen), drawn, None if prefix is None else prefix.hidden)
    np.testing.assert_allclose(scores.reward, [alone(chosen, text) for text in texts], rtol=1e-4, atol=1e-5)
    assert np.asarray(scores.valid).all() and scores.parts == {}


def test_a_score_that_is_not_finite_is_invalid_and_its_neighbours_are_not():
    base = BASE | {"embedding": BASE["embedding"].at[8].set(jnp.nan)}  # only the third text says 8
    scores = adapter_reward(CONFIG, (STOP, OTHER_STOP))(Frozen(base, role()), rollout(), None, 0)
    assert np.asarray(scores.valid).tolist() == [True, True, False, True]
    assert np.isfinite(np.asarray(scores.reward)[[0, 1, 3]]).all()
