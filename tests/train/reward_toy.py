"""A tiny reward model, texts for it, and which of them is preferred to which."""

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.rewards.adapter import RewardRole, score_tokens
from ppo_jax.train.comparisons import Comparisons, bucket_texts
from ppo_jax.train.reward import RewardConfig, init_role
from tests.models.tiny import CONFIG, random_params
from tests.train.toy import noisy

BASE = random_params(CONFIG)
REWARD = RewardConfig(depth=2, lora_layers=1, rank=2, alpha=4.0, batch_size=4)
TRUNK = REWARD.trunk(CONFIG)
PAD = 0
scores_of = jax.jit(score_tokens, static_argnums=2)


def role() -> RewardRole:
    return noisy(init_role(jax.random.key(0), CONFIG, REWARD), scale=0.2)


def texts(count: int = 11, longest: int = 9, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, CONFIG.vocab_size, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def comparisons(better: np.ndarray, margin: np.ndarray | None = None) -> Comparisons:
    (bucket,) = bucket_texts(texts(len(better)), [9], PAD)
    margin = np.zeros(better.shape) if margin is None else margin
    arrays = (bucket.tokens, bucket.mask, better, margin.astype(np.float32))
    return Comparisons(*map(jnp.asarray, arrays))


def groups_of(*sizes: int) -> np.ndarray:
    """The first row of each group is better than the rest of it."""
    better, start = np.zeros((sum(sizes), sum(sizes)), bool), 0
    for size in sizes:
        better[start, start + 1 : start + size] = True
        start += size
    return better
