"""One optimizer step of PPO: whether it is taken, and what it does to the policy's and the critic's parameters."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from ppo_jax.train.optimizer import clip_scale, scale_gradient, step
from ppo_jax.train.options import Algorithm
from ppo_jax.train.state import Groups, TrainState, groups
from ppo_jax.types import Hyper, Metrics, Minibatch, Policy


class Norms(NamedTuple):
    """Global norms of a gradient."""

    policy: Float[Array, ""]
    critic: Float[Array, ""]  # of the parameters that are only the critic's
    whole: Float[Array, ""]


class Verdict(NamedTuple):
    """Whether a step is taken: if all hold."""

    scored: Bool[Array, ""]  # some token counts: without one the gradient says nothing, and momentum must not act alone
    finite: Bool[Array, ""]  # loss and gradient
    close: Bool[Array, ""]  # the approximate KL to the old policy is at most hyper.target_kl
    sane: Bool[Array, ""]  # the mean ratio is at most hyper.ratio_threshold


def measure_norms(grads: Policy) -> Norms:
    """The global norms of both groups and of the whole gradient."""
    policy, critic = map(optax.tree.norm, groups(grads))
    return Norms(policy, critic, jnp.sqrt(jnp.square(policy) + jnp.square(critic)))


def judge_step(minibatch: Minibatch, metrics: Metrics, norms: Norms, hyper: Hyper) -> Verdict:
    """What a minibatch and the metrics of its loss say of the step; what a loss does not measure holds nobody up."""
    nothing = (jnp.zeros(()), jnp.ones(()))
    kl, ratio = (_mean(metrics.get(name, nothing)) for name in ("approx_kl", "ratio"))
    finite = jnp.isfinite(norms.whole) & jnp.isfinite(metrics.get("loss", nothing)[0])
    scored = jnp.any(minibatch.loss_mask)
    return Verdict(scored, finite, kl <= hyper.target_kl, ratio <= hyper.ratio_threshold)


def apply_gradients(algorithm: Algorithm, state: TrainState, grads: Policy, norms: Norms, hyper: Hyper) -> TrainState:
    """The step of the policy's parameters, and that of the critic's own with its own rate, clip and optimizer state.

    Both gradients are clipped together by their global norm, unless hyper.critic_max_grad_norm > 0 gives the critic a
    clip of its own. During hyper.critic_warmup iterations the policy's parameters and optimizer state stay.
    """
    ppo, optimizer = algorithm.ppo, algorithm.optimizer
    apart = jnp.asarray(hyper.critic_max_grad_norm) > 0
    scales = Groups(
        policy=clip_scale(jnp.where(apart, norms.policy, norms.whole), hyper.max_grad_norm),
        critic=clip_scale(
            jnp.where(apart, norms.critic, norms.whole),
            jnp.where(apart, hyper.critic_max_grad_norm, hyper.max_grad_norm),
        ),
    )
    rates = Groups(hyper.learning_rate, hyper.learning_rate * hyper.critic_lr_scale)
    params, gradients = groups(state.policy), groups(grads)
    actor, critic = (
        step(params[i], scale_gradient(gradients[i], scales[i]), state.opt_state[i], optimizer, rates[i])
        for i in range(2)
    )
    warming = ppo.has_critic & (state.step < hyper.critic_warmup)
    old = (params.policy, state.opt_state.policy)
    adapter, actor_state = jax.tree.map(
        lambda kept, new: jnp.where(warming, kept, new), old, (actor.params, actor.opt_state)
    )
    policy = Policy(adapter=adapter, **critic.params)
    ema = state.ema
    if ppo.ema_decay:
        ema = jax.tree.map(lambda e, p: ppo.ema_decay * e + (1 - ppo.ema_decay) * p, ema, policy)
    return dataclasses.replace(state, policy=policy, opt_state=Groups(actor_state, critic.opt_state), ema=ema)


def step_metrics(algorithm: Algorithm, norms: Norms, verdict: Verdict) -> Metrics:
    """What the log says of one step, taken or left out."""
    scored, finite, close, sane = verdict
    one, happened = jnp.ones(()), finite.astype(jnp.float32)
    metrics: Metrics = {
        "grad_norm": (jnp.where(finite, norms.whole, 0.0), happened),
        "policy_grad_norm": (jnp.where(finite, norms.policy, 0.0), happened),
        "nonfinite_updates": (1 - happened, one),
        "unscored_updates": ((finite & ~scored).astype(jnp.float32), one),
        "early_stops": ((finite & ~close).astype(jnp.float32), one),
        "ratio_skips": ((finite & close & ~sane).astype(jnp.float32), one),
    }
    if algorithm.ppo.has_critic:
        metrics["critic_grad_norm"] = (jnp.where(finite, norms.critic, 0.0), happened)
    return metrics


def _mean(metric: tuple[Array, Array]) -> Array:
    return metric[0] / jnp.maximum(metric[1], 1)
