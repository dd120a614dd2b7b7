"""Over-optimisation by PPO: proxies and gold score of `overoptimisation`, a policy trained without a KL penalty.

    python -m experiments.papers.overoptimisation_ppo

The proxies of one number of labels are one population: `Prompts.index` says which of them scores a row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.papers import overoptimisation, words
from experiments.papers.records import Setting, Study, rounded, run_as_command
from experiments.papers.words import WORTH, T
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, PPOConfig
from ppo_jax.train.population import member_means, stack_hypers, stack_prompts
from ppo_jax.types import Frozen, Hyper, Rollout, Scores

RATE, FIRST_RATE, TEMPERATURE = 1e-4, 1e-3, 1.0  # at the first attempt KL left the scale within ten updates
PPO = PPOConfig(sampling=words.SAMPLING, epochs=2, num_minibatches=2)


class Proxies(NamedTuple):
    """In `Frozen.reward`: what words are worth to each proxy, and the scale of both scores."""

    weights: Float[Array, "K V"]
    shift: Float[Array, " K"]  # such that the reference has mean 0 and standard deviation 1
    scale: Float[Array, " K"]
    gold: Float[Array, "2"]  # mean and standard deviation of the reference's gold scores


def settings(toy: bool) -> list[Setting]:
    """All proxies of one number of labels."""
    size: Setting = {"seeds": list(overoptimisation.SEEDS), "updates": 120, "rows": 128, "rate": RATE}
    if toy:
        size = {"seeds": [0, 1], "updates": 3, "rows": 16, "rate": RATE}
    return [{"labels": labels, **size} for labels in overoptimisation.LABELS[: 1 if toy else None]]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Curves [proxy, update] of KL, proxy and gold score, in standard deviations of the reference's responses."""
    language, seeds = words.learn_language(), setting["seeds"]
    frozen = Frozen(language.base, make_proxies(language, setting["labels"], seeds, 20_000 if toy else 400_000))
    states, iterate = words.start_states(language, algorithm(), seeds), words.members_of(algorithm())
    hypers = stack_hypers(
        [Hyper(learning_rate=setting.get("rate", FIRST_RATE), temperature=TEMPERATURE, kl_coef=0.0)] * len(seeds)
    )
    rngs, curves = [np.random.default_rng(seed) for seed in seeds], []
    for _ in range(setting["updates"]):
        drawn = [words.draw_prompts(language, setting["rows"], rng) for rng in rngs]
        drawn = [prompts._replace(index=jnp.full_like(prompts.index, i)) for i, prompts in enumerate(drawn)]
        states, metrics = iterate(states, frozen, stack_prompts(drawn), hypers, jnp.ones(len(seeds), bool))
        curves.append(member_means(metrics))
    names = {"kl": "kl", "proxy": "reward", "gold": "reward/gold"}
    return rounded({name: [[at[i][key] for at in curves] for i in range(len(seeds))] for name, key in names.items()}, 4)


def make_proxies(language: words.Language, labels: int, seeds: list[int], responses: int) -> Proxies:
    """The proxies of `overoptimisation`, scaled on responses of the model that is the reference here."""
    counts, gold = overoptimisation.draw_responses(responses)
    fitted = [
        overoptimisation.fit_proxy(*overoptimisation.draw_labels(counts, gold, labels, np.random.default_rng(seed)))
        for seed in seeds
    ]
    weights = np.concatenate([np.zeros((len(seeds), 1)), fitted], axis=1)  # END is worth nothing
    rollout = words.sample(words.reference_state(language), language, 2048, TEMPERATURE)
    own, true = np.asarray(count_words(rollout)) @ weights.T, np.asarray(count_gold(rollout))
    return Proxies(*map(jnp.asarray, (weights, own.mean(0), own.std(0), np.array([true.mean(), true.std()]))))


def count_words(rollout: Rollout) -> Float[Array, "B V"]:
    """How often each word stands in a response."""
    said = jax.nn.one_hot(rollout.tokens[:, -T:], len(WORTH))
    return jnp.sum(jnp.where(rollout.response_mask[..., None], said, 0.0), axis=1)


def count_gold(rollout: Rollout) -> Float[Array, " B"]:
    """Good words less bad ones, less the squares of repetitions."""
    counts = count_words(rollout).at[:, words.END].set(0.0)
    return counts @ jnp.asarray(WORTH) - jnp.sum(jnp.maximum(counts - 1, 0) ** 2, axis=1)


def reward(frozen: Frozen, rollout: Rollout, prefix: Array | None, prefix_layers: int) -> Scores:
    """The score of the proxy that `index` names; the gold score is only reported."""
    proxies, which = frozen.reward, rollout.index
    score = jnp.sum(count_words(rollout) * proxies.weights[which], axis=1)
    score = (score - proxies.shift[which]) / proxies.scale[which]
    gold = (count_gold(rollout) - proxies.gold[0]) / proxies.gold[1]
    return Scores(score, jnp.ones(score.shape, bool), {"gold": gold})


@functools.cache
def algorithm() -> Algorithm:
    """One for all numbers of labels, so that one program serves."""
    return Algorithm(words.learn_language().config, PPO, make_optimizer(), reward)


STUDY = Study("overoptimisation_ppo", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
