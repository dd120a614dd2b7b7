"""Everything that decides a run's future, in one pytree."""

import zlib

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import ValueHead
from ppo_jax.ops.rewards import RunningMoments
from ppo_jax.types import Policy, PyTree


def key_stream(seed: int, name: str) -> PRNGKeyArray:
    """The run's key for one purpose. Purposes share a seed and nothing else: fold_in(key(seed), crc32(name)).

    (A key that is split here and folded there would be used twice: split(k, n)[i] equals fold_in(k, i).)
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


@flax.struct.dataclass
class TrainState:
    """The carry of training. The frozen base is not in it: it is named by the run's config and never changes."""

    step: Int[Array, ""]  # iterations done; also the data cursor
    key: PRNGKeyArray  # the run's root key; iteration i uses fold_in(key, i)
    policy: Policy
    opt_state: optax.OptState
    kl_coef: Float[Array, ""]  # beta now; changes only when it adapts
    moments: RunningMoments  # of the scores seen so far
    baseline: RunningMoments  # of the returns seen so far, for REINFORCE
    nonfinite: Int[Array, ""]  # optimizer steps in a row that were skipped because something was not finite
    best: Float[Array, ""]  # of the evaluations so far, the best value of the metric that chooses checkpoints
    ema: PyTree = None  # running average of the policy's parameters; None: off


def init_state(
    key: PRNGKeyArray,
    adapter: PyTree,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    kl_coef: float,
) -> TrainState:
    """A fresh state around a copy of `adapter`, with a value head of zeros. `key` is kept as the run's root key."""
    # Value-head parameters are zeros whatever the key, so the root key is not spent here.
    value_head = ValueHead().init(jax.random.key(0), jnp.zeros((1, config.hidden_size)))["params"]
    # Copies: an iteration is donated the state's buffers, and the caller's own must outlive it.
    policy = Policy(adapter=jax.tree.map(jnp.copy, adapter), value_head=value_head)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jnp.copy(key),
        policy=policy,
        opt_state=optimizer.init(policy),
        kl_coef=jnp.asarray(kl_coef, jnp.float32),
        moments=RunningMoments.init(),
        baseline=RunningMoments.init(),
        nonfinite=jnp.zeros((), jnp.int32),
        best=jnp.asarray(-jnp.inf, jnp.float32),
    )
