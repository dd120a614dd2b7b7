"""A reward model from rated sentences: saved, and reused by the next run that asks for the same one."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import movie_reviews
from experiments.movie_reviews import Review
from ppo_jax import artifacts, metrics
from ppo_jax.display import Screen
from ppo_jax.models.adapters import first_layer
from ppo_jax.models.config import ModelConfig
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.runs import Model
from ppo_jax.train.loop import means
from ppo_jax.train.ppo import make_optimizer
from ppo_jax.train.reward_model import (
    Bucket,
    RewardConfig,
    bucket_texts,
    fit_head,
    head_scores,
    init_role,
    keep_prefix,
    make_reward_step,
    normalise_head,
    rated_batches,
    text_features,
)

LENGTHS = (16, 24, 36, 80)  # padded lengths; one program is compiled for each
HEAD_PAIRS = 20_000


class RatingModel(NamedTuple):
    """A role on `trunk` that scores sentences; mean 0 and std 1 on those it was trained on."""

    role: RewardRole
    trunk: ModelConfig
    accuracy: float  # over all pairs of the held-out sentences with different ratings
    reused: bool


def obtain(
    name: str,
    model: Model,
    train: Sequence[Review],
    test: Sequence[Review],
    reward: RewardConfig,
    seed: int,
    cache: Path,
    screen: Screen,
    write: metrics.Writer,
) -> RatingModel:
    """The reward model that these settings describe: from `cache` if an earlier run left it there, else trained."""
    facts = {
        "reward": dataclasses.asdict(reward),
        "base": model.fingerprint,
        "train": _digest(train),
        "test": _digest(test),
        "seed": seed,
    }
    path = cache / f"{name}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"
    trunk = reward.trunk(model.config)
    if path.exists():
        found = artifacts.load(path, "reward")
        artifacts.check_base(found, model.fingerprint, model.config)
        screen.message(f"{name}: reusing {path} (held-out pairwise accuracy {found.meta['accuracy']:.3f})")
        return RatingModel(RewardRole(found.adapter, found.head), trunk, found.meta["accuracy"], True)

    role = fit(name, model, train, reward, seed, screen, write)
    held_out = list(_buckets(model, test, reward, trunk, trunk.num_layers))
    features = text_features(model.params, role, trunk, held_out, reward.batch_size)
    accuracy = movie_reviews.all_pairs_accuracy(head_scores(role.head, features), _ratings(test))
    write(0, f"{name} test", {"heldout_accuracy": accuracy})
    artifacts.save(
        path,
        "reward",
        role.adapter,
        role.head,
        {"accuracy": accuracy, **facts},
        config=model.config,
        base=model.name,
        base_fingerprint=model.fingerprint,
        layers=trunk.num_layers,
    )
    return RatingModel(role, trunk, accuracy, False)


def fit(
    name: str,
    model: Model,
    train: Sequence[Review],
    reward: RewardConfig,
    seed: int,
    screen: Screen,
    write: metrics.Writer,
) -> RewardRole:
    """Head on frozen features first, then LoRA and head together; scores normalised on the training sentences."""
    trunk, size, ratings = reward.trunk(model.config), reward.batch_size, _ratings(train)
    rng = np.random.default_rng(seed)
    role = init_role(jax.random.key(seed), model.config, reward)
    layers = first_layer(role.adapter, trunk)

    kept: list[Bucket] = []
    total = len(train)
    for bucket in _buckets(model, train, reward, trunk, layers):
        kept.append(bucket)
        screen.update(phase=f"{name} features", step=sum(len(b.index) for b in kept), total=total)
    features = text_features(model.params, role, trunk, kept, size, layers)
    better, worse = rated_pairs(ratings, HEAD_PAIRS, rng)
    role = role._replace(head=fit_head(features, better, worse, reward.head_l2, reward.head_steps))

    if reward.lora_layers and reward.epochs:
        optimizer = make_optimizer()
        step, opt_state = make_reward_step(trunk, optimizer, reward.max_grad_norm), optimizer.init(role)
        epochs = [rated_batches(kept, ratings, size, rng) for _ in range(reward.epochs)]
        batches = [batch for epoch in epochs for batch in epoch]
        for number, batch in enumerate(batches):
            rate = reward.learning_rate * (1 - number / len(batches))
            role, opt_state, measured = step(role, opt_state, model.params, batch, rate)
            values = means(measured)
            write(number + 1, name, values)
            screen.update(phase=name, step=number + 1, total=len(batches), values=values)
        features = text_features(model.params, role, trunk, kept, size, layers)
    return role._replace(head=normalise_head(role.head, head_scores(role.head, features)))


def rated_pairs(ratings: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs (better, worse) of rows with different ratings; about `count` of them."""
    i, j = rng.integers(len(ratings), size=(2, count))
    i, j = (side[ratings[i] != ratings[j]] for side in (i, j))
    swap = ratings[i] < ratings[j]
    return np.where(swap, j, i), np.where(swap, i, j)


def _buckets(
    model: Model, reviews: Sequence[Review], reward: RewardConfig, trunk: ModelConfig, layers: int
) -> Sequence[Bucket]:
    rows = model.tokenizer([review.text for review in reviews], add_special_tokens=False)["input_ids"]
    buckets = bucket_texts(rows, LENGTHS, model.pad_id)
    # A prefix up to the very top is only wanted for training; without one the features come in a single pass.
    return (
        buckets if layers == trunk.num_layers else keep_prefix(model.params, trunk, buckets, layers, reward.batch_size)
    )  # type: ignore[return-value]


def _ratings(reviews: Sequence[Review]) -> np.ndarray:
    return np.array([review.rating for review in reviews])


def _digest(reviews: Sequence[Review]) -> str:
    lines = "\n".join(f"{review.rating}\t{review.text}" for review in reviews)
    return hashlib.sha256(lines.encode()).hexdigest()
