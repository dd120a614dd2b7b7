"""The reward head on fixed features, against torch, and the normalisation of its scores."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppo_jax.train.comparisons import head_scores
from ppo_jax.train.reward import fit_head, normalise_head


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


@pytest.mark.parametrize(("count", "strong"), [(8, 1), (512, 8)])
def test_a_planted_head_is_recovered_where_few_features_matter_and_their_means_are_large(count: int, strong: int):
    """Against Newton's method in float64 on the same objective; the means must not matter."""
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(400, count)) + rng.normal(0, 30, count)).astype(np.float32)
    planted = np.zeros(count)
    planted[:strong] = 6 / np.sqrt(strong)
    quality = features @ planted
    i, j = rng.integers(400, size=(2, 3000))
    likely = rng.random(3000) < 1 / (1 + np.exp(quality[j] - quality[i]))
    better, worse = np.where(likely, i, j)[i != j], np.where(likely, j, i)[i != j]
    l2 = 1e-3
    z = ((features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)).astype(np.float64)
    d, w = z[better] - z[worse], np.zeros(count)
    for _ in range(30):
        p = 1 / (1 + np.exp(d @ w))
        gradient = -d.T @ p / len(d) + 2 * l2 * w
        w -= np.linalg.solve((d * (p * (1 - p))[:, None]).T @ d / len(d) + 2 * l2 * np.eye(count), gradient)
    assert np.abs(gradient).max() < 1e-12
    head = fit_head(features, better, worse, l2, steps=300)
    kernel = np.asarray(head["reward"]["kernel"])[:, 0] * (features.std(axis=0) + 1e-6)
    assert np.abs(kernel - w).max() < 5e-3 * np.abs(w).max()


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
