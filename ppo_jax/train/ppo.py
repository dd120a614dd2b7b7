"""PPO from human feedback, one screen per step.

    rollout    = collect(...)            sample responses; log-probs and values come free
    scores     = reward(...)             on the device, or on the host in between
    experience = make_experience(...)    reference KL, reward shaping, GAE, whitening         (train/experience.py)
    state      = update_epochs(...)      epochs x shuffled minibatches of the clipped objective (train/objective.py)

Sources: Ziegler et al. 2019 (KL-shaped rewards), Schulman et al. 2015 and 2017 (GAE, PPO), Stiennon et al. 2020 and
Ouyang et al. 2022 (the recipe). `Hyper` is traced; everything in `PPOConfig` is compiled in.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.roles import policy_depth
from ppo_jax.ops.kl import adaptive_kl, linear_kl
from ppo_jax.ops.losses import token_weights
from ppo_jax.ops.means import merge_metrics, no_metrics
from ppo_jax.parallel.sharding import constrain_rows
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.rewards.combine import add_scores
from ppo_jax.rewards.scores import only_finite
from ppo_jax.rollout import generate
from ppo_jax.train.experience import (
    adjusted,
    consult_reference,
    critic_values,
    make_experience,
    response_totals,
    rollout_prefix,
    truncated,
)
from ppo_jax.train.metrics import experience_metrics, observed_kl
from ppo_jax.train.objective import ppo_loss, predicted
from ppo_jax.train.optimizer import accumulate, clip_scale, scale_gradient, step
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.state import Collect, Groups, Iteration, Learn, TrainState, groups
from ppo_jax.types import Frozen, Hyper, Metrics, Minibatch, Policy, Prompts, Rollout, Scores, Texts


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
        return learn(state, frozen, rollout, scores, prefix, hyper, config, ppo, optimizer, prompts.pretrain)

    return jax.jit(iteration, donate_argnums=0)


def make_host_iteration(
    config: ModelConfig, ppo: PPOConfig, optimizer: optax.GradientTransformation, reward: DeviceReward | None = None
) -> tuple[Collect, Learn]:
    """The iteration in two jitted halves, for rewards that are computed on the host in between.

    Returns collect(state, frozen, prompts, hyper) -> rollout, and
    learn(state, frozen, rollout, scores, hyper, pretrain=None) -> (state, metrics), which is donated the state. It adds
    what `reward` says on the device, where there is one, to the host's scores.
    """

    def first(state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper) -> Rollout:
        return collect(state, frozen, prompts, hyper, config, ppo)

    def second(
        state: TrainState,
        frozen: Frozen,
        rollout: Rollout,
        scores: Scores,
        hyper: Hyper,
        pretrain: Texts | None = None,
    ) -> tuple[TrainState, Metrics]:
        prefix, depth = rollout_prefix(state.policy, frozen, rollout, config)
        if reward is not None:
            scores = add_scores(reward(frozen, rollout, prefix, depth), scores)
        return learn(state, frozen, rollout, scores, prefix, hyper, config, ppo, optimizer, pretrain)

    return jax.jit(first), jax.jit(second, donate_argnums=0)


def collect(
    state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper, config: ModelConfig, ppo: PPOConfig
) -> Rollout:
    """Samples a rollout with the key of this iteration: `group_size` responses to each prompt, in consecutive rows."""
    key, _ = jax.random.split(jax.random.fold_in(state.key, state.step))
    asked = prompts._replace(pretrain=None)
    if ppo.group_size > 1:
        asked = jax.tree.map(lambda x: jnp.repeat(x, ppo.group_size, axis=0), asked)
    rollout = generate(frozen.base, state.policy, config, asked, key, ppo.sampling, hyper.temperature)
    return truncated(rollout, ppo.score.truncate_ids, config)


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
    pretrain: Texts | None = None,
) -> tuple[TrainState, Metrics]:
    """From scores to the next state: reference, experience, epochs of updates, KL controller, running moments."""
    depth = policy_depth(state.policy, config)
    kl_coef = kl_coefficient(state, hyper, ppo)
    raw = only_finite(scores)
    fitted, moments = adjusted(raw, rollout, state.moments, hyper, ppo)
    reference = consult_reference(state.policy, frozen, rollout, prefix, depth, hyper, config, ppo)
    bootstrap = None
    if ppo.has_critic:
        values, bootstrap = critic_values(
            state.policy, frozen, rollout, prefix, depth, config, ppo.critic.bootstrap_truncated
        )
        rollout = rollout._replace(values=values)
    experience = make_experience(
        rollout,
        fitted,
        reference.logprobs,
        prefix,
        kl_coef,
        hyper,
        ppo,
        reference=reference,
        baseline=state.baseline.mean,
        bootstrap=bootstrap,
    )
    batch = experience.batch._replace(pretrain=pretrain)
    _, key = jax.random.split(jax.random.fold_in(state.key, state.step))
    state, losses = update_epochs(state, frozen, batch, key, hyper, config, ppo, optimizer, kl_coef)
    metrics = experience_metrics(experience, rollout, raw, reference.logprobs, kl_coef, hyper, ppo) | losses
    if ppo.kl.control == "adaptive":
        steered = adaptive_kl(kl_coef, *observed_kl(metrics), hyper.kl_target, hyper.kl_horizon)
        kl_coef = jnp.where(jnp.isfinite(steered), steered, kl_coef)  # one bad batch must not spoil it for good
    totals = response_totals(experience.rewards, batch.loss_mask)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        kl_coef=kl_coef,
        moments=moments,
        baseline=state.baseline.update(totals, fitted.valid & jnp.isfinite(totals)),
    )
    return state, metrics


def kl_coefficient(state: TrainState, hyper: Hyper, ppo: PPOConfig) -> Float[Array, ""]:
    """beta of this iteration."""
    match ppo.kl.control:
        case "adaptive":
            return state.kl_coef
        case "linear":
            return linear_kl(hyper.kl_coef, hyper.kl_coef_end, state.step, hyper.kl_steps)
        case _:
            return jnp.asarray(hyper.kl_coef, jnp.float32)


def update_epochs(
    state: TrainState,
    frozen: Frozen,
    batch: Minibatch,
    key: PRNGKeyArray,
    hyper: Hyper,
    config: ModelConfig,
    ppo: PPOConfig,
    optimizer: optax.GradientTransformation,
    kl_coef: Float[Array, ""] | float = 0.0,
) -> tuple[TrainState, Metrics]:
    """epochs x num_minibatches optimizer steps; every epoch visits the rows in a fresh order. `key` is consumed.

    Once a minibatch's approximate KL to the old policy exceeds hyper.target_kl, the rest of the iteration is left out.
    Metrics are over all steps; the approximate KL and clip fraction of each epoch also apart.
    """
    size = batch.tokens.shape[0]
    ppo.check_responses(size)

    def minibatch(carry: tuple[TrainState, Array], rows: Array) -> tuple[tuple[TrainState, Array], Metrics]:
        state, stopped = carry
        taken = constrain_rows(jax.tree.map(lambda x: x[rows], batch))

        def go(state: TrainState) -> tuple[TrainState, Metrics]:
            return update(state, frozen, taken, hyper, config, ppo, optimizer, kl_coef)

        def rest(state: TrainState) -> tuple[TrainState, Metrics]:
            return state, no_metrics(jax.eval_shape(go, state)[1])

        state, metrics = jax.lax.cond(stopped, rest, go, state)
        left_out = stopped.astype(jnp.float32)
        stopped |= metrics["early_stops"][0] > 0
        return (state, stopped), metrics | {"steps_left_out": (left_out, jnp.ones(()))}

    def epoch(carry: tuple[TrainState, Array], epoch_key: PRNGKeyArray) -> tuple[tuple[TrainState, Array], Metrics]:
        order = jax.random.permutation(epoch_key, size)
        carry, metrics = jax.lax.scan(minibatch, carry, order.reshape(ppo.num_minibatches, -1))
        return carry, merge_metrics(metrics)

    carry = (state, jnp.zeros((), bool))
    (state, _), metrics = jax.lax.scan(epoch, carry, jax.random.split(key, ppo.epochs))
    by_epoch = {
        f"{name}/epoch_{number + 1}": (metrics[name][0][number], metrics[name][1][number])
        for name in ("approx_kl", "clip_fraction")
        for number in range(ppo.epochs if ppo.epochs > 1 else 0)
    }
    return state, merge_metrics(metrics) | by_epoch


def update(
    state: TrainState,
    frozen: Frozen,
    minibatch: Minibatch,
    hyper: Hyper,
    config: ModelConfig,
    ppo: PPOConfig,
    optimizer: optax.GradientTransformation,
    kl_coef: Float[Array, ""] | float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One optimizer step: gradients summed over micro-batches, clipped by their global norm, then Adam.

    The step is left out, and counted, when the loss or a gradient is not finite, when the mean ratio exceeds
    hyper.ratio_threshold, or when the approximate KL to the old policy exceeds hyper.target_kl.
    """
    count = jnp.sum(token_weights(minibatch.loss_mask, ppo.aggregation)[1])
    texts = minibatch.pretrain
    text_count = None if texts is None else jnp.sum(predicted(texts), dtype=jnp.float32)

    def gradient(policy: Policy, rows: Minibatch) -> tuple[Policy, Metrics]:
        loss = jax.grad(ppo_loss, has_aux=True)
        return loss(policy, frozen, rows, count, hyper, config, ppo, kl_coef, text_count)

    grads, metrics = accumulate(gradient, state.policy, minibatch, ppo.accumulate)
    norms = Groups(*map(optax.tree.norm, groups(grads)))
    whole = jnp.sqrt(jnp.square(norms.policy) + jnp.square(norms.critic))
    finite = jnp.isfinite(whole) & jnp.isfinite(metrics["loss"][0])
    close = _mean(metrics["approx_kl"]) <= hyper.target_kl
    sane = _mean(metrics["ratio"]) <= hyper.ratio_threshold
    taken = jax.lax.cond(
        finite & close & sane,
        lambda state: descend_groups(state, grads, norms, whole, hyper, ppo, optimizer),
        lambda state: state,
        state,
    )
    one = jnp.ones(())
    # A step that is not finite says nothing of the others; it shows in its own count.
    metrics = jax.tree.map(lambda kept, none: jnp.where(finite, kept, none), metrics, no_metrics(metrics))
    happened = finite.astype(jnp.float32)
    metrics |= {
        "grad_norm": (jnp.where(finite, whole, 0.0), happened),
        "policy_grad_norm": (jnp.where(finite, norms.policy, 0.0), happened),
        "nonfinite_updates": (1 - happened, one),
        "early_stops": ((finite & ~close).astype(jnp.float32), one),
        "ratio_skips": ((finite & close & ~sane).astype(jnp.float32), one),
    }
    if ppo.has_critic:
        metrics["critic_grad_norm"] = (jnp.where(finite, norms.critic, 0.0), happened)
    return dataclasses.replace(taken, nonfinite=jnp.where(finite, 0, state.nonfinite + 1)), metrics


def descend_groups(
    state: TrainState,
    grads: Policy,
    norms: Groups,
    whole: Float[Array, ""],
    hyper: Hyper,
    ppo: PPOConfig,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The step of the policy's parameters, and that of the critic's own with its own rate, clip and optimizer state.

    Both gradients are clipped together by their global norm, unless hyper.critic_max_grad_norm > 0 gives the critic a
    clip of its own. During hyper.critic_warmup iterations the policy's parameters and optimizer state stay.
    """
    apart = jnp.asarray(hyper.critic_max_grad_norm) > 0
    scales = Groups(
        policy=clip_scale(jnp.where(apart, norms.policy, whole), hyper.max_grad_norm),
        critic=clip_scale(
            jnp.where(apart, norms.critic, whole),
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


def _mean(metric: tuple[Array, Array]) -> Array:
    return metric[0] / jnp.maximum(metric[1], 1)
