"""A PPO problem of a few thousand numbers, whose reward can be read off the tokens."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppo_jax.models.adapters import init_full, init_lora, init_top_k
from ppo_jax.models.config import ModelConfig
from ppo_jax.rollout import Sampling
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, PPOConfig
from ppo_jax.train.ppo import make_iteration
from ppo_jax.train.state import Iteration, TrainState, init_state
from ppo_jax.types import Frozen, Hyper, Policy, Prompts, PyTree, Rollout, Scores
from tests.models.tiny import random_params

PAD, STOP = 0, 2
CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_embeddings=False,
)
# Logits far enough apart that LoRA below a frozen unembedding can make any token all but certain.
BASE = random_params(CONFIG)
BASE["unembedding"] = 2.5 * BASE["unembedding"]
B, P, T = 16, 4, 5
S = P + T
SAMPLING = Sampling(response_length=T, stop_ids=(STOP,), pad_id=PAD)
ONCE = PPOConfig(sampling=SAMPLING, epochs=1, num_minibatches=1)  # the whole rollout is the first minibatch
TWICE = PPOConfig(sampling=SAMPLING, epochs=2, num_minibatches=2)

# Points per token: fractions, so that a score that is cut to an integer shows; the stop token is worth nothing.
WORTH = jnp.asarray(np.random.default_rng(7).normal(0, 0.7, CONFIG.vocab_size), jnp.float32).at[STOP].set(0.0)
FROZEN = Frozen(BASE, WORTH)


def worth(frozen: Frozen, rollout: Rollout, prefix: jax.Array | None, prefix_layers: int) -> Scores:
    """A device reward: the points of the response's tokens, by the table in `frozen.reward`."""
    points = frozen.reward[rollout.tokens[:, -rollout.response_mask.shape[1] :]]
    score = jnp.sum(jnp.where(rollout.response_mask, points, 0.0), axis=1)
    return Scores(score, jnp.ones(score.shape, bool), {"half": score / 2})


def text(ids: np.ndarray) -> str:
    return " ".join(str(i) for i in ids)


def host_worth(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict]) -> Scores:
    """The same points from texts of token ids."""
    table = np.asarray(WORTH)
    score = np.array([sum((table[int(word)] for word in r.split()), np.float32(0)) for r in responses], np.float32)
    return Scores(score, np.ones(len(score), bool), {"half": score / 2})


def prompts(seed: int = 0, batch: int = B) -> Prompts:
    """1 to P random tokens a row; the pad slots hold random ids too, since only masks may tell."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, P + 1, batch)
    tokens = rng.integers(0, CONFIG.vocab_size, (batch, P))
    mask = np.arange(P) >= P - lengths[:, None]
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.arange(batch))


ADAPTERS = {
    "lora": lambda: init_lora(jax.random.key(3), CONFIG, 4, 8.0),
    "lora above a shared prefix": lambda: init_lora(jax.random.key(3), CONFIG, 4, 8.0, first_layer=1),
    "top-k": lambda: init_top_k(BASE, CONFIG, 1),
    "full": lambda: init_full(BASE),
    "value head alone": dict,
}


def algorithm(ppo: PPOConfig, optimizer: optax.GradientTransformation | None = None) -> Algorithm:
    """The toy's model under these choices; by default with the optimizer that they ask for."""
    return Algorithm(CONFIG, ppo, optimizer or make_optimizer(ppo.optimizer))


def noisy(tree: PyTree, seed: int = 1, scale: float = 0.1) -> PyTree:
    """Every array moved away from where it starts."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, scale, x.shape), x.dtype), tree)


def start(
    adapter: PyTree | None = None, seed: int = 0, optimizer: optax.GradientTransformation | None = None
) -> TrainState:
    """A state at the base policy; by default LoRA above a shared prefix, and Adam."""
    adapter = ADAPTERS["lora above a shared prefix"]() if adapter is None else adapter
    return init_state(jax.random.key(seed), adapter, CONFIG, optimizer or make_optimizer(), 0.05)


def moved(state: TrainState, seed: int = 1, scale: float = 0.1) -> TrainState:
    """The state with a policy that has left the base."""
    return state.replace(policy=Policy(*(noisy(part, seed, scale) for part in state.policy)))


@functools.cache
def iteration(ppo: PPOConfig = TWICE) -> Iteration:
    """One compiled program for all tests that need a whole iteration."""
    return make_iteration(CONFIG, ppo, make_optimizer(), worth)


def numbers(metrics: dict) -> dict[str, float]:
    """The means. Without `value_clip_fraction`, which counts where one of two squares that may be equal is larger."""
    host = {name: pair for name, pair in jax.device_get(metrics).items() if name != "value_clip_fraction"}
    return {name: float(total / count) for name, (total, count) in host.items() if count}


def assert_close(left: PyTree, right: PyTree, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Equal trees up to rounding; typed keys by their words."""

    def words(x: jax.typing.ArrayLike) -> np.ndarray:
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else x)

    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(words(a), words(b), rtol, atol, err_msg=jax.tree_util.keystr(path))


HYPER = Hyper(learning_rate=1e-2, temperature=0.7, vf_coef=0.5, entropy_coef=0.01)
