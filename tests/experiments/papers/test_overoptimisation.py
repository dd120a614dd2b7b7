"""One gold score, of the language's own sentences and of rollouts; each row is scored by the proxy it names."""

import jax.numpy as jnp
import numpy as np

from experiments.papers import overoptimisation
from experiments.papers.overoptimisation_ppo import Proxies, count_gold, reward
from experiments.papers.words import END, WORTH, P, T, make_chances, write_sentences
from ppo_jax.types import Frozen, Rollout


def test_gold_and_proxies_of_rollouts_are_those_of_best_of_n() -> None:
    counts, gold = overoptimisation.draw_responses(40)
    sentences = write_sentences(make_chances(), 80, np.random.default_rng(7))  # the same draw
    tokens = sentences[sentences[:, P - 1] != END][:40, : P + T]
    mask = np.cumsum(tokens[:, P:] == END, axis=1) - (tokens[:, P:] == END) == 0
    none, which = jnp.zeros((40, T)), jnp.arange(40) % 2
    rollout = Rollout(
        jnp.asarray(tokens), jnp.ones((40, P), bool), jnp.asarray(mask), none, none, none, mask[:, 0], which
    )
    np.testing.assert_allclose(count_gold(rollout), gold, rtol=1e-5)

    weights = np.random.default_rng(0).normal(size=(2, len(WORTH)))
    proxies = Proxies(*map(jnp.asarray, (weights, np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([0.0, 1.0]))))
    scores = reward(Frozen({}, proxies), rollout, None, 0)
    own = np.where(np.arange(40) % 2, (counts @ weights[1, 1:] - 2) / 4, (counts @ weights[0, 1:] - 1) / 3)
    ends = (mask & (tokens[:, P:] == END)).sum(axis=1)  # END has a weight of 0 in the study, and one of its own here
    own += ends * np.where(np.arange(40) % 2, weights[1, 0] / 4, weights[0, 0] / 3)
    np.testing.assert_allclose(scores.reward, own, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores.parts["gold"], gold, rtol=1e-5)
