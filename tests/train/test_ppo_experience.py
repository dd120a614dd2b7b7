"""From scores to the next state: against torch, with failed scores, with the KL controller."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.train.experience import Reference, make_experience, share_prefix
from ppo_jax.train.optimizer import OptimizerConfig, make_optimizer
from ppo_jax.train.options import KLConfig, PPOConfig, ScoreConfig
from ppo_jax.train.ppo import learn
from ppo_jax.train.state import Groups, groups, init_state
from ppo_jax.types import Collected, Frozen, Policy, Rollout, Scores, Texts
from tests.train import toy
from tests.train.toy import CONFIG, FROZEN, PAD, STOP, assert_close, numbers

B, P, T = 6, 3, 5
HYPER = toy.HYPER._replace(
    learning_rate=0.02, kl_coef=0.3, gamma=0.97, lam=0.9, clip_low=0.05, clip_high=0.08, value_clip=0.05,
    vf_coef=0.4, entropy_coef=0.02, max_grad_norm=0.5, kl_target=0.8, kl_horizon=50.0,
)  # fmt: skip


def rollout(rows: int = B, seed: int = 0) -> Rollout:
    """Made by hand: responses of 1 to T tokens, some of them stopped, with pad ids in the middle (defect 8)."""
    rng = np.random.default_rng(seed)
    prompt_mask = np.arange(P) >= P - rng.integers(1, P + 1, B)[:, None]
    lengths = np.array([5, 1, 3, 5, 2, 4])
    response_mask = np.arange(T) < lengths[:, None]
    tokens = rng.integers(3, CONFIG.vocab_size, (B, P + T))
    tokens[:, P:][~response_mask] = PAD
    tokens[2, P + 1] = tokens[5, P] = PAD  # sampled
    terminated = np.array([False, True, True, False, True, False])
    tokens[np.flatnonzero(terminated), P + lengths[terminated] - 1] = STOP
    logprobs = rng.normal(-2, 0.4, (B, T)) * response_mask
    values = rng.normal(0, 0.5, (B, T)) * response_mask
    whole = Rollout(
        jnp.asarray(tokens, jnp.int32), jnp.asarray(prompt_mask), jnp.asarray(response_mask),
        jnp.asarray(logprobs, jnp.float32), jnp.asarray(logprobs, jnp.float32), jnp.asarray(values, jnp.float32),
        jnp.asarray(terminated), jnp.arange(B),
    )  # fmt: skip
    return jax.tree.map(lambda x: x[:rows], whole)


SCORES = np.array([0.7, -0.4, 0.25, 1.6, -1.1, 0.45], np.float32)  # integers of them would be 0, 0, 0, 1, -1, 0


def scores(values=SCORES, valid=None) -> Scores:
    values = jnp.asarray(values, jnp.float32)
    valid = jnp.ones(values.shape, bool) if valid is None else jnp.asarray(valid)
    return Scores(values, valid, {"part": values * 2})


@functools.cache
def learner(ppo: PPOConfig):
    """`learn` with the unembedding and the value head trained: the hidden states stay, and torch can do the rest."""
    algorithm = toy.algorithm(ppo)

    def run(state, frozen, rollout, scores, hyper):
        collected = share_prefix(algorithm, state.policy, frozen, rollout)
        return learn(algorithm, state, frozen, collected, scores, hyper)

    return jax.jit(run)


def start():
    rng = np.random.default_rng(5)
    table = FROZEN.base["unembedding"] + jnp.asarray(rng.normal(0, 0.1, FROZEN.base["unembedding"].shape), jnp.float32)
    state = init_state(jax.random.key(0), {"unembedding": table}, CONFIG, make_optimizer(), HYPER.kl_coef)
    return state.replace(policy=Policy(state.policy.adapter, toy.noisy(state.policy.value_head, seed=2)))


EPOCHS = PPOConfig(
    sampling=toy.SAMPLING,
    epochs=3,
    num_minibatches=1,
    score=ScoreConfig(whiten_rewards="scale"),
    kl=KLConfig(control="adaptive"),
)


def by_torch(rollout: Rollout, hyper, epochs: int) -> dict:
    """PPO on this rollout as the papers write it, row by row and token by token, in float64."""

    def double(x) -> torch.Tensor:
        return torch.from_numpy(np.array(x, np.float64))

    state = start()
    hidden = double(apply(FROZEN.base, {}, CONFIG, rollout.tokens, positions_from_mask(rollout.mask)))[:, P - 1 : -1]
    actions = torch.from_numpy(np.array(rollout.tokens[:, P:], np.int64))
    lengths = [int(n) for n in np.asarray(rollout.response_mask).sum(axis=1)]
    tokens = [(b, t) for b in range(len(lengths)) for t in range(lengths[b])]  # what counts

    def distribution(table: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(hidden @ table.T / hyper.temperature, dim=-1)

    old, values = double(rollout.policy_logprobs), double(rollout.values)
    reference = distribution(double(FROZEN.base["unembedding"])).gather(-1, actions[..., None])[..., 0]
    kl = old - reference
    rewards = torch.zeros(len(lengths), T, dtype=torch.float64)
    for b, t in tokens:
        rewards[b, t] = -hyper.kl_coef * kl[b, t] + (double(SCORES)[b] if t == lengths[b] - 1 else 0)
    plain = torch.stack([rewards[i] for i in tokens])
    scaled = {i: (rewards[i] - plain.mean()) / torch.sqrt(plain.var() + 1e-8) + plain.mean() for i in tokens}

    advantages, returns = {}, {}
    for b, length in enumerate(lengths):
        for t in range(length):  # the definition: a discounted sum of the deltas that follow
            total = 0.0
            for later in range(t, length):
                next_value = values[b, later + 1] if later + 1 < length else 0.0
                delta = scaled[b, later] + hyper.gamma * next_value - values[b, later]
                total = total + (hyper.gamma * hyper.lam) ** (later - t) * delta
            advantages[b, t], returns[b, t] = total, total + values[b, t]
    flat = torch.stack([advantages[i] for i in tokens])
    white = {i: (advantages[i] - flat.mean()) / torch.sqrt(flat.var() + 1e-8) for i in tokens}

    table = double(state.policy.adapter["unembedding"]).requires_grad_()
    weight = double(state.policy.value_head["value"]["kernel"][:, 0]).requires_grad_()
    bias = double(state.policy.value_head["value"]["bias"][0]).requires_grad_()
    adam = torch.optim.Adam([table, weight, bias], lr=hyper.learning_rate)
    log: dict[str, list] = {name: [] for name in ("policy_loss", "value_loss", "entropy", "ratio", "clip", "norm")}
    for _ in range(epochs):
        logs = distribution(table)
        new, new_values = logs.gather(-1, actions[..., None])[..., 0], hidden @ weight + bias
        policy_terms, value_terms, entropies, ratios, clipped = [], [], [], [], []
        for i in tokens:
            ratio = torch.exp(new[i] - old[i])
            bounded = min(max(ratio, torch.tensor(1 - hyper.clip_low)), torch.tensor(1 + hyper.clip_high))
            policy_terms.append(-min(ratio * white[i], bounded * white[i]))
            clipped.append(float(bounded * white[i] < ratio * white[i]))
            step = torch.clamp(new_values[i] - values[i], -hyper.value_clip, hyper.value_clip)
            value_terms.append(0.5 * max((new_values[i] - returns[i]) ** 2, (values[i] + step - returns[i]) ** 2))
            entropies.append(-(logs[i].exp() * logs[i]).sum())
            ratios.append(ratio.detach())
        policy_loss, value_loss, entropy = (torch.stack(x).mean() for x in (policy_terms, value_terms, entropies))
        loss = policy_loss + hyper.vf_coef * value_loss - hyper.entropy_coef * entropy
        adam.zero_grad()
        loss.backward()
        log["norm"].append(float(torch.nn.utils.clip_grad_norm_([table, weight, bias], hyper.max_grad_norm)))
        adam.step()
        for name, value in (("policy_loss", policy_loss), ("value_loss", value_loss), ("entropy", entropy)):
            log[name].append(float(value.detach()))
        log["ratio"].append(float(torch.stack(ratios).mean()))
        log["clip"].append(float(np.mean(clipped)))
    target = torch.stack([returns[i] for i in tokens])
    rest = torch.stack([returns[i] - values[i] for i in tokens])
    return {
        "table": table.detach().numpy(), "weight": weight.detach().numpy(), "bias": float(bias.detach()),
        "kl": float(sum(kl[i] for i in tokens)) / len(lengths), "shaped": float(plain.sum()) / len(lengths),
        "explained": float(1 - rest.var() / target.var()), "return": float(target.mean()), "log": log,
    }  # fmt: skip


def test_three_updates_equal_a_plain_torch_program():
    """Rewards, whitening, GAE, both clipped losses, entropy, clipping of the gradient and Adam, from log-probs on."""
    state, metrics = learner(EPOCHS)(start(), FROZEN, rollout(), scores(), HYPER)
    expected, values = by_torch(rollout(), HYPER, EPOCHS.epochs), numbers(metrics)
    log = {name: float(np.mean(column)) for name, column in expected["log"].items()}
    assert max(expected["log"]["norm"]) > HYPER.max_grad_norm, "the clip is at work"
    assert 0 < log["clip"] < 1
    np.testing.assert_allclose(state.policy.adapter["unembedding"], expected["table"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        state.policy.value_head["value"]["kernel"][:, 0], expected["weight"], rtol=1e-3, atol=1e-4
    )
    assert float(state.policy.value_head["value"]["bias"][0]) == pytest.approx(expected["bias"], rel=1e-3)
    for name, value in {
        "policy_loss": log["policy_loss"],
        "value_loss": log["value_loss"],
        "entropy": log["entropy"],
        "ratio": log["ratio"],
        "clip_fraction": log["clip"],
        "grad_norm": log["norm"],
        "kl": expected["kl"],
        "shaped_reward": expected["shaped"],
        "explained_variance": expected["explained"],
        "return": expected["return"],
        "reward": SCORES.mean(),  # defect 2: not of integers
        "reward_std": SCORES.std(ddof=1),
        "reward/part": 2 * SCORES.mean(),
        "response_length": 20 / 6,
        "eos_rate": 3 / 6,
        "invalid_scores": 0.0,
        "learning_rate": 0.02,
    }.items():
        assert values[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


def test_the_kl_coefficient_adapts_and_is_state():
    """Ziegler et al. 2019: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon), n the batch's episodes."""
    state, run = start(), learner(EPOCHS)
    coefficient = HYPER.kl_coef
    for target in (0.01, 100.0, 0.8):
        # The coefficient that shapes the rewards is the state's, whatever hyper.kl_coef says after the start.
        state, metrics = run(state, FROZEN, rollout(), scores(), HYPER._replace(kl_target=target, kl_coef=9.0))
        values = numbers(metrics)
        assert values["kl_coef"] == pytest.approx(coefficient, rel=1e-6)
        kl_sum = values["reward"] - values["shaped_reward"]
        assert kl_sum == pytest.approx(coefficient * values["kl"], rel=1e-4)
        coefficient *= 1 + min(max(values["kl"] / target - 1, -0.2), 0.2) * B / HYPER.kl_horizon
        assert float(state.kl_coef) == pytest.approx(coefficient, rel=1e-6)


FIXED = PPOConfig(sampling=toy.SAMPLING, epochs=2, num_minibatches=1, score=ScoreConfig(whiten_rewards="scale"))


def test_a_fixed_kl_coefficient_is_hypers():
    state, metrics = learner(FIXED)(start(), FROZEN, rollout(), scores(), HYPER._replace(kl_coef=0.125))
    assert numbers(metrics)["kl_coef"] == float(state.kl_coef) == 0.125


def test_a_failed_score_is_as_if_the_row_were_not_there():
    """Defect 19: not in a metric, the whitening, an advantage, a gradient or the state; and never a 0."""
    with_it, measured = learner(FIXED)(
        start(), FROZEN, rollout(), scores([*SCORES[:-1], np.nan], [True] * 5 + [False]), HYPER
    )
    without, expected = learner(FIXED)(start(), FROZEN, rollout(B - 1), scores(SCORES[:-1]), HYPER)
    assert_close(with_it, without, rtol=1e-4, atol=1e-6)
    values, expected = numbers(measured), numbers(expected)
    assert values.pop("invalid_scores") == pytest.approx(1 / 6)
    assert expected.pop("invalid_scores") == 0
    assert_close(values, expected, rtol=1e-4, atol=1e-6)

    zero, _ = learner(FIXED)(start(), FROZEN, rollout(), scores([*SCORES[:-1], 0.0]), HYPER)
    assert np.abs(zero.policy.adapter["unembedding"] - with_it.policy.adapter["unembedding"]).max() > 1e-4


def test_a_nan_score_that_claims_to_be_valid_shows():
    """Defect 21: no number is made up in its place; the row counts as invalid, and as nothing else."""
    claimed, metrics = learner(FIXED)(start(), FROZEN, rollout(), scores([*SCORES[:-1], np.nan]), HYPER)
    admitted, expected = learner(FIXED)(
        start(), FROZEN, rollout(), scores([*SCORES[:-1], np.nan], [True] * 5 + [False]), HYPER
    )
    assert numbers(metrics)["invalid_scores"] == pytest.approx(1 / 6)
    assert_close(claimed, admitted, rtol=0, atol=0)
    assert_close(numbers(metrics), numbers(expected), rtol=0, atol=0)


def test_when_every_score_failed_nothing_is_learned_or_measured():
    state, metrics = learner(FIXED)(start(), FROZEN, rollout(), scores([np.nan] * B, [False] * B), HYPER)
    assert_close(state.policy, start().policy, rtol=0, atol=0)
    values = numbers(metrics)
    assert values["invalid_scores"] == 1
    assert values["grad_norm"] == 0
    for name in ("reward", "reward_std", "explained_variance", "kl", "policy_loss", "response_length"):
        assert name not in values, f"{name} has a count of 0"


def test_when_every_score_failed_neither_momentum_nor_weight_decay_nor_texts_move_the_policy():
    """After a good batch Adam's momentum alone would make a step of about the learning rate."""
    ppo = dataclasses.replace(FIXED, num_minibatches=2, optimizer=OptimizerConfig(weight_decay=0.1))
    algorithm, texts = toy.algorithm(ppo), Texts(rollout().tokens, jnp.ones(rollout().tokens.shape, bool))

    @jax.jit
    def run(state, scores):
        collected = share_prefix(algorithm, state.policy, FROZEN, rollout(), texts)
        return learn(algorithm, state, FROZEN, collected, scores, HYPER._replace(ptx_coef=0.5))

    first = start()
    first = first.replace(opt_state=Groups(*map(algorithm.optimizer.init, groups(first.policy))))
    good, _ = run(first, scores())
    after, metrics = run(good, scores([np.nan] * B, [False] * B))
    assert_close(after.policy, good.policy, rtol=0, atol=0)
    assert_close(after.opt_state, good.opt_state, rtol=0, atol=0)
    assert numbers(metrics)["unscored_updates"] == 1 and numbers(metrics)["nonfinite_updates"] == 0
    one_valid, metrics = run(good, scores(valid=np.arange(B) == 2))
    assert numbers(metrics)["unscored_updates"] == 0.5  # the minibatch without that row
    assert optax.tree.norm(jax.tree.map(jnp.subtract, one_valid.policy, good.policy)) > 1e-3


def test_each_iteration_shuffles_with_a_key_of_its_own():
    """Defect 4, across updates: same state, same rollout, another step, and the rows come in another order."""
    ppo = PPOConfig(sampling=toy.SAMPLING, epochs=2, num_minibatches=B)
    keep = optax.GradientTransformation(
        lambda policy: (jnp.zeros((), jnp.int32), jnp.zeros(2 * B)),
        lambda grads, state, policy=None: (grads, (state[0] + 1, state[1].at[state[0]].set(optax.tree.norm(grads)))),
    )

    @jax.jit
    def norms(state):
        hyper = HYPER._replace(learning_rate=0.0, max_grad_norm=1e9)
        after, _ = learn(toy.algorithm(ppo, keep), state, FROZEN, Collected(rollout()), scores(), hyper)
        return after.opt_state.policy[1]

    state = start().replace(opt_state=Groups(keep.init(None), keep.init(None)))
    first, again, later = norms(state), norms(state), norms(state.replace(step=state.step + 1))
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - later)) > 1e-3
    np.testing.assert_allclose(np.sort(first), np.sort(later), rtol=1e-4)  # the same rows, though


@pytest.mark.parametrize("whiten", [True, False])
def test_experience_by_hand(whiten: bool):
    """One response of two tokens, gamma = lam = 1: A_t = (rewards from t on) - V_t.

    kl = (0.5, -0.25), coefficient 0.2, score 1: rewards (-0.1, 1.05); values (0.3, 0.6); so advantages
    (-0.1 + 1.05 - 0.3, 1.05 - 0.6) = (0.65, 0.45), returns (0.95, 1.05). Whitened: mean 0.55, unbiased
    std 0.1 sqrt(2), so (0.1, -0.1) / 0.141421 = (0.707107, -0.707107).
    """
    one = rollout(1)._replace(
        response_mask=jnp.asarray([[True, True, False, False, False]]),
        policy_logprobs=jnp.asarray([[-1.0, -2.0, np.nan, 0.0, 0.0]]),
        values=jnp.asarray([[0.3, 0.6, np.nan, 5.0, 0.0]]),
    )
    reference = jnp.asarray([[-1.5, -1.75, 0.0, np.nan, 0.0]])
    ppo = PPOConfig(sampling=toy.SAMPLING, whiten_advantages=whiten)
    hyper = HYPER._replace(gamma=1.0, lam=1.0, kl_coef=0.2)
    experience = make_experience(toy.algorithm(ppo), Collected(one), scores([1.0]), Reference(reference), hyper)
    advantages = [0.707107, -0.707107] if whiten else [0.65, 0.45]
    np.testing.assert_allclose(experience.rewards[0], [-0.1, 1.05, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(experience.batch.advantages[0], [*advantages, 0, 0, 0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(experience.batch.returns[0], [0.95, 1.05, 0, 0, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(experience.kl[0, :2], [0.5, -0.25], rtol=1e-6)


def test_scores_of_integers_are_taken_as_numbers():
    ints = Scores(jnp.asarray([3, -2, 1, 0, 5, 4]), jnp.ones(B, bool), {})
    algorithm, hyper = toy.algorithm(PPOConfig(sampling=toy.SAMPLING)), HYPER._replace(kl_coef=0.0)
    experience = make_experience(algorithm, Collected(rollout()), ints, Reference(jnp.zeros((B, T))), hyper)
    np.testing.assert_array_equal(experience.rewards.sum(axis=1), [3, -2, 1, 0, 5, 4])


def test_the_reward_that_is_frozen_with_the_base_is_not_needed():
    """A host reward leaves `Frozen.reward` empty."""
    state, _ = learner(FIXED)(start(), Frozen(FROZEN.base), rollout(), scores(), HYPER)
    assert int(state.step) == 1
