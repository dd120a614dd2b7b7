"""PPO with KL-shaped rewards has a known answer, and converges to it.

Over all responses y, with reference rho, the maximum of E_pi[r(y)] - beta KL(pi || rho) is at

    pi*(y) = rho(y) exp(r(y) / beta) / Z

(Ziegler et al. 2019; Korbak et al. 2022, "RL with KL penalties is better viewed as Bayesian inference".) Here every
response is listed (`experiments.papers.enumerable`): 4 tokens, one of which stops, at most 3 of them, give 40.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.papers.enumerable import (
    CONFIG,
    PROMPT,
    RESPONSES,
    STOP,
    T,
    V,
    World,
    code,
    optimum,
    probabilities,
    prompts,
    reward,
    total_variation,
)
from ppo_jax.models.adapters import init_full
from ppo_jax.rollout import Sampling
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.ppo import make_iteration
from ppo_jax.train.state import init_state
from ppo_jax.types import Frozen, Hyper, PyTree
from tests.models.tiny import random_params

BETA, TEMPERATURE, ROWS, ITERATIONS = 0.7, 0.8, 256, 100
# Embeddings far apart and weights small: a model of this size can then be moved to the optimum (see below).
BASE = jax.tree_util.tree_map_with_path(
    lambda path, x: x if "norm" in path[-1].key else 0.5 * x, random_params(CONFIG, seed=1)
)
BASE["embedding"] = 6.0 * BASE["embedding"]
TABLE = np.random.default_rng(3).normal(0, 0.8, V**T + V**2 + V).astype(np.float32)
WORLD = World(BASE, jnp.asarray(TABLE[[code(words) for words in RESPONSES]]))
SAMPLING = Sampling(response_length=T, stop_ids=(STOP,))
HYPER = Hyper(learning_rate=3e-3, temperature=TEMPERATURE, kl_coef=BETA, lam=1.0, value_clip=1e6, vf_coef=0.3)

chances = jax.jit(partial(probabilities, BASE, prompt=PROMPT, temperature=TEMPERATURE))
best = partial(optimum, WORLD, prompt=PROMPT, temperature=TEMPERATURE)


def train(ppo: PPOConfig, hyper: Hyper) -> PyTree:
    """The policy's parameters after PPO with a learning rate that falls to 0 (cosine)."""
    run = make_iteration(CONFIG, ppo, make_optimizer(), reward)
    state = init_state(jax.random.key(0), init_full(BASE), CONFIG, make_optimizer(), BETA)
    frozen = Frozen(BASE, WORLD.rewards)
    for step in range(ITERATIONS):
        rate = hyper.learning_rate * 0.5 * (1 + np.cos(np.pi * step / ITERATIONS))
        state, _ = run(state, frozen, prompts(ROWS), hyper._replace(learning_rate=rate))
    return state.policy.adapter


def test_there_is_something_to_learn() -> None:
    assert total_variation(chances({}), best(BETA)) > 0.3


def test_ppo_converges_to_the_optimum() -> None:
    """The advantage is the return minus the value (lambda 1), which no baseline biases. It is not whitened, so that it
    vanishes at the optimum, where r(y) - beta log(pi(y) / rho(y)) = beta log Z for every y."""
    ppo = PPOConfig(sampling=SAMPLING, epochs=2, num_minibatches=2, whiten_advantages=False)
    found = np.asarray(chances(train(ppo, HYPER)), np.float64)
    assert found.sum() == pytest.approx(1, abs=1e-4)
    assert total_variation(found, best(BETA)) < 0.05
    for other in (0.8 * BETA, BETA / 0.8, BETA * TEMPERATURE**2):  # what a wrong coefficient would lead to
        assert total_variation(found, best(other)) > 0.05
