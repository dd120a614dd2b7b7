"""PPO from human feedback. One iteration is `iterate`; read on from there, in calling order.

    rollout    = collect(...)            sample responses; log-probs and values come free
    scores     = reward(...)             on the device, or on the host in between
    experience = make_experience(...)    reference KL, reward shaping, GAE, whitening
    state      = update_epochs(...)      epochs x shuffled minibatches of the clipped objective

The six formulas that matter:

    a token and its log-prob     ops/sampling.py    sample
    the KL penalty               ops/kl.py          kl_penalty
    reward = score - beta KL     ops/rewards.py     shape_rewards
    GAE                          ops/advantages.py  gae
    the clipped policy loss      ops/losses.py      clipped_policy_loss
    the clipped value loss       ops/losses.py      clipped_value_loss

docs/algorithm.md has them all. Sources: Ziegler et al. 2019 (KL-shaped rewards), Schulman et al. 2015 and 2017 (GAE,
PPO), Stiennon et al. 2020 and Ouyang et al. 2022 (the recipe). `Hyper` is traced; `Algorithm` is compiled in.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PRNGKeyArray

from ppo_jax.models.config import ModelConfig
from ppo_jax.ops.means import merge_metrics, no_metrics
from ppo_jax.parallel.members import branch
from ppo_jax.parallel.sharding import constrain_rows
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.rewards.combine import add_scores
from ppo_jax.rewards.scores import only_finite
from ppo_jax.rollout import generate
from ppo_jax.train.buckets import cut_to_buckets, sort_by_length
from ppo_jax.train.experience import (
    cut_responses,
    evaluate_critic,
    evaluate_reference,
    kl_coefficient,
    make_experience,
    next_kl_coefficient,
    prepare_scores,
    score_rollout,
    share_prefix,
)
from ppo_jax.train.gradients import apply_gradients, judge_step, measure_norms, step_metrics
from ppo_jax.train.metrics import experience_metrics
from ppo_jax.train.objective import count_units, ppo_loss
from ppo_jax.train.optimizer import accumulate
from ppo_jax.train.options import Algorithm, Estimator, Loss, PPOConfig
from ppo_jax.train.state import Collect, Iteration, Learn, TrainState
from ppo_jax.types import Collected, Frozen, Hyper, Metrics, Minibatch, Policy, Prompts, Rollout, Scores, Texts


def iterate(
    algorithm: Algorithm, state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper
) -> tuple[TrainState, Metrics]:
    """One PPO iteration with a reward on the device; a pure function, not jitted."""
    assert algorithm.reward is not None
    rollout = collect(algorithm, state, frozen, prompts, hyper)
    collected = share_prefix(algorithm, state.policy, frozen, rollout, prompts.pretrain)
    scores = score_rollout(algorithm.reward, frozen, collected)
    return learn(algorithm, state, frozen, collected, scores, hyper)


def collect(algorithm: Algorithm, state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper) -> Rollout:
    """Samples a rollout with the key of this iteration: `group_size` responses to each prompt, in consecutive rows."""
    config, ppo = algorithm.model, algorithm.ppo
    key, _ = jax.random.split(jax.random.fold_in(state.key, state.step))
    asked = prompts._replace(pretrain=None)
    if ppo.group_size > 1:
        asked = jax.tree.map(lambda x: jnp.repeat(x, ppo.group_size, axis=0), asked)
    rollout = generate(frozen.base, state.policy, config, asked, key, ppo.sampling, hyper.temperature)
    return cut_responses(rollout, ppo.score.truncate_ids, config)


def learn(
    algorithm: Algorithm, state: TrainState, frozen: Frozen, collected: Collected, scores: Scores, hyper: Hyper
) -> tuple[TrainState, Metrics]:
    """From scores to the next state: reference, experience, epochs of updates, KL controller, running moments."""
    hyper = hyper._replace(kl_coef=kl_coefficient(algorithm, state, hyper))  # type: ignore[arg-type]  # traced from here on
    raw, rollout = only_finite(scores), collected.rollout
    scores, moments = prepare_scores(algorithm, raw, rollout, state.moments, hyper)
    reference = evaluate_reference(algorithm, state.policy, frozen, collected, hyper)
    values, bootstrap = evaluate_critic(algorithm, state.policy, frozen, collected)
    collected = collected._replace(rollout=rollout._replace(values=values))
    experience = make_experience(algorithm, collected, scores, reference, hyper, state.baseline.mean, bootstrap)
    _, key = jax.random.split(jax.random.fold_in(state.key, state.step))
    state, losses = update_epochs(algorithm, state, frozen, experience.batch, key, hyper)
    metrics = experience_metrics(algorithm, experience, rollout, raw, reference.logprobs, hyper) | losses
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        kl_coef=next_kl_coefficient(algorithm, hyper, metrics),
        moments=moments,
        baseline=state.baseline.update(experience.totals, scores.valid & jnp.isfinite(experience.totals)),
    )
    return state, metrics


def update_epochs(
    algorithm: Algorithm, state: TrainState, frozen: Frozen, batch: Minibatch, key: PRNGKeyArray, hyper: Hyper
) -> tuple[TrainState, Metrics]:
    """epochs x num_minibatches optimizer steps; every epoch visits the rows in a fresh order. `key` is consumed.

    Once a minibatch's approximate KL to the old policy exceeds hyper.target_kl, the rest of the iteration is left out.
    Metrics are over all steps; the approximate KL and clip fraction of each epoch also apart.
    """
    ppo, size = algorithm.ppo, batch.tokens.shape[0]
    ppo.check_responses(size)

    def minibatch(carry: tuple[TrainState, Array], rows: Array) -> tuple[tuple[TrainState, Array], Metrics]:
        state, stopped = carry
        taken = constrain_rows(jax.tree.map(lambda x: x[rows], batch))
        state, metrics = update(algorithm, state, frozen, taken, hyper, stopped)
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
        for number in range(ppo.epochs if ppo.epochs > 1 and name in metrics else 0)
    }
    return state, merge_metrics(metrics) | by_epoch


def update(
    algorithm: Algorithm,
    state: TrainState,
    frozen: Frozen,
    minibatch: Minibatch,
    hyper: Hyper,
    stopped: bool | Bool[Array, ""] = False,
) -> tuple[TrainState, Metrics]:
    """One optimizer step: gradients summed over micro-batches, clipped by their global norm, then Adam.

    The step is left out, and counted, when no row of the minibatch has a valid score (whatever its pretraining texts
    say), when the loss or a gradient is not finite, when the mean ratio exceeds hyper.ratio_threshold, or when the
    approximate KL to the old policy exceeds hyper.target_kl. With `stopped` no gradient is computed, the state stays
    and the metrics say nothing.
    """
    go = partial(minibatch_gradient, algorithm)

    def rest(*inputs: Any) -> tuple[Policy, Metrics]:
        grads, metrics = jax.eval_shape(go, *inputs)
        return jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), grads), no_metrics(metrics)

    stopped = jnp.asarray(stopped)
    grads, metrics = branch(stopped, rest, go, state.policy, frozen, minibatch, hyper)
    norms = measure_norms(grads)
    verdict = judge_step(minibatch, metrics, norms, hyper)
    # Chosen number by number: a conditional around parameters and optimizer state would hold them twice.
    take = verdict.scored & verdict.finite & verdict.close & verdict.sane & ~stopped
    taken, kept = (
        (s.policy, s.opt_state, s.ema) for s in (apply_gradients(algorithm, state, grads, norms, hyper), state)
    )
    adapted, opt_state, ema = jax.tree.map(lambda new, old: jnp.where(take, new, old), taken, kept)
    # A step that is not finite says nothing of the others; it shows in its own count.
    metrics = jax.tree.map(lambda kept, none: jnp.where(verdict.finite, kept, none), metrics, no_metrics(metrics))
    nonfinite = jnp.where(stopped, state.nonfinite, jnp.where(verdict.finite, 0, state.nonfinite + 1))
    of_step = step_metrics(algorithm, norms, verdict)
    of_step = jax.tree.map(lambda said, none: jnp.where(stopped, none, said), of_step, no_metrics(of_step))
    state = dataclasses.replace(state, policy=adapted, opt_state=opt_state, ema=ema, nonfinite=nonfinite)
    return state, metrics | of_step


def minibatch_gradient(
    algorithm: Algorithm, policy: Policy, frozen: Frozen, minibatch: Minibatch, hyper: Hyper
) -> tuple[Policy, Metrics]:
    """The gradient of the loss of a minibatch, summed over its micro-batches, and their metrics."""
    counts = count_units(algorithm, minibatch)

    def gradient(policy: Policy, rows: Minibatch) -> tuple[Policy, Metrics]:
        loss = algorithm.loss or ppo_loss
        return jax.grad(loss, has_aux=True)(policy, algorithm, frozen, rows, counts, hyper)

    pieces, buckets = algorithm.ppo.accumulate, algorithm.ppo.length_buckets
    if buckets == 1:
        return accumulate(gradient, policy, minibatch, pieces)
    return accumulate(cut_to_buckets(gradient, buckets), policy, sort_by_length(minibatch, pieces), pieces)


# -- compiled --------------------------------------------------------------------------------------------------------


def make_iteration(
    config: ModelConfig,
    ppo: PPOConfig,
    optimizer: optax.GradientTransformation,
    reward: DeviceReward,
    *,
    loss: Loss | None = None,
    advantage: Estimator | None = None,
) -> Iteration:
    """`iterate` as ONE jitted function: iteration(state, frozen, prompts, hyper) -> (state, metrics).

    The state is donated. Nothing recompiles unless a shape changes.

    Args:
      loss: in place of `objective.ppo_loss`, with its arguments.
      advantage: in place of `experience.estimate_advantages`, with its arguments.
    """
    return jax.jit(partial(iterate, Algorithm(config, ppo, optimizer, reward, loss, advantage)), donate_argnums=0)


def make_host_iteration(
    config: ModelConfig,
    ppo: PPOConfig,
    optimizer: optax.GradientTransformation,
    reward: DeviceReward | None = None,
    *,
    loss: Loss | None = None,
    advantage: Estimator | None = None,
) -> tuple[Collect, Learn]:
    """The iteration in two jitted halves, for rewards that are computed on the host in between.

    Returns collect(state, frozen, prompts, hyper) -> rollout, and
    learn(state, frozen, rollout, scores, hyper, pretrain=None) -> (state, metrics), which is donated the state. It
    adds what `reward` says on the device, where there is one, to the host's scores. `loss` and `advantage` as for
    `make_iteration`.
    """
    algorithm = Algorithm(config, ppo, optimizer, reward, loss, advantage)

    def second(
        state: TrainState,
        frozen: Frozen,
        rollout: Rollout,
        scores: Scores,
        hyper: Hyper,
        pretrain: Texts | None = None,
    ) -> tuple[TrainState, Metrics]:
        collected = share_prefix(algorithm, state.policy, frozen, rollout, pretrain)
        if reward is not None:
            scores = add_scores(score_rollout(reward, frozen, collected), scores)
        return learn(algorithm, state, frozen, collected, scores, hyper)

    return jax.jit(partial(collect, algorithm)), jax.jit(second, donate_argnums=0)
