"""PPO from human feedback, one screen per step.

    rollout    = collect(...)            sample responses; log-probs and values come free
    scores     = reward(...)             on the device, or on the host in between
    experience = make_experience(...)    reference KL, reward shaping, GAE, whitening
    state      = update_epochs(...)      epochs x shuffled minibatches of the clipped objective

Sources: Ziegler et al. 2019 (KL-shaped rewards), Schulman et al. 2015 and 2017 (GAE, PPO), Stiennon et al. 2020 and
Ouyang et al. 2022 (the recipe). `Hyper` is traced; everything in `PPOConfig` is compiled in.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ppo_jax.models.adapters import shared_layers, unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import value
from ppo_jax.ops.advantages import gae
from ppo_jax.ops.kl import Kind, adaptive_kl, kl_penalty
from ppo_jax.ops.logprobs import hidden_logprobs, hidden_logprobs_and_entropy
from ppo_jax.ops.losses import clipped_policy_loss, clipped_value_loss
from ppo_jax.ops.masked import masked_var, masked_whiten
from ppo_jax.ops.rewards import shape_rewards
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.rollout import Sampling, before_response, generate, role_hidden, shared_prefix
from ppo_jax.sharding import constrain_rows
from ppo_jax.train.optimizer import accumulate, descend
from ppo_jax.train.state import TrainState
from ppo_jax.types import Experience, Frozen, Hyper, Metrics, Minibatch, Policy, Prompts, Rollout, Scores


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Static choices of the algorithm."""

    sampling: Sampling = Sampling()
    """How responses are generated."""
    epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 4
    """Optimizer steps per epoch; must divide the batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step; must divide the minibatch. Changes memory, not the result."""
    kl_estimator: Kind = "k1"
    """Per-token KL estimate that shapes the reward (Schulman 2020): k1 is the log-ratio."""
    adaptive_kl: bool = False
    """Steer the KL coefficient towards hyper.kl_target (Ziegler et al. 2019, section 2.2)."""
    whiten_rewards: bool = False
    """Divide shaped rewards by their standard deviation over the batch (the mean stays)."""
    whiten_advantages: bool = True
    """Whiten advantages over all response tokens of the batch."""
    logprob_chunk: int = 0
    """Positions whose logits are held at once in the loss; 0: all of a micro-batch."""

    def __post_init__(self) -> None:
        for name in ("epochs", "num_minibatches", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.logprob_chunk < 0:
            raise ValueError(f"logprob_chunk={self.logprob_chunk} must be 0 (off) or positive")

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError unless `batch_size` rows split into minibatches and micro-batches."""
        pieces = self.num_minibatches * self.accumulate
        if batch_size % pieces:
            raise ValueError(
                f"batch_size={batch_size} does not divide into num_minibatches={self.num_minibatches} x "
                f"accumulate={self.accumulate}; use a multiple of {pieces}"
            )


def check_hyper(hyper: Hyper) -> None:
    """Raises ValueError for a scalar outside its range, with the field's name and what is allowed."""
    positive = ("learning_rate", "temperature", "max_grad_norm", "value_clip", "clip_high", "kl_target", "kl_horizon")
    ranges = {name: (0 < getattr(hyper, name) < math.inf, "positive") for name in positive}
    ranges |= {name: (0 <= getattr(hyper, name) <= 1, "in [0, 1]") for name in ("gamma", "lam")}
    ranges |= {name: (0 <= getattr(hyper, name) < math.inf, "at least 0") for name in ("kl_coef", "vf_coef")}
    ranges["clip_low"] = (0 < hyper.clip_low <= 1, "in (0, 1]")
    ranges["entropy_coef"] = (math.isfinite(hyper.entropy_coef), "finite")
    for name, (fine, allowed) in ranges.items():
        if not fine:
            raise ValueError(f"hyper.{name}={getattr(hyper, name)} must be {allowed}")


Iteration = Callable[[TrainState, Frozen, Prompts, Hyper], tuple[TrainState, Metrics]]
Collect = Callable[[TrainState, Frozen, Prompts, Hyper], Rollout]
Learn = Callable[[TrainState, Frozen, Rollout, Scores, Hyper], tuple[TrainState, Metrics]]


def make_iteration(
    config: ModelConfig, ppo: PPOConfig, optimizer: optax.GradientTransformation, reward: DeviceReward
) -> Iteration:
    """One whole PPO iteration as ONE jitted function: iteration(state, frozen, prompts, hyper) -> (state, metrics).

    The state is donated. Nothing recompiles unless a shape changes.
    """

    def iteration(state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper) -> tuple[TrainState, Metrics]:
        rollout = collect(state, frozen, prompts, hyper, config, ppo)
        prefix, depth = rollout_prefix(state.policy, frozen, rollout, config)
        scores = reward(frozen, rollout, prefix, depth)
        return learn(state, frozen, rollout, scores, prefix, hyper, config, ppo, optimizer)

    return jax.jit(iteration, donate_argnums=0)


def make_host_iteration(
    config: ModelConfig, ppo: PPOConfig, optimizer: optax.GradientTransformation
) -> tuple[Collect, Learn]:
    """The iteration in two jitted halves, for rewards that are computed on the host in between.

    Returns collect(state, frozen, prompts, hyper) -> rollout, and
    learn(state, frozen, rollout, scores, hyper) -> (state, metrics), which is donated the state.
    """

    def first(state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper) -> Rollout:
        return collect(state, frozen, prompts, hyper, config, ppo)

    def second(
        state: TrainState, frozen: Frozen, rollout: Rollout, scores: Scores, hyper: Hyper
    ) -> tuple[TrainState, Metrics]:
        prefix, _ = rollout_prefix(state.policy, frozen, rollout, config)
        return learn(state, frozen, rollout, scores, prefix, hyper, config, ppo, optimizer)

    return jax.jit(first), jax.jit(second, donate_argnums=0)


def collect(
    state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper, config: ModelConfig, ppo: PPOConfig
) -> Rollout:
    """Samples a rollout with the key of this iteration."""
    key, _ = jax.random.split(jax.random.fold_in(state.key, state.step))
    return generate(frozen.base, state.policy, config, prompts, key, ppo.sampling, hyper.temperature)


def rollout_prefix(
    policy: Policy, frozen: Frozen, rollout: Rollout, config: ModelConfig
) -> tuple[Float[Array, "B S D"] | None, int]:
    """What all roles share of a rollout, constant over the epochs, and how many layers deep it is."""
    depth = shared_layers(policy.adapter, config)
    return shared_prefix(frozen.base, config, rollout.tokens, rollout.mask, depth), depth


def learn(
    state: TrainState,
    frozen: Frozen,
    rollout: Rollout,
    scores: Scores,
    prefix: Float[Array, "B S D"] | None,
    hyper: Hyper,
    config: ModelConfig,
    ppo: PPOConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """From scores to the next state: reference, experience, epochs of updates, KL controller."""
    kl_coef = state.kl_coef if ppo.adaptive_kl else jnp.asarray(hyper.kl_coef, jnp.float32)
    ref_logprobs = reference_logprobs(
        frozen, rollout, prefix, shared_layers(state.policy.adapter, config), hyper, config
    )
    experience = make_experience(rollout, scores, ref_logprobs, prefix, kl_coef, hyper, ppo)
    _, key = jax.random.split(jax.random.fold_in(state.key, state.step))
    state, losses = update_epochs(state, frozen, experience.batch, key, hyper, config, ppo, optimizer)
    metrics = experience_metrics(experience, rollout, kl_coef, hyper, ppo) | losses
    if ppo.adaptive_kl:
        total, rows = metrics["kl"]
        observed = total / jnp.maximum(rows, 1)
        kl_coef = adaptive_kl(kl_coef, observed, rows, hyper.kl_target, hyper.kl_horizon)
    return dataclasses.replace(state, step=state.step + 1, kl_coef=kl_coef), metrics


def reference_logprobs(
    frozen: Frozen,
    rollout: Rollout,
    prefix: Float[Array, "B S D"] | None,
    depth: int,
    hyper: Hyper,
    config: ModelConfig,
) -> Float[Array, "B T"]:
    """log pi_ref(a_t | s_t) of the response tokens under the empty adapter, at the sampling temperature."""
    length = rollout.response_mask.shape[1]
    hidden = role_hidden(frozen.base, {}, config, rollout.tokens, rollout.mask, prefix, depth)
    table = unembedding(frozen.base, {})
    return hidden_logprobs(before_response(hidden, length), table, rollout.tokens[:, -length:], hyper.temperature)


def make_experience(
    rollout: Rollout,
    scores: Scores,
    ref_logprobs: Float[Array, "B T"],
    prefix: Float[Array, "B S D"] | None,
    kl_coef: Float[Array, ""],
    hyper: Hyper,
    ppo: PPOConfig,
) -> Experience:
    """r_t = score at the last token - kl_coef * KL_t; advantages by GAE; rows with an invalid score masked out."""
    mask = rollout.response_mask & scores.valid[:, None]
    kl = kl_penalty(rollout.policy_logprobs, ref_logprobs, ppo.kl_estimator)
    rewards = shape_rewards(scores.reward, kl, mask, kl_coef)
    shaped = masked_whiten(rewards, mask, shift_mean=False) if ppo.whiten_rewards else rewards
    advantages, returns = gae(shaped, rollout.values, mask, hyper.gamma, hyper.lam)
    if ppo.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    batch = Minibatch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        prefix=prefix,
        loss_mask=mask,
        logprobs=rollout.policy_logprobs,
        values=rollout.values,
        advantages=advantages,
        returns=returns,
    )
    return Experience(batch=batch, rewards=rewards, kl=kl, scores=scores)


def update_epochs(
    state: TrainState,
    frozen: Frozen,
    batch: Minibatch,
    key: PRNGKeyArray,
    hyper: Hyper,
    config: ModelConfig,
    ppo: PPOConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """epochs x num_minibatches optimizer steps; every epoch visits the rows in a fresh order. `key` is consumed."""
    size = batch.tokens.shape[0]
    ppo.check_batch(size)

    def minibatch(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
        picked = constrain_rows(jax.tree.map(lambda x: x[rows], batch))
        return update(state, frozen, picked, hyper, config, ppo, optimizer)

    def epoch(state: TrainState, epoch_key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        order = jax.random.permutation(epoch_key, size)
        return jax.lax.scan(minibatch, state, order.reshape(ppo.num_minibatches, -1))

    state, metrics = jax.lax.scan(epoch, state, jax.random.split(key, ppo.epochs))
    return state, jax.tree.map(jnp.sum, metrics)


def update(
    state: TrainState,
    frozen: Frozen,
    minibatch: Minibatch,
    hyper: Hyper,
    config: ModelConfig,
    ppo: PPOConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """One optimizer step: gradients summed over micro-batches, clipped by their global norm, then Adam."""
    count = jnp.sum(minibatch.loss_mask, dtype=jnp.float32)

    def gradient(policy: Policy, rows: Minibatch) -> tuple[Policy, Metrics]:
        return jax.grad(ppo_loss, has_aux=True)(policy, frozen, rows, count, hyper, config, ppo)

    grads, metrics = accumulate(gradient, state.policy, minibatch, ppo.accumulate)
    policy, opt_state, norm = descend(
        state.policy, grads, state.opt_state, optimizer, hyper.learning_rate, hyper.max_grad_norm
    )
    return dataclasses.replace(state, policy=policy, opt_state=opt_state), metrics | norm


def ppo_loss(
    policy: Policy,
    frozen: Frozen,
    batch: Minibatch,
    count: Float[Array, ""],
    hyper: Hyper,
    config: ModelConfig,
    ppo: PPOConfig,
) -> tuple[Float[Array, ""], Metrics]:
    """L = L_clip + vf_coef L_value - entropy_coef H, each a sum over this batch's tokens divided by `count`."""
    length = batch.loss_mask.shape[1]
    depth = shared_layers(policy.adapter, config)
    hidden = role_hidden(frozen.base, policy.adapter, config, batch.tokens, batch.mask, batch.prefix, depth)
    hidden = before_response(hidden, length)
    actions, table = batch.tokens[:, -length:], unembedding(frozen.base, policy.adapter)
    logprobs, entropy = hidden_logprobs_and_entropy(hidden, table, actions, hyper.temperature, ppo.logprob_chunk)
    values = value(policy.value_head, hidden)

    mask = batch.loss_mask
    policy_loss, policy_metrics = clipped_policy_loss(
        logprobs, batch.logprobs, batch.advantages, mask, hyper.clip_low, hyper.clip_high, count=count
    )
    value_loss, value_metrics = clipped_value_loss(
        values, batch.values, batch.returns, mask, hyper.value_clip, count=count
    )
    entropy_sum = jnp.sum(jnp.where(mask, entropy, 0.0))
    loss = policy_loss + hyper.vf_coef * value_loss - hyper.entropy_coef * entropy_sum / jnp.maximum(count, 1)
    tokens = jnp.sum(mask, dtype=jnp.float32)
    metrics = policy_metrics | value_metrics
    metrics |= {
        # `total / count` must be the mean over tokens whatever the micro-batches, so undo the division by count.
        "policy_loss": (policy_loss * count, tokens),
        "value_loss": (value_loss * count, tokens),
        "entropy": (entropy_sum, tokens),
    }
    return loss, jax.lax.stop_gradient(metrics)


def experience_metrics(
    experience: Experience, rollout: Rollout, kl_coef: Float[Array, ""], hyper: Hyper, ppo: PPOConfig
) -> Metrics:
    """What the rollout says, over rows with a valid score."""
    batch, scores = experience.batch, experience.scores
    mask, valid = batch.loss_mask, scores.valid
    one = jnp.ones(())
    rows, tokens = jnp.sum(valid, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)
    measured = jnp.minimum(rows, 1)  # a spread of no rows is unknown, not 0
    kl = jnp.sum(jnp.where(mask, experience.kl, 0.0))
    unexplained = masked_var(batch.returns - batch.values, mask) / jnp.maximum(masked_var(batch.returns, mask), 1e-8)
    metrics = {
        "reward": (jnp.sum(jnp.where(valid, scores.reward, 0.0)), rows),
        "reward_std": (jnp.sqrt(masked_var(scores.reward, valid)) * measured, measured),
        "shaped_reward": (jnp.sum(jnp.where(mask, experience.rewards, 0.0)), rows),
        "kl": (kl, rows),
        "kl_per_token": (kl, tokens),
        "value": (jnp.sum(jnp.where(mask, batch.values, 0.0)), tokens),
        "return": (jnp.sum(jnp.where(mask, batch.returns, 0.0)), tokens),
        "explained_variance": ((1 - unexplained) * measured, measured),
        "response_length": (tokens, rows),
        "eos_rate": (jnp.sum(rollout.terminated & valid, dtype=jnp.float32), rows),
        "invalid_scores": (jnp.sum(~valid, dtype=jnp.float32), jnp.asarray(valid.size, jnp.float32)),
        "kl_coef": (kl_coef, one),
        "learning_rate": (jnp.asarray(hyper.learning_rate, jnp.float32), one),
    }
    metrics |= {f"reward/{name}": (jnp.sum(jnp.where(valid, part, 0.0)), rows) for name, part in scores.parts.items()}
    if ppo.sampling.filtered:
        # > 0: the filters made sampled tokens more likely than the policy would have.
        gap = jnp.where(mask, rollout.logprobs - rollout.policy_logprobs, 0.0)
        metrics["behaviour_mismatch"] = (jnp.sum(gap), tokens)
    return metrics
