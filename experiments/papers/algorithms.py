"""PPO, RLOO, GRPO, Dr. GRPO and REINFORCE++ with the same number of responses, tuned by the same sweep each.

python -m experiments.papers.algorithms
"""

from typing import Any

import jax
import numpy as np

from experiments.papers import words
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, PPOConfig
from ppo_jax.train.state import TrainState
from ppo_jax.types import Hyper

SEEDS, TUNING_SEEDS, RATES = [0, 1, 2, 3, 4], [100, 101], [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
BETA, TEMPERATURE, LAST = 0.1, 1.0, 10  # updates whose mean counts
SAME: dict[str, Any] = {"sampling": words.SAMPLING, "epochs": 2, "num_minibatches": 2}
METHODS = {
    "PPO": PPOConfig(**SAME),
    "RLOO": PPOConfig(**SAME, advantage="rloo", group_size=4, aggregation="constant"),
    "GRPO": PPOConfig(**SAME, advantage="grpo", group_size=4, aggregation="sequence-mean"),
    "Dr. GRPO": PPOConfig(**SAME, advantage="dr_grpo", group_size=4, aggregation="constant"),
    "REINFORCE++": PPOConfig(**SAME, advantage="reinforce++"),
}
METRICS = ("shaped_reward", "reward", "kl", "response_length")


def settings(toy: bool) -> list[Setting]:
    """Each method on the words' task; and the two GRPOs where the score has nothing to do with length."""
    size = {"updates": 3 if toy else 100, "rows": 16 if toy else 64}
    ours = ["GRPO"] if toy else list(METHODS)
    found: list[Setting] = [{"task": "worth", "method": method, "beta": BETA, **size} for method in ours]
    length = ["GRPO"] if toy else ["GRPO", "Dr. GRPO"]
    early = size | {"updates": min(size["updates"], 10)}  # where there are wrong responses left
    return found + [{"task": "first word", "method": m, "beta": 0.0, **many} for many in (size, early) for m in length]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """The sweep and, at the best rate, curves [seed, update]; of the second task the lengths of responses by score."""
    language = words.learn_language()
    reward = words.reward if setting["task"] == "worth" else words.first_reward
    algorithm = Algorithm(language.config, METHODS[setting["method"]], make_optimizer(), reward)
    if setting["task"] != "worth":
        states, found = train(algorithm, setting, [1e-3] * len(SEEDS), SEEDS)
        return rounded(words.pick(found, METRICS) | lengths_by_score(states, language, 256 if toy else 4096))
    sweep = []
    for seed in TUNING_SEEDS[: 1 if toy else 2]:
        _, found = train(algorithm, setting, RATES, [seed] * len(RATES))
        sweep.append(found["shaped_reward"][:, -LAST:].mean(axis=1))
    best = RATES[int(np.nanargmax(np.mean(sweep, axis=0)))]
    _, found = train(algorithm, setting, [best] * len(SEEDS), SEEDS)
    return rounded(words.pick(found, METRICS) | {"rates": RATES, "sweep": np.array(sweep), "best": best})


def train(
    algorithm: Algorithm, setting: Setting, rates: list[float], seeds: list[int]
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """One population: a rate and a seed for each member."""
    language = words.learn_language()
    hypers = [Hyper(learning_rate=rate, kl_coef=setting["beta"], temperature=TEMPERATURE) for rate in rates]
    states = words.start_states(language, algorithm, seeds)
    score = words.reference_score(language, TEMPERATURE)
    return words.train_members(algorithm, states, score, hypers, setting["rows"], setting["updates"], seed=seeds[0])


def lengths_by_score(states: TrainState, language: words.Language, count: int) -> dict[str, Any]:
    """Mean length of responses with score -1, 0 and 1: of the reference, and of each member."""

    def measure(state: TrainState) -> list[float]:
        rollout = words.sample(state, language, count, TEMPERATURE)
        score, length = np.asarray(words.first_worth(rollout)), np.asarray(rollout.response_mask).sum(1)
        return [float(length[score == v].mean()) if (score == v).any() else float("nan") for v in (-1, 0, 1)]

    own = [measure(jax.tree.map(lambda x, i=i: x[i], states)) for i in range(len(states.step))]
    return {"lengths": np.array(own), "reference_lengths": measure(words.reference_state(language))}


STUDY = Study("algorithms", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
