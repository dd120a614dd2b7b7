"""The N implementation details of RLHF with PPO: all on, and each of six off.

python -m experiments.papers.details
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.papers import words
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.models.heads import ValueHead
from ppo_jax.train.objective import Counts, ppo_loss
from ppo_jax.train.optimizer import OptimizerConfig, make_optimizer
from ppo_jax.train.options import Algorithm, KLConfig, PPOConfig, ScoreConfig
from ppo_jax.types import Frozen, Hyper, Metrics, Minibatch, Policy

SEEDS, TARGET, TEMPERATURE = [0, 1, 2, 3, 4], 4.0, 0.7
OFF = (
    "reward whitening",
    "advantage whitening",
    "value head at zero",
    "reward normalisation",
    "end-token rule",
    "temperature in log-probs",
)
METRICS = ("reward/worth", "kl", "kl_coef", "value_loss", "eos_rate", "response_length", "approx_kl", "clip_fraction")
PPO = PPOConfig(
    sampling=words.SAMPLING,
    epochs=4,
    num_minibatches=1,
    kl=KLConfig(control="adaptive"),
    score=ScoreConfig(missing_eos="replace", whiten_rewards="scale"),
    optimizer=OptimizerConfig(eps=1e-5),
)
HYPER = Hyper(learning_rate=1e-3, temperature=TEMPERATURE, kl_coef=0.15, kl_target=TARGET, kl_horizon=1000.0)


def settings(toy: bool) -> list[Setting]:
    """All on, and one switched off; all seeds of one are one population."""
    size = {"seeds": SEEDS[:2] if toy else SEEDS, "updates": 3 if toy else 100, "rows": 16 if toy else 64}
    return [{"off": off, **size} for off in (("none",) if toy else ("none", *OFF))]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Curves [seed, update]."""
    language, off, seeds = words.learn_language(), setting["off"], setting["seeds"]
    ppo, hyper = choose(off)
    loss = untempered_loss if off == "temperature in log-probs" else None
    algorithm = Algorithm(language.config, ppo, make_optimizer(ppo.optimizer), words.reward, loss)
    score = words.reference_score(language, TEMPERATURE)
    if off == "reward normalisation":
        score = words.Score(jnp.float32(1.0), jnp.float32(5.0))  # good words less bad ones, five points for nothing
    head = None
    if off == "value head at zero":  # as a fresh linear layer: N(0, 1 / width)
        width = language.config.hidden_size
        shapes = ValueHead().init(jax.random.key(0), jnp.zeros((1, width)))["params"]
        head = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape) * width**-0.5, shapes)
    states = words.start_states(language, algorithm, seeds, kl_coef=hyper.kl_coef, value_head=head)
    sizes = (setting["rows"], setting["updates"])
    _, found = words.train_members(algorithm, states, score, [hyper] * len(seeds), *sizes, seed=0)
    return rounded(words.pick(found, METRICS), 4)


def choose(off: str) -> tuple[PPOConfig, Hyper]:
    """The options with one detail switched off."""
    match off:
        case "reward whitening":
            return dataclasses.replace(PPO, score=dataclasses.replace(PPO.score, whiten_rewards="off")), HYPER
        case "advantage whitening":
            return dataclasses.replace(PPO, whiten_advantages=False), HYPER
        case "end-token rule":
            return dataclasses.replace(PPO, score=dataclasses.replace(PPO.score, missing_eos="off")), HYPER
        case _:
            return PPO, HYPER


def untempered_loss(
    policy: Policy, algorithm: Algorithm, frozen: Frozen, batch: Minibatch, counts: Counts, hyper: Hyper
) -> tuple[Float[Array, ""], Metrics]:
    """`ppo_loss` whose log-probs are those at temperature 1, while the sampler's were tempered."""
    return ppo_loss(policy, algorithm, frozen, batch, counts, hyper._replace(temperature=1.0))


STUDY = Study("details", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
