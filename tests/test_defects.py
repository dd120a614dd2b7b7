"""The 21 defects of other PPO libraries that this one must never have (DESIGN, section 10), and which tests see them.

Those here look where a defect would act, mostly at a whole step: rollout -> experience -> update.
"""

import ast
import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
from ppo_jax.models.files.families import config_from_hf, config_to_hf
from ppo_jax.models.transformer import apply
from ppo_jax.ops.rewards import RunningMoments
from ppo_jax.rollout import Sampling
from ppo_jax.runs.checkpoints import store
from ppo_jax.train.experience import Reference, make_experience, prepare_scores
from ppo_jax.train.metrics import experience_metrics
from ppo_jax.train.options import KLConfig, PPOConfig, ScoreConfig
from ppo_jax.train.ppo import collect
from ppo_jax.types import Collected, Experience, Rollout, Scores
from tests.models.tiny import CONFIG as TINY
from tests.models.tiny import LLAMA3, random_params
from tests.train import toy
from tests.train.test_ppo_experience import SCORES, learner, rollout, scores, start
from tests.train.toy import FROZEN, HYPER, PAD, STOP, T, numbers

HERE = "tests.test_defects"
# What would fail, by module: the tests here, and those at home that look at a whole step already or at a part.
DEFECTS: dict[str, dict[str, list[str]]] = {
    "whitened rewards leak through padding into GAE": {
        HERE: ["test_defect_01_whitened_rewards_leak_through_padding_into_gae"],
        "tests.ops.test_rewards": ["test_defect_1_whitened_rewards_do_not_leak_through_padding"],
        "tests.ops.test_advantages": ["test_defect_1_more_padding_changes_nothing"],
    },
    "scores are cast to integers": {
        HERE: ["test_defect_02_scores_cast_to_integers"],
        "tests.ops.test_rewards": ["test_defect_2_scores_keep_their_fractions"],
    },
    "the same sampling key in every step, micro-batch or device": {
        "tests.test_rollout": [
            "test_defect_3_keys_rows_and_steps_draw_differently",
            "test_row_b_step_t_draws_with_its_own_key",
            "test_eight_devices_draw_the_same_tokens",
        ],
        "tests.train.test_ppo": ["test_each_step_draws_with_a_key_of_its_own"],
    },
    "the same permutation in every epoch or update": {
        "tests.train.test_ppo_update": ["test_every_epoch_and_update_visits_all_rows_once_in_an_order_of_its_own"],
        "tests.train.test_ppo_experience": ["test_each_iteration_shuffles_with_a_key_of_its_own"],
    },
    "old and reference log-probs at different temperatures": {
        "tests.train.test_ppo": ["test_first_minibatch_sees_ratio_1_and_an_equal_reference_has_kl_0"],
        "tests.test_rollout": ["test_defect_5_log_probs_and_values_are_those_of_a_teacher_forced_pass"],
    },
    "EOS is stripped or masked, so stopping is never learned": {
        HERE: ["test_defect_06_eos_stripped_or_masked_so_stopping_is_never_learned"],
        "tests.test_rollout": ["test_defect_6_a_response_ends_with_its_stop_token"],
        "tests.train.test_ppo": ["test_learns_to_stop"],
        "tests.train.test_ppo_update": ["test_the_last_token_of_a_response_is_trained_like_the_first"],
    },
    "the score is placed on a pad": {
        HERE: ["test_defect_07_score_placed_on_a_pad"],
        "tests.ops.test_rewards": ["test_defect_7_the_score_is_never_on_a_pad"],
    },
    "the score is shifted by a sampled pad id inside the response": {
        HERE: ["test_defect_08_score_shifted_by_a_sampled_pad_id_inside_the_response"],
        "tests.ops.test_rewards": ["test_defect_8_a_sampled_pad_id_does_not_move_the_score"],
        "tests.test_rollout": ["test_defects_7_and_8_a_sampled_pad_id_is_a_token_like_any_other"],
    },
    "the ratio is identically 1, because old log-probs are recomputed": {
        "tests.train.test_ppo": ["test_old_logprobs_are_the_rollouts_so_later_ratios_differ_from_1"],
    },
    "dropout is active while collecting": {
        HERE: ["test_defect_10_dropout_active_while_collecting"],
        "tests.train.test_ppo": ["test_first_minibatch_sees_ratio_1_and_an_equal_reference_has_kl_0"],
    },
    "metrics are averaged over pads or sentinel values": {
        HERE: ["test_defect_11_metrics_averaged_over_pads_or_sentinel_values"],
        "tests.ops.test_losses": [
            "test_defect_11_values_outside_the_mask_reach_neither_loss_nor_gradient_nor_metrics",
        ],
    },
    "num_minibatches adds no optimizer steps": {
        "tests.train.test_ppo": ["test_optimizer_steps_are_epochs_times_minibatches"],
    },
    "score normalisation with one sample turns it into 0": {
        HERE: ["test_defect_13_score_normalisation_with_one_sample_turning_it_into_0"],
        "tests.ops.test_rewards": ["test_defect_13_one_sample_does_not_become_0"],
    },
    "whitening with n <= 1 valid tokens or zero variance gives NaN": {
        HERE: ["test_defect_14_whitening_with_one_valid_token_or_no_variance_gives_nan"],
        "tests.ops.test_masked": ["test_defect_14_whitening_without_variance_is_finite"],
    },
    "the loss depends on micro-batching": {
        "tests.train.test_ppo_update": ["test_gradient_does_not_depend_on_micro_batches"],
        "tests.train.test_choices_of_steps": ["test_micro_batches_add_up_under_every_aggregation"],
        "tests.ops.test_losses": ["test_defect_15_micro_batches_sum_to_the_whole"],
    },
    "gradient clipping is silently absent": {
        "tests.train.test_ppo_update": [
            "test_gradients_are_clipped_by_their_global_norm",
            "test_the_step_is_the_learning_rate_times_what_the_optimizer_returns",
        ],
    },
    "rope_theta or RoPE scaling is ignored": {HERE: ["test_defect_17_rope_theta_or_rope_scaling_ignored"]},
    "part of the state is missing from the checkpoint": {
        HERE: ["test_defect_18_part_of_the_state_missing_from_the_checkpoint"],
        "tests.runs.test_ppo": ["test_a_run_killed_twice_and_resumed_is_the_run_that_was_not"],
    },
    "a failed reward counts as 0": {
        HERE: ["test_defect_19_a_failed_reward_counted_as_0"],
        "tests.train.test_ppo_experience": ["test_a_failed_score_is_as_if_the_row_were_not_there"],
        "tests.ops.test_rewards": ["test_defect_19_a_failed_reward_has_an_empty_mask_and_leaves_no_trace"],
    },
    "log-probs of the unfiltered distribution under top-k or top-p": {
        HERE: ["test_defect_20_log_probs_of_the_unfiltered_distribution_under_top_k"],
        "tests.train.test_choices": ["test_defect_20_a_filtered_policy_has_a_kl_that_is_not_negative"],
    },
    "`fmin` or `nan_to_num` hides a NaN": {
        HERE: ["test_defect_21_fmin_or_nan_to_num_hiding_a_nan"],
        "tests.train.test_ppo_update": ["test_a_nan_inside_the_mask_is_not_hidden"],
        "tests.train.test_ppo_experience": ["test_a_nan_score_that_claims_to_be_valid_shows"],
    },
}
ONE_STEP = PPOConfig(sampling=toy.SAMPLING, epochs=1, num_minibatches=1)


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_seen_by_a_test_that_is_collected(defect: str) -> None:
    assert len(DEFECTS) == 21
    for module, names in DEFECTS[defect].items():
        there = vars(importlib.import_module(module))
        assert not [name for name in names if not callable(there.get(name))]


def experience(given: Rollout, reward: Scores | None = None, kl_coef: float = 0.3, **options: object) -> Experience:
    """`make_experience` beside a reference whose log-probs are those of the rollout less 0.1."""
    ppo = PPOConfig(sampling=toy.SAMPLING, **options)
    reward = scores() if reward is None else reward
    algorithm, reference = toy.algorithm(ppo), Reference(given.policy_logprobs - 0.1)
    return make_experience(algorithm, Collected(given), reward, reference, HYPER._replace(kl_coef=kl_coef))


def padded(given: Rollout, garbage: float, extra: int = 3) -> Rollout:
    """More response slots, and `garbage` in every number that no mask covers."""
    wide = lambda x: jnp.pad(x, ((0, 0), (0, extra)))
    mask = wide(given.response_mask)
    floats = {
        name: jnp.where(mask, wide(getattr(given, name)), garbage) for name in ("logprobs", "policy_logprobs", "values")
    }
    return given._replace(tokens=wide(given.tokens), response_mask=mask, **floats)


@functools.cache
def sampler(sampling: Sampling):
    algorithm = toy.algorithm(PPOConfig(sampling=sampling))
    return jax.jit(lambda state, prompts, hyper: collect(algorithm, state, FROZEN, prompts, hyper))


def draw(state=None, sampling: Sampling = toy.SAMPLING, hyper=HYPER) -> Rollout:
    return sampler(sampling)(toy.moved(toy.start()) if state is None else state, toy.prompts(), hyper)


def test_defect_01_whitened_rewards_leak_through_padding_into_gae():
    """Whitened rewards leak through padding into GAE."""
    whitened = {"score": ScoreConfig(whiten_rewards="shift")}
    short = experience(rollout(), **whitened)
    for garbage in (0.0, np.nan):
        long = experience(padded(rollout(), garbage), **whitened)
        for name in ("advantages", "returns"):
            left, right = (np.asarray(getattr(x.batch, name)) for x in (short, long))
            np.testing.assert_allclose(right[:, :T], left, rtol=1e-5, atol=1e-6)
            assert not right[:, T:].any()
    # The shortest row is one token, whose advantage is its own whitened reward less its value, and nothing behind it.
    plain = np.asarray(short.rewards)[np.asarray(short.batch.loss_mask)].astype(np.float64)
    alone = experience(rollout(), whiten_advantages=False, **whitened)
    expected = (float(short.rewards[1, 0]) - plain.mean()) / plain.std(ddof=1) - float(rollout().values[1, 0])
    assert float(alone.batch.advantages[1, 0]) == pytest.approx(expected, rel=1e-4)


def test_defect_02_scores_cast_to_integers():
    """Scores cast to integers."""
    found = experience(rollout(), kl_coef=0.0)
    np.testing.assert_allclose(found.rewards.sum(axis=1), SCORES, rtol=1e-6)
    whole = scores()._replace(reward=jnp.asarray([2, -1, 0, 3, 1, 5]))  # nor do integers make the penalty one
    found = experience(rollout(), whole)
    lengths = np.asarray(rollout().response_mask).sum(axis=1)
    np.testing.assert_allclose(found.rewards.sum(axis=1), whole.reward - 0.03 * lengths, rtol=1e-4)


def test_defect_06_eos_stripped_or_masked_so_stopping_is_never_learned():
    """EOS stripped or masked, so stopping is never learned."""
    found = draw()
    mask, actions = np.asarray(found.response_mask), np.asarray(found.tokens[:, -T:])
    ended = np.asarray(found.terminated)
    last = mask.sum(axis=1) - 1
    rows = np.arange(len(mask))
    assert ended.any() and (actions[rows, last] == STOP)[ended].all()
    made = experience(found, scores(np.ones(toy.B)))
    assert np.asarray(made.batch.loss_mask)[rows, last].all()  # what the loss does with it: test_ppo_update


def score_positions(given: Rollout) -> list[tuple[int, ...]]:
    """Where each row of rewards is not 0 when there is no penalty."""
    rewards = np.asarray(experience(given, scores(np.ones(len(given.tokens))), kl_coef=0.0).rewards)
    return [tuple(np.flatnonzero(row)) for row in rewards]


def test_defect_07_score_placed_on_a_pad():
    """Score placed on a pad."""
    lengths = np.asarray(rollout().response_mask).sum(axis=1)
    assert lengths.min() == 1 and score_positions(rollout()) == [(n - 1,) for n in lengths]
    assert score_positions(padded(rollout(), 0.0)) == [(n - 1,) for n in lengths]


def test_defect_08_score_shifted_by_a_sampled_pad_id_inside_the_response():
    """Score shifted by a sampled pad id inside the response."""
    expected = score_positions(rollout())
    everywhere = rollout()._replace(tokens=jnp.full_like(rollout().tokens, PAD))
    assert (rollout().tokens[:, -T:] == PAD)[np.asarray(rollout().response_mask)].any()
    assert score_positions(everywhere) == expected
    # The sampler, too, goes on after a pad id: it pads with an id that it may sample, here the likeliest.
    busy = int(np.bincount(np.asarray(draw().tokens[:, -T:])[np.asarray(draw().response_mask)]).argmax())
    other = draw(sampling=Sampling(response_length=T, stop_ids=(STOP,), pad_id=busy))
    np.testing.assert_array_equal(other.response_mask, draw().response_mask)


def test_defect_10_dropout_active_while_collecting():
    """Dropout active while collecting: the only randomness is the choice of the token."""
    greedy = HYPER._replace(temperature=0.0)
    state = toy.moved(toy.start())
    first, second = (draw(state.replace(key=jax.random.key(seed)), hyper=greedy) for seed in (1, 2))
    for name in ("tokens", "logprobs", "values"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_defect_11_metrics_averaged_over_pads_or_sentinel_values():
    """Metrics averaged over pads or sentinel values."""
    run = lambda given: numbers(learner(ONE_STEP)(start(), FROZEN, given, scores(), HYPER)[1])
    expected = run(rollout())
    for garbage in (1.0, 1e6):
        toy.assert_close(run(padded(rollout(), garbage, extra=0)), expected, rtol=1e-4, atol=1e-5)


def test_defect_13_score_normalisation_with_one_sample_turning_it_into_0():
    """Score normalisation with one sample turning it into 0."""
    for how in ("scale", "shift"):
        algorithm = toy.algorithm(PPOConfig(score=ScoreConfig(normalise=how)))
        made, moments = prepare_scores(algorithm, scores([0.7]), rollout(1), RunningMoments.init(), HYPER)
        assert float(made.reward[0]) == pytest.approx(0.7)
        made, _ = prepare_scores(algorithm, scores([0.7]), rollout(1), moments, HYPER)  # one more, equal to the first
        assert np.isfinite(made.reward).all()


@pytest.mark.parametrize("how", ["off", "scale", "shift"])
def test_defect_14_whitening_with_one_valid_token_or_no_variance_gives_nan(how):
    """Whitening with n <= 1 valid tokens or zero variance giving NaN."""
    one = rollout(2)._replace(response_mask=jnp.zeros((2, T), bool).at[0, 0].set(True))
    flat = rollout()._replace(values=jnp.zeros((6, T)), response_mask=jnp.ones((6, T), bool))
    for given, reward in ((one, scores([0.5, 0.5])), (flat, scores(np.zeros(6)))):
        made = experience(given, reward, kl_coef=0.0, score=ScoreConfig(whiten_rewards=how))
        for array in (made.batch.advantages, made.batch.returns):
            assert np.isfinite(array).all()
        assert not np.asarray(made.batch.advantages).any()  # 0, and not noise of size 1


def test_defect_17_rope_theta_or_rope_scaling_ignored():
    """rope_theta or RoPE scaling ignored."""
    raw = config_to_hf(TINY) | {"rope_theta": 500.0}
    params, tokens = random_params(TINY), jnp.arange(3, 33)[None]
    run = lambda config: np.asarray(apply(params, {}, config, tokens, jnp.arange(30)[None]))
    scaled = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = LLAMA3.original_max_positions
    linear = {"rope_type": "linear", "factor": 4.0}
    configs = [config_from_hf(raw | change) for change in ({}, {"rope_theta": 1e4}, {"rope_scaling": scaled})]
    configs.append(config_from_hf(raw | {"rope_scaling": linear}))
    outputs = [run(config) for config in configs]
    for i, left in enumerate(outputs):
        for right in outputs[:i]:
            assert np.abs(left - right).max() > 1e-2


def test_defect_18_part_of_the_state_missing_from_the_checkpoint(tmp_path: Path):
    """Value head, KL coefficient, running moments, PRNG key or data cursor missing from the checkpoint."""
    ppo = PPOConfig(
        sampling=toy.SAMPLING, epochs=1, num_minibatches=1,
        kl=KLConfig(control="adaptive"), score=ScoreConfig(normalise="shift"),
    )  # fmt: skip
    fresh = start()
    state, _ = learner(ppo)(fresh, FROZEN, rollout(), scores(), HYPER)
    for name in ("policy.value_head", "kl_coef", "moments", "step", "opt_state", "baseline"):
        old, new = (functools.reduce(getattr, name.split("."), x) for x in (fresh, state))
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), old, new)
        assert not all(jax.tree.leaves(same)), f"{name} has not changed, so this test says nothing of it"
    with store.open_manager(tmp_path) as manager:
        store.save(manager, 1, state)
    other = state.replace(**jax.tree.map(jnp.zeros_like, {"step": state.step, "kl_coef": state.kl_coef}))
    other = other.replace(key=jax.random.key(99), policy=fresh.policy, moments=fresh.moments)
    restored, _ = store.restore(tmp_path, other)
    toy.assert_close(restored, state, rtol=0, atol=0)
    follow = [learner(ppo)(x, FROZEN, rollout(), scores(SCORES[::-1]), HYPER)[0] for x in (restored, state)]
    toy.assert_close(*follow, rtol=0, atol=0)  # and the next step is the step that would have come


def test_defect_19_a_failed_reward_counted_as_0():
    """A failed reward counted as 0."""
    options = {"score": ScoreConfig(whiten_rewards="shift")}
    failed = scores([*SCORES[:-1], np.nan], [True] * 5 + [False])
    made, without = experience(rollout(), failed, **options), experience(rollout(5), scores(SCORES[:-1]), **options)
    for name in ("advantages", "returns", "loss_mask"):
        left, right = (np.asarray(getattr(x.batch, name)) for x in (made, without))
        np.testing.assert_allclose(left[:5], right, rtol=1e-5, atol=1e-6)
        assert not left[5].any()  # no row of the loss, and in no mean of the others
    zero = experience(rollout(), scores([*SCORES[:-1], 0.0]), **options)
    assert np.abs(np.asarray(zero.batch.advantages - made.batch.advantages)[:5]).max() > 1e-3
    moments = RunningMoments.init().update(failed.reward, failed.valid)
    assert float(moments.mean) == pytest.approx(SCORES[:-1].mean(), rel=1e-5)


def test_defect_20_log_probs_of_the_unfiltered_distribution_under_top_k():
    """Top-k/top-p sampling with log-probs of the unfiltered distribution makes the KL estimate negative: both are
    kept, the ratio and the KL are of one policy, and the mismatch is reported."""
    sampling = Sampling(response_length=T, stop_ids=(STOP,), pad_id=PAD, top_k=2)
    found = draw(sampling=sampling)
    mask = np.asarray(found.response_mask)
    gap = np.asarray(found.logprobs - found.policy_logprobs)[mask]
    assert gap.min() >= -1e-5 and gap.mean() > 0.1  # at least as likely to be drawn as the policy says
    algorithm, reference = toy.algorithm(PPOConfig(sampling=sampling)), found.policy_logprobs
    made = make_experience(algorithm, Collected(found), scores(np.ones(toy.B)), Reference(reference), HYPER)
    np.testing.assert_allclose(np.asarray(made.kl)[mask], 0, atol=1e-6)  # the reference is the policy itself
    np.testing.assert_array_equal(made.batch.logprobs, found.policy_logprobs)
    metrics = experience_metrics(algorithm, made, found, made.scores, reference, HYPER)
    assert numbers(metrics)["behaviour_mismatch"] == pytest.approx(gap.mean(), rel=1e-3)


def test_defect_21_fmin_or_nan_to_num_hiding_a_nan():
    """`fmin`/`nan_to_num` hiding a NaN."""
    hiding = {"nan_to_num", "fmin", "fmax", "nanmean", "nansum", "nanmax", "nanmin", "nanstd", "nanvar"}
    for path in (Path(ppo_jax.__file__).parent / folder for folder in ("ops", "models", "train")):
        for file in path.glob("*.py"):
            used = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
            assert not used & hiding, f"{file.name} uses {used & hiding}"
