"""The frontier of `frontier` with three seeds at a time: on the small language model, whose runs are cheap.

    python -m experiments.papers.frontier_small

Base, reward model and held-out prompts are those of `alignment_tax`. The seeds of a setting are one population.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers import alignment_tax
from experiments.papers.frontier import COEFFICIENTS, START, TARGETS
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.models.adapters import init_full
from ppo_jax.rewards.adapter import adapter_reward
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, KLConfig, PPOConfig
from ppo_jax.train.population import make_members, member_means, stack_hypers, stack_prompts
from ppo_jax.train.state import init_state, key_stream
from ppo_jax.types import Frozen, Hyper

METRICS = ("reward", "kl", "kl_coef")


def settings(toy: bool) -> list[Setting]:
    """The reference, the coefficients, and the targets of one that adapts."""
    size: Setting = {"seeds": alignment_tax.SEEDS, "updates": 24, "rows": 32}
    kinds: list[Setting] = [{"kind": "fixed", "beta": beta} for beta in COEFFICIENTS]
    kinds += [{"kind": "adaptive", "target": target} for target in TARGETS]
    if toy:
        size, kinds = {"seeds": [0, 1], "updates": 2, "rows": 8}, kinds[-1:]
    return [{"kind": "reference", **size | {"updates": 0}}, *(kind | size for kind in kinds)]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Curves [seed, update], and of each seed's end what `alignment_tax.measure` says."""
    world, seeds, beta = alignment_tax.prepare(toy), setting["seeds"], setting.get("beta", START)
    model, full = world.model, init_full(world.model.params)
    states = jax.tree.map(
        lambda *x: jnp.stack(x),
        *(init_state(key_stream(s, "state"), full, model.config, make_optimizer(), beta) for s in seeds),
    )
    rngs, curves = [np.random.default_rng(seed) for seed in seeds], []
    for update in range(setting["updates"]):
        hyper = Hyper(
            learning_rate=alignment_tax.RATE * min((update + 1) / 3, 1),
            temperature=1.0,
            kl_target=setting.get("target", 1.0),
            kl_horizon=1e12 if "beta" in setting else float(setting["rows"]),  # at most a fifth in an update
        )
        drawn = [alignment_tax.draw(world, setting["rows"], rng)._replace(pretrain=None) for rng in rngs]
        inputs = (stack_prompts(drawn), stack_hypers([hyper] * len(seeds)), jnp.ones(len(seeds), bool))
        states, metrics = members(toy)(states, Frozen(model.params, world.role), *inputs)
        curves.append(member_means(metrics))
    ends = [alignment_tax.measure(world, jax.tree.map(lambda x, i=i: x[i], states), i, toy) for i in range(len(seeds))]
    found = {name: [[at[i][name] for at in curves] for i in range(len(seeds))] for name in METRICS}
    return rounded(found | {"end": ends})


@functools.cache
def members(toy: bool) -> Any:
    """A population's iteration, compiled once; the control of `frontier`."""
    world = alignment_tax.prepare(toy)
    model = world.model
    ppo = PPOConfig(sampling=alignment_tax.sample(model), **alignment_tax.STEPS, kl=KLConfig(control="adaptive"))
    reward = adapter_reward(world.trunk, model.stop_ids)
    return make_members(Algorithm(model.config, ppo, make_optimizer(), reward))


STUDY = Study("frontier_small", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
