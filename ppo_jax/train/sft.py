"""Supervised fine-tuning: the policy learns to write the responses of demonstrations.

    loss = -1/N sum over response tokens of log pi(token | what stands before it),   N: those of the whole batch

(Ouyang et al. 2022, "Training language models to follow instructions with human feedback", step 1.) What counts as
response, its EOS included, is the batch's `loss_mask`; prompt tokens are read and never learnt. Any adapter may be
trained: LoRA, the last layers, or everything.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.adapters import unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.ops.logprobs import hidden_logprobs
from ppo_jax.rollout import role_hidden
from ppo_jax.train.loop import means
from ppo_jax.train.optimizer import accumulate, descend, make_optimizer
from ppo_jax.types import Metrics, PyTree


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """How supervised fine-tuning is done, and for how long."""

    epochs: float = 1.0
    """Passes over the demonstrations, unless `steps` says otherwise."""
    steps: int = 0
    """Optimizer steps; 0: as many as `epochs` needs."""
    batch_size: int = 16
    """Demonstrations per optimizer step."""
    accumulate: int = 1
    """Micro-batches per optimizer step; must divide batch_size. Changes memory, not the result."""
    learning_rate: float = 1e-4
    """Adam, falling linearly to 0."""
    max_grad_norm: float = 1.0
    """Global-norm clip."""
    logprob_chunk: int = 256
    """Positions whose logits are held at once; 0: all of a micro-batch."""

    def __post_init__(self) -> None:
        for name, least in {"steps": 0, "batch_size": 1, "accumulate": 1, "logprob_chunk": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")

    def num_steps(self, rows: int) -> int:
        """Optimizer steps of a run over `rows` demonstrations."""
        return self.steps or math.ceil(self.epochs * rows / self.batch_size)


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
    hidden = role_hidden(base, adapter, config, batch.tokens, batch.mask)
    table = unembedding(base, adapter)
    logprobs = hidden_logprobs(hidden[:, :-1], table, batch.tokens[:, 1:], chunk=logprob_chunk)
    mask = batch.loss_mask[:, 1:]  # nothing stands before the first token
    total = -jnp.sum(jnp.where(mask, logprobs, 0.0))
    tokens = jnp.sum(mask, dtype=jnp.float32)
    return total / jnp.maximum(count, 1), {"loss": (jax.lax.stop_gradient(total), tokens)}


def loss_tokens(batch: Demonstrations) -> Float[Array, ""]:
    """How many tokens the loss of a batch is a mean of."""
    return jnp.sum(batch.loss_mask[:, 1:], dtype=jnp.float32)


def sft_gradient(
    adapter: PyTree, base: PyTree, batch: Demonstrations, config: ModelConfig, sft: SFTConfig
) -> tuple[PyTree, Metrics]:
    """Gradient of the batch's loss, summed over `sft.accumulate` micro-batches."""
    rows = batch.tokens.shape[0]
    if rows % sft.accumulate:
        raise ValueError(f"a batch of {rows} rows does not divide into accumulate={sft.accumulate}")
    count = loss_tokens(batch)

    def gradient(adapter: PyTree, piece: Demonstrations) -> tuple[PyTree, Metrics]:
        return jax.grad(sft_loss, has_aux=True)(adapter, base, piece, count, config, sft.logprob_chunk)

    return accumulate(gradient, adapter, batch, sft.accumulate)


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
        grads, metrics = sft_gradient(adapter, base, batch, config, sft)
        adapter, opt_state, norm = descend(adapter, grads, opt_state, optimizer, learning_rate, max_grad_norm)
        return adapter, opt_state, metrics | norm

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
      batch: step -> rows; a pure function of the step.
      write: called after every step with the number of steps done and the metrics.

    Raises:
      FloatingPointError: the loss is no longer finite.
    """
    optimizer = make_optimizer()
    step, opt_state = make_sft_step(config, sft, optimizer), optimizer.init(adapter)
    for number in range(steps):
        rate = sft.learning_rate * (1 - number / steps)
        adapter, opt_state, metrics = step(adapter, opt_state, base, batch(number), rate, sft.max_grad_norm)
        values = means(metrics)
        write(number + 1, values | {"learning_rate": rate})
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(f"step {number + 1}: the loss is {values['loss']}; lower the learning rate")
    return adapter


def make_sft_loss(config: ModelConfig, logprob_chunk: int = 256) -> SFTLoss:
    """loss(adapter, base, batch) -> {"loss": (total, tokens)}, jitted, for `evaluate`."""

    def loss(adapter: PyTree, base: PyTree, batch: Demonstrations) -> Metrics:
        return sft_loss(adapter, base, batch, loss_tokens(batch), config, logprob_chunk)[1]

    return jax.jit(loss)


def evaluate(loss: SFTLoss, adapter: PyTree, base: PyTree, batches: Iterable[Demonstrations]) -> dict[str, float]:
    """Mean loss per response token over all batches in nats, perplexity = exp(loss), and how many tokens there were."""
    total = tokens = 0.0
    for batch in batches:
        batch_total, batch_tokens = jax.device_get(loss(adapter, base, batch)["loss"])
        total, tokens = total + float(batch_total), tokens + float(batch_tokens)
    mean = total / tokens if tokens else math.nan
    return {"loss": mean, "perplexity": float(np.exp(mean)), "tokens": tokens}


def in_order(rows: Demonstrations, batch_size: int) -> Iterator[Demonstrations]:
    """All rows once, in batches of one size: the last one is filled up with rows whose loss mask is empty."""
    count = len(rows.tokens)
    for start in range(0, count, batch_size):
        index = np.arange(start, start + batch_size)
        piece = Demonstrations(*(np.asarray(x)[np.minimum(index, count - 1)] for x in rows))  # type: ignore[arg-type]
        yield piece._replace(loss_mask=piece.loss_mask & (index < count)[:, None])
