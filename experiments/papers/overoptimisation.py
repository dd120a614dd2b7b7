"""Over-optimisation by best-of-n: proxies from few labels against a gold score, in the language of 24 words.

    python -m experiments.papers.overoptimisation

The gold score is good words less bad ones, less the squares of how often each word is repeated. A proxy is a logistic
regression on the counts of the words, which cannot see a repetition, from comparisons of the reference's responses
whose labels are drawn by Bradley and Terry's rule from the gold score. No network takes part: the reference is the
language itself.
"""

import functools
import math
from typing import Any

import numpy as np

from experiments.papers.records import Setting, Study, rounded, run_as_command
from experiments.papers.words import END, WORTH, P, T, make_chances, write_sentences

LABELS, SEEDS = (100, 300, 1000, 2000), range(5)
LARGEST, POINTS = 10_000, 25


def settings(toy: bool) -> list[Setting]:
    """One proxy each."""
    labels, seeds = (LABELS[:1], SEEDS[:2]) if toy else (LABELS, SEEDS)
    size = {"responses": 20_000 if toy else 400_000, "held_out": 4_000}
    return [{"labels": count, "seed": seed, **size} for count in labels for seed in seeds]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Proxy and gold score of the best of n by the proxy, in standard deviations of the reference, over KL."""
    counts, gold = draw_responses(setting["responses"])
    center, spread = gold.mean(), gold.std()
    rng = np.random.default_rng(setting["seed"])
    weights = fit_proxy(*draw_labels(counts, gold, setting["labels"], rng))
    proxy = counts @ weights
    proxy = (proxy - proxy.mean()) / proxy.std()
    pairs = rng.integers(0, len(gold), (setting["held_out"], 2))
    right = np.sign(proxy[pairs[:, 0]] - proxy[pairs[:, 1]]) == np.sign(gold[pairs[:, 0]] - gold[pairs[:, 1]])
    sizes = np.unique(np.geomspace(1, min(LARGEST, len(gold) // 20), POINTS).round().astype(int))
    order = np.argsort(proxy + 1e-9 * rng.random(len(proxy)))
    curves = [best_of(int(n), np.stack([proxy[order], (gold[order] - center) / spread])) for n in sizes]
    kl = [math.log(n) - (n - 1) / n for n in sizes]
    return rounded(
        {
            "n": sizes,
            "kl": kl,
            "proxy": [c[0] for c in curves],
            "gold": [c[1] for c in curves],
            "accuracy": right.mean(),
        }
    )


@functools.cache
def draw_responses(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the words, and the gold scores, of responses of the reference to prompts of two words."""
    sentences = write_sentences(make_chances(), 2 * count, np.random.default_rng(7))
    responses = sentences[sentences[:, P - 1] != END][:count, P : P + T]
    words = np.arange(1, len(WORTH))
    counts = np.stack([(responses == word).sum(axis=1) for word in words], axis=1).astype(np.float64)
    return counts, counts @ WORTH[1:] - (np.maximum(counts - 1, 0) ** 2).sum(axis=1)


def draw_labels(
    counts: np.ndarray, gold: np.ndarray, labels: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(differences of the counts, whether the first was preferred): P = sigmoid(difference of the gold scores)."""
    pairs = rng.integers(0, len(gold), (labels, 2))
    margin = gold[pairs[:, 0]] - gold[pairs[:, 1]]
    return counts[pairs[:, 0]] - counts[pairs[:, 1]], rng.random(labels) < 1 / (1 + np.exp(-margin))


def fit_proxy(features: np.ndarray, preferred: np.ndarray, l2: float = 1.0, steps: int = 30) -> np.ndarray:
    """Logistic regression by Newton's method, with the penalty l2 |w|^2 / 2."""
    weights = np.zeros(features.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (p - preferred) + l2 * weights
        hessian = (features * (p * (1 - p))[:, None]).T @ features + l2 * np.eye(len(weights))
        weights = weights - np.linalg.solve(hessian, gradient)
    return weights


def best_of(n: int, values: np.ndarray) -> np.ndarray:
    """The mean of `values` [..., N], sorted by the proxy, at the best of n draws without replacement, exactly.

    The response of rank i (from 0) is the best of n with probability C(i, n-1) / C(N, n).
    """
    total = values.shape[-1]
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    ranks = np.arange(n - 1, total)
    chances = log_factorial[ranks] - log_factorial[n - 1] - log_factorial[ranks - n + 1]
    chances -= log_factorial[total] - log_factorial[n] - log_factorial[total - n]
    return values[..., n - 1 :] @ np.exp(chances)


STUDY = Study("overoptimisation", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
