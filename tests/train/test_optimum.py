"""PPO with KL-shaped rewards has a known answer, and converges to it.

Over all responses y, with reference rho, the maximum of E_pi[r(y)] - beta KL(pi || rho) is at

    pi*(y) = rho(y) exp(r(y) / beta) / Z

(Ziegler et al. 2019; Korbak et al. 2022, "RL with KL penalties is better viewed as Bayesian inference".) Here every
response is listed: 4 tokens, one of which stops, at most 3 of them, give 1 + 3 + 9 * 4 = 40.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.adapters import init_full, unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.roles import before_response, role_hidden
from ppo_jax.ops.logprobs import hidden_logprobs
from ppo_jax.rollout import Sampling
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.ppo import make_iteration
from ppo_jax.train.state import init_state
from ppo_jax.types import Frozen, Hyper, Prompts, PyTree, Rollout, Scores
from tests.models.tiny import random_params

V, T, STOP, BETA = 4, 3, 2, 0.7
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
# Embeddings far apart and weights small: a model of this size can then be moved to the optimum (see below).
BASE = jax.tree_util.tree_map_with_path(
    lambda path, x: x if "norm" in path[-1].key else 0.5 * x, random_params(CONFIG, seed=1)
)
BASE["embedding"] = 6.0 * BASE["embedding"]
PROMPT, TEMPERATURE, ROWS, ITERATIONS = (3,), 0.8, 256, 100


def responses() -> list[tuple[int, ...]]:
    """Every response there is: it ends with its first stop token, or at T."""
    found = []
    for length in range(1, T + 1):
        for words in itertools.product(range(V), repeat=length):
            stops = STOP in words[:-1]
            if not stops and (length == T or words[-1] == STOP):
                found.append(words)
    return found


ALL = responses()
REWARDS = np.random.default_rng(3).normal(0, 0.8, V**T + V**2 + V).astype(np.float32)  # by number, see `number`


def number(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """A number of its own for every response: its tokens as digits, after the shorter ones."""
    lengths = jnp.sum(mask, axis=1)
    value = jnp.zeros(tokens.shape[0], jnp.int32)
    for t in range(T):
        value = jnp.where(mask[:, t], value * V + tokens[:, t], value)
    return value + jnp.asarray([0, 0, V, V + V**2])[lengths]


def reward(frozen: Frozen, rollout: Rollout, prefix: jax.Array | None, prefix_layers: int) -> Scores:
    scores = frozen.reward[number(rollout.tokens[:, -T:], rollout.response_mask)]
    return Scores(scores, jnp.ones(scores.shape, bool), {})


def enumerated() -> tuple[jax.Array, jax.Array, jax.Array]:
    """tokens [40, P + T], mask of the whole, mask of the responses."""
    tokens = np.zeros((len(ALL), len(PROMPT) + T), np.int32)
    tokens[:, : len(PROMPT)] = PROMPT
    mask = np.zeros((len(ALL), T), bool)
    for row, words in enumerate(ALL):
        tokens[row, len(PROMPT) : len(PROMPT) + len(words)], mask[row, : len(words)] = words, True
    whole = np.concatenate([np.ones((len(ALL), len(PROMPT)), bool), mask], axis=1)
    return jnp.asarray(tokens), jnp.asarray(whole), jnp.asarray(mask)


@jax.jit
def probabilities(adapter: PyTree) -> jax.Array:
    """pi(y) of all responses, exactly."""
    tokens, whole, mask = enumerated()
    hidden = before_response(role_hidden(BASE, adapter, CONFIG, tokens, whole), T)
    logprobs = hidden_logprobs(hidden, unembedding(BASE, adapter), tokens[:, -T:], TEMPERATURE)
    return jnp.exp(jnp.sum(jnp.where(mask, logprobs, 0.0), axis=1))


def optimum(beta: float = BETA) -> np.ndarray:
    """rho(y) exp(r(y) / beta) / Z of all responses."""
    tokens, _, mask = enumerated()
    scores = REWARDS[np.asarray(number(tokens[:, -T:], mask))]
    weights = np.asarray(probabilities({}), np.float64) * np.exp(scores / beta)
    return weights / weights.sum()


def distance(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation: half the sum of absolute differences."""
    return 0.5 * float(np.abs(np.asarray(p, np.float64) - np.asarray(q, np.float64)).sum())


def train(ppo: PPOConfig, hyper: Hyper) -> PyTree:
    """The policy's parameters after PPO with a learning rate that falls to 0 (cosine)."""
    run = make_iteration(CONFIG, ppo, make_optimizer(), reward)
    state = init_state(jax.random.key(0), init_full(BASE), CONFIG, make_optimizer(), BETA)
    prompts = Prompts(jnp.tile(jnp.asarray(PROMPT, jnp.int32), (ROWS, 1)), jnp.ones((ROWS, 1), bool), jnp.arange(ROWS))
    frozen = Frozen(BASE, jnp.asarray(REWARDS))
    for step in range(ITERATIONS):
        rate = hyper.learning_rate * 0.5 * (1 + np.cos(np.pi * step / ITERATIONS))
        state, _ = run(state, frozen, prompts, hyper._replace(learning_rate=rate))
    return state.policy.adapter


SAMPLING = Sampling(response_length=T, stop_ids=(STOP,))
HYPER = Hyper(learning_rate=3e-3, temperature=TEMPERATURE, kl_coef=BETA, lam=1.0, value_clip=1e6, vf_coef=0.3)


def test_the_enumeration_is_complete() -> None:
    tokens, _, mask = enumerated()
    assert len(ALL) == len(set(np.asarray(number(tokens[:, -T:], mask)).tolist())) == 40
    assert float(probabilities({}).sum()) == pytest.approx(1, abs=1e-5)
    assert distance(probabilities({}), optimum()) > 0.3  # there is something to learn


def test_ppo_converges_to_the_optimum() -> None:
    """The advantage is the return minus the value (lambda 1), which no baseline biases. It is not whitened, so that it
    vanishes at the optimum, where r(y) - beta log(pi(y) / rho(y)) = beta log Z for every y."""
    ppo = PPOConfig(sampling=SAMPLING, epochs=2, num_minibatches=2, whiten_advantages=False)
    found = np.asarray(probabilities(train(ppo, HYPER)), np.float64)
    assert found.sum() == pytest.approx(1, abs=1e-4)
    assert distance(found, optimum()) < 0.05
    for other in (0.8 * BETA, BETA / 0.8, BETA * TEMPERATURE**2):  # what a wrong coefficient would lead to
        assert distance(found, optimum(other)) > 0.05
