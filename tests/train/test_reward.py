"""Reward models: the loss pair by pair, that it learns, what it may be told, and the losses of choices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ppo_jax.models.adapters import first_layer
from ppo_jax.train.comparisons import bucket_texts, rated_batches, text_features
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.reward import RewardConfig, comparison_loss, init_role, make_reward_step, train_role
from tests.models.tiny import CONFIG
from tests.train.reward_toy import BASE, PAD, REWARD, TRUNK, comparisons, groups_of, role, scores_of, texts
from tests.train.toy import assert_close


def test_loss_is_the_mean_over_the_ordered_pairs():
    rng = np.random.default_rng(3)
    better = (rng.random((5, 5)) < 0.4) & ~np.eye(5, dtype=bool)
    margin = rng.uniform(0, 1, (5, 5))
    batch = comparisons(better, margin)
    scores = np.asarray(scores_of(BASE, role(), TRUNK, batch.tokens, batch.mask), np.float64)
    terms, right = [], []
    for i, j in zip(*np.nonzero(better), strict=True):
        terms.append(np.log1p(np.exp(-(scores[i] - scores[j] - margin[i, j]))))
        right.append(scores[i] > scores[j])
    loss, metrics = jax.jit(comparison_loss, static_argnums=2)(role(), BASE, TRUNK, batch)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-4)
    assert {name: float(count) for name, (_, count) in metrics.items()} == dict.fromkeys(metrics, len(terms))
    assert float(metrics["loss"][0]) == pytest.approx(np.sum(terms), rel=1e-4)
    assert float(metrics["accuracy"][0]) == sum(right)


def test_a_batch_without_a_pair_has_loss_and_gradient_0():
    step = make_reward_step(TRUNK, optax.sgd(1.0))
    before = role()
    after, _, metrics = step(role(), optax.sgd(1.0).init(before), BASE, comparisons(np.zeros((5, 5), bool)), 1.0)
    assert_close(after, before, rtol=0, atol=0)
    assert float(metrics["loss"][1]) == 0 and float(metrics["grad_norm"][0]) == 0


@functools.cache
def trained() -> tuple:
    """60 steps on a task that can be separated: of two texts, the one with token 5 is better."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(10, CONFIG.vocab_size, 6).tolist() for _ in range(40)]
    for row in rows[::2]:
        row[rng.integers(6)] = 5
    ratings = np.array([1.0, -1.0] * 20)
    buckets = bucket_texts(rows, [6], PAD)
    optimizer = make_optimizer()
    start = role()
    state, opt_state = jax.tree.map(jnp.copy, start), optimizer.init(start)
    step = make_reward_step(TRUNK, optimizer)
    losses = []
    for _ in range(15):
        for batch in rated_batches(buckets, ratings, 10, rng):
            state, opt_state, metrics = step(state, opt_state, BASE, batch, 1e-2)
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return start, state, losses, buckets[0], ratings, step


def test_learns_to_order_texts_and_leaves_the_normalisation_alone():
    start, end, losses, bucket, ratings, step = trained()
    assert np.mean(losses[-8:]) < 0.3 * np.mean(losses[:8])
    scores = np.asarray(scores_of(BASE, end, TRUNK, bucket.tokens, bucket.mask))
    by_place = ratings[bucket.index]
    assert np.mean(scores[by_place > 0][:, None] > scores[by_place < 0]) > 0.95
    for name in ("gain", "bias"):
        assert end.head[name] == start.head[name]
    for part in (lambda role: role.adapter, lambda role: role.head["reward"]):  # trained together
        pairs = zip(jax.tree.leaves(part(start)), jax.tree.leaves(part(end)), strict=True)
        assert min(float(jnp.abs(a - b).max()) for a, b in pairs) > 1e-3
    assert step._cache_size() == 1


def test_reward_gradients_are_clipped():
    batch = comparisons(np.triu(np.ones((5, 5), bool), 1))
    (grads, _) = jax.grad(comparison_loss, has_aux=True)(role(), BASE, TRUNK, batch)
    norm = float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves((grads.adapter, grads.head["reward"])))))
    limit = norm / 4
    after, _, metrics = make_reward_step(TRUNK, optax.identity(), limit)(role(), optax.EmptyState(), BASE, batch, 1.0)
    assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-4)
    expected = role().head["reward"]["kernel"] - grads.head["reward"]["kernel"] / 4
    assert_close(after.head["reward"]["kernel"], expected, rtol=1e-4)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_fresh_role_equals_the_base_and_touches_the_top_of_its_trunk():
    fresh = init_role(jax.random.key(0), CONFIG, REWARD)
    assert TRUNK.num_layers == 2 and first_layer(fresh.adapter, TRUNK) == 1
    buckets = bucket_texts(texts(), [9], PAD)
    bare = text_features(BASE, fresh._replace(adapter={}), TRUNK, buckets, 11)
    np.testing.assert_allclose(text_features(BASE, fresh, TRUNK, buckets, 11), bare, rtol=1e-5, atol=1e-6)
    assert init_role(jax.random.key(0), CONFIG, dataclasses.replace(REWARD, lora_layers=0)).adapter == {}
    assert RewardConfig(lora_layers=3).trunk(CONFIG).num_layers == CONFIG.num_layers


def test_a_dora_role_measures_the_layers_of_its_trunk():
    reward = dataclasses.replace(REWARD, dora=True)
    fresh, plain = (init_role(jax.random.key(0), CONFIG, one, BASE) for one in (reward, REWARD))
    assert TRUNK.num_layers == 2
    for name, update in fresh.adapter["lora"].items():
        np.testing.assert_allclose(update.magnitude, np.linalg.norm(BASE["layers"][name][1:2], axis=1), rtol=1e-6)
    buckets = bucket_texts(texts(), [9], PAD)
    found, expected = (text_features(BASE, role, TRUNK, buckets, 11) for role in (fresh, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="dora=True is a form of kind=lora"):
        RewardConfig(kind="full", dora=True)


def test_more_layers_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="reward.depth=4: the base has 3 layers"):
        RewardConfig(depth=4).trunk(CONFIG)


@pytest.mark.parametrize(("depth", "first"), [(0, 0), (1, 0)])
def test_lora_layers_is_at_most_the_depth(depth: int, first: int):
    reward = RewardConfig(depth=depth, lora_layers=6)
    fresh = init_role(jax.random.key(0), CONFIG, reward)
    assert first_layer(fresh.adapter, reward.trunk(CONFIG)) == first


@pytest.mark.parametrize(
    "fields",
    [
        {"depth": -1},
        {"epochs": -1},
        {"head_steps": -1},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"max_grad_norm": -1.0},
        {"centring": -0.1},
        {"head_l2": float("nan")},
        {"rank": 0},
    ],
)
def test_impossible_settings_name_the_field(fields: dict):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name}={fields[name]}"):
        RewardConfig(**fields)


@pytest.mark.parametrize("fields", [{"lora_layers": 0}, {"epochs": 0}, {"kind": "full", "epochs": 0}])
def test_a_head_that_nothing_would_train_is_an_error(fields: dict):
    with pytest.raises(ValueError, match="head_steps=0 leaves the head untrained"):
        RewardConfig(head_steps=0, **fields)


# -- other losses ------------------------------------------------------------------------------------------------------


def test_best_of_n_is_softmax_cross_entropy():
    """Against torch's cross_entropy on the scores of each group."""
    batch = comparisons(groups_of(3, 2, 4))
    scores = np.asarray(scores_of(BASE, role(), TRUNK, batch.tokens, batch.mask))
    parts = [torch.from_numpy(np.array(part)) for part in np.split(scores, [3, 5])]
    expected = [float(torch.nn.functional.cross_entropy(part[None], torch.tensor([0]))) for part in parts]
    loss, metrics = comparison_loss(role(), BASE, TRUNK, batch, loss="best")
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-4)
    assert [float(x) for x in metrics["loss"]] == pytest.approx([np.sum(expected), 3], rel=1e-4)
    wins = sum(int(part.argmax() == 0) for part in parts)
    assert [float(x) for x in metrics["best_accuracy"]] == [wins, 3]
    assert float(metrics["accuracy"][1]) == 2 + 1 + 3


def test_best_of_two_is_the_pairwise_loss():
    batch = comparisons(groups_of(2, 2, 2))
    (best, _), (pairwise, _) = (comparison_loss(role(), BASE, TRUNK, batch, loss=x) for x in ("best", "pairwise"))
    assert float(best) == pytest.approx(float(pairwise), rel=1e-5)


@pytest.mark.parametrize("loss", ["pairwise", "best"])
def test_centring_adds_the_squared_sum_of_the_two_scores(loss: str):
    batch = comparisons(groups_of(3, 2))
    scores = np.asarray(scores_of(BASE, role(), TRUNK, batch.tokens, batch.mask), np.float64)
    sums = [scores[i] + scores[j] for i, j in np.argwhere(groups_of(3, 2))]
    plain, _ = comparison_loss(role(), BASE, TRUNK, batch, loss=loss)
    centred, metrics = comparison_loss(role(), BASE, TRUNK, batch, loss=loss, centring=0.3)
    assert float(centred - plain) == pytest.approx(0.3 * np.mean(np.square(sums)), rel=1e-3)
    assert float(metrics["centre"][0]) == pytest.approx(np.sum(np.square(sums)), rel=1e-4)


def test_centring_holds_the_scores_around_0():
    """The same training from a head whose scores lie around 20, with and without."""
    batch = comparisons(groups_of(2, 2, 2, 2))
    optimizer = make_optimizer()
    ends = []
    for centring in (0.0, 0.1):
        state = role()
        state = state._replace(head=state.head | {"bias": jnp.asarray(20.0), "gain": jnp.ones(())})
        step, opt_state = make_reward_step(TRUNK, optimizer, 100.0, centring=centring), optimizer.init(state)
        for _ in range(60):
            state, opt_state, _ = step(state, opt_state, BASE, batch, 3e-2)
        ends.append(np.abs(np.asarray(scores_of(BASE, state, TRUNK, batch.tokens, batch.mask))).mean())
    assert ends[1] < 0.3 * ends[0]


def test_a_loss_that_is_not_finite_stops_the_training():
    broken = BASE | {"embedding": BASE["embedding"] * jnp.nan}
    batch = comparisons(groups_of(5))
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan; lower the learning rate"):
        train_role(role(), broken, TRUNK, REWARD, lambda _: batch, 3, lambda *_: None)


def test_training_writes_every_step_and_ends_at_learning_rate_0():
    """A batch in which nothing is ordered has no loss, and does not stop it."""
    seen = []
    batches = [comparisons(groups_of(5)), comparisons(np.zeros((5, 5), bool)), comparisons(groups_of(5))]
    train_role(role(), BASE, TRUNK, REWARD, batches.__getitem__, 3, lambda step, values: seen.append((step, values)))
    assert [step for step, _ in seen] == [1, 2, 3] and np.isnan(seen[1][1]["loss"]) and seen[2][1]["loss"] > 0


def test_the_full_kind_trains_a_copy_and_reads_no_base():
    config = dataclasses.replace(REWARD, kind="full", lora_layers=0)
    whole = init_role(jax.random.key(0), CONFIG, config, BASE)
    assert whole.adapter["layers"]["q"].shape[0] == 2 and "unembedding" not in whole.adapter
    batch = comparisons(groups_of(5))
    bare = whole._replace(adapter={})
    loss = [float(comparison_loss(r, b, TRUNK, batch)[0]) for r, b in ((whole, {}), (bare, BASE))]
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)
    grads = jax.grad(lambda r: comparison_loss(r, {}, TRUNK, batch)[0])(whole)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads.adapter)) > 0
