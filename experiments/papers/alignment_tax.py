"""What PPO costs in the loss on the pretraining text, and what PPO-ptx or a larger KL coefficient gives back.

    python -m experiments.papers.alignment_tax

The base is the small language model of `language`; its reward is a model of the film-review ratings, trained as a
whole, and its pretraining text the sentences that it has learnt. Policies are trained as a whole. The seeds of a
setting are one population (`train.population`). What is held out: sentences, and prompts that begin others of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.judges import vader_score
from experiments.papers import language, reward_models
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.data import assets
from ppo_jax.data.batches import left_pad
from ppo_jax.models.adapters import init_full
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import artifacts
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rollout import Sampling
from ppo_jax.runs.setup import decode_responses
from ppo_jax.train.evaluate import make_evaluate
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, PPOConfig
from ppo_jax.train.population import make_members, member_means, stack_hypers, stack_prompts
from ppo_jax.train.reward import normalise_head
from ppo_jax.train.sft import Demonstrations, evaluate, make_sft_loss
from ppo_jax.train.state import TrainState, init_state, key_stream
from ppo_jax.types import Frozen, Hyper, Prompts, Texts

BETA, RATE, SEEDS = 0.02, 5e-4, [0, 1, 2]
PTX, BETAS = (0.0, 0.1, 0.3, 1.0, 3.0), (0.2, 2.0)  # the second: 10 and 100 times the first
STEPS: dict[str, Any] = {"epochs": 1, "num_minibatches": 4}
LONGEST, P_TEXT = 10, 32  # tokens of a prompt, and of a row of pretraining text
METRICS = ("reward", "kl", "response_length", "ptx_loss")


class World(NamedTuple):
    """What all settings share."""

    model: Model
    trunk: ModelConfig
    role: RewardRole  # mean 0 and standard deviation 1 on its training sentences
    prompts: list[list[int]]
    held_out: list[list[int]]
    texts: np.ndarray  # [rows, P_TEXT]: of the pretraining text
    unseen: np.ndarray  # of held-out sentences


def settings(toy: bool) -> list[Setting]:
    """The reference, ptx coefficients, and larger KL coefficients without ptx."""
    size: Setting = {"seeds": SEEDS, "updates": 24, "rows": 32}
    if toy:
        size = {"seeds": SEEDS[:2], "updates": 2, "rows": 8}
    pairs = [(ptx, BETA) for ptx in PTX] + [(0.0, beta) for beta in BETAS]
    found: list[Setting] = [{"ptx": ptx, "beta": beta, **size} for ptx, beta in (pairs[1:2] if toy else pairs)]
    return [{"ptx": None, "beta": None, **size | {"updates": 0}}, *found]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Curves [seed, update], and of each seed's end what `measure` says."""
    world = prepare(toy)
    states = start(world, setting["seeds"])
    curves: list[list[dict[str, float]]] = []
    rngs = [np.random.default_rng(seed) for seed in setting["seeds"]]
    frozen = Frozen(world.model.params, world.role)
    for update in range(setting["updates"]):
        hyper = Hyper(
            learning_rate=RATE * min((update + 1) / 3, 1),
            temperature=1.0,
            kl_coef=setting["beta"],
            ptx_coef=setting["ptx"],
        )
        prompts = stack_prompts([draw(world, setting["rows"], rng) for rng in rngs])
        hypers = stack_hypers([hyper] * len(rngs))
        states, metrics = members(toy)(states, frozen, prompts, hypers, jnp.ones(len(rngs), bool))
        curves.append(member_means(metrics))
    ends = [measure(world, jax.tree.map(lambda x, i=i: x[i], states), i, toy) for i in range(len(rngs))]
    found = {name: [[at[i][name] for at in curves] for i in range(len(rngs))] for name in METRICS}
    return rounded(found | {"end": ends})


@functools.cache
def prepare(toy: bool) -> World:
    """Find the reward model, or train it, and cut the texts."""
    model = language.small_model(toy)
    trunk = reward_models.describe("small", "probe", 0).trunk(model.config)
    path = assets.cache_dir() / "papers" / "reward"
    if toy or not path.exists():
        role = train_reward(toy)
        if not toy:
            artifacts.save(path, "reward", role.adapter, role.head, model.base, {}, layers=trunk.num_layers)
    else:
        found = artifacts.load(path, "reward")
        artifacts.check_base(found, model.fingerprint, model.config)
        role = RewardRole(found.adapter, found.head)
    splits = language.read_corpus(toy)
    rows = [language.opening_rows(model, part, LONGEST) for part in (splits.splits.prompts, splits.splits.test)]
    held_out = [review.text for review in splits.splits.test]
    texts, unseen = (
        np.array(language.pack(part, model.tokenizer, P_TEXT).rows, np.int32) for part in (splits.training, held_out)
    )
    return World(model, trunk, role, rows[0], rows[1][:256], texts, unseen[: 16 if toy else 512])


def train_reward(toy: bool) -> RewardRole:
    """All parameters on all labels, scores with mean 0 and standard deviation 1 on them."""
    corpus = reward_models.read("small", toy)
    reward = reward_models.describe("small", "full", len(corpus.train))
    role = reward_models.fit(corpus, reward, corpus.train, seed=0)
    scores = reward_models.score(corpus, role, reward, corpus.train)
    return role._replace(head=normalise_head(role.head, scores))


@functools.cache
def algorithm(toy: bool) -> Algorithm:
    """PPO with a reward on the device."""
    world = prepare(toy)
    model = world.model
    ppo = PPOConfig(sampling=sample(model), **STEPS)
    return Algorithm(model.config, ppo, make_optimizer(), adapter_reward(world.trunk, model.stop_ids))


def sample(model: Model) -> Sampling:
    """Short responses."""
    return Sampling(response_length=12, stop_ids=model.stop_ids, pad_id=model.pad_id)


@functools.cache
def members(toy: bool) -> Any:
    """A population's iteration, compiled once."""
    return make_members(algorithm(toy))


@functools.cache
def measures(toy: bool) -> tuple[Any, Any]:
    """Evaluation on prompts, and the loss on text, compiled once."""
    return make_evaluate(algorithm(toy)), make_sft_loss(prepare(toy).model.config)


def start(world: World, seeds: list[int]) -> TrainState:
    """A state for each seed, stacked, whose policy is the reference."""
    model = world.model
    full = init_full(model.params)
    states = [init_state(key_stream(s, "state"), full, model.config, make_optimizer(), BETA) for s in seeds]
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


def draw(world: World, rows: int, rng: np.random.Generator) -> Prompts:
    """Prompts, each with a row of pretraining text."""
    asked = rng.choice(len(world.prompts), rows, replace=False)
    tokens, mask = left_pad([world.prompts[i] for i in asked], LONGEST, world.model.pad_id)
    texts = world.texts[rng.choice(len(world.texts), rows, replace=False)]
    pretrain = Texts(texts, np.ones(texts.shape, bool))  # type: ignore[arg-type]  # numpy until it is fed
    return Prompts(tokens, mask, asked.astype(np.int32), pretrain)  # type: ignore[arg-type]


def measure(world: World, state: TrainState, seed: int, toy: bool) -> dict[str, Any]:
    """Loss on held-out sentences (nats per token); reward, KL, VADER and length on held-out prompts; two texts."""
    model, (ask, loss) = world.model, measures(toy)
    mask = np.ones((len(world.unseen) // 16, 16, P_TEXT), bool)
    batches = [
        Demonstrations(rows, ones, ones)  # type: ignore[arg-type]  # numpy until it is fed
        for rows, ones in zip(world.unseen.reshape(mask.shape), mask, strict=True)
    ]
    lost = evaluate(loss, state.policy.adapter, model.params, batches)["loss"]
    tokens, there = left_pad(world.held_out, LONGEST, model.pad_id)
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(there), jnp.arange(len(tokens)))
    key = key_stream(seed, "evaluation")
    found = ask(state.policy, Frozen(model.params, world.role), prompts, key, Hyper(temperature=1.0))
    said = decode_responses(model, algorithm(toy).ppo.sampling, found.rollout)
    texts = [model.decode(np.array(row)) + text for row, text in zip(world.held_out, said, strict=True)]
    return {
        "loss": lost,
        "reward": float(found.scores.reward.mean()),
        "kl": float(found.kl.mean()),
        "length": float(found.rollout.response_mask.sum(axis=1).mean()),
        "vader": float(np.mean([vader_score(text) for text in texts])),
        "texts": texts[:2],
    }


STUDY = Study("alignment_tax", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
