"""Every option of PPO at work: what it changes in an iteration, and what it leaves alone."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.adapters import init_lora
from ppo_jax.models.heads import score, value
from ppo_jax.ops.kl import kl_full
from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.rollout import Sampling, before_response, role_hidden
from ppo_jax.train.experience import consult_reference, critic_values, make_experience, rollout_prefix
from ppo_jax.train.optimizer import OptimizerConfig, make_optimizer
from ppo_jax.train.options import CriticConfig, KLConfig, PPOConfig, ScoreConfig
from ppo_jax.train.ppo import collect, learn, ppo_loss
from ppo_jax.train.state import init_state, value_head_of_reward
from ppo_jax.types import Experience, Scores, Texts
from tests.train import toy
from tests.train.toy import CONFIG, FROZEN, HYPER, assert_close, numbers

FOUR = PPOConfig(sampling=toy.SAMPLING, epochs=2, num_minibatches=2)
OFF = HYPER._replace(entropy_coef=0.0)


def critic_adapter(seed: int = 8):
    return toy.noisy(init_lora(jax.random.key(seed), CONFIG, 2, 4.0), seed)


def begin(ppo: PPOConfig = FOUR, **options):
    adapter = toy.ADAPTERS["lora above a shared prefix"]()
    state = init_state(jax.random.key(0), adapter, CONFIG, make_optimizer(ppo.optimizer), 0.05, **options)
    policy = state.policy._replace(adapter=toy.noisy(state.policy.adapter))
    return dataclasses.replace(state, policy=policy)


@functools.cache
def half(ppo: PPOConfig, pretrain: bool = False):
    """learn() on a fixed rollout with the toy's scores, jitted once per choice."""
    optimizer = make_optimizer(ppo.optimizer)

    def run(state, rollout, scores, hyper):
        prefix, _ = rollout_prefix(state.policy, FROZEN, rollout, CONFIG)
        more = texts(rollout.tokens.shape[0]) if pretrain else None
        return learn(state, FROZEN, rollout, scores, prefix, hyper, CONFIG, ppo, optimizer, more)

    return jax.jit(run)


@functools.cache
def drawn(ppo: PPOConfig = FOUR, temperature: float = 0.7):
    run = jax.jit(lambda state, prompts, hyper: collect(state, FROZEN, prompts, hyper, CONFIG, ppo))
    return run(begin(), toy.prompts(), HYPER._replace(temperature=temperature))


def scored(rollout) -> Scores:
    return toy.worth(FROZEN, rollout, None, 0)


def texts(rows: int) -> Texts:
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 7, rows)
    return Texts(
        jnp.asarray(rng.integers(0, CONFIG.vocab_size, (rows, 6)), jnp.int32),
        jnp.asarray(np.arange(6) < lengths[:, None]),
    )


def experience(ppo: PPOConfig, rollout=None, scores=None, hyper=OFF, kl_coef=0.1, **more) -> Experience:
    rollout = drawn() if rollout is None else rollout
    state = begin()
    prefix, depth = rollout_prefix(state.policy, FROZEN, rollout, CONFIG)
    reference = consult_reference(state.policy, FROZEN, rollout, prefix, depth, hyper, CONFIG, ppo)
    scores = scored(rollout) if scores is None else scores
    return make_experience(
        rollout, scores, reference.logprobs, prefix, jnp.float32(kl_coef), hyper, ppo, reference=reference, **more
    )


# -- KL --------------------------------------------------------------------------------------------------------------


def logits_of(adapter, rollout, temperature=0.7):
    hidden = before_response(role_hidden(FROZEN.base, adapter, CONFIG, rollout.tokens, rollout.mask), toy.T)
    return hidden @ FROZEN.base["unembedding"].T / temperature


def test_the_full_estimator_is_the_kl_over_the_vocabulary():
    rollout, ppo = drawn(), dataclasses.replace(FOUR, kl=KLConfig(estimator="full"))
    expected = kl_full(logits_of(begin().policy.adapter, rollout), logits_of({}, rollout))
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(np.asarray(experience(ppo).kl)[mask], np.asarray(expected)[mask], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_a_kl_in_the_loss_leaves_the_reward_alone_and_adds_its_gradient(estimator):
    """Against the gradient of the same mean, written out from logits."""
    ppo = dataclasses.replace(toy.ONCE, kl=KLConfig(estimator=estimator, place="loss"), whiten_advantages=False)
    rollout, policy = drawn(), begin().policy
    result = experience(ppo)
    assert_close(jnp.sum(result.rewards, axis=1), scored(rollout).reward)
    mask, count = rollout.response_mask, jnp.sum(rollout.response_mask, dtype=jnp.float32)

    def ours(adapter, kl_coef):
        loss, _ = ppo_loss(
            policy._replace(adapter=adapter),
            FROZEN,
            result.batch,
            count,
            OFF._replace(vf_coef=0.0),
            CONFIG,
            ppo,
            kl_coef,
        )
        return loss

    def by_hand(adapter):
        new, ref = logits_of(adapter, rollout), logits_of({}, rollout)
        actions = rollout.tokens[:, -toy.T :]
        d = token_logprobs(new, actions) - token_logprobs(ref, actions)
        terms = {"k2": d**2 / 2, "k3": jnp.exp(-d) - 1 + d, "full": kl_full(new, ref)}[estimator]
        return jnp.sum(jnp.where(mask, terms, 0)) / count

    with_it, without = (jax.grad(ours)(policy.adapter, jnp.float32(c)) for c in (2.0, 0.0))
    expected = jax.tree.map(lambda g: 2 * g, jax.grad(by_hand)(policy.adapter))
    assert_close(jax.tree.map(jnp.subtract, with_it, without), expected, rtol=1e-3, atol=1e-5)


def test_the_linear_coefficient_follows_the_step():
    ppo = dataclasses.replace(FOUR, kl=KLConfig(control="linear"))
    hyper = HYPER._replace(kl_coef=0.3, kl_coef_end=0.1, kl_steps=4.0)
    state = begin()
    for expected in (0.3, 0.25, 0.2, 0.15, 0.1, 0.1):
        state, metrics = half(ppo)(state, drawn(), scored(drawn()), hyper)
        assert numbers(metrics)["kl_coef"] == pytest.approx(expected, rel=1e-5)


# -- filters ---------------------------------------------------------------------------------------------------------

TOP_3 = Sampling(response_length=toy.T, stop_ids=(toy.STOP,), top_k=3, min_p=0.05)


def test_defect_20_a_filtered_policy_has_a_kl_that_is_not_negative():
    """The filtered distribution as the policy: its KL to the reference, sampled often, is that of the exact sums."""
    ppo = PPOConfig(sampling=TOP_3, behaviour="filtered", epochs=1, num_minibatches=1)
    rollout = drawn(ppo)
    result = experience(ppo, rollout)
    mask = np.asarray(rollout.response_mask)
    assert np.asarray(result.kl)[mask].mean() > 0
    np.testing.assert_array_equal(result.batch.logprobs, rollout.logprobs)
    _, metrics = half(ppo)(begin(), rollout, scored(rollout), OFF)
    values = numbers(metrics)
    assert values["ratio"] == pytest.approx(1, abs=1e-4), "one filter for sampler and loss"
    assert values["outside_filter"] == 0
    assert values["behaviour_mismatch"] > 0.01

    _, metrics = half(dataclasses.replace(ppo, epochs=3))(
        begin(), rollout, scored(rollout), OFF._replace(learning_rate=0.1)
    )
    values = numbers(metrics)
    assert 0 < values["outside_filter"] < 1 and math.isfinite(values["policy_loss"]) and values["ratio_max"] < 1e6


def test_importance_weights_are_truncated_and_weigh_the_loss():
    ppo = PPOConfig(sampling=TOP_3, behaviour="importance", epochs=1, num_minibatches=1)
    rollout = drawn(ppo)
    weights = np.asarray(experience(ppo, rollout, hyper=OFF._replace(importance_cap=0.9)).batch.weights)
    mask = np.asarray(rollout.response_mask)
    expected = np.exp(np.asarray(rollout.policy_logprobs - rollout.logprobs))
    np.testing.assert_allclose(weights[mask], np.minimum(expected, 0.9)[mask], rtol=1e-5)
    assert (weights[~mask] == 0).all() and (weights == np.float32(0.9)).any() and (weights[mask] < 0.9).any()

    # At the first step the ratio is 1, so the loss is minus the weighted mean of the advantages.
    result = experience(ppo, rollout)
    count = jnp.sum(rollout.response_mask, dtype=jnp.float32)
    loss, _ = ppo_loss(begin().policy, FROZEN, result.batch, count, OFF._replace(vf_coef=0.0), CONFIG, ppo)
    by_hand = -jnp.sum(result.batch.weights * result.batch.advantages) / count
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-3, abs=1e-5)


def test_a_repetition_penalty_spreads_tokens_and_is_logged():
    free = Sampling(response_length=12)
    held = dataclasses.replace(free, repetition_penalty=50.0)
    repeats = []
    for sampling in (free, held):
        rollout = drawn(PPOConfig(sampling=sampling), temperature=0.3)
        rows = np.asarray(rollout.tokens[:, -12:])
        repeats.append(np.mean([12 - len(set(row)) for row in rows.tolist()]))
        assert sampling.filtered == (np.abs(rollout.logprobs - rollout.policy_logprobs).max() > 1e-3)
    assert repeats[1] < repeats[0] - 1


# -- scores ----------------------------------------------------------------------------------------------------------


def test_running_moments_are_of_all_valid_scores_and_in_the_state():
    """Two batches: the state's moments are numpy's of both; a lone score is not turned into 0 (defect 13)."""
    ppo = dataclasses.replace(FOUR, score=ScoreConfig(normalise="shift"))
    rollout = drawn()
    first, second = scored(rollout), scored(rollout)._replace(valid=jnp.arange(toy.B) != 3)
    second = second._replace(reward=second.reward * 2 + 1)
    state, metrics = half(ppo)(begin(), rollout, first, OFF)
    raw = np.asarray(first.reward)
    assert numbers(metrics)["score"] == pytest.approx(0, abs=1e-5)
    assert numbers(metrics)["reward"] == pytest.approx(raw.mean(), rel=1e-5), "the log keeps the reward's own scale"
    state, _ = half(ppo)(state, rollout, second, OFF)
    seen = np.concatenate([raw, np.delete(np.asarray(second.reward), 3)])
    assert float(state.moments.mean) == pytest.approx(seen.mean(), rel=1e-5)
    assert float(state.moments.std) == pytest.approx(seen.std(ddof=1), rel=1e-5)

    one = scored(rollout)._replace(valid=jnp.arange(toy.B) == 0)
    _, metrics = half(ppo)(begin(), rollout, one, OFF)
    assert numbers(metrics)["score"] == pytest.approx(raw[0], rel=1e-5)


def test_penalties_reach_the_reward_of_cut_responses():
    ppo = dataclasses.replace(FOUR, score=ScoreConfig(missing_eos="subtract"))
    rollout = drawn()
    ended = np.asarray(rollout.terminated)
    assert 0 < ended.mean() < 1
    hyper = OFF._replace(missing_eos=4.0, length_penalty=0.25)
    _, metrics = half(ppo)(begin(), rollout, scored(rollout), hyper)
    lengths = np.asarray(rollout.response_mask).sum(axis=1)
    expected = np.asarray(scored(rollout).reward) - 0.25 * lengths - 4.0 * ~ended
    assert numbers(metrics)["score"] == pytest.approx(expected.mean(), rel=1e-4)


def test_rewards_of_single_tokens_add_to_the_score():
    rollout = drawn()
    extra = jnp.asarray(np.random.default_rng(0).normal(size=(toy.B, toy.T)), jnp.float32)
    with_it = experience(FOUR, scores=scored(rollout)._replace(tokens=extra)).rewards - experience(FOUR).rewards
    np.testing.assert_allclose(with_it, np.where(rollout.response_mask, extra, 0), atol=1e-5)
    broken = scored(rollout)._replace(tokens=extra.at[2, 0].set(np.nan))
    _, metrics = half(FOUR)(begin(), rollout, broken, OFF)
    assert numbers(metrics)["invalid_scores"] == pytest.approx(1 / toy.B)


@pytest.mark.parametrize("how", ["scale", "shift"])
def test_whitened_rewards(how):
    plain = experience(FOUR)
    mask = np.asarray(plain.batch.loss_mask)
    whitened = experience(dataclasses.replace(toy.ONCE, score=ScoreConfig(whiten_rewards=how), whiten_advantages=False))
    # With gamma = 1 the first return is A + V; lambda mixes, so compare the rewards that GAE must have read at lam = 1.
    exact = OFF._replace(lam=1.0)
    ppo = dataclasses.replace(toy.ONCE, score=ScoreConfig(whiten_rewards=how), whiten_advantages=False)
    whitened = experience(ppo, hyper=exact)
    rewards = np.asarray(plain.rewards)
    x = rewards[mask]
    scaled = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8) + (x.mean() if how == "scale" else 0)
    rewards = np.zeros_like(rewards)
    rewards[mask] = scaled
    to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(np.asarray(whitened.batch.returns)[mask], to_go[mask], rtol=1e-3, atol=1e-4)


def test_a_response_is_dropped_after_the_tokens_that_truncate_it():
    ids = (4, 5)
    whole, short = drawn(), drawn(dataclasses.replace(FOUR, score=ScoreConfig(truncate_ids=ids)))
    np.testing.assert_array_equal(whole.tokens, short.tokens)
    changed = 0
    for row, before, after, ended in zip(
        np.asarray(whole.tokens[:, -toy.T :]),
        np.asarray(whole.response_mask),
        np.asarray(short.response_mask),
        np.asarray(short.terminated),
        strict=True,
    ):
        at = [i for i in range(toy.T) if before[i] and row[i] in ids]
        assert after.sum() == (at[0] + 1 if at else before.sum())
        assert ended or not at
        changed += after.sum() < before.sum()
    assert changed > 2


# -- advantages ------------------------------------------------------------------------------------------------------


def test_a_group_is_responses_to_one_prompt_in_consecutive_rows():
    ppo = PPOConfig(sampling=toy.SAMPLING, advantage="rloo", group_size=4, epochs=1, num_minibatches=1)
    rollout = drawn(ppo)
    assert rollout.tokens.shape[0] == 4 * toy.B
    np.testing.assert_array_equal(rollout.index, np.repeat(np.arange(toy.B), 4))
    prompts = np.asarray(rollout.tokens[:, : toy.P]).reshape(toy.B, 4, -1)
    assert (prompts == prompts[:, :1]).all()
    responses = np.asarray(rollout.tokens[:, toy.P :]).reshape(toy.B, 4, -1)
    assert np.mean([len({tuple(r) for r in group}) for group in responses.tolist()]) > 2.5, "each draws by itself"


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo"])
def test_group_advantages_compare_whole_responses_kl_included(advantage):
    """By numpy: R = score - 0.1 * sum of KL; the same number for every token; nothing for a row that failed."""
    ppo = PPOConfig(sampling=toy.SAMPLING, advantage=advantage, group_size=4, epochs=1, num_minibatches=1)
    rollout = drawn(ppo)
    valid = np.arange(4 * toy.B) != 5
    scores = scored(rollout)._replace(valid=jnp.asarray(valid))
    result = experience(ppo, rollout, scores, kl_coef=0.1)
    mask = np.asarray(rollout.response_mask) & valid[:, None]
    totals = np.asarray(scores.reward) - 0.1 * np.where(mask, result.kl, 0).sum(axis=1)
    expected = np.zeros_like(totals)
    for group in range(toy.B):
        rows = [i for i in range(4 * group, 4 * group + 4) if valid[i]]
        r = totals[rows]
        expected[rows] = {
            "rloo": (r - r.mean()) * len(r) / (len(r) - 1),
            "grpo": (r - r.mean()) / (r.std() + 1e-8),
            "dr_grpo": r - r.mean(),
        }[advantage]
    np.testing.assert_allclose(result.batch.advantages, np.where(mask, expected[:, None], 0), rtol=1e-3, atol=1e-4)


def test_reinforce_subtracts_the_mean_of_earlier_returns():
    ppo = PPOConfig(sampling=toy.SAMPLING, advantage="reinforce", whiten_advantages=False, epochs=1, num_minibatches=1)
    rollout = drawn()
    state, _ = half(ppo)(begin(), rollout, scored(rollout), OFF._replace(kl_coef=0.0))
    mean = np.asarray(scored(rollout).reward).mean()
    assert float(state.baseline.mean) == pytest.approx(mean, rel=1e-4)
    after, metrics = half(ppo)(state, rollout, scored(rollout), OFF._replace(kl_coef=0.0))
    lengths = np.asarray(rollout.response_mask).sum(axis=1)
    expected = ((np.asarray(scored(rollout).reward) - mean) * lengths).sum() / lengths.sum()
    assert numbers(metrics)["advantage"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert float(after.baseline.count) == 2 * toy.B


def test_reinforce_plus_plus_whitens_rewards_to_go():
    ppo = PPOConfig(sampling=toy.SAMPLING, advantage="reinforce++", epochs=1, num_minibatches=1)
    result = experience(ppo)
    mask = np.asarray(result.batch.loss_mask)
    to_go = np.cumsum(np.asarray(result.rewards)[:, ::-1], axis=1)[:, ::-1][mask]
    expected = (to_go - to_go.mean()) / to_go.std(ddof=1)
    np.testing.assert_allclose(np.asarray(result.batch.advantages)[mask], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("advantage", ["rloo", "reinforce", "reinforce++"])
def test_without_a_critic_nothing_of_it_moves_or_is_logged(advantage):
    ppo = PPOConfig(
        sampling=toy.SAMPLING, advantage=advantage, group_size=2 if advantage == "rloo" else 1, num_minibatches=2
    )
    rollout = drawn(ppo)
    before = begin()
    after, metrics = half(ppo)(before, rollout, scored(rollout), OFF)
    assert_close(after.policy.value_head, before.policy.value_head, rtol=0, atol=0)
    assert np.abs(after.policy.adapter["lora"]["q"].b - before.policy.adapter["lora"]["q"].b).max() > 1e-4
    assert not {"value", "value_loss", "explained_variance", "critic_grad_norm"} & set(metrics)


# -- critic ----------------------------------------------------------------------------------------------------------


def test_a_critic_of_its_own_has_the_values_and_its_gradient_stays_there():
    ppo = dataclasses.replace(FOUR, critic=CriticConfig(own=True))
    head = toy.noisy(begin().policy.value_head)
    state = begin(ppo, critic=critic_adapter(), value_head=head)
    rollout = drawn()
    prefix, depth = rollout_prefix(state.policy, FROZEN, rollout, CONFIG)
    assert depth == 0, "the critic's adapter starts at layer 0"
    values, bootstrap = critic_values(state.policy, FROZEN, rollout, prefix, depth, CONFIG, False)
    hidden = role_hidden(FROZEN.base, state.policy.critic, CONFIG, rollout.tokens, rollout.mask)
    np.testing.assert_allclose(values, value(head, before_response(hidden, toy.T)), rtol=1e-4, atol=1e-5)
    assert bootstrap is None

    result = experience(dataclasses.replace(toy.ONCE, critic=ppo.critic), rollout._replace(values=values))
    batch = result.batch._replace(prefix=None)
    count = jnp.sum(rollout.response_mask, dtype=jnp.float32)

    def loss(policy, vf_coef):
        return ppo_loss(policy, FROZEN, batch, count, OFF._replace(vf_coef=vf_coef), CONFIG, ppo)[0]

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
    prefix, depth = rollout_prefix(policy, FROZEN, rollout, CONFIG)
    values, after = critic_values(policy, FROZEN, rollout, prefix, depth, CONFIG, True)
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
    one = half(FOUR)(begin(), drawn(), scored(drawn()), OFF)[1]
    assert numbers(one)["ratio_max"] > 1
    state, metrics = half(FOUR)(begin(), drawn(), scored(drawn()), OFF._replace(ratio_threshold=0.5))
    assert numbers(metrics)["ratio_skips"] == 1 and int(state.opt_state.policy.count) == 0
    assert_close(state.policy, begin().policy, rtol=0, atol=0)


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
        return ppo_loss(policy._replace(adapter=adapter), FROZEN, batch, count, hyper, CONFIG, toy.ONCE)[0]

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


@pytest.mark.parametrize("aggregation", ["sequence-mean", "constant"])
def test_micro_batches_add_up_under_every_aggregation(aggregation):
    """Defect 15, where the normaliser is not the number of tokens."""
    ppo = dataclasses.replace(toy.ONCE, aggregation=aggregation)
    (whole, one), (parts, four) = (
        half(choice)(begin(), drawn(), scored(drawn()), OFF) for choice in (ppo, dataclasses.replace(ppo, accumulate=4))
    )
    assert_close(whole.opt_state, parts.opt_state, rtol=1e-3, atol=1e-6)
    for name in ("policy_loss", "value_loss", "entropy", "loss"):
        assert numbers(one)[name] == pytest.approx(numbers(four)[name], rel=1e-4, abs=1e-6)
    tokens, _ = half(toy.ONCE)(begin(), drawn(), scored(drawn()), OFF)
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), tokens.opt_state.policy.mu, whole.opt_state.policy.mu)
    assert max(map(float, jax.tree.leaves(difference))) > 1e-5, "it is another loss"


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
