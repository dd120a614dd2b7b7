"""A language of 24 words, a model that has learnt it, and populations of PPO runs on it: a second for each run.

The words are those of `ppo-jax demo`; which word follows which is drawn once, END ends a sentence. The score of a
response is the number of its good words less that of its bad ones, times a gain plus a bias, 12 tokens at most.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppo_jax.cli.demo.language import BAD, GOOD, model
from ppo_jax.models.adapters import init_full
from ppo_jax.models.config import ModelConfig
from ppo_jax.rollout import Sampling, generate
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm
from ppo_jax.train.population import make_members, member_means, stack_hypers, stack_prompts
from ppo_jax.train.sft import Demonstrations, SFTConfig, train_sft
from ppo_jax.train.state import TrainState, init_state
from ppo_jax.types import Frozen, Hyper, Prompts, PyTree, Rollout, Scores

P, T, END = 2, 12, 0
SAMPLING = Sampling(response_length=T, stop_ids=(END,), pad_id=END)
WORTH = np.array([0.0] + [1.0] * len(GOOD) + [-1.0] * len(BAD) + [0.0] * 12, np.float32)  # END, good, bad, others


class Language(NamedTuple):
    """The reference, and how sentences come about."""

    config: ModelConfig
    base: PyTree
    chances: np.ndarray  # [V, V]: which word follows which
    loss: float  # of the model on fresh sentences, nats per token
    entropy: float  # of the language itself, the least that this can be


class Score(NamedTuple):
    """In `Frozen.reward`: score = gain * (good words - bad words) + bias."""

    gain: Float[Array, ""]
    bias: Float[Array, ""]


@functools.cache
def learn_language(steps: int = 400) -> Language:
    """Train the four-layer model of the demo on random sentences, the same in every process."""
    config, chances = model(0).config, make_chances()

    def rows(step: int) -> Demonstrations:
        tokens = write_sentences(chances, 64, np.random.default_rng(step + 1))
        mask = np.cumsum(tokens == END, axis=1) - (tokens == END) == 0
        return Demonstrations(tokens, mask, mask)  # type: ignore[arg-type]  # numpy until it is fed

    losses: list[float] = []
    start, zero = init_full(model(0).params), model(0).params
    options = SFTConfig(learning_rate=1e-2)
    base = train_sft(start, zero, config, options, rows, steps, lambda step, values: losses.append(values["loss"]))
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.nansum(-chances * np.log(chances), axis=1)
    visited = np.concatenate([row[:-1][np.cumprod(row[:-1] != END) > 0] for row in rows(10**6).tokens])
    return Language(config, base, chances, float(np.mean(losses[-20:])), float(entropy[visited].mean()))


def make_chances() -> np.ndarray:
    """[V, V]: which word follows which, drawn once; END with probability 0.1 always."""
    logits = 1.5 * np.random.default_rng(0).normal(size=(len(WORTH), len(WORTH)))
    logits[:, END] = -np.inf
    chances = np.exp(logits)
    chances *= 0.9 / chances.sum(1, keepdims=True)
    chances[:, END] = 0.1
    return chances


def write_sentences(chances: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, P + T + 2] tokens from a random first word on; behind END stands END."""
    cumulative = np.cumsum(chances, axis=1)
    tokens = np.zeros((count, P + T + 2), np.int64)
    tokens[:, 0] = rng.integers(1, len(chances), count)
    for t in range(1, tokens.shape[1]):
        drawn = (rng.random((count, 1)) < cumulative[tokens[:, t - 1]]).argmax(axis=1)
        tokens[:, t] = np.where(tokens[:, t - 1] == END, END, drawn)
    return tokens.astype(np.int32)


def draw_prompts(language: Language, count: int, rng: np.random.Generator) -> Prompts:
    """The first two words of sentences that have them."""
    tokens = write_sentences(language.chances, 2 * count, rng)[:, :P]
    tokens = np.concatenate([tokens[tokens[:, 1] != END], tokens[tokens[:, 1] != END]])[:count]
    return Prompts(tokens, np.ones(tokens.shape, bool), np.arange(count, dtype=np.int32))  # type: ignore[arg-type]


def count_worth(rollout: Rollout) -> Float[Array, " B"]:
    """Good words of a response less its bad ones."""
    points = jnp.asarray(WORTH)[rollout.tokens[:, -T:]]
    return jnp.sum(jnp.where(rollout.response_mask, points, 0.0), axis=1)


def first_worth(rollout: Rollout) -> Float[Array, " B"]:
    """1, 0 or -1 for a good, other or bad first word of a response, however long that is."""
    return jnp.asarray(WORTH)[rollout.tokens[:, -T]]


def reward(frozen: Frozen, rollout: Rollout, prefix: Array | None, prefix_layers: int) -> Scores:
    """The device reward; `frozen.reward` is a Score."""
    worth = count_worth(rollout)
    score = frozen.reward.gain * worth + frozen.reward.bias
    return Scores(score, jnp.ones(score.shape, bool), {"worth": worth})


def first_reward(frozen: Frozen, rollout: Rollout, prefix: Array | None, prefix_layers: int) -> Scores:
    """A device reward that length has no part in."""
    score = first_worth(rollout)
    return Scores(score, jnp.ones(score.shape, bool), {"worth": score})


@functools.cache
def _sampler() -> Any:
    config = learn_language().config
    return jax.jit(lambda base, policy, prompts, key, t: generate(base, policy, config, prompts, key, SAMPLING, t))


def sample(state: TrainState, language: Language, count: int, temperature: float, seed: int = 0) -> Rollout:
    """Responses of a policy to fresh prompts."""
    prompts = draw_prompts(language, count, np.random.default_rng(10**6 + seed))
    return _sampler()(language.base, state.policy, prompts, jax.random.key(seed), temperature)


def start_states(language: Language, algorithm: Algorithm, seeds: Sequence[int], **parts: Any) -> TrainState:
    """One state for each seed, stacked; `parts` as of `train.state.init_state`."""
    full = init_full(language.base)
    states = [
        init_state(jax.random.key(s), full, language.config, algorithm.optimizer, parts.get("kl_coef", 0.0),
                   value_head=parts.get("value_head"))
        for s in seeds
    ]  # fmt: skip
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


@functools.cache
def members_of(algorithm: Algorithm) -> Any:
    """Compiled once in a process for each algorithm."""
    return make_members(algorithm)


def train_members(
    algorithm: Algorithm, states: TrainState, score: Score, hypers: Sequence[Hyper], rows: int, updates: int, seed: int
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train a population for `updates`; metrics as [member, update]. Members have prompts of their own."""
    language, members = learn_language(), members_of(algorithm)
    frozen, active = Frozen(language.base, score), jnp.ones(len(hypers), bool)
    rngs = [np.random.default_rng([seed, place]) for place in range(len(hypers))]
    found = []
    for _ in range(updates):
        prompts = stack_prompts([draw_prompts(language, rows // algorithm.ppo.group_size, rng) for rng in rngs])
        states, metrics = members(states, frozen, prompts, stack_hypers(hypers), active)
        found.append(member_means(metrics))
    names = found[0][0]
    return states, {name: np.array([[one[k][name] for one in found] for k in range(len(hypers))]) for name in names}


def reference_state(language: Language) -> TrainState:
    """A state whose policy is the reference."""
    return init_state(jax.random.key(0), init_full(language.base), language.config, make_optimizer(), 0.0)


def reference_score(language: Language, temperature: float) -> Score:
    """The gain and bias that give the reference's own responses mean 0 and standard deviation 1."""
    worth = np.asarray(count_worth(sample(reference_state(language), language, 2048, temperature)), np.float64)
    gain = 1 / worth.std()
    return Score(jnp.float32(gain), jnp.float32(-gain * worth.mean()))


def pick(found: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some of the metrics; one that the algorithm does not have is left out."""
    return {name: found[name] for name in names if name in found}
