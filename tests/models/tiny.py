"""Tiny random models with every array, biases and norms included, far from its trivial value."""

import jax
import numpy as np

from ppo_jax.models.config import ModelConfig, RopeScaling
from ppo_jax.models.layout import init_params
from ppo_jax.types import PyTree

LLAMA3 = RopeScaling("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
CONFIG = ModelConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def random_params(config: ModelConfig, seed: int = 0) -> PyTree:
    """N(0, 0.3) in every array, norms around 1."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        value = rng.normal(1.0 if "norm" in name else 0.0, 0.3, leaf.shape)
        return jax.numpy.asarray(value.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(fill, shapes)


def equal(left: PyTree, right: PyTree) -> bool:
    """Bitwise equality of two trees, dtypes and structure included."""
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right)
    return all(jax.tree.leaves(same))
