"""Scalar heads on hidden states, as Flax Linen modules; computed in float32."""

from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.types import PyTree


class ValueHead(nn.Module):
    """V(s) = w . h + b, zero-initialised: the critic starts at 0 whatever the hidden states are."""

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        out = nn.Dense(1, kernel_init=nn.initializers.zeros, name="value")(hidden.astype(jnp.float32))
        return out[..., 0]


class RewardHead(nn.Module):
    """r = gain * (w . h) + bias, w ~ N(0, 1/(D+1)) (Stiennon et al. 2020, appendix B).

    `gain` and `bias` start at 1 and 0; they normalise a trained reward model's output and are not trained.
    """

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        width = hidden.shape[-1]
        init = nn.initializers.normal((width + 1) ** -0.5)
        out = nn.Dense(1, use_bias=False, kernel_init=init, name="reward")(hidden.astype(jnp.float32))
        gain = self.param("gain", nn.initializers.ones, ())
        bias = self.param("bias", nn.initializers.zeros, ())
        return gain * out[..., 0] + bias


def value(head: PyTree, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """V of each hidden state, by the parameters of a ValueHead."""
    return cast(Array, ValueHead().apply({"params": head}, hidden))


def score(head: PyTree, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """r of each hidden state, by the parameters of a RewardHead."""
    return cast(Array, RewardHead().apply({"params": head}, hidden))


def last_token(hidden: Float[Array, "B S D"], mask: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    """The hidden state at each row's last masked-in token, wherever the padding lies; row 0 if there is none."""
    slots = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, slots, 0), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
