"""What the tests of PPO's options share: a state, a rollout, one compiled learn() per choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.models.adapters import init_lora
from ppo_jax.rollout import Sampling
from ppo_jax.train.experience import evaluate_reference, make_experience, share_prefix
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.ppo import collect, learn
from ppo_jax.train.state import init_state
from ppo_jax.types import Experience, Scores, Texts
from tests.train import toy
from tests.train.toy import CONFIG, FROZEN, HYPER

FOUR = PPOConfig(sampling=toy.SAMPLING, epochs=2, num_minibatches=2)
OFF = HYPER._replace(entropy_coef=0.0)


def critic_adapter(seed: int = 8):
    return toy.noisy(init_lora(jax.random.key(seed), CONFIG, 2, 4.0), seed)


def begin(ppo: PPOConfig = FOUR, **options):
    adapter = toy.ADAPTERS["lora above a shared prefix"]()
    state = init_state(jax.random.key(0), adapter, CONFIG, make_optimizer(ppo.optimizer), 0.05, **options)
    policy = state.policy._replace(adapter=toy.noisy(state.policy.adapter))
    return dataclasses.replace(state, policy=policy)


@functools.cache
def half(ppo: PPOConfig, pretrain: bool = False):
    """learn() on a fixed rollout with the toy's scores, jitted once per choice."""
    algorithm = toy.algorithm(ppo)

    def run(state, rollout, scores, hyper):
        more = texts(rollout.tokens.shape[0]) if pretrain else None
        collected = share_prefix(algorithm, state.policy, FROZEN, rollout, more)
        return learn(algorithm, state, FROZEN, collected, scores, hyper)

    return jax.jit(run)


@functools.cache
def drawn(ppo: PPOConfig = FOUR, temperature: float = 0.7):
    algorithm = toy.algorithm(ppo)
    run = jax.jit(lambda state, prompts, hyper: collect(algorithm, state, FROZEN, prompts, hyper))
    return run(begin(), toy.prompts(), HYPER._replace(temperature=temperature))


def scored(rollout) -> Scores:
    return toy.worth(FROZEN, rollout, None, 0)


def texts(rows: int) -> Texts:
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 7, rows)
    return Texts(
        jnp.asarray(rng.integers(0, CONFIG.vocab_size, (rows, 6)), jnp.int32),
        jnp.asarray(np.arange(6) < lengths[:, None]),
    )


def experience(ppo: PPOConfig, rollout=None, scores=None, hyper=OFF, kl_coef=0.1, **more) -> Experience:
    rollout = drawn() if rollout is None else rollout
    algorithm, policy, hyper = toy.algorithm(ppo), begin().policy, hyper._replace(kl_coef=kl_coef)
    collected = share_prefix(algorithm, policy, FROZEN, rollout)
    reference = evaluate_reference(algorithm, policy, FROZEN, collected, hyper)
    scores = scored(rollout) if scores is None else scores
    return make_experience(algorithm, collected, scores, reference, hyper, **more)


TOP_3 = Sampling(response_length=toy.T, stop_ids=(toy.STOP,), top_k=3, min_p=0.05)
