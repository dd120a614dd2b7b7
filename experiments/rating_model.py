"""A reward model from rated sentences: saved, and reused by the next run that asks for the same one."""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import movie_reviews
from experiments.movie_reviews import Review
from experiments.phases import plan_rating_models
from ppo_jax.data.locks import wait_for_target
from ppo_jax.models.adapters import shared_layers
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import artifacts
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rewards.base import Reward
from ppo_jax.runs.output import writers
from ppo_jax.runs.output.screen import Screen
from ppo_jax.train.comparisons import (
    Bucket,
    bucket_texts,
    head_scores,
    keep_prefix,
    rated_batches,
    rated_pairs,
    text_features,
)
from ppo_jax.train.reward import RewardConfig, fit_head, init_role, normalise_head, train_role
from ppo_jax.train.state import key_stream

LENGTHS = (16, 24, 36, 80)  # padded lengths; one program is compiled for each
HEAD_PAIRS = 20_000


class RatingModel(NamedTuple):
    """A role on `trunk` that scores sentences; mean 0 and std 1 on those it was trained on."""

    role: RewardRole
    trunk: ModelConfig
    accuracy: float  # over all pairs of the held-out sentences with different ratings
    path: Path  # the artifact


def lora_reward(found: RatingModel, stop_ids: tuple[int, ...], normalised: bool) -> Reward:
    """The trained reward model as PPO takes it: an adapter and a head on the policy's own base."""
    device = adapter_reward(found.trunk, stop_ids)
    metadata = {"accuracy": found.accuracy, "reward": {"normalise": normalised}}
    return Reward(device, params=found.role, layers=found.trunk.num_layers, metadata=metadata)


class Wanted(NamedTuple):
    """What describes a rating model."""

    name: str
    train: Sequence[Review]
    reward: RewardConfig


def obtain(
    wanted: Sequence[Wanted],
    model: Model,
    test: Sequence[Review],
    seed: int,
    cache: Path,
    screen: Screen,
    write: writers.Writer,
) -> list[RatingModel]:
    """The rating models that these settings describe: from `cache` if an earlier run left them there, else trained."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):  # before training, not after
            pass
    except OSError as error:
        raise ValueError(f"cannot keep reward models in {cache}: {error.strerror}; set PPO_JAX_CACHE") from error
    facts = [_facts(one, model, test, seed) for one in wanted]
    paths = [cache / f"{one.name}-{_digest(fact)[:16]}" for one, fact in zip(wanted, facts, strict=True)]
    with contextlib.ExitStack() as held:
        for path in sorted({path for path in paths if not path.exists()}):  # in one order, whoever asks
            held.enter_context(wait_for_target(path, screen.message))  # another run makes it: it is there afterwards
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        screen.plan = plan_rating_models([wanted[i] for i in missing], model.config, len(test)) | dict(screen.plan)
        roles = {i: fit(wanted[i], model, seed, screen, write) for i in missing}
        accuracies = _held_out_accuracies([(roles[i], wanted[i].reward) for i in missing], model, test, screen)
        for i, accuracy in zip(missing, accuracies, strict=True):
            one, role = wanted[i], roles[i]
            write(0, f"{one.name} test", {"heldout_accuracy": accuracy})
            artifacts.save(
                paths[i],
                "reward",
                role.adapter,
                role.head,
                model.base,
                {"accuracy": accuracy, **facts[i]},
                layers=one.reward.trunk(model.config).num_layers,
            )
    return [
        _load(one, path, model, i not in missing, screen)
        for i, (one, path) in enumerate(zip(wanted, paths, strict=True))
    ]


def _load(wanted: Wanted, path: Path, model: Model, reused: bool, screen: Screen) -> RatingModel:
    found = artifacts.load(path, "reward")
    artifacts.check_base(found, model.fingerprint, model.config)
    accuracy = found.meta["accuracy"]
    how = "reused from" if reused else "saved in"
    screen.message(f"{wanted.name} model: held-out pairwise accuracy {accuracy:.3f}, {how} {path}")
    return RatingModel(RewardRole(found.adapter, found.head), found.trunk(model.config), accuracy, path)


def _held_out_accuracies(
    trained: Sequence[tuple[RewardRole, RewardConfig]], model: Model, test: Sequence[Review], screen: Screen
) -> list[float]:
    """Pairwise accuracy of each on the same sentences, whose lower layers are computed once for all."""
    if not trained:
        return []
    trunks = [reward.trunk(model.config) for _, reward in trained]
    pairs = list(zip(trained, trunks, strict=True))
    shared = min(shared_layers(role.adapter, trunk) for (role, _), trunk in pairs)
    size = trained[0][1].batch_size
    held_out = _with_prefix("held-out features", model, test, trunks[0], shared, size, screen)
    accuracies = []
    for (role, _), trunk in pairs:
        features = text_features(model.params, role, trunk, held_out, size, shared)
        accuracies.append(movie_reviews.all_pairs_accuracy(head_scores(role.head, features), _ratings(test)))
    return accuracies


def fit(wanted: Wanted, model: Model, seed: int, screen: Screen, write: writers.Writer) -> RewardRole:
    """Head on frozen features first, then LoRA and head together; scores normalised on the training sentences."""
    name, train, reward = wanted
    trunk, size, ratings = reward.trunk(model.config), reward.batch_size, _ratings(train)
    rng = np.random.default_rng(seed)
    if reward.kind == "full":
        raise ValueError("rating models are LoRA on the policy's base; kind=full is for `ppo-jax reward`")
    role = init_role(key_stream(seed, name), model.config, reward, model.params)
    layers = shared_layers(role.adapter, trunk)
    texts = _with_prefix(f"{name} features", model, train, trunk, layers, size, screen)

    features = text_features(model.params, role, trunk, texts, size, layers)
    better, worse = rated_pairs(ratings, HEAD_PAIRS, rng)
    if reward.head_steps:
        role = role._replace(head=fit_head(features, better, worse, reward.head_l2, reward.head_steps))
    scores = head_scores(role.head, features)
    if reward.trains:
        batches = [b for _ in range(reward.epochs) for b in rated_batches(texts, ratings, size, rng)]

        def record(step: int, values: Mapping[str, float]) -> None:
            write(step, name, values)
            screen.update(phase=name, step=step, total=len(batches), values=values)

        role = train_role(role, model.params, trunk, reward, batches.__getitem__, len(batches), record)
        scores = head_scores(role.head, text_features(model.params, role, trunk, texts, size, layers))
    return role._replace(head=normalise_head(role.head, scores)) if reward.normalise else role


def _with_prefix(
    phase: str,
    model: Model,
    reviews: Sequence[Review],
    trunk: ModelConfig,
    layers: int,
    size: int,
    screen: Screen,
) -> list[Bucket]:
    rows = model.tokenizer([review.text for review in reviews], add_special_tokens=False)["input_ids"]
    kept: list[Bucket] = []
    for bucket in keep_prefix(model.params, trunk, bucket_texts(rows, LENGTHS, model.pad_id), layers, size):
        kept.append(bucket)
        screen.update(phase=phase, step=sum(len(b.index) for b in kept), total=len(rows))
    return kept


def _ratings(reviews: Sequence[Review]) -> np.ndarray:
    return np.array([review.rating for review in reviews])


def _facts(wanted: Wanted, model: Model, test: Sequence[Review], seed: int) -> dict[str, Any]:
    """Everything that decides what training gives."""
    return {
        "reward": dataclasses.asdict(wanted.reward),
        "base_weights": model.fingerprint,
        "train": _digest([(review.rating, review.text) for review in wanted.train]),
        "test": _digest([(review.rating, review.text) for review in test]),
        "seed": seed,
        "lengths": LENGTHS,
        "head_pairs": HEAD_PAIRS,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
