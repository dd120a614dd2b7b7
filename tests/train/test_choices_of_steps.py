"""Every option of PPO at work: critic, steps, and the table of metrics."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax.models.heads import score, value
from ppo_jax.models.roles import before_response, role_hidden
from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.train.experience import evaluate_critic, reference_logprobs, share_prefix
from ppo_jax.train.objective import Counts, ppo_loss
from ppo_jax.train.optimizer import OptimizerConfig, make_optimizer
from ppo_jax.train.options import CriticConfig, KLConfig, PPOConfig
from ppo_jax.train.state import value_head_of_reward
from tests.train import toy
from tests.train.choices import FOUR, OFF, TOP_3, begin, critic_adapter, drawn, experience, half, scored, texts
from tests.train.toy import CONFIG, FROZEN, assert_close, numbers

# -- prefix ----------------------------------------------------------------------------------------------------------


def test_a_prefix_in_bfloat16_is_half_as_large_and_moves_log_probs_by_its_rounding():
    rollout, policy = drawn(), begin().policy
    whole, rounded = (
        share_prefix(toy.algorithm(dataclasses.replace(FOUR, prefix_dtype=dtype)), policy, FROZEN, rollout)
        for dtype in ("compute", "bfloat16")
    )
    assert rounded.prefix.hidden.nbytes == whole.prefix.hidden.nbytes / 2 and rounded.prefix.layers == 1
    exact, near = (np.asarray(reference_logprobs(CONFIG, FROZEN, one, OFF)) for one in (whole, rounded))
    assert near.dtype == np.float32 and 1e-5 < np.abs(exact - near)[np.asarray(rollout.response_mask)].max() < 0.1


# -- critic ----------------------------------------------------------------------------------------------------------


def test_a_critic_of_its_own_has_the_values_and_its_gradient_stays_there():
    ppo = dataclasses.replace(FOUR, critic=CriticConfig(own=True))
    head = toy.noisy(begin().policy.value_head)
    state = begin(ppo, critic=critic_adapter(), value_head=head)
    rollout = drawn()
    collected = share_prefix(toy.algorithm(ppo), state.policy, FROZEN, rollout)
    assert collected.prefix is None, "the critic's adapter starts at layer 0"
    values, bootstrap = evaluate_critic(toy.algorithm(ppo), state.policy, FROZEN, collected)
    hidden = role_hidden(FROZEN.base, state.policy.critic, CONFIG, rollout.tokens, rollout.mask)
    np.testing.assert_allclose(values, value(head, before_response(hidden, toy.T)), rtol=1e-4, atol=1e-5)
    assert bootstrap is None

    result = experience(dataclasses.replace(toy.ONCE, critic=ppo.critic), rollout._replace(values=values))
    batch = result.batch._replace(prefix=None)
    count = jnp.sum(rollout.response_mask, dtype=jnp.float32)

    def loss(policy, vf_coef):
        return ppo_loss(policy, toy.algorithm(ppo), FROZEN, batch, Counts(count), OFF._replace(vf_coef=vf_coef))[0]

    without, with_it = (jax.grad(loss)(state.policy, c) for c in (0.0, 1.0))
    assert_close(with_it.adapter, without.adapter, rtol=1e-4, atol=1e-6)
    size = lambda tree: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))
    assert size(without.critic) == size(without.value_head) == 0
    assert size(with_it.critic) > 0.01 and size(with_it.value_head) > 0.01
    after, metrics = half(ppo)(state, rollout, scored(rollout), OFF)
    assert size(jax.tree.map(jnp.subtract, after.policy.critic, state.policy.critic)) > 0.01
    assert numbers(metrics)["critic_grad_norm"] > 0


def test_cut_responses_are_continued_by_the_critic():
    """The value after the last token, by a pass over one token more; 0 for those that ended themselves."""
    rollout, policy = drawn(), begin().policy
    policy = policy._replace(value_head=toy.noisy(policy.value_head))
    algorithm = toy.algorithm(dataclasses.replace(FOUR, critic=CriticConfig(bootstrap_truncated=True)))
    values, after = evaluate_critic(algorithm, policy, FROZEN, share_prefix(algorithm, policy, FROZEN, rollout))
    np.testing.assert_array_equal(values, rollout.values)
    longer = jnp.pad(rollout.tokens, ((0, 0), (0, 1)))
    mask = jnp.pad(rollout.mask, ((0, 0), (0, 1)), constant_values=False)
    hidden = role_hidden(FROZEN.base, policy.adapter, CONFIG, longer, mask)
    ended = np.asarray(rollout.terminated)
    expected = np.asarray(value(policy.value_head, hidden[:, toy.P + toy.T - 1]))  # cut rows fill every slot
    np.testing.assert_allclose(np.asarray(after)[~ended], expected[~ended], rtol=1e-4, atol=1e-5)
    assert (np.asarray(after)[ended] == 0).all() and 0 < ended.mean() < 1


def test_a_critic_that_starts_from_the_reward_model_says_its_score():
    rng = np.random.default_rng(0)
    head = {
        "reward": {"kernel": jnp.asarray(rng.normal(size=(16, 1)), jnp.float32)},
        "gain": jnp.float32(1.7),
        "bias": jnp.float32(-0.3),
    }
    hidden = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    np.testing.assert_allclose(value(value_head_of_reward(head), hidden), score(head, hidden), rtol=1e-5)


def test_only_the_critic_learns_during_its_warm_up():
    hyper = OFF._replace(critic_warmup=1.0)
    start = begin()
    warm, _ = half(FOUR)(start, drawn(), scored(drawn()), hyper)
    assert_close(warm.policy.adapter, start.policy.adapter, rtol=0, atol=0)
    assert_close(warm.opt_state.policy, start.opt_state.policy, rtol=0, atol=0)
    assert np.abs(warm.policy.value_head["value"]["kernel"]).max() > 1e-3
    assert int(warm.opt_state.critic.count) == 4
    after, _ = half(FOUR)(warm, drawn(), scored(drawn()), hyper)
    assert np.abs(after.policy.adapter["lora"]["q"].b - warm.policy.adapter["lora"]["q"].b).max() > 1e-4


def test_the_critic_has_a_rate_and_a_clip_of_its_own():
    """Adam's first step is the rate whatever the gradient, so rates show in the first step and clips in its moments."""
    ppo = toy.ONCE
    start, rollout = begin(ppo), drawn()
    plain, measured = half(ppo)(start, rollout, scored(rollout), OFF)
    fast, _ = half(ppo)(start, rollout, scored(rollout), OFF._replace(critic_lr_scale=3.0))
    moved = lambda state: np.asarray(state.policy.value_head["value"]["kernel"])
    np.testing.assert_allclose(moved(fast), 3 * moved(plain), rtol=1e-4)
    assert_close(fast.policy.adapter, plain.policy.adapter, rtol=1e-6)

    norms = numbers(measured)
    tight = OFF._replace(max_grad_norm=1e9, critic_max_grad_norm=norms["critic_grad_norm"] / 4)
    clipped, _ = half(ppo)(start, rollout, scored(rollout), tight)
    free, _ = half(ppo)(start, rollout, scored(rollout), OFF._replace(max_grad_norm=1e9))
    quarter = jax.tree.map(lambda m: m / 4, free.opt_state.critic.mu)
    assert_close(clipped.opt_state.critic.mu, quarter, rtol=1e-4, atol=1e-8)
    assert_close(clipped.opt_state.policy.mu, free.opt_state.policy.mu, rtol=1e-6)
    assert norms["grad_norm"] == pytest.approx(
        math.hypot(norms["policy_grad_norm"], norms["critic_grad_norm"]), rel=1e-4
    )


# -- steps -----------------------------------------------------------------------------------------------------------


def test_target_kl_ends_the_updates_of_an_iteration():
    """Four steps; the second measures more than the target, so one is made, one refused and two are left out."""
    hyper = OFF._replace(target_kl=1e-6)
    state, metrics = half(FOUR)(begin(), drawn(), scored(drawn()), hyper)
    values = numbers(metrics)
    assert int(state.opt_state.policy.count) == 1
    assert (values["early_stops"], values["steps_left_out"]) == (0.5, 0.5), "1 of 2 steps tried, 2 of 4 left out"
    free, metrics = half(FOUR)(begin(), drawn(), scored(drawn()), OFF)
    assert int(free.opt_state.policy.count) == 4 and numbers(metrics)["early_stops"] == 0


def test_a_minibatch_whose_ratio_is_too_large_is_skipped_alone():
    state, metrics = half(FOUR)(begin(), drawn(), scored(drawn()), OFF._replace(ratio_threshold=0.5))
    assert numbers(metrics)["ratio_skips"] == 1 and int(state.opt_state.policy.count) == 0
    assert_close(state.policy, begin().policy, rtol=0, atol=0)
    # Two of 16 rows have ratios of e^3: of eight minibatches of two rows, those that hold one are skipped.
    rollout = drawn()
    lowered = rollout._replace(policy_logprobs=rollout.policy_logprobs - (jnp.arange(toy.B) < 2)[:, None] * 3.0)
    eight = dataclasses.replace(FOUR, epochs=1, num_minibatches=8)
    state, metrics = half(eight)(begin(eight), lowered, scored(rollout), OFF._replace(ratio_threshold=2.0))
    skipped = round(8 * numbers(metrics)["ratio_skips"])
    assert skipped in (1, 2) and int(state.opt_state.policy.count) == 8 - skipped, "those that follow are not"


def test_the_average_of_the_policy_follows_its_steps():
    ppo = dataclasses.replace(toy.ONCE, ema_decay=0.75)
    start = begin(ppo, ema=True)
    start = dataclasses.replace(start, ema=jax.tree.map(jnp.copy, start.policy))
    after, _ = half(ppo)(start, drawn(), scored(drawn()), OFF)
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, start.policy, after.policy)
    assert_close(after.ema, expected)


def test_pretraining_texts_add_their_mean_loss_whatever_the_micro_batches():
    """PPO-ptx: the gradient changes by coefficient times that of the texts' mean negative log-likelihood."""
    policy, result = begin().policy, experience(toy.ONCE)
    batch = result.batch._replace(pretrain=texts(toy.B))
    count = jnp.sum(batch.loss_mask, dtype=jnp.float32)

    def ours(adapter, coefficient):
        hyper = OFF._replace(ptx_coef=coefficient)
        tuned = policy._replace(adapter=adapter)
        return ppo_loss(tuned, toy.algorithm(toy.ONCE), FROZEN, batch, Counts(count), hyper)[0]

    def by_hand(adapter):
        tokens, mask = texts(toy.B)
        hidden = role_hidden(FROZEN.base, adapter, CONFIG, tokens, mask)
        logprobs = token_logprobs(hidden[:, :-1] @ FROZEN.base["unembedding"].T, tokens[:, 1:])
        return -jnp.sum(jnp.where(mask[:, 1:], logprobs, 0)) / jnp.sum(mask[:, 1:])

    with_it, without = (jax.grad(ours)(policy.adapter, c) for c in (0.5, 0.0))
    expected = jax.tree.map(lambda g: 0.5 * g, jax.grad(by_hand)(policy.adapter))
    assert_close(jax.tree.map(jnp.subtract, with_it, without), expected, rtol=1e-3, atol=1e-5)

    hyper = OFF._replace(ptx_coef=0.5)
    split = dataclasses.replace(toy.ONCE, accumulate=4)
    (whole, one), (parts, four) = (
        half(ppo, pretrain=True)(begin(), drawn(), scored(drawn()), hyper) for ppo in (toy.ONCE, split)
    )
    assert_close(whole.opt_state, parts.opt_state, rtol=1e-3, atol=1e-6)
    assert numbers(one)["ptx_loss"] == pytest.approx(numbers(four)["ptx_loss"], rel=1e-5)


@pytest.mark.parametrize("aggregation", ["sequence-mean", pytest.param("constant", marks=pytest.mark.long)])
def test_micro_batches_add_up_under_every_aggregation(aggregation):
    """Defect 15, where the normaliser is not the number of tokens."""
    ppo = dataclasses.replace(toy.ONCE, aggregation=aggregation)
    hyper = OFF._replace(max_grad_norm=1e9)  # clipped gradients of two losses that differ by a factor are equal
    (whole, one), (parts, four) = (
        half(choice)(begin(), drawn(), scored(drawn()), hyper)
        for choice in (ppo, dataclasses.replace(ppo, accumulate=4))
    )
    assert_close(whole.opt_state, parts.opt_state, rtol=1e-3, atol=1e-6)
    for name in ("policy_loss", "value_loss", "entropy", "loss"):
        assert numbers(one)[name] == pytest.approx(numbers(four)[name], rel=1e-4, abs=1e-6)
    tokens, _ = half(toy.ONCE)(begin(), drawn(), scored(drawn()), hyper)
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), tokens.opt_state.policy.mu, whole.opt_state.policy.mu)
    assert max(map(float, jax.tree.leaves(difference))) > 1e-5, "it is another loss"


def test_adafactor_is_optax_s():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(130, 140)), jnp.float32), "b": jnp.zeros(3)}
    ours = make_optimizer(OptimizerConfig(kind="adafactor"))
    theirs = optax.adafactor(1.0, multiply_by_parameter_scale=False, clipping_threshold=1.0)
    states = [ours.init(params), theirs.init(params)]
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        left, states[0] = ours.update(grads, states[0], params)
        right, states[1] = theirs.update(grads, states[1], params)
        assert_close(left, jax.tree.map(jnp.negative, right), rtol=1e-5)


@pytest.mark.parametrize("config", [OptimizerConfig(kind="adafactor"), OptimizerConfig(eps_placement="tensorflow1")])
def test_other_optimizers_run_in_the_same_step(config):
    ppo = dataclasses.replace(FOUR, optimizer=config)
    state, metrics = half(ppo)(begin(ppo), drawn(), scored(drawn()), OFF)
    assert numbers(metrics)["nonfinite_updates"] == 0
    assert np.abs(state.policy.adapter["lora"]["q"].b - begin(ppo).policy.adapter["lora"]["q"].b).max() > 1e-4


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_table_of_metrics_and_the_program_have_the_same_names():
    table = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    seen: set[str] = set()
    filtered = PPOConfig(sampling=TOP_3, behaviour="importance", epochs=1, num_minibatches=1)
    everything = (
        (FOUR, False),
        (filtered, False),
        (dataclasses.replace(filtered, behaviour="filtered"), False),
        (dataclasses.replace(FOUR, kl=KLConfig(estimator="full")), False),
        (dataclasses.replace(toy.ONCE, kl=KLConfig(estimator="k2", place="loss")), True),
    )
    for ppo, pretrain in everything:
        rollout = drawn(FOUR)
        seen |= set(jax.eval_shape(half(ppo, pretrain), begin(), rollout, scored(rollout), OFF)[1])
    seen = {re.sub(r"epoch_\d+", "epoch_E", name) for name in seen} - {"reward/half"} | {"reward/NAME"}
    timed = {"seconds", "tokens_per_second", "rollout_seconds", "reward_seconds", "learn_seconds"}
    assert documented == seen | timed
