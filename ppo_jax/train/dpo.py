"""Direct preference optimisation: the policy learns from pairs without a reward model and without sampling.

    r(y)  = beta (log pi(y | x) - log pi_ref(y | x))          the implicit reward
    loss  = mean over pairs of -log sigmoid(r(chosen) - r(rejected))

(Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", eq. 7.) The
policy is an adapter over the frozen base, and the reference is the base itself or another adapter over it, so both are
one set of weights, and layers below the adapters' first are computed once for both. Log-probs are of the model at
temperature 1, summed over the response, its EOS included.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.adapters import shared_layers
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.roles import shared_prefix
from ppo_jax.ops.losses import dpo_loss
from ppo_jax.train.offline import (
    OfflineConfig,
    ParamStep,
    batch_gradient,
    check_positive,
    descended,
    learn,
    target_logprobs,
    totals,
)
from ppo_jax.types import Metrics, Prefix, PyTree


@dataclasses.dataclass(frozen=True)
class DPOConfig(OfflineConfig):
    """How direct preference optimisation is done, and for how long."""

    learning_rate: float = 5e-5
    """Adam starts at this learning rate, which falls linearly to 0."""
    beta: float = 0.1
    """Beta is the strength of the pull to the reference: the implicit reward is beta times the log-ratio."""
    label_smoothing: float = 0.0
    """A label is the wrong way round with this probability (conservative DPO, Mitchell 2023); it is below 0.5."""
    reference: Literal["base", "start"] = "base"
    """The reference is the base, or the adapter that --start names, as it is before training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        if self.reference not in ("base", "start"):
            raise ValueError(f"reference={self.reference!r} must be one of base, start")


class Preferences(NamedTuple):
    """Pairs of texts, padded on either side: [:, 0] is the chosen one, [:, 1] the rejected one."""

    tokens: Int[Array, "B 2 S"]
    mask: Bool[Array, "B 2 S"]
    loss_mask: Bool[Array, "B 2 S"]  # True on the response tokens; a row of pairs without any does not count


class DPOScalars(NamedTuple):
    """What may change between steps without recompiling."""

    learning_rate: float | Float[Array, ""]
    max_grad_norm: float | Float[Array, ""]
    beta: float | Float[Array, ""]
    label_smoothing: float | Float[Array, ""]


# (adapter, opt_state, base, batch, scalars, reference=None) -> adapter, opt_state, metrics
DPOStep = Callable[..., tuple[PyTree, optax.OptState, Metrics]]
DPOMeasure = Callable[..., Metrics]  # (adapter, base, batch, reference=None)


def response_logprobs(
    adapter: PyTree,
    base: PyTree,
    batch: Preferences,
    prefix: Prefix | None,
    config: ModelConfig,
    logprob_chunk: int = 256,
) -> Float[Array, "B 2"]:
    """log pi(response | prompt) of both sides of each pair: the sum over the loss mask, in nats.

    Args:
      prefix: of the 2B texts (`models.roles.shared_prefix`); None: start at the tokens.
    """
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    logprobs = target_logprobs(adapter, base, config, flat.tokens, flat.mask, flat.loss_mask, logprob_chunk, prefix)
    return jnp.sum(logprobs, axis=1).reshape(-1, 2)


def counted(batch: Preferences) -> Bool[Array, " B"]:
    """Pairs that have a response token to compare; rows that only fill up a batch have none."""
    return jnp.any(batch.loss_mask[..., 1:], axis=(1, 2))


def preference_loss(
    adapter: PyTree,
    base: PyTree,
    batch: Preferences,
    count: Float[Array, ""],
    config: ModelConfig,
    scalars: DPOScalars,
    logprob_chunk: int = 256,
    reference: PyTree = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Sum over this batch's pairs of -(1 - eps) log sigmoid(h) - eps log sigmoid(-h), divided by `count`.

    h = r(chosen) - r(rejected); `count` is the number of pairs of the logical batch. Metrics, means over pairs: `loss`;
    `accuracy` of h > 0, a tie counting a half; `margin` h; `chosen_reward`, `rejected_reward` r; `chosen_logprob`,
    `rejected_logprob` in nats, which say whether the policy still writes the chosen responses.

    Args:
      reference: its adapter; None: the base itself.
    """
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask))
    shared = min(shared_layers(each, config) for each in (adapter, reference or {}))
    prefix = shared_prefix(base, config, tokens, mask, shared)
    before = response_logprobs(reference or {}, base, batch, prefix, config, logprob_chunk)
    logprobs = response_logprobs(adapter, base, batch, prefix, config, logprob_chunk)
    real = counted(batch)
    loss, metrics = dpo_loss(
        logprobs[:, 0],
        logprobs[:, 1],
        before[:, 0],
        before[:, 1],
        scalars.beta,
        scalars.label_smoothing,
        mask=real,
        count=count,
    )
    pairs = jnp.sum(real, dtype=jnp.float32)
    metrics |= {
        "loss": (loss * jnp.maximum(count, 1), pairs),
        "chosen_logprob": (jnp.sum(jnp.where(real, logprobs[:, 0], 0.0)), pairs),
        "rejected_logprob": (jnp.sum(jnp.where(real, logprobs[:, 1], 0.0)), pairs),
    }
    return loss, jax.lax.stop_gradient(metrics)


def dpo_gradient(
    adapter: PyTree,
    base: PyTree,
    batch: Preferences,
    config: ModelConfig,
    dpo: DPOConfig,
    scalars: DPOScalars,
    reference: PyTree = None,
) -> tuple[PyTree, Metrics]:
    """Gradient of the batch's loss, summed over `dpo.accumulate` micro-batches."""
    count = jnp.sum(counted(batch), dtype=jnp.float32)

    def loss(adapter: PyTree, piece: Preferences) -> tuple[Float[Array, ""], Metrics]:
        return preference_loss(adapter, base, piece, count, config, scalars, dpo.logprob_chunk, reference)

    return batch_gradient(loss, adapter, batch, dpo.accumulate)


def make_dpo_step(config: ModelConfig, dpo: DPOConfig, optimizer: optax.GradientTransformation) -> DPOStep:
    """step(adapter, opt_state, base, batch, scalars, reference) -> (adapter, opt_state, metrics), jitted.

    One optimizer step: gradient of the whole batch, clipped by its global norm, then `optimizer`'s direction. The
    scalars are traced (those in `dpo` are not read); adapter and opt_state are donated.
    """

    def step(
        adapter: PyTree,
        opt_state: optax.OptState,
        base: PyTree,
        batch: Preferences,
        scalars: DPOScalars,
        reference: PyTree = None,
    ) -> tuple[PyTree, optax.OptState, Metrics]:
        gradient = dpo_gradient(adapter, base, batch, config, dpo, scalars, reference)
        return descended(adapter, gradient, opt_state, optimizer, scalars.learning_rate, scalars.max_grad_norm)

    return jax.jit(step, donate_argnums=(0, 1))


def train_dpo(
    adapter: PyTree,
    base: PyTree,
    config: ModelConfig,
    dpo: DPOConfig,
    batch: Callable[[int], Preferences],
    steps: int,
    write: Callable[[int, Mapping[str, float]], Any],
) -> PyTree:
    """Trains `adapter` (whose buffers are donated) for `steps` and returns it. Arguments and errors as `train_sft`.

    Raises:
      FloatingPointError: the loss is no longer finite.
    """
    return learn(adapter, partial(bind_dpo_step, base, config, dpo), batch, steps, dpo.learning_rate, write)


def bind_dpo_step(
    base: PyTree,
    config: ModelConfig,
    dpo: DPOConfig,
    optimizer: optax.GradientTransformation,
    reference: PyTree = None,
) -> ParamStep[Preferences]:
    """Make step(adapter, opt_state, batch, learning_rate) of `make_dpo_step` on this base."""
    step = make_dpo_step(config, dpo, optimizer)
    fixed = DPOScalars(0.0, dpo.max_grad_norm, dpo.beta, dpo.label_smoothing)
    return lambda adapter, state, pairs, rate: step(
        adapter, state, base, pairs, fixed._replace(learning_rate=rate), reference
    )


def make_measure(config: ModelConfig, dpo: DPOConfig) -> DPOMeasure:
    """measure(adapter, base, batch, reference) -> metrics of `preference_loss`, jitted, for `evaluate`."""
    scalars = DPOScalars(dpo.learning_rate, dpo.max_grad_norm, dpo.beta, dpo.label_smoothing)

    def measure(adapter: PyTree, base: PyTree, batch: Preferences, reference: PyTree = None) -> Metrics:
        count = jnp.sum(counted(batch), dtype=jnp.float32)
        return preference_loss(adapter, base, batch, count, config, scalars, dpo.logprob_chunk, reference)[1]

    return jax.jit(measure)


def evaluate(
    measure: DPOMeasure, adapter: PyTree, base: PyTree, batches: Iterable[Preferences], reference: PyTree = None
) -> dict[str, float]:
    """Means of the metrics over all pairs of the batches, and `pairs`, their number."""
    found = totals(lambda batch: measure(adapter, base, batch, reference), batches)
    values = {name: total / count if count else math.nan for name, (total, count) in found.items()}
    return values | {"pairs": max((count for _, count in found.values()), default=0.0)}
