"""The reward model in one run directory: from pairs, ratings or choices to export/reward, and what it is worth.

base --run_reward--> reward on that base (LoRA), or a model of its own (full) --runs.run_ppo--> policy
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ppo_jax.data import EncodedPairs, PairBatch, pair_batches
from ppo_jax.data.encode import EncodedChoices, EncodedRatings
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files.artifacts import EXPORT, REWARD
from ppo_jax.models.placement import create_on_mesh, place_on_mesh
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards import loading
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.runs.exports import save_role
from ppo_jax.runs.health import watched
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.output.writers import phase_writer
from ppo_jax.train.calibration import Bucket, calibration, calibration_error
from ppo_jax.train.comparisons import Comparisons, bucket_texts, head_scores, rated_batches, rated_pairs, text_features
from ppo_jax.train.reward_model import Loss, RewardConfig, fit_head, init_role, normalise_head, train_role
from ppo_jax.train.state import key_stream

Data = EncodedPairs | EncodedRatings | EncodedChoices
TRAINING, HELD_OUT = "training texts", "held-out texts"
RATED_PAIRS = 50_000  # of ratings, as many random pairs fit the head and are measured


class Compared(NamedTuple):
    """All texts of some data, and which are preferred to which."""

    rows: list[list[int]]
    better: Int[np.ndarray, " M"]
    worse: Int[np.ndarray, " M"]
    margin: Float[np.ndarray, " M"]
    loss: Loss


class RewardResult(NamedTuple):
    role: RewardRole
    trunk: ModelConfig  # what the role reads of the base
    accuracy: float  # fraction of held-out comparisons in the right order; ties count half
    heldout: dict[str, float]  # accuracy, calibration_error, score_mean, _std, _min, _max
    calibration: list[Bucket]
    path: Path  # the artifact (LoRA), or the sequence-classification directory (full)


def run_reward(
    directory: Path,
    model: Model,
    reward: RewardConfig,
    train: Data,
    held_out: Data,
    seed: int,
    screen: Screen,
    reference: Sequence[Sequence[int]] = (),
) -> RewardResult:
    """Train a reward model in an opened run directory; leave export/reward.

    The head is fitted on frozen features, then adapter and head together. With `reward.normalise` scores have mean 0
    and std 1 on the `reference` rows, by default the training texts. LoRA leaves an artifact (`ppo_jax.artifacts`),
    the full kind a sequence-classification directory (`models.seqcls`).

    Raises ValueError when a batch cannot be filled (`check_batch`), or nothing is compared.
    """
    check_batch(reward, train)
    trunk, given, size = reward.trunk(model.config), collect_comparisons(train, seed, TRAINING), reward.batch_size
    batches, steps = training_batches(train, reward, seed, model.pad_id)
    write = watched(phase_writer(directory, screen, "reward", steps), "reward", screen)
    model = model._replace(params=place_on_mesh(model.params))
    key = key_stream(seed, "reward")
    role = create_on_mesh(lambda k, base: init_role(k, model.config, reward, base), key, model.params)

    def features(rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "N D"]:
        return text_features(model.params, role, trunk, bucket_texts(rows, _lengths(rows), model.pad_id), size)

    def measure(step: int) -> tuple[dict[str, float], list[Bucket]]:
        values, table = evaluate(role, features(unseen.rows), unseen)
        kept = [name for name in values if not name.startswith("score_")]  # normalising moves those
        write(step, {f"heldout_{name}": values[name] for name in kept})
        return values, table

    unseen = collect_comparisons(held_out, seed, HELD_OUT)
    screen.message(f"reward model: reading {len(given.rows)} texts")
    found = features(given.rows)
    if reward.head_steps:
        i, j, margin, loss = given[1:]
        head = fit_head(found, i, j, reward.head_l2, reward.head_steps, margin, loss=loss)
        role = role._replace(head=place_on_mesh(head))
        values, table = measure(0)
    if steps:
        role = train_role(role, model.params, trunk, reward, batches, steps, write, given.loss)
        found = features(given.rows)
        values, table = measure(steps)
    if reward.normalise:
        texts = features(reference) if reference else found
        role = role._replace(head=normalise_head(role.head, head_scores(role.head, texts)))
    spread = _spread(head_scores(role.head, features(unseen.rows)))  # of the model as it is saved
    write(steps, {f"heldout_{name}": value for name, value in spread.items()})
    values |= spread
    normalised_on = ("reference texts" if reference else "training texts") if reward.normalise else None
    meta = describe_training(reward, given, unseen, values, table) | {"normalised_on": normalised_on}
    path = save_reward(directory, model, reward, role, meta)
    return RewardResult(role, trunk, values["accuracy"], values, table, path)


def describe_training(
    reward: RewardConfig, given: Compared, unseen: Compared, values: dict[str, float], table: list[Bucket]
) -> dict[str, Any]:
    """List what an artifact says of its training."""
    return {
        "accuracy": values["accuracy"],
        "heldout_pairs": len(unseen.better),
        "pairs": len(given.better),
        "heldout": values,
        "calibration": [bucket._asdict() for bucket in table],
        "loss": given.loss,
        "reward": dataclasses.asdict(reward),
    }


def save_reward(directory: Path, model: Model, reward: RewardConfig, role: RewardRole, meta: dict[str, Any]) -> Path:
    """Write a run's export/reward: an artifact of the role, or the full kind as a sequence classifier."""
    path, trunk = directory / EXPORT / REWARD, reward.trunk(model.config)
    if reward.kind == "full":
        loading.save_full(path, model, role, trunk, meta, overwrite=True)
    else:
        save_role(path, "reward", role.adapter, role.head, model, meta=meta, layers=trunk.num_layers)
    return path


def check_batch(reward: RewardConfig, data: Data) -> None:
    """Raise ValueError unless `batch_size` texts are a whole number of pairs or choices, and there are so many."""
    size = reward.batch_size
    if isinstance(data, EncodedRatings):
        if size > len(data.rows):
            raise ValueError(f"batch_size={size} texts, but there are {len(data.rows)}")
        return
    each, count, what = 2, 0, "pairs"
    if isinstance(data, EncodedChoices):
        each, count, what = max(map(len, data.groups)), len(data.groups), f"choices of {max(map(len, data.groups))}"
    else:
        count = len(data.chosen)
    if size % each:
        raise ValueError(f"batch_size={size} texts are no whole number of {what}; give a multiple of {each}")
    if size // each > count:
        raise ValueError(f"batch_size={size} texts are {size // each} {what}, but there are {count}")


def collect_comparisons(data: Data, seed: int, what: str = "texts") -> Compared:
    """Collect texts and comparisons of pairs, of ratings (all, or many at random) or of choices (the best to others).

    Args:
      what: what the texts are, for the message: which part of the data.

    Raises ValueError when nothing is preferred to anything.
    """
    loss: Loss = "pairwise"
    if isinstance(data, EncodedPairs):
        first = np.arange(len(data.chosen))
        rows = [*data.chosen, *data.rejected]
        return Compared(rows, first, len(first) + first, np.asarray(data.margins, np.float32), loss)
    if isinstance(data, EncodedRatings):
        rows, ratings = data.rows, np.asarray(data.ratings, np.float64)
        if len(rows) ** 2 <= RATED_PAIRS:
            better, worse = np.nonzero(ratings[:, None] > ratings[None, :])
        else:
            better, worse = rated_pairs(ratings, RATED_PAIRS, np.random.default_rng(seed))
    else:
        loss, rows, pairs = "best", [row for group in data.groups for row in group], []
        start = 0
        for group, best in zip(data.groups, data.best, strict=True):
            pairs += [(start + best, start + other) for other in range(len(group)) if other != best]
            start += len(group)
        better, worse = np.array(pairs).T
    if not len(better):
        raise ValueError(
            f"all {len(rows)} {what} have the same rating, so nothing is preferred to anything: give texts with "
            "different ratings, or change --held-out, which decides how many of them are kept apart to measure"
        )
    return Compared(rows, better, worse, np.zeros(len(better), np.float32), loss)


def training_batches(
    data: Data, reward: RewardConfig, seed: int, pad_id: int
) -> tuple[Callable[[int], Comparisons], int]:
    """Make (step -> batch, number of steps); no steps where the head alone is trained."""
    epochs = reward.epochs if reward.trains else 0
    if isinstance(data, EncodedPairs):
        per_batch = reward.batch_size // 2
        pairs = pair_batches(data.chosen, data.rejected, data.margins, per_batch, seed, pad_id)
        return lambda step: compare_pairs(pairs[step]), math.ceil(epochs * len(data.chosen) / per_batch)
    rng = np.random.default_rng(seed)
    if isinstance(data, EncodedRatings):
        buckets, ratings = bucket_texts(data.rows, _lengths(data.rows), pad_id), np.asarray(data.ratings, np.float64)
        rated = [batch for _ in range(epochs) for batch in rated_batches(buckets, ratings, reward.batch_size, rng)]
        return rated.__getitem__, len(rated)
    per_batch = reward.batch_size // max(map(len, data.groups))
    steps = math.ceil(epochs * len(data.groups) / per_batch)
    order = np.concatenate([rng.permutation(len(data.groups)) for _ in range(epochs + 1)])
    return lambda step: compare_choices(data, order[step * per_batch :][:per_batch], pad_id), steps


def compare_pairs(batch: PairBatch) -> Comparisons:
    """Put chosen texts in the first half of the rows, rejected in the second; row i is preferred to row B + i."""
    pairs, length = batch.chosen.shape
    better = np.zeros((2 * pairs, 2 * pairs), bool)
    margin = np.zeros(better.shape, np.float32)
    first = np.arange(pairs)
    better[first, pairs + first] = True
    margin[first, pairs + first] = batch.margin
    tokens = np.concatenate([batch.chosen, batch.rejected])
    mask = np.concatenate([batch.chosen_mask, batch.rejected_mask])
    return Comparisons(tokens, mask, better, margin)  # type: ignore[arg-type]  # numpy until it is fed


def compare_choices(data: EncodedChoices, index: Int[np.ndarray, " G"], pad_id: int) -> Comparisons:
    """Put the groups of `index` in as many rows each as the largest of all needs; every shape is the same."""
    each = max(map(len, data.groups))
    length = max(len(row) for group in data.groups for row in group)
    count = each * len(index)
    tokens, mask = np.full((count, length), pad_id, np.int32), np.zeros((count, length), bool)
    mask[:, 0] = True  # rows that fill up a group have one token
    better = np.zeros((count, count), bool)
    for place, number in enumerate(index):
        group, best, start = data.groups[number], data.best[number], place * each
        for i, row in enumerate(group, start):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        better[start + best, start : start + len(group)] = True
        better[start + best, start + best] = False
    return Comparisons(tokens, mask, better, np.zeros(better.shape, np.float32))  # type: ignore[arg-type]


def evaluate(
    role: RewardRole, features: Float[np.ndarray, "N D"], unseen: Compared
) -> tuple[dict[str, float], list[Bucket]]:
    """Measure a role on held-out comparisons, from the features of their texts; gaps without the head's gain."""
    scores = head_scores(role.head, features)
    leads = (scores[unseen.better] - scores[unseen.worse]) / float(role.head["gain"])
    table = calibration(leads)
    values = {
        "accuracy": float(np.mean((leads > 0) + 0.5 * (leads == 0))),
        "calibration_error": calibration_error(table),
        **_spread(scores),
    }
    if unseen.loss == "best":
        wins = np.ones(len(scores), bool)
        np.logical_and.at(wins, unseen.better, leads > 0)
        values["best_accuracy"] = float(wins[np.unique(unseen.better)].mean())
    return values, table


def _spread(scores: Float[np.ndarray, " N"]) -> dict[str, Any]:
    found = {"mean": scores.mean(), "std": scores.std(), "min": scores.min(), "max": scores.max()}
    return {f"score_{name}": float(value) for name, value in found.items()}


def _lengths(rows: Sequence[Sequence[int]]) -> list[int]:
    """Choose three padded lengths; one program is compiled for each."""
    longest = max(map(len, rows))
    return sorted({-(-longest // 4), -(-longest // 2), longest})
