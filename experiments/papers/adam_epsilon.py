"""Where Adam's epsilon stands: approximate KL and reward under PyTorch's and TensorFlow 1's placement.

python -m experiments.papers.adam_epsilon
"""

from typing import Any

import jax

from experiments.papers import words
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.train.optimizer import OptimizerConfig, make_optimizer
from ppo_jax.train.options import Algorithm, PPOConfig
from ppo_jax.types import Hyper

EPS, SEEDS = 1e-5, [0, 1, 2, 3, 4]
METRICS = ("approx_kl/epoch_1", "approx_kl/epoch_2", "clip_fraction", "kl", "reward", "grad_norm", "ratio_max")
# A gradient of N numbers that is clipped to norm 1 has an rms of 1 / sqrt(N): a clip of 0.1 gives this model of 24,000
# numbers the gradients that a clip of 1 gives one of 2.4 million.
CLIPS = (1.0, 0.1, 0.01)


def settings(toy: bool) -> list[Setting]:
    """Both placements under every clip; all seeds of one are one population."""
    size = {"seeds": SEEDS[:2] if toy else SEEDS, "updates": 3 if toy else 60, "rows": 16 if toy else 64}
    places = ("pytorch", "tensorflow1")
    clips = CLIPS[:1] if toy else CLIPS
    return [{"eps_placement": place, "max_grad_norm": clip, **size} for place in places for clip in clips]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Curves [seed, update]."""
    language = words.learn_language()
    optimizer = OptimizerConfig(eps=EPS, eps_placement=setting["eps_placement"])
    ppo = PPOConfig(sampling=words.SAMPLING, epochs=2, num_minibatches=1, optimizer=optimizer)
    algorithm = Algorithm(language.config, ppo, make_optimizer(optimizer), words.reward)
    hyper = Hyper(learning_rate=1e-3, kl_coef=0.1, temperature=0.7, max_grad_norm=setting["max_grad_norm"])
    score, seeds = words.reference_score(language, 0.7), setting["seeds"]
    states = words.start_states(language, algorithm, seeds)
    sizes = (setting["rows"], setting["updates"])
    _, found = words.train_members(algorithm, states, score, [hyper] * len(seeds), *sizes, seed=0)
    count = sum(x.size for x in jax.tree.leaves(language.base))
    return rounded(
        words.pick(found, METRICS) | {"parameters": count, "loss": language.loss, "entropy": language.entropy}
    )


STUDY = Study("adam_epsilon", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
