"""DPO against a reward model and PPO on real language: the same pairs, the same base, in and out of distribution.

    python -m experiments.papers.dpo_ppo_small

Base and prompts are those of `alignment_tax`, and its reward model labels the pairs: P(first) = sigmoid(r1 - r2) of two
responses of the base. DPO learns from the pairs; so does a reward model (all parameters), in whose scores, as they
come, PPO is trained with the same beta: both maximise E[r] - beta KL, where r explains the pairs. Prompts out of
distribution begin product reviews, tweets and editorials, and no pair has one. A seed is a set of pairs.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.judges import vader_score
from experiments.movie_reviews import Review
from experiments.papers import alignment_tax, language
from experiments.papers.alignment_tax import LONGEST, World
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.data.batches import left_pad
from ppo_jax.models.config import ModelConfig
from ppo_jax.rewards.adapter import RewardRole, score_tokens, text_mask
from ppo_jax.runs.setup import decode_responses
from ppo_jax.train import ppo
from ppo_jax.train.comparisons import Bucket, Comparisons, text_features
from ppo_jax.train.dpo import DPOConfig, DPOScalars, Preferences, make_dpo_step, make_measure
from ppo_jax.train.evaluate import Evaluation
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.reward import RewardConfig, fit_head, init_role, train_role
from ppo_jax.train.state import key_stream
from ppo_jax.types import Frozen, Hyper, Policy, Prompts, Rollout

BETAS, SEEDS = (0.1, 0.3), (0, 1, 2)
RATES = {"DPO": 3e-4, "PPO": 5e-4}
BATCH = 32  # pairs in a step of DPO and of the reward model, responses in an update of PPO
REWARD = RewardConfig(kind="full", batch_size=2 * BATCH, epochs=2, learning_rate=3e-4)


class Pairs(NamedTuple):
    """Two responses of the base to each prompt, the preferred one first."""

    rows: Preferences
    texts: np.ndarray  # [N, 2, S]: True on what a reader of the text sees


class Lesson(NamedTuple):
    """What a seed learns from, and what it is asked."""

    pairs: Pairs
    role: RewardRole  # learnt from the pairs
    asked: dict[str, Prompts]  # in and out of distribution
    unseen: dict[str, Pairs]  # of the base's responses to those, ordered as the labeller does


def settings(toy: bool) -> list[Setting]:
    """First those that most is said of."""
    size: Setting = {"pairs": 2048, "updates": 24, "passes": 2, "points": 4}
    if toy:
        size = {"pairs": 16, "updates": 2, "passes": 2, "points": 1}
    seeds, betas = (SEEDS[:2], BETAS[:1]) if toy else (SEEDS, BETAS)
    return [{"way": way, "beta": b, "seed": s, **size} for b in betas for s in seeds for way in ("DPO", "PPO")]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """`measure` at the start and at even distances; what the reward model orders right; two texts of the end."""
    world, lesson = alignment_tax.prepare(toy), prepare(setting["seed"], setting["pairs"], toy)
    train = train_dpo if setting["way"] == "DPO" else train_ppo
    first = jax.tree.map(lambda x: x[0], alignment_tax.start(world, [setting["seed"]]).policy)
    curve = [{"step": 0} | measure(lesson, first, setting["seed"], toy)]
    for step, policy in train(lesson, setting, toy):
        curve.append({"step": step} | measure(lesson, policy, setting["seed"], toy))
    leads = {
        name: [score(pairs.rows.tokens[:, i], pairs.texts[:, i], lesson.role, toy) for i in range(2)]
        for name, pairs in lesson.unseen.items()
    }
    right = {name: share_alike(chosen - rejected, np.ones(len(chosen))) for name, (chosen, rejected) in leads.items()}
    said = {name: read(ask(policy, prompts, 0, toy).rollout, toy)[:2] for name, prompts in lesson.asked.items()}
    return rounded({"curve": curve, "reward model on base": right, "texts": said})


@functools.cache
def prepare(seed: int, count: int, toy: bool) -> Lesson:
    """Draw the pairs of a seed, and train its reward model."""
    world, rng, size = alignment_tax.prepare(toy), np.random.default_rng(seed), 16 if toy else 256
    corpus = language.read_corpus(toy)
    others = corpus.others or [review.text for review in corpus.splits.judge_train]
    away = language.opening_rows(world.model, [Review(0, 0.0, text) for text in others], LONGEST)
    chosen = np.random.default_rng(0).choice(len(away), size, replace=False)
    asked = {"in": pad(world, world.held_out[:size]), "out": pad(world, [away[i] for i in chosen])}
    drawn = rng.choice(len(world.prompts), count)
    prompts = [pad(world, [world.prompts[i] for i in drawn[at : at + size]]) for at in range(0, count, size)]
    pairs = [draw_pairs(world, p, 1000 * (seed + 1) + i, rng, toy) for i, p in enumerate(prompts)]
    unseen = {name: draw_pairs(world, p, 0, None, toy) for name, p in asked.items()}
    joined = jax.tree.map(lambda *x: np.concatenate(x), *pairs)
    return Lesson(joined, train_reward(world, joined, seed), asked, unseen)


def pad(world: World, rows: list[list[int]]) -> Prompts:
    """A batch of prompts."""
    tokens, mask = left_pad(rows, LONGEST, world.model.pad_id)
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(rows)))


def ask(policy: Policy, prompts: Prompts, number: int, toy: bool) -> Evaluation:
    """One response to each prompt, with the labeller's scores; `number` seeds it."""
    world = alignment_tax.prepare(toy)
    key = key_stream(number, "evaluation")
    return alignment_tax.measures(toy)[0](
        policy, Frozen(world.model.params, world.role), prompts, key, Hyper(temperature=1.0)
    )


def draw_pairs(world: World, prompts: Prompts, number: int, rng: Any, toy: bool) -> Pairs:
    """Two responses of the base to each prompt, labelled; without `rng` the one with the higher score is preferred."""
    base = jax.tree.map(lambda x: x[0], alignment_tax.start(world, [0]).policy)
    both = [ask(base, prompts, 10_000 + 2 * number + i, toy) for i in range(2)]
    first, second = (np.asarray(found.scores.reward) for found in both)  # type: ignore[union-attr]
    lead = first - second
    swapped = (lead < 0) if rng is None else rng.random(len(lead)) > 1 / (1 + np.exp(-lead))
    order = np.stack([swapped, ~swapped], axis=1).astype(int)

    def ordered(get: Any) -> np.ndarray:
        return np.take_along_axis(np.stack([np.asarray(get(e.rollout)) for e in both], 1), order[..., None], axis=1)

    rows = Preferences(*map(ordered, (lambda r: r.tokens, lambda r: r.mask, mark_response)))  # type: ignore[arg-type]
    return Pairs(rows, ordered(lambda r: text_mask(r, world.model.stop_ids)))


def mark_response(rollout: Rollout) -> Array:
    """True on the response's tokens, in the slots of the whole sequence."""
    return jnp.concatenate([jnp.zeros_like(rollout.prompt_mask), rollout.response_mask], axis=1)


def train_reward(world: World, pairs: Pairs, seed: int) -> RewardRole:
    """The head on the base's features, then all parameters; the mean score of the pairs' texts is 0."""
    model, rng = world.model, np.random.default_rng(seed)
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (np.asarray(pairs.rows.tokens), pairs.texts))
    role = init_role(key_stream(seed, "reward"), model.config, REWARD, model.params)
    texts = [Bucket(np.arange(len(tokens)), tokens, mask)]
    features = text_features(model.params, RewardRole({}, {}), world.trunk, texts, 2 * BATCH)
    better = np.arange(0, len(tokens), 2)
    role = role._replace(head=fit_head(features, better, better + 1, REWARD.head_l2, REWARD.head_steps))
    size = min(BATCH, len(better))
    order = np.concatenate([rng.permutation(len(better)) for _ in range(REWARD.epochs)]).reshape(-1, size)
    won = np.zeros((2 * size, 2 * size), bool)
    won[np.arange(0, 2 * size, 2), np.arange(1, 2 * size, 2)] = True

    def batch(step: int) -> Comparisons:
        rows = (2 * order[step][:, None] + [0, 1]).ravel()
        return Comparisons(tokens[rows], mask[rows], won, np.zeros(won.shape, np.float32))  # type: ignore[arg-type]

    role = train_role(role, model.params, world.trunk, REWARD, batch, len(order), lambda *_: None)
    scores = np.asarray(_score(model.params, role, jnp.asarray(tokens), jnp.asarray(mask), world.trunk))
    return role._replace(head=role.head | {"bias": role.head["bias"] - scores.mean()})


def train_dpo(lesson: Lesson, setting: Setting, toy: bool) -> Iterator[tuple[int, Policy]]:
    """(step, policy) at `points`; the learning rate falls linearly to 0."""
    world, rng = alignment_tax.prepare(toy), np.random.default_rng(setting["seed"])
    policy = jax.tree.map(lambda x: x[0], alignment_tax.start(world, [setting["seed"]]).policy)
    adapter, state, size = policy.adapter, make_optimizer().init(policy.adapter), min(BATCH, setting["pairs"])
    order = np.concatenate([rng.permutation(setting["pairs"]) for _ in range(setting["passes"])]).reshape(-1, size)
    for step, rows in enumerate(order):
        batch = jax.tree.map(lambda x, rows=rows: jnp.asarray(x[rows]), lesson.pairs.rows)
        scalars = DPOScalars(setting.get("rate", RATES["DPO"]) * (1 - step / len(order)), 1.0, setting["beta"], 0.0)
        adapter, state, _ = dpo_programs(toy)[0](adapter, state, world.model.params, batch, scalars)
        if (step + 1) % (len(order) // setting["points"]) == 0:
            yield step + 1, policy._replace(adapter=adapter)


def train_ppo(lesson: Lesson, setting: Setting, toy: bool) -> Iterator[tuple[int, Policy]]:
    """(update, policy) at `points`, in the scores of the reward model that the pairs gave."""
    world, rng = alignment_tax.prepare(toy), np.random.default_rng(setting["seed"])
    state = jax.tree.map(lambda x: x[0], alignment_tax.start(world, [setting["seed"]]))
    frozen, total = Frozen(world.model.params, lesson.role), setting["updates"]
    for update in range(total):
        rate = setting.get("rate", RATES["PPO"]) * min((update + 1) / 3, 1)
        hyper = Hyper(learning_rate=rate, temperature=1.0, kl_coef=setting["beta"])
        prompts = alignment_tax.draw(world, 8 if toy else BATCH, rng)._replace(pretrain=None)
        state, _ = iterate(toy)(state, frozen, prompts, hyper)
        if (update + 1) % (total // setting["points"]) == 0:
            yield update + 1, state.policy


@functools.cache
def dpo_programs(toy: bool) -> tuple[Any, Any]:
    """A step, and what is measured of pairs, compiled once; at beta 1 an implicit reward is a log-ratio."""
    config = alignment_tax.prepare(toy).model.config
    return make_dpo_step(config, DPOConfig(), make_optimizer()), make_measure(config, DPOConfig(beta=1.0))


@functools.cache
def iterate(toy: bool) -> Any:
    """An iteration of `alignment_tax`'s PPO, compiled once."""
    return jax.jit(functools.partial(ppo.iterate, alignment_tax.algorithm(toy)), donate_argnums=0)


def measure(lesson: Lesson, policy: Policy, seed: int, toy: bool) -> dict[str, Any]:
    """Of own responses, of the base's unseen pairs, and of the first learnt ones; log-ratios in nats."""
    base, compare = alignment_tax.prepare(toy).model.params, dpo_programs(toy)[1]
    found: dict[str, Any] = {}
    for name, prompts in lesson.asked.items():
        own = [judge(lesson, ask(policy, prompts, 2 * seed + i, toy), toy) for i in range(2)]
        lead = {key: own[0][key] - own[1][key] for key in ("reward", "kl", "reward model")}
        found[name] = {key: np.mean([each[key] for each in own]) for key in own[0]} | {
            "implicit on own": share_alike(lead["kl"], lead["reward"]),
            "reward model on own": share_alike(lead["reward model"], lead["reward"]),
            "implicit on base": ratio(compare(policy.adapter, base, lesson.unseen[name].rows)["accuracy"]),
        }
    first = jax.tree.map(lambda x: x[:256], lesson.pairs.rows)
    learnt = compare(policy.adapter, base, first)
    return found | {key: ratio(learnt[f"{key}_reward"]) for key in ("chosen", "rejected")}


def judge(lesson: Lesson, found: Evaluation, toy: bool) -> dict[str, np.ndarray]:
    """Of every response: the labeller's score, log pi / rho, the learnt reward model's, VADER's, and its tokens."""
    world, rollout = alignment_tax.prepare(toy), found.rollout
    return {
        "reward": np.asarray(found.scores.reward),  # type: ignore[union-attr]
        "kl": np.asarray(found.kl),
        "reward model": score(rollout.tokens, text_mask(rollout, world.model.stop_ids), lesson.role, toy),
        "vader": np.array([vader_score(text) for text in read(rollout, toy)]),
        "length": np.asarray(rollout.response_mask).sum(axis=1),
    }


def read(rollout: Rollout, toy: bool) -> list[str]:
    """Prompts and responses as text."""
    model, sampling = alignment_tax.prepare(toy).model, alignment_tax.algorithm(toy).ppo.sampling
    asked, there = np.asarray(rollout.tokens), np.asarray(rollout.prompt_mask)
    said = decode_responses(model, sampling, rollout)
    return [model.decode(row[:LONGEST][mask]) + text for row, mask, text in zip(asked, there, said, strict=True)]


def score(tokens: Any, mask: Any, role: RewardRole, toy: bool) -> np.ndarray:
    """A reward model's scores of texts."""
    world = alignment_tax.prepare(toy)
    return np.asarray(_score(world.model.params, role, jnp.asarray(tokens), jnp.asarray(mask), world.trunk))


@functools.partial(jax.jit, static_argnames="trunk")
def _score(base: Any, role: RewardRole, tokens: Array, mask: Array, trunk: ModelConfig) -> Array:
    return score_tokens(base, role, trunk, tokens, mask)


def share_alike(lead: np.ndarray, truth: np.ndarray) -> float:
    """How often two leads have one sign; none is half right, and pairs without a true lead do not count."""
    counted = truth != 0
    return float(np.mean(np.where(lead == 0, 0.5, (lead > 0) == (truth > 0))[counted])) if counted.any() else 0.5


def ratio(metric: Any) -> float:
    """The mean of a metric."""
    return float(metric[0] / metric[1])


STUDY = Study("dpo_ppo_small", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
