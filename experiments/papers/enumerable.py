"""A language model whose 40 responses can be listed, so that expectations are sums and the optimum is known.

Four tokens, one of which ends a response, at most three of them: 1 + 3 + 9 * 4 = 40 responses to one prompt. Every
seed is a world of its own: other weights of the reference, other rewards.

By default the prompt is one token, 3. One layer cannot tell a 3 from two or three of them: attention averages equal
values, wherever they stand. So the policy has the same distribution after 3, 3 3 and 3 3 3, and not every optimum can
be reached. Behind the prompt 0 3 it can.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.adapters import unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layout import init_params
from ppo_jax.models.roles import before_response, role_hidden
from ppo_jax.ops.logprobs import hidden_logprobs
from ppo_jax.types import Frozen, Prompts, PyTree, Rollout, Scores

V, T, STOP, PROMPT = 4, 3, 2, (3,)
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=96,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=24,
    tie_embeddings=False,
)


class World(NamedTuple):
    """A reference and a reward for each response."""

    base: PyTree
    rewards: Float[Array, " R"]  # in the order of `RESPONSES`


class Listed(NamedTuple):
    """All responses, as rows behind the prompt."""

    tokens: Int[Array, "R S"]
    mask: Bool[Array, "R S"]
    response_mask: Bool[Array, "R T"]


def _list_responses() -> list[tuple[int, ...]]:
    """Each ends with its first stop token, or at T."""
    words = [w for length in range(1, T + 1) for w in itertools.product(range(V), repeat=length)]
    return [w for w in words if STOP not in w[:-1] and (len(w) == T or w[-1] == STOP)]


RESPONSES = _list_responses()


def make_world(seed: int, spread: float = 0.8) -> World:
    """Embeddings far apart and weights small: such a model can be moved anywhere. Rewards are N(0, spread)."""
    params = jax.tree.map(lambda x: 7.5 * x if x.ndim > 2 else x, init_params(jax.random.key(seed), CONFIG))
    params["embedding"], params["unembedding"] = 45 * params["embedding"], 4 * params["unembedding"]
    rewards = np.random.default_rng(seed).normal(0, spread, len(RESPONSES)).astype(np.float32)
    return World(params, jnp.asarray(rewards))


def list_rows(prompt: tuple[int, ...] = PROMPT) -> Listed:
    """The rows that a rollout would have for each response."""
    tokens = np.zeros((len(RESPONSES), len(prompt) + T), np.int32)
    tokens[:, : len(prompt)] = prompt
    mask = np.zeros((len(RESPONSES), T), bool)
    for row, words in enumerate(RESPONSES):
        tokens[row, len(prompt) : len(prompt) + len(words)], mask[row, : len(words)] = words, True
    whole = np.concatenate([np.ones((len(RESPONSES), len(prompt)), bool), mask], axis=1)
    return Listed(jnp.asarray(tokens), jnp.asarray(whole), jnp.asarray(mask))


def number(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """Place of each response in `RESPONSES`."""
    codes = np.zeros(V**T + V**2 + V, np.int32)
    for place, words in enumerate(RESPONSES):
        codes[code(words)] = place
    lengths = jnp.sum(mask, axis=1)
    value = jnp.zeros(tokens.shape[0], jnp.int32)
    for t in range(T):
        value = jnp.where(mask[:, t], value * V + tokens[:, t], value)
    return jnp.asarray(codes)[value + jnp.asarray([0, 0, V, V + V**2])[lengths]]


def code(words: tuple[int, ...]) -> int:
    """The tokens as digits, after the shorter responses."""
    value = 0
    for word in words:
        value = value * V + word
    return value + (0, 0, V, V + V**2)[len(words)]


def reward(frozen: Frozen, rollout: Rollout, prefix: Array | None, prefix_layers: int) -> Scores:
    """A device reward: the table of `World.rewards` in `frozen.reward`."""
    scores = frozen.reward[number(rollout.tokens[:, -T:], rollout.response_mask)]
    return Scores(scores, jnp.ones(scores.shape, bool), {})


def prompts(rows: int, prompt: tuple[int, ...] = PROMPT) -> Prompts:
    """The one prompt, `rows` times."""
    return Prompts(
        jnp.tile(jnp.asarray(prompt, jnp.int32), (rows, 1)), jnp.ones((rows, len(prompt)), bool), jnp.arange(rows)
    )


def token_logprobs(
    base: PyTree, adapter: PyTree, prompt: tuple[int, ...] = PROMPT, temperature: float = 1.0
) -> Float[Array, "R T"]:
    """log pi of the tokens of all responses, 0 outside of them."""
    rows = list_rows(prompt)
    hidden = before_response(role_hidden(base, adapter, CONFIG, rows.tokens, rows.mask), T)
    logprobs = hidden_logprobs(hidden, unembedding(base, adapter), rows.tokens[:, -T:], temperature)
    return jnp.where(rows.response_mask, logprobs, 0.0)


def probabilities(
    base: PyTree, adapter: PyTree, prompt: tuple[int, ...] = PROMPT, temperature: float = 1.0
) -> Float[Array, " R"]:
    """pi(y) of all responses, exactly."""
    return jnp.exp(jnp.sum(token_logprobs(base, adapter, prompt, temperature), axis=1))


def optimum(world: World, beta: float, prompt: tuple[int, ...] = PROMPT, temperature: float = 1.0) -> np.ndarray:
    """rho(y) exp(r(y) / beta) / Z of all responses."""
    reference = np.asarray(probabilities(world.base, {}, prompt, temperature), np.float64)
    weights = reference * np.exp(np.asarray(world.rewards) / beta)
    return weights / weights.sum()


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Half the sum of absolute differences over the last axis."""
    return 0.5 * np.abs(np.asarray(p, np.float64) - np.asarray(q, np.float64)).sum(axis=-1)
