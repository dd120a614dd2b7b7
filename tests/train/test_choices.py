"""Every option of PPO at work, what it changes and what it leaves alone: KL, filters, scores, advantages."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.roles import before_response, role_hidden
from ppo_jax.ops.kl import kl_full
from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.rollout import Sampling
from ppo_jax.train.objective import Counts, count_units, ppo_loss
from ppo_jax.train.options import KLConfig, PPOConfig, ScoreConfig
from tests.train import toy
from tests.train.choices import FOUR, OFF, TOP_3, begin, drawn, experience, half, scored
from tests.train.toy import CONFIG, FROZEN, HYPER, assert_close, numbers

# -- KL --------------------------------------------------------------------------------------------------------------


def logits_of(adapter, rollout, temperature=0.7):
    hidden = before_response(role_hidden(FROZEN.base, adapter, CONFIG, rollout.tokens, rollout.mask), toy.T)
    return hidden @ FROZEN.base["unembedding"].T / temperature


def test_the_full_estimator_is_the_kl_over_the_vocabulary():
    rollout, ppo = drawn(), dataclasses.replace(FOUR, kl=KLConfig(estimator="full"))
    expected = kl_full(logits_of(begin().policy.adapter, rollout), logits_of({}, rollout))
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(np.asarray(experience(ppo).kl)[mask], np.asarray(expected)[mask], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", [pytest.param("k2", marks=pytest.mark.long), "k3", "full"])
def test_a_kl_in_the_loss_leaves_the_reward_alone_and_adds_its_gradient(estimator):
    """Against the gradient of the same mean, written out from logits."""
    ppo = dataclasses.replace(toy.ONCE, kl=KLConfig(estimator=estimator, place="loss"), whiten_advantages=False)
    rollout, policy = drawn(), begin().policy
    result = experience(ppo)
    assert_close(jnp.sum(result.rewards, axis=1), scored(rollout).reward)
    mask, count = rollout.response_mask, jnp.sum(rollout.response_mask, dtype=jnp.float32)

    def ours(adapter, kl_coef):
        hyper = OFF._replace(vf_coef=0.0, kl_coef=kl_coef)
        return ppo_loss(
            policy._replace(adapter=adapter), toy.algorithm(ppo), FROZEN, result.batch, Counts(count), hyper
        )[0]

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


def test_the_entropy_under_a_filter_is_of_the_tokens_that_it_leaves():
    """By hand: -sum p log p over the 3 largest, averaged over the tokens that the moved policy can still sample."""
    sampling = dataclasses.replace(TOP_3, min_p=0.0)
    ppo = PPOConfig(sampling=sampling, behaviour="filtered", epochs=1, num_minibatches=1)
    rollout, algorithm = drawn(ppo), toy.algorithm(ppo)
    batch, policy = experience(ppo, rollout).batch, toy.moved(begin(), scale=0.3).policy
    run = jax.jit(lambda policy, batch: ppo_loss(policy, algorithm, FROZEN, batch, count_units(algorithm, batch), OFF))
    _, metrics = run(policy, batch)
    found = np.asarray(logits_of(policy.adapter, rollout))
    largest = np.sort(found, axis=-1)[..., -3:]
    shares = np.exp(largest) / np.exp(largest).sum(-1, keepdims=True)
    entropies = -(shares * np.log(shares)).sum(-1)
    taken = np.take_along_axis(found, np.asarray(batch.tokens)[:, -toy.T :, None], -1)[..., 0]
    real = np.asarray(batch.loss_mask)
    inside = real & (taken >= largest[..., 0])
    values = numbers(metrics)
    assert values["outside_filter"] == pytest.approx(1 - inside.sum() / real.sum()) and 0 < inside.sum() < real.sum()
    assert values["entropy"] == pytest.approx(entropies[inside].mean(), rel=1e-4)


def test_the_loss_in_the_log_is_weighed_by_tokens():
    """Of two steps with different numbers of tokens it is not the mean of the two losses."""
    algorithm, batch = toy.algorithm(FOUR), experience(FOUR, drawn()).batch
    long = np.argsort(np.asarray(batch.loss_mask).sum(1))
    parts = [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in (long[:8], long[8:])]
    policy = toy.moved(begin()).policy
    run = jax.jit(lambda batch: ppo_loss(policy, algorithm, FROZEN, batch, count_units(algorithm, batch), OFF))
    losses, metrics = zip(*map(run, parts), strict=True)
    tokens = [int(part.loss_mask.sum()) for part in parts]
    assert tokens[0] < tokens[1]
    found = numbers(jax.tree.map(jnp.add, *metrics))["loss"]
    assert found == pytest.approx(np.average(losses, weights=tokens), rel=1e-5)
    assert abs(found - np.mean(losses)) > 1e-4


@pytest.mark.parametrize("estimator", [pytest.param("k2", marks=pytest.mark.long), "k3"])
def test_a_token_that_leaves_the_filter_spoils_no_gradient(estimator):
    """Its log-prob is -1e30, whose exponential in k3 has no finite gradient."""
    kl = KLConfig(estimator=estimator, place="loss")
    ppo = PPOConfig(sampling=TOP_3, behaviour="filtered", epochs=3, num_minibatches=1, kl=kl)
    rollout = drawn(ppo)
    _, metrics = half(ppo)(begin(), rollout, scored(rollout), OFF._replace(learning_rate=0.1))
    values = numbers(metrics)
    assert values["outside_filter"] > 0 and values["nonfinite_updates"] == 0
    assert values["entropy"] <= np.log(3) + 1e-6  # top 3


def test_a_number_that_is_not_finite_spoils_no_controller():
    """The step is left out; coefficient, moments and baseline are as they were, so the next batch can be learned."""
    ppo = dataclasses.replace(FOUR, kl=KLConfig(control="adaptive"))
    rollout = drawn()
    broken = rollout._replace(policy_logprobs=rollout.policy_logprobs.at[0, 0].set(np.nan))
    state, metrics = half(ppo)(begin(), broken, scored(rollout), OFF)
    assert numbers(metrics)["nonfinite_updates"] > 0
    assert float(state.kl_coef) == np.float32(0.05) and np.isfinite(state.baseline.mean)
    state, metrics = half(ppo)(state, rollout, scored(rollout), OFF)
    assert numbers(metrics)["nonfinite_updates"] == 0 and np.isfinite(state.kl_coef)


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
    loss, _ = ppo_loss(
        begin().policy, toy.algorithm(ppo), FROZEN, result.batch, Counts(count), OFF._replace(vf_coef=0.0)
    )
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


@pytest.mark.parametrize("whiten", [pytest.param("scale", marks=pytest.mark.long), "shift"])
def test_the_baseline_of_reinforce_is_on_the_scale_of_what_it_is_subtracted_from(whiten: str):
    """Scores far from 0 with whitened rewards: after one batch the advantages of an equal batch have mean 0."""
    ppo = PPOConfig(
        sampling=toy.SAMPLING, advantage="reinforce", whiten_advantages=False, epochs=1, num_minibatches=1,
        score=ScoreConfig(whiten_rewards=whiten),
    )  # fmt: skip
    rollout, hyper = drawn(), OFF._replace(kl_coef=0.0, learning_rate=1e-9)
    far = scored(rollout)._replace(reward=50 + scored(rollout).reward)
    state, _ = half(ppo)(begin(), rollout, far, hyper)
    advantages = experience(ppo, rollout, far, OFF, kl_coef=0.0, baseline=state.baseline.mean).batch.advantages[:, 0]
    assert abs(float(jnp.mean(advantages))) < 1e-3 * float(jnp.std(advantages))


def test_whitened_reinforce_only_divides():
    """The baseline is what is subtracted; the scale is the std over the tokens of the batch."""
    ppo = PPOConfig(sampling=toy.SAMPLING, advantage="reinforce", epochs=1, num_minibatches=1)
    plain = experience(dataclasses.replace(ppo, whiten_advantages=False), baseline=0.5).batch
    mask = np.asarray(plain.loss_mask)
    expected = np.asarray(plain.advantages)[mask] / np.asarray(plain.advantages)[mask].std(ddof=1)
    np.testing.assert_allclose(
        np.asarray(experience(ppo, baseline=0.5).batch.advantages)[mask], expected, rtol=1e-4, atol=1e-6
    )


def test_reinforce_plus_plus_whitens_rewards_to_go():
    ppo = PPOConfig(sampling=toy.SAMPLING, advantage="reinforce++", epochs=1, num_minibatches=1)
    result = experience(ppo)
    mask = np.asarray(result.batch.loss_mask)
    to_go = np.cumsum(np.asarray(result.rewards)[:, ::-1], axis=1)[:, ::-1][mask]
    expected = (to_go - to_go.mean()) / to_go.std(ddof=1)
    np.testing.assert_allclose(np.asarray(result.batch.advantages)[mask], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "advantage", ["rloo", *(pytest.param(name, marks=pytest.mark.long) for name in ("reinforce", "reinforce++"))]
)
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
