"""The reward model in one run directory: from pairs, ratings or choices to export/reward, and what it is worth.

base --run_reward--> reward on that base (LoRA), or a model of its own (full) --runs.run_ppo--> policy
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ppo_jax.data import EncodedPairs, PairBatch, pair_batches
from ppo_jax.data.batches import Mixture
from ppo_jax.data.encode import EncodedChoices, EncodedRatings
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files.artifacts import BEST, EXPORT, REWARD
from ppo_jax.models.placement import create_on_mesh, place_on_mesh
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards import loading
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.exports import read_best, save_role
from ppo_jax.runs.offline import PassOn, Work, init_policy, train_offline
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.train.calibration import Bucket, calibration, calibration_error
from ppo_jax.train.comparisons import Comparisons, bucket_texts, head_scores, rated_batches, rated_pairs, text_features
from ppo_jax.train.reward import Loss, RewardConfig, bind_reward_step, fit_head, init_role, normalise_head
from ppo_jax.train.state import key_stream

Data = EncodedPairs | EncodedRatings | EncodedChoices
TRAINING = "training texts"
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


class Completed(NamedTuple):
    """A role as it is saved, and what was measured of it."""

    role: RewardRole
    values: dict[str, float]
    table: list[Bucket]


def run_reward(directory: Path, setup: OfflineSetup, screen: Screen, resume: bool | Resume = "no") -> RewardResult:
    """Train a reward model in an opened run directory; leave export/reward.

    The head is fitted on frozen features, then adapter and head together. With `reward.normalise` scores have mean 0
    and std 1 on the `reference` rows, by default the training texts. LoRA leaves an artifact, the full kind a
    sequence-classification directory (`models.files`). Where another step was measured best that role is in
    export/best, normalised in the same way.

    Args:
      setup: with a RewardConfig, and pairs, ratings or choices as data.

    Raises ValueError when a batch cannot be filled (`check_batch`), or nothing is compared; else as
    `runs.offline.train_offline`.
    """
    reward, seed = setup.options, setup.seed
    check_batch(reward, setup.train)
    model = setup.model._replace(params=place_on_mesh(setup.model.params))
    measured_on = "training" if setup.held_out == setup.train else "held-out"  # too few to hold any out
    given, unseen = (
        collect_comparisons(setup.train, seed, TRAINING),
        collect_comparisons(setup.held_out, seed, f"{measured_on} texts"),
    )
    texts = RewardTexts(model, reward, given, unseen, setup.reference, measured_on)
    batches, steps = training_batches(setup.train, reward, seed, model.pad_id, setup.mix)
    trunk, key = reward.trunk(model.config), key_stream(seed, "reward")

    role = create_on_mesh(lambda k, base: init_role(k, model.config, reward, base), key, model.params)

    def begin(role: RewardRole) -> RewardRole:
        screen.message(f"reward model: reading {len(given.rows)} texts")
        return texts.fit_head(role) if reward.head_steps else role

    work = Work(
        phase="reward",
        steps=steps,
        params=role if setup.start is None else role._replace(adapter=init_policy(setup)),
        bind_step=partial(bind_reward_step, model.params, trunk, reward, given.loss),
        batches=batches,
        measure=texts.measure,
        begin=begin,
        complete=texts.complete,
    )
    trained = train_offline(directory, setup._replace(model=model), work, screen, resume)
    done, path = trained.completed, directory / EXPORT / REWARD
    save_reward(path, model, reward, done.role, texts.describe(done))
    best = read_best(directory, trained.best, steps, {"params": trained.params}, screen.message)
    if best is not None:
        found, _ = texts.complete(best["params"])
        chosen = {"steps": trained.best["step"], "chosen_by": trained.best["metric"]}
        save_reward(directory / EXPORT / BEST, model, reward, found.role, texts.describe(found) | chosen)
    return RewardResult(done.role, trunk, done.values["accuracy"], done.values, done.table, path)


@dataclasses.dataclass(frozen=True)
class RewardTexts:
    """The texts of a reward model on its base, and what is read of them."""

    model: Model
    reward: RewardConfig
    given: Compared
    unseen: Compared
    reference: Sequence[Sequence[int]]
    measured_on: str  # "held-out", or "training" where none is held out

    def features(
        self, role: RewardRole, rows: Sequence[Sequence[int]], pass_on: PassOn = iter
    ) -> Float[np.ndarray, "N D"]:
        """Read what the head sees of these texts."""
        model, trunk = self.model, self.reward.trunk(self.model.config)
        buckets = bucket_texts(rows, _lengths(rows), model.pad_id)
        return text_features(model.params, role, trunk, buckets, self.reward.batch_size, pass_on=pass_on)

    def fit_head(self, role: RewardRole) -> RewardRole:
        """Fit the head on the training texts."""
        (_, i, j, margin, loss), reward = self.given, self.reward
        found = self.features(role, self.given.rows)
        head = fit_head(found, i, j, reward.head_l2, reward.head_steps, margin, loss=loss)
        return role._replace(head=place_on_mesh(head))

    def measure(self, done: int, role: RewardRole, pass_on: PassOn) -> dict[str, float]:
        """Measure a role after `done` steps on the held-out comparisons; nothing of a head that is still random."""
        if not done and not self.reward.head_steps:
            return {}
        values, _ = evaluate(role, self.features(role, self.unseen.rows, pass_on), self.unseen)
        # Normalising moves the scores.
        return {name: value for name, value in values.items() if not name.startswith("score_")}

    def complete(self, role: RewardRole) -> tuple[Completed, dict[str, float]]:
        """Normalise a role that was trained; also return the spread of its scores."""
        held_out = self.features(role, self.unseen.rows)
        values, table = evaluate(role, held_out, self.unseen)
        if self.reward.normalise:
            texts = self.features(role, self.reference or self.given.rows)
            role = role._replace(head=normalise_head(role.head, head_scores(role.head, texts)))
        spread = _spread(head_scores(role.head, held_out))  # of the model as it is saved
        return Completed(role, values | spread, table), spread

    def describe(self, done: Completed) -> dict[str, Any]:
        """List what an artifact says of its training."""
        normalised_on = "reference texts" if self.reference else "training texts"
        return {
            "accuracy": done.values["accuracy"],
            "heldout_pairs": len(self.unseen.better),
            "pairs": len(self.given.better),
            "heldout": done.values,
            "calibration": [bucket._asdict() for bucket in done.table],
            "loss": self.given.loss,
            "reward": dataclasses.asdict(self.reward),
            "normalised_on": normalised_on if self.reward.normalise else None,
            "measured_on": self.measured_on,
        }


def save_reward(path: Path, model: Model, reward: RewardConfig, role: RewardRole, meta: dict[str, Any]) -> None:
    """Write an artifact of the role, or the full kind as a sequence classifier."""
    trunk = reward.trunk(model.config)
    if reward.kind == "full":
        loading.save_full(path, model, role, trunk, meta, overwrite=True)
    else:
        save_role(path, "reward", role.adapter, role.head, model, meta=meta, layers=trunk.num_layers)


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
    data: Data, reward: RewardConfig, seed: int, pad_id: int, mix: Mixture | None = None
) -> tuple[Callable[[int], Comparisons], int]:
    """Make (step -> batch, number of steps); no steps where the head alone is trained."""
    epochs = reward.epochs if reward.trains else 0
    if isinstance(data, EncodedPairs):
        per_batch = reward.batch_size // 2
        pairs = pair_batches(data.chosen, data.rejected, data.margins, per_batch, seed, pad_id, mix)
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
