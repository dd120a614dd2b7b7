"""10,605 sentences from film reviews, each with the mean of about 20 human ratings from -4 to 4.

Hutto & Gilbert ("VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014)
had the sentences of Pang & Lee's Rotten Tomatoes collection rated; `ppo_jax.assets.vader` fetches their file, in
which a line is `id TAB rating TAB text`. An id names a sentence, and nothing says which review it comes from.
"""

import hashlib
import html
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ppo_jax.data import assets
from ppo_jax.models.pretrained import Model
from ppo_jax.runs.prompts import PromptSet

PROMPT_WORDS = (2, 3, 4, 5)


class Review(NamedTuple):
    id: int
    rating: float  # mean of the human ratings, -4 to 4
    text: str


class Splits(NamedTuple):
    """Disjoint, also in their texts. All but `reward_train` have a fixed size."""

    test: list[Review]  # measures reward models
    prompts: list[Review]  # their first words are the prompts of PPO
    reward_train: list[Review]
    judge_train: list[Review]  # for a second reward model, which PPO does not see


def load(folder: Path | None = None) -> list[Review]:
    """All rated sentences, cleaned by `clean`, in the order of the file.

    Args:
      folder: what `ppo_jax.assets.vader` returns, which is the default.

    Raises:
      ppo_jax.assets.AssetError: the file cannot be fetched.
      ValueError: a line is not `id TAB rating TAB text`; the message names file and line.
    """
    path = (folder or assets.vader()) / "movieReviewSnippets_GroundTruth.txt"
    reviews = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            name, rating, text = line.split("\t")
            reviews.append(Review(int(name), float(rating), clean(text)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not `id TAB rating TAB text`: {error}") from error
    return reviews


def clean(text: str) -> str:
    """A sentence of the file in the usual spelling, as a language model knows it.

    The file is in normal English spacing already, but it lost its hyphens and dashes (they became spaces) and has
    typewriter quotes. Undone is what can be undone for certain: HTML entities; three or four spaces, where a dash
    stood; two spaces; '' for a double quote and ` for an opening one; spaces inside a bracket or before a comma.
    """
    text = html.unescape(text).replace("''", '"').replace("`", "'").replace("\u2019", "'")
    text = re.sub(r" {3,}", " \u2013 ", text)
    text = re.sub(r" {2}", " ", text)
    return re.sub(r" (?=[,;:!?)])|(?<=\() ", "", text).strip()


def splits(
    reviews: Sequence[Review], seed: int = 0, test: int = 1500, prompts: int = 1600, judge_train: int = 2500
) -> Splits:
    """Disjoint random splits; the remaining reviews are `reward_train`. Sentences that repeat are all in that one.

    Different sentences on one film may be in different splits: the file does not name the films.
    The order is that of a hash of (seed, text), so a sentence's place does not depend on the random generator of
    some version of some library.

    Raises:
      ValueError: there are not enough reviews.
    """
    if len(reviews) <= test + prompts + judge_train:
        raise ValueError(
            f"{len(reviews)} reviews are too few for {test} + {prompts} + {judge_train} and some to train on"
        )
    keys = [_normal(review.text) for review in reviews]
    copies = Counter(keys)
    hashes = [hashlib.sha256(f"{seed}\t{key}".encode()).hexdigest() for key in keys]
    order = sorted(range(len(reviews)), key=lambda i: (copies[keys[i]] > 1, hashes[i], reviews[i].id))
    ordered = [reviews[i] for i in order]
    a, b, c = test, test + prompts, test + prompts + judge_train
    return Splits(test=ordered[:a], prompts=ordered[a:b], reward_train=ordered[c:], judge_train=ordered[b:c])


def _normal(text: str) -> str:
    """What two sentences share if they differ only in case, spacing and punctuation."""
    return re.sub(r"[\W_]", "", text.lower())


def all_pairs_accuracy(scores: Sequence[float] | np.ndarray, ratings: Sequence[float] | np.ndarray) -> float:
    """The fraction of all pairs with different ratings that the scores put in the same order; ties count half.

        P[s_i > s_j | r_i > r_j] + P[s_i = s_j | r_i > r_j] / 2

    Raises:
      ValueError: the lengths differ, a score is not finite, or all ratings are equal.
    """
    s, r = np.asarray(scores, np.float64), np.asarray(ratings, np.float64)
    if s.ndim != 1 or s.shape != r.shape:
        raise ValueError(f"scores {s.shape} and ratings {r.shape} must be two lists of one length")
    if not np.isfinite(s).all() or not np.isfinite(r).all():
        raise ValueError(
            f"{int((~np.isfinite(s)).sum())} scores and {int((~np.isfinite(r)).sum())} ratings are not finite"
        )
    right, count = 0.0, 0
    for score, rating in zip(s, r, strict=True):  # one row of the n x n table at a time
        below = r < rating
        right += (s[below] < score).sum() + 0.5 * (s[below] == score).sum()
        count += int(below.sum())
    if not count:
        raise ValueError("all ratings are equal, so there is no pair to order")
    return float(right / count)


def first_words(text: str, n: int) -> str:
    """The first `n` words of a longer text. ValueError if it has no more than that."""
    words = text.split()
    if len(words) <= n:
        raise ValueError(f"{text!r} has {len(words)} words; the first {n} need a longer one")
    return " ".join(words[:n])


def openings(reviews: Sequence[Review], rng: np.random.Generator, lengths: Sequence[int] = PROMPT_WORDS) -> list[str]:
    """The first words of each review that is longer than the shortest of `lengths`.

    How many words is drawn from those of `lengths` that leave at least one word to say.
    """
    texts = []
    for review in reviews:
        fitting = [n for n in lengths if n < len(review.text.split())]
        if fitting:
            texts.append(first_words(review.text, fitting[rng.integers(len(fitting))]))
    return texts


def prompt_set(
    model: Model, reviews: Sequence[Review], longest: int, rng: np.random.Generator, count: int | None = None
) -> PromptSet:
    """The first words of sentences, at most `longest` tokens; the first `count` of them."""
    texts = openings(reviews, rng)
    rows = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    fitting = [i for i, row in enumerate(rows) if 1 <= len(row) <= longest][:count]
    return PromptSet([rows[i] for i in fitting], [texts[i] for i in fitting], [{} for _ in fitting])
