"""Reward models from rated sentences: accuracy and calibration over the number of labels, by what is trained.

    python -m experiments.papers.reward_models

A label is the mean rating of a sentence by about 20 people (`movie_reviews`); labelled sentences with different ratings
are compared with one another. On SmolLM2-135M a linear probe and LoRA, from activations that are computed once for
all; on the small language model of `language` also all parameters; beside them ridge regression on words, and VADER.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import movie_reviews
from experiments.judges import vader_score
from experiments.movie_reviews import Review
from experiments.papers import language
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.data import assets
from ppo_jax.models.adapters import shared_layers
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.train.calibration import calibration, calibration_error
from ppo_jax.train.comparisons import (
    Bucket,
    bucket_texts,
    head_scores,
    keep_prefix,
    rated_batches,
    rated_pairs,
    text_features,
)
from ppo_jax.train.reward import RewardConfig, fit_head, init_role, train_role
from ppo_jax.train.state import key_stream

LABELS, SEEDS = (100, 500, 2000, 5000), (0, 1, 2)
DEPTH, TOP, SIZE, PAIRS = 18, 4, 50, 20_000  # of SmolLM2's 30 layers, and LoRA on the last of them
LENGTHS = {"SmolLM2": (16, 24, 36, 80), "small": (32, 56, 144)}
RATES = {("SmolLM2", "LoRA"): 3e-4, ("small", "LoRA"): 1e-3, ("small", "full"): 3e-4}


class Corpus(NamedTuple):
    """All sentences as a base reads them."""

    model: Model
    trunk: ModelConfig
    buckets: list[Bucket]
    layers: int  # below which the buckets hold the activations
    features: np.ndarray  # [N, D] of the base itself
    reviews: list[Review]
    test: np.ndarray  # places of the held-out sentences
    train: np.ndarray


def settings(toy: bool) -> list[Setting]:
    """Cheap ones first; of one kind the few labels first."""
    labels, seeds = (LABELS, SEEDS) if not toy else ((40,), SEEDS[:1])
    kinds = [("words", "ridge"), ("VADER", "lexicon"), ("SmolLM2", "probe"), ("small", "probe")]
    kinds += [("small", "full"), ("small", "LoRA"), ("SmolLM2", "LoRA")]
    if toy:
        kinds = [("words", "ridge"), ("small", "full"), ("small", "LoRA")]
    found = []
    for base, kind in kinds:
        counts = (0,) if kind == "lexicon" else labels
        if (base, kind) == ("SmolLM2", "LoRA"):  # a few minutes each: first what can be compared with least time
            counts = (2000, 500, 5000, 100)
        for count in counts:
            for seed in seeds if kind != "lexicon" else (0,):
                found.append({"base": base, "kind": kind, "labels": count, "seed": seed})
    return found


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Accuracy over all pairs of held-out sentences; of models of differences also the calibration."""
    if setting["base"] in ("words", "VADER"):
        reviews = language.read_corpus(toy).splits
        test = reviews.test
        if setting["kind"] == "lexicon":
            scores = np.array([vader_score(review.text) for review in test])
        else:
            train = choose_labels(np.arange(len(reviews.reward_train)), setting["labels"], setting["seed"])
            scores = fit_ridge([reviews.reward_train[i] for i in train], test)
        return rounded({"accuracy": movie_reviews.all_pairs_accuracy(scores, [review.rating for review in test])})
    corpus = read(setting["base"], toy)
    rows = choose_labels(corpus.train, setting["labels"], setting["seed"])
    config = describe(setting["base"], setting["kind"], len(rows))
    role = fit(corpus, config, rows, setting["seed"])
    scores, ratings = score(corpus, role, config, corpus.test), rate(corpus, corpus.test)
    better, worse = rated_pairs(ratings, PAIRS, np.random.default_rng(0))
    table = calibration(scores[better] - scores[worse])
    return rounded(
        {
            "accuracy": movie_reviews.all_pairs_accuracy(scores, ratings),
            "calibration_error": calibration_error(table),
            "calibration": [[bucket.predicted, bucket.accuracy] for bucket in table],
        }
    )


def describe(base: str, kind: str, labels: int) -> RewardConfig:
    """Few labels are passed over four times, many once."""
    if kind == "probe":
        return RewardConfig(depth=DEPTH if base == "SmolLM2" else 0, lora_layers=0, batch_size=SIZE)
    return RewardConfig(
        kind="full" if kind == "full" else "lora",
        depth=DEPTH if base == "SmolLM2" else 0,
        lora_layers=TOP,
        batch_size=min(SIZE, labels),
        epochs=4 if labels <= 500 else 1,
        learning_rate=RATES[base, kind],
    )


@functools.cache
def read(base: str, toy: bool) -> Corpus:
    """Sentences to train and to test on, through a base once."""
    splits = language.read_corpus(toy).splits
    reviews, count = [*splits.test, *splits.reward_train], len(splits.test)
    model = language.small_model(toy) if base == "small" else load_model(assets.smollm2())
    probe = describe(base, "probe", 0)
    trunk = probe.trunk(model.config)
    rows = model.tokenizer([review.text for review in reviews], add_special_tokens=False)["input_ids"]
    buckets = bucket_texts([row[: LENGTHS[base][-1]] for row in rows], LENGTHS[base], model.pad_id)
    layers = trunk.num_layers - TOP if base == "SmolLM2" else 0
    buckets = list(keep_prefix(model.params, trunk, buckets, layers, SIZE))
    plain = RewardRole({}, {})
    features = text_features(model.params, plain, trunk, buckets, SIZE, layers)
    return Corpus(model, trunk, buckets, layers, features, reviews, np.arange(count), np.arange(count, len(reviews)))


def fit(corpus: Corpus, reward: RewardConfig, rows: np.ndarray, seed: int) -> RewardRole:
    """The head on the base's features first, then all that is trained; scores on the scale that was trained."""
    rng, ratings = np.random.default_rng(seed), rate(corpus, rows)
    role = init_role(key_stream(seed, "reward"), corpus.model.config, reward, corpus.model.params)
    better, worse = rated_pairs(ratings, PAIRS, rng)
    role = role._replace(head=fit_head(corpus.features[rows], better, worse, reward.head_l2, reward.head_steps))
    if not reward.trains:
        return role
    texts = take(corpus, rows, reward)
    batches = [b for _ in range(reward.epochs) for b in rated_batches(texts, ratings, reward.batch_size, rng)]
    return train_role(
        role, corpus.model.params, corpus.trunk, reward, batches.__getitem__, len(batches), lambda *_: None
    )


def score(corpus: Corpus, role: RewardRole, reward: RewardConfig, rows: np.ndarray) -> np.ndarray:
    """The scores of sentences."""
    if not reward.trains:
        return head_scores(role.head, corpus.features[rows])
    layers = shared_layers(role.adapter, corpus.trunk) if reward.kind == "lora" and corpus.layers else 0
    texts = take(corpus, rows, reward)
    return head_scores(role.head, text_features(corpus.model.params, role, corpus.trunk, texts, SIZE, layers))


def take(corpus: Corpus, rows: np.ndarray, reward: RewardConfig) -> list[Bucket]:
    """The buckets of some sentences, numbered by their place in `rows`; a whole model reads the tokens themselves."""
    place = {int(row): i for i, row in enumerate(rows)}
    found = []
    for bucket in corpus.buckets:
        kept = np.array([i for i, row in enumerate(bucket.index) if int(row) in place], np.int64)
        if len(kept):
            index = np.array([place[int(row)] for row in bucket.index[kept]])
            prefix = None if bucket.prefix is None or reward.kind == "full" else bucket.prefix[kept]
            found.append(Bucket(index, bucket.tokens[kept], bucket.mask[kept], prefix))
    return found


def rate(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """The people's mean ratings."""
    return np.array([corpus.reviews[i].rating for i in rows])


def choose_labels(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which sentences have labels: the same for every kind of a seed, and more labels hold the fewer."""
    return np.random.default_rng(seed).permutation(rows)[:count]


def fit_ridge(train: Sequence[Review], test: Sequence[Review], l2: float = 10.0) -> np.ndarray:
    """Scores by ridge regression of the ratings on which words a sentence has, in its dual form."""

    def words(review: Review) -> set[str]:
        return set(re.findall(r"[\w']+", review.text.lower()))

    known = {word: i for i, word in enumerate(sorted(set().union(*map(words, train))))}

    def count(reviews: Sequence[Review]) -> np.ndarray:
        found = np.zeros((len(reviews), len(known)), np.float32)
        for row, review in enumerate(reviews):
            found[row, [known[word] for word in words(review) if word in known]] = 1
        return found

    x, y = count(train), np.array([review.rating for review in train])
    weights = np.linalg.solve(x @ x.T + l2 * np.eye(len(x)), y - y.mean())
    return count(test) @ (x.T @ weights)


STUDY = Study("reward_models", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
