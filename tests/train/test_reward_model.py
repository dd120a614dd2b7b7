"""Reward models: the loss pair by pair, the head's fit against torch, buckets that lose no text, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.models.adapters import first_layer
from ppo_jax.rewards.adapter import score_tokens
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.reward_model import (
    RewardConfig,
    comparison_loss,
    fit_head,
    init_role,
    make_reward_step,
    normalise_head,
    train_role,
)
from ppo_jax.train.reward_texts import (
    Comparisons,
    bucket_texts,
    head_scores,
    keep_prefix,
    rated_batches,
    text_features,
)
from tests.models.tiny import CONFIG, random_params
from tests.train.toy import assert_close, noisy

BASE = random_params(CONFIG)
REWARD = RewardConfig(depth=2, lora_layers=1, rank=2, alpha=4.0, batch_size=4)
TRUNK = REWARD.trunk(CONFIG)
PAD = 0
scores_of = jax.jit(score_tokens, static_argnums=(2, 6))


def role():
    return noisy(init_role(jax.random.key(0), CONFIG, REWARD), scale=0.2)


def texts(count: int = 11, longest: int = 9, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, CONFIG.vocab_size, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def comparisons(better: np.ndarray, margin: np.ndarray | None = None) -> Comparisons:
    (bucket,) = bucket_texts(texts(len(better)), [9], PAD)
    margin = np.zeros(better.shape) if margin is None else margin
    arrays = (bucket.tokens, bucket.mask, better, margin.astype(np.float32))
    return Comparisons(*map(jnp.asarray, arrays))


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


# -- the head on fixed features ----------------------------------------------------------------------------------------


def features_and_pairs():
    rng = np.random.default_rng(2)
    features = (rng.normal(0, 1, (60, 5)) * [0.1, 1, 3, 10, 1] + [5, 0, -2, 0, 1]).astype(np.float32)
    quality = features @ np.array([4.0, 0.5, -0.3, 0.02, 0.0]) + rng.normal(0, 0.4, 60)
    i, j = rng.integers(60, size=(2, 300))
    i, j = i[i != j], j[i != j]
    return features, np.where(quality[i] > quality[j], i, j), np.where(quality[i] > quality[j], j, i)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_head_is_the_optimum_that_torch_finds(margin: float):
    """Same convex objective, another optimiser (L-BFGS), another precision (float64)."""
    features, better, worse = features_and_pairs()
    l2 = 0.02
    z = torch.from_numpy((features / (features.std(axis=0) + 1e-6)).astype(np.float64))
    w = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    margins = np.linspace(0, 2 * margin, len(better)).astype(np.float32)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        difference = (z[better] - z[worse]) @ w - torch.from_numpy(margins)
        loss = -torch.nn.functional.logsigmoid(difference).mean() + l2 * (w**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    assert w.grad.abs().max() < 1e-9
    head = fit_head(features, better, worse, l2, steps=1500, margin=margins)
    kernel = np.asarray(head["reward"]["kernel"])[:, 0] * (features.std(axis=0) + 1e-6)
    np.testing.assert_allclose(kernel, w.detach().numpy(), rtol=2e-3, atol=2e-3)


def test_head_reads_raw_features_and_its_scores_have_mean_0():
    features, better, worse = features_and_pairs()
    head = fit_head(features, better, worse, 1e-2, steps=300)
    scores = head_scores(head, features)
    assert abs(scores.mean()) < 1e-4
    assert np.mean(scores[better] > scores[worse]) > 0.85
    assert head["gain"] == 1


def test_normalised_scores_have_mean_0_and_std_1():
    features, better, worse = features_and_pairs()
    head = fit_head(features, better, worse, 1e-2, steps=50) | {"gain": jnp.asarray(3.0), "bias": jnp.asarray(-7.0)}
    scores = head_scores(head, features)
    normalised = head_scores(normalise_head(head, scores), features)
    assert abs(normalised.mean()) < 1e-4
    assert normalised.std(ddof=1) == pytest.approx(1, rel=1e-4)
    np.testing.assert_array_equal(np.argsort(normalised), np.argsort(scores))


@pytest.mark.parametrize("scores", [np.ones(5), np.array([1.0, np.nan, 2.0])])
def test_scores_without_a_spread_cannot_be_normalised(scores: np.ndarray):
    head = {"reward": {"kernel": jnp.ones((2, 1))}, "gain": jnp.ones(()), "bias": jnp.zeros(())}
    with pytest.raises(ValueError, match="standard deviation (0.0|nan)"):
        normalise_head(head, scores)


# -- texts of different lengths ----------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=20))
def test_every_text_is_in_exactly_one_bucket_the_shortest_that_fits(rows: list[list[int]]):
    lengths = [12, 3, 7]
    buckets = bucket_texts(rows, lengths, PAD)
    found = {}
    for bucket in buckets:
        assert bucket.tokens.shape == bucket.mask.shape
        for place, tokens, mask in zip(bucket.index, bucket.tokens, bucket.mask, strict=True):
            assert place not in found
            found[int(place)] = tokens[mask].tolist()
            assert mask.tolist() == sorted(mask, reverse=True), "padding on the right"
            assert len(mask) == min(length for length in lengths if length >= mask.sum())
    assert found == dict(enumerate(rows))
    sizes = [bucket.tokens.shape[1] for bucket in buckets]
    assert len(set(sizes)) == len(sizes), "one program a length"


@pytest.mark.parametrize(("rows", "sizes"), [([[1, 2], []], "0 to 2"), ([[1], [1, 2, 3, 4, 5]], "1 to 5")])
def test_texts_that_fit_no_bucket_are_refused(rows: list[list[int]], sizes: str):
    with pytest.raises(ValueError, match=rf"texts have {sizes} tokens; allowed are 1 to 4"):
        bucket_texts(rows, [2, 4], PAD)


def test_features_come_in_the_order_of_the_texts_and_a_kept_prefix_changes_nothing():
    rows = texts()
    buckets = bucket_texts(rows, [4, 9], PAD)
    assert len(buckets) == 2
    layers = first_layer(role().adapter, TRUNK)
    assert layers == 1
    kept = list(keep_prefix(BASE, TRUNK, buckets, layers, batch_size=4))
    assert [bucket.prefix.shape for bucket in kept] == [(*b.tokens.shape, CONFIG.hidden_size) for b in buckets]
    plain = text_features(BASE, role(), TRUNK, buckets, batch_size=4)
    np.testing.assert_allclose(text_features(BASE, role(), TRUNK, kept, 4, layers), plain, rtol=1e-4, atol=1e-5)
    scores = head_scores(role().head, plain)
    for i in (0, 5, 10):  # one text at a time, without padding
        tokens = jnp.asarray([rows[i]], jnp.int32)
        alone = scores_of(BASE, role(), TRUNK, tokens, jnp.ones(tokens.shape, bool))[0]
        assert scores[i] == pytest.approx(float(alone), rel=1e-4, abs=1e-5)


def test_a_prefix_of_no_layers_is_no_prefix():
    buckets = bucket_texts(texts(), [9], PAD)
    assert list(keep_prefix(BASE, TRUNK, buckets, 0, 4)) == buckets


def test_the_loss_from_kept_prefixes_is_the_loss():
    layers = first_layer(role().adapter, TRUNK)
    buckets = bucket_texts(texts(4), [9], PAD)
    kept = list(keep_prefix(BASE, TRUNK, buckets, layers, 4))
    ratings = np.array([1.0, 2.0, 3.0, 4.0])
    (plain,), (shared,) = (rated_batches(b, ratings, 4, np.random.default_rng(0)) for b in (buckets, kept))
    loss = jax.jit(jax.value_and_grad(comparison_loss, has_aux=True), static_argnums=2)
    assert_close(loss(role(), BASE, TRUNK, shared), loss(role(), BASE, TRUNK, plain), rtol=1e-3, atol=1e-5)


@given(st.integers(1, 23), st.integers(2, 6), st.integers(0, 99))
def test_batches_hold_every_text_and_compare_no_filler(count: int, size: int, seed: int):
    """Every pair of *different* texts of a batch that the ratings order is compared exactly once."""
    rng = np.random.default_rng(seed)
    rows = [[i + 1] * int(rng.integers(1, 5)) for i in range(count)]  # a text's first token names it
    ratings = rng.integers(0, 4, count).astype(float)
    batches = rated_batches(bucket_texts(rows, [2, 4], PAD), ratings, size, rng)
    seen: list[int] = []
    for batch in batches:
        names = np.asarray(batch.tokens)[:, 0] - 1
        better = np.asarray(batch.better)
        assert len(names) == size and not np.any(batch.margin)
        pairs = [(names[i], names[j]) for i, j in zip(*np.nonzero(better), strict=True)]
        members = set(names.tolist())
        assert sorted(pairs) == sorted((a, b) for a in members for b in members if ratings[a] > ratings[b])
        seen += members
    assert sorted(seen) == list(range(count))


def test_every_epoch_cuts_other_batches():
    buckets = bucket_texts(texts(20), [9], PAD)
    rng = np.random.default_rng(0)
    first, second = (rated_batches(buckets, np.arange(20.0), 4, rng) for _ in range(2))
    assert any(np.any(a.tokens != b.tokens) for a, b in zip(first, second, strict=True))


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_fresh_role_equals_the_base_and_touches_the_top_of_its_trunk():
    fresh = init_role(jax.random.key(0), CONFIG, REWARD)
    assert TRUNK.num_layers == 2 and first_layer(fresh.adapter, TRUNK) == 1
    buckets = bucket_texts(texts(), [9], PAD)
    bare = text_features(BASE, fresh._replace(adapter={}), TRUNK, buckets, 11)
    np.testing.assert_allclose(text_features(BASE, fresh, TRUNK, buckets, 11), bare, rtol=1e-5, atol=1e-6)
    assert init_role(jax.random.key(0), CONFIG, dataclasses.replace(REWARD, lora_layers=0)).adapter == {}
    assert RewardConfig(lora_layers=3).trunk(CONFIG).num_layers == CONFIG.num_layers


@pytest.mark.parametrize("fields", [{"depth": 4}, {"depth": 1, "lora_layers": 2}, {"lora_layers": 4}])
def test_more_layers_than_there_are_is_an_error(fields: dict):
    with pytest.raises(ValueError, match="lora_layers <= depth <= layers"):
        RewardConfig(**{"lora_layers": 1} | fields).trunk(CONFIG)


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


def groups_of(*sizes: int) -> np.ndarray:
    """The first row of each group is better than the rest of it."""
    better, start = np.zeros((sum(sizes), sum(sizes)), bool), 0
    for size in sizes:
        better[start, start + 1 : start + size] = True
        start += size
    return better


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


def test_the_head_is_fitted_to_choices_by_their_own_loss():
    """Against L-BFGS of torch on the cross-entropy of groups of 2 to 5, in float64."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(2, 6, 40)
    features = rng.normal(0, 1, (int(sizes.sum()), 4)).astype(np.float32)
    starts = np.cumsum(sizes) - sizes
    pairs = [(start, start + other) for start, size in zip(starts, sizes, strict=True) for other in range(1, size)]
    better, worse = np.array(pairs).T
    head = fit_head(features, better, worse, 0.02, steps=1500, loss="best")
    z = torch.from_numpy((features / (features.std(axis=0) + 1e-6)).astype(np.float64))
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        terms = [-torch.log_softmax(z[a : a + n] @ w, 0)[0] for a, n in zip(starts, sizes, strict=True)]
        loss = torch.stack(terms).mean() + 0.02 * (w**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    kernel = np.asarray(head["reward"]["kernel"])[:, 0] * (features.std(axis=0) + 1e-6)
    np.testing.assert_allclose(kernel, w.detach().numpy(), rtol=2e-3, atol=2e-3)


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


def test_features_of_equal_shapes_are_compiled_once(caplog: pytest.LogCaptureFixture):
    """A second measurement, of a role with other values, reuses the program of the first."""
    buckets = bucket_texts(texts(), [9], PAD)
    first = text_features(BASE, role(), TRUNK, buckets, batch_size=4)
    list(keep_prefix(BASE, TRUNK, buckets, 1, 4))
    other = jax.tree.map(lambda x: 2 * x, role())
    caplog.clear()
    with jax.log_compiles():
        assert not np.array_equal(first, text_features(BASE, other, TRUNK, buckets, batch_size=4))
        list(keep_prefix(BASE, TRUNK, buckets, 1, 4))
    assert not [record for record in caplog.records if "ompiling" in record.getMessage()]
