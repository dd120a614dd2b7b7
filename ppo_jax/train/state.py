"""Everything that decides a run's future, in one pytree."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import ValueHead
from ppo_jax.ops.rewards import RunningMoments
from ppo_jax.types import Frozen, Hyper, Metrics, Policy, Prompts, PyTree, Rollout


def key_stream(seed: int, name: str) -> PRNGKeyArray:
    """The run's key for one purpose. Purposes share a seed and nothing else: fold_in(key(seed), crc32(name)).

    (A key that is split here and folded there would be used twice: split(k, n)[i] equals fold_in(k, i).)
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


@flax.struct.dataclass
class TrainState:
    """The carry of training. The frozen base is not in it: it is named by the run's config and never changes.

    Tree functions also put shapes and shardings into it, so no array types are claimed.
    """

    step: PyTree  # Int[Array, ""]: iterations done; also the data cursor
    key: PyTree  # PRNGKeyArray: the run's root key; iteration i uses fold_in(key, i)
    policy: Policy
    opt_state: "Groups"  # one optimizer state for the policy's parameters, one for the critic's own
    kl_coef: PyTree  # Float[Array, ""]: beta now; changes only when it adapts
    moments: RunningMoments  # of the scores seen so far
    baseline: RunningMoments  # of the returns seen so far, for REINFORCE
    nonfinite: PyTree  # Int[Array, ""]: optimizer steps in a row that were skipped because something was not finite
    failing: PyTree  # Int[Array, ""]: batches in a row of which too many rewards failed (loop.max_failed)
    best: PyTree  # Float[Array, ""]: of the evaluations so far, the best value of the metric that chooses checkpoints
    ema: PyTree = None  # running average of the policy's parameters; None: off


@runtime_checkable
class RunState(Protocol):
    """What the host reads of a run's state: a `TrainState`, or that of a member, whose arrays a population holds."""

    step: Any
    nonfinite: Any
    failing: Any
    best: Any

    @property
    def policy(self) -> Policy: ...
    @property
    def ema(self) -> Any: ...


Iteration = Callable[[TrainState, Frozen, Prompts, Hyper], tuple[TrainState, Metrics]]
Collect = Callable[[TrainState, Frozen, Prompts, Hyper], Rollout]
Learn = Callable[..., tuple[TrainState, Metrics]]  # (state, frozen, rollout, scores, hyper, pretrain=None)


class Groups(NamedTuple):
    """One thing for the policy's parameters and one for those that are only the critic's."""

    policy: Any
    critic: Any


def groups(policy: Policy) -> Groups:
    """The two groups of trained parameters: each has its own optimizer state, clip and learning rate."""
    return Groups(policy.adapter, {"value_head": policy.value_head, "critic": policy.critic})


def init_state(
    key: PRNGKeyArray,
    adapter: PyTree,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    kl_coef: float,
    *,
    critic: PyTree = None,
    value_head: PyTree = None,
    ema: bool = False,
) -> TrainState:
    """A fresh state around a copy of `adapter`. `key` is kept as the run's root key.

    Args:
      critic: the adapter that values are read from; None: the policy's own.
      value_head: parameters of a ValueHead; None: zeros, so that every value is 0.
      ema: keep a running average of the policy (PPOConfig.ema_decay).
    """
    if value_head is None:
        value_head = zero_value_head(config)
    # Copies: an iteration is donated the state's buffers, and the caller's own must outlive it.
    policy: Policy = jax.tree.map(jnp.copy, Policy(adapter, value_head, critic))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jnp.copy(key),
        policy=policy,
        opt_state=Groups(*map(optimizer.init, groups(policy))),
        kl_coef=jnp.asarray(kl_coef, jnp.float32),
        moments=RunningMoments.init(),
        baseline=RunningMoments.init(),
        nonfinite=jnp.zeros((), jnp.int32),
        failing=jnp.zeros((), jnp.int32),
        best=jnp.asarray(-jnp.inf, jnp.float32),
        ema=jax.tree.map(jnp.copy, policy) if ema else None,
    )


def zero_value_head(config: ModelConfig) -> PyTree:
    """A value head whose value is 0 everywhere. Its parameters are zeros whatever the key."""
    return ValueHead().init(jax.random.key(0), jnp.zeros((1, config.hidden_size)))["params"]


def value_head_of_reward(head: PyTree) -> PyTree:
    """The value head whose value is a reward head's score: gain * (w . h) + bias (Stiennon et al. 2020, appendix B)."""
    return {"value": {"kernel": head["gain"] * head["reward"]["kernel"], "bias": jnp.reshape(head["bias"], (1,))}}
