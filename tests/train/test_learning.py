"""From random weights to more than nine tenths of the reward, by PPO, RLOO and GRPO.

Two rewards in [0, 1]: the share of one token in the response, and the share of positions that repeat the prompt. The
second needs attention: what is right depends on the prompt's tokens and their places.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.adapters import init_full
from ppo_jax.models.config import ModelConfig
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.rollout import Sampling
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.ppo import make_iteration
from ppo_jax.train.state import init_state
from ppo_jax.types import Frozen, Hyper, Prompts, Rollout, Scores
from tests.models.tiny import random_params

CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=False,
)
# Embeddings far apart and weights small: a token is told from another from the start, and nothing else is known.
BASE = jax.tree_util.tree_map_with_path(lambda path, x: x if "norm" in path[-1].key else 0.5 * x, random_params(CONFIG))
BASE["embedding"] = 6.0 * BASE["embedding"]
TARGET, P = 3, 2
METHODS = {"ppo": ("gae", 1), "rloo": ("rloo", 4), "grpo": ("grpo", 4)}


def shares(right: jax.Array) -> Scores:
    """The mean over positions of whether each is right."""
    return Scores(jnp.mean(right, axis=1, dtype=jnp.float32), jnp.ones(right.shape[0], bool), {})


def one_token(frozen: Frozen, rollout: Rollout, prefix: jax.Array | None, prefix_layers: int) -> Scores:
    return shares(rollout.tokens[:, P:] == TARGET)


def copied(frozen: Frozen, rollout: Rollout, prefix: jax.Array | None, prefix_layers: int) -> Scores:
    return shares(rollout.tokens[:, P:] == rollout.tokens[:, :P])


def learn(method: str, reward: DeviceReward, length: int, responses: int, iterations: int, rate: float) -> list[float]:
    """Mean reward of every iteration; the learning rate falls linearly to 0. Prompts are new each time."""
    advantage, group = METHODS[method]
    ppo = PPOConfig(
        sampling=Sampling(response_length=length), epochs=2, num_minibatches=4, advantage=advantage, group_size=group
    )
    run = make_iteration(CONFIG, ppo, make_optimizer(), reward)
    state, means = init_state(jax.random.key(0), init_full(BASE), CONFIG, make_optimizer(), 0.0), []
    rows = responses // group
    for number in range(iterations):
        tokens = np.random.default_rng(number).integers(0, CONFIG.vocab_size, (rows, P))
        prompts = Prompts(jnp.asarray(tokens, jnp.int32), jnp.ones((rows, P), bool), jnp.arange(rows))
        hyper = Hyper(learning_rate=rate * (1 - number / iterations), temperature=1.0, kl_coef=0.0)
        state, metrics = run(state, Frozen(BASE), prompts, hyper)
        total, count = metrics["reward"]
        means.append(float(total / count))
    return means


@pytest.mark.parametrize("method", ["rloo", *(pytest.param(name, marks=pytest.mark.long) for name in ("ppo", "grpo"))])
def test_learns_to_say_one_token(method: str) -> None:
    rewards = learn(method, one_token, length=4, responses=64, iterations=24, rate=1e-2)
    assert rewards[0] < 0.25  # chance is 1/8
    assert np.mean(rewards[-4:]) > 0.9


@pytest.mark.parametrize("method", ["grpo", *(pytest.param(name, marks=pytest.mark.long) for name in ("ppo", "rloo"))])
def test_learns_to_copy_the_prompt(method: str) -> None:
    rewards = learn(method, copied, length=P, responses=256, iterations=40, rate=6e-3)
    assert rewards[0] < 0.25
    assert np.mean(rewards[-4:]) > 0.9
