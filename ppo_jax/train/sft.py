"""Supervised fine-tuning: the policy learns to write the responses of demonstrations.

    loss = -1/N sum over response tokens of log pi(token | what stands before it),   N: those of the whole batch

(Ouyang et al. 2022, "Training language models to follow instructions with human feedback", step 1.) What counts as
response, its EOS included, is the batch's `loss_mask`; prompt tokens are read and never learnt. Any adapter may be
trained: LoRA, the last layers, or everything.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.config import ModelConfig
from ppo_jax.train.offline import OfflineConfig, ParamStep, batch_gradient, descended, learn, target_logprobs, totals
from ppo_jax.types import Metrics, PyTree


@dataclasses.dataclass(frozen=True)
class SFTConfig(OfflineConfig):
    """How supervised fine-tuning is done, and for how long."""


class Demonstrations(NamedTuple):
    """What the loss reads of a batch, padded on either side; numpy arrays until they are on the device."""

    tokens: Int[Array, "B S"]
    mask: Bool[Array, "B S"]
    loss_mask: Bool[Array, "B S"]  # True on the tokens to be predicted from those before them


Scalar = float | Float[Array, ""]
SFTStep = Callable[
    [PyTree, optax.OptState, PyTree, Demonstrations, Scalar, Scalar], tuple[PyTree, optax.OptState, Metrics]
]
SFTLoss = Callable[[PyTree, PyTree, Demonstrations], Metrics]


def sft_loss(
    adapter: PyTree,
    base: PyTree,
    batch: Demonstrations,
    count: Float[Array, ""],
    config: ModelConfig,
    logprob_chunk: int = 256,
) -> tuple[Float[Array, ""], Metrics]:
    """-sum over this batch's loss tokens of their log-probs, divided by `count`, the tokens of the logical batch.

    Metric "loss" is the mean over tokens in nats, whatever the micro-batches.
    """
    logprobs = target_logprobs(adapter, base, config, batch.tokens, batch.mask, batch.loss_mask, logprob_chunk)
    total, tokens = -jnp.sum(logprobs), loss_tokens(batch)
    return total / jnp.maximum(count, 1), {"loss": (jax.lax.stop_gradient(total), tokens)}


def loss_tokens(batch: Demonstrations) -> Float[Array, ""]:
    """How many tokens the loss of a batch is a mean of."""
    return jnp.sum(batch.loss_mask[:, 1:], dtype=jnp.float32)


def sft_gradient(
    adapter: PyTree, base: PyTree, batch: Demonstrations, config: ModelConfig, sft: SFTConfig
) -> tuple[PyTree, Metrics]:
    """Gradient of the batch's loss, summed over `sft.accumulate` micro-batches."""
    count = loss_tokens(batch)

    def loss(adapter: PyTree, piece: Demonstrations) -> tuple[Float[Array, ""], Metrics]:
        return sft_loss(adapter, base, piece, count, config, sft.logprob_chunk)

    return batch_gradient(loss, adapter, batch, sft.accumulate)


def make_sft_step(config: ModelConfig, sft: SFTConfig, optimizer: optax.GradientTransformation) -> SFTStep:
    """step(adapter, opt_state, base, batch, learning_rate, max_grad_norm) -> (adapter, opt_state, metrics), jitted.

    One optimizer step: gradient of the whole batch, clipped by its global norm, then `optimizer`'s direction. The
    two numbers are traced; adapter and opt_state are donated.
    """

    def step(
        adapter: PyTree,
        opt_state: optax.OptState,
        base: PyTree,
        batch: Demonstrations,
        learning_rate: Float[Array, ""],
        max_grad_norm: Float[Array, ""],
    ) -> tuple[PyTree, optax.OptState, Metrics]:
        gradient = sft_gradient(adapter, base, batch, config, sft)
        return descended(adapter, gradient, opt_state, optimizer, learning_rate, max_grad_norm)

    return jax.jit(step, donate_argnums=(0, 1))


def train_sft(
    adapter: PyTree,
    base: PyTree,
    config: ModelConfig,
    sft: SFTConfig,
    batch: Callable[[int], Demonstrations],
    steps: int,
    write: Callable[[int, Mapping[str, float]], Any],
) -> PyTree:
    """Trains `adapter` (whose buffers are donated) for `steps` and returns it.

    Args:
      batch: step -> rows on the host; a pure function of the step, and the same in every process.
      write: called after every step with the number of steps done and the metrics.

    Raises:
      FloatingPointError: the loss is no longer finite.
    """
    return learn(adapter, partial(bind_sft_step, base, config, sft), batch, steps, sft.learning_rate, write)


def bind_sft_step(
    base: PyTree, config: ModelConfig, sft: SFTConfig, optimizer: optax.GradientTransformation
) -> ParamStep[Demonstrations]:
    """Make step(adapter, opt_state, batch, learning_rate) of `make_sft_step` on this base."""
    step = make_sft_step(config, sft, optimizer)
    return lambda adapter, opt_state, rows, rate: step(adapter, opt_state, base, rows, rate, sft.max_grad_norm)


def make_sft_loss(config: ModelConfig, logprob_chunk: int = 256) -> SFTLoss:
    """loss(adapter, base, batch) -> {"loss": (total, tokens)}, jitted, for `evaluate`."""

    def loss(adapter: PyTree, base: PyTree, batch: Demonstrations) -> Metrics:
        return sft_loss(adapter, base, batch, loss_tokens(batch), config, logprob_chunk)[1]

    return jax.jit(loss)


def evaluate(loss: SFTLoss, adapter: PyTree, base: PyTree, batches: Iterable[Demonstrations]) -> dict[str, float]:
    """Mean loss per response token over all batches in nats, perplexity = exp(loss), and how many tokens there were."""
    total, tokens = totals(lambda batch: loss(adapter, base, batch), batches).get("loss", (0.0, 0.0))
    mean = total / tokens if tokens else math.nan
    return {"loss": mean, "perplexity": float(np.exp(mean)), "tokens": tokens}
