"""Texts of different lengths for reward models: buckets, the features that a head reads, batches of comparisons."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import last_token, score
from ppo_jax.models.roles import own_trunk, role_hidden, shared_prefix
from ppo_jax.parallel.processes import feed, fetch
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.types import Prefix, PyTree


class Comparisons(NamedTuple):
    """Texts, right-padded, and which of them is preferred to which; numpy arrays until the step that needs them."""

    tokens: Int[Array, "N S"]
    mask: Bool[Array, "N S"]
    better: Bool[Array, "N N"]  # [i, j]: text i is preferred to text j
    margin: Float[Array, "N N"]  # by how much its score should lead
    prefix: Float[Array, "N S D"] | None = None  # residual stream below the adapter, where it was kept


class Bucket(NamedTuple):
    """Texts of similar length, right-padded to the same number of slots."""

    index: Int[np.ndarray, " N"]  # type: ignore[assignment]  # place in the list of all texts
    tokens: Int[np.ndarray, "N S"]
    mask: Bool[np.ndarray, "N S"]
    prefix: Float[np.ndarray, "N S D"] | None = None


def bucket_texts(rows: Sequence[Sequence[int]], lengths: Sequence[int], pad_id: int) -> list[Bucket]:
    """Sorts token rows into one bucket per length that holds any; a row goes to the shortest that fits.

    Raises ValueError when a row is empty or longer than the longest.
    """
    allowed = sorted(lengths)
    sizes = np.array([len(row) for row in rows])
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= allowed[-1]:
        raise ValueError(f"texts have {sizes.min()} to {sizes.max()} tokens; allowed are 1 to {allowed[-1]}")
    place = np.searchsorted(allowed, sizes)
    buckets = []
    for number, length in enumerate(allowed):
        index = np.flatnonzero(place == number)
        if index.size:
            mask = np.arange(length) < sizes[index, None]
            tokens = np.full(mask.shape, pad_id, np.int32)
            tokens[mask] = np.concatenate([rows[int(i)] for i in index])
            buckets.append(Bucket(index, tokens, mask))
    return buckets


def keep_prefix(
    base: PyTree, trunk: ModelConfig, buckets: Sequence[Bucket], layers: int, batch_size: int
) -> Iterator[Bucket]:
    """The buckets with the residual stream below `layers`, so that no later pass computes it again."""
    for bucket in buckets:
        if layers == 0:
            yield bucket
            continue
        parts = [_prefix(base, *feed((b.tokens, b.mask)), trunk, layers) for b in _slices(bucket, batch_size)]
        prefix = np.concatenate(fetch(parts))[: len(bucket.index)]
        yield bucket._replace(prefix=prefix)


@partial(jax.jit, static_argnames=("trunk", "layers"))
def _prefix(base: PyTree, tokens: Array, mask: Array, trunk: ModelConfig, layers: int) -> Array | None:
    prefix = shared_prefix(base, trunk, tokens, mask, layers)
    return None if prefix is None else prefix.hidden


def text_features(
    base: PyTree,
    role: RewardRole,
    trunk: ModelConfig,
    buckets: Sequence[Bucket],
    batch_size: int,
    prefix_layers: int = 0,
    pass_on: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> Float[np.ndarray, "N D"]:
    """What the head reads of every text, in the order of the original list; from kept prefixes if there are any.

    Args:
      pass_on: every batch goes through it before it is read; it may raise, to give up.
    """
    features = np.zeros((sum(len(b.index) for b in buckets), trunk.hidden_size), np.float32)
    for bucket in buckets:
        pieces = (feed((b.tokens, b.mask, b.prefix)) for b in _slices(bucket, batch_size))
        parts = [_features(base, role.adapter, *piece, trunk, prefix_layers) for piece in pass_on(pieces)]
        features[bucket.index] = np.concatenate(fetch(parts))[: len(bucket.index)]
    return features


@partial(jax.jit, static_argnames=("trunk", "prefix_layers"))  # here, so that each shape is compiled once a process
def _features(
    base: PyTree,
    adapter: PyTree,
    tokens: Array,
    mask: Array,
    prefix: Array | None,
    trunk: ModelConfig,
    prefix_layers: int,
) -> Array:
    base, adapter = own_trunk(base, adapter)
    shared = None if prefix is None else Prefix(prefix, prefix_layers)
    return last_token(role_hidden(base, adapter, trunk, tokens, mask, shared), mask)


def head_scores(head: PyTree, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """The head's scores of features from `text_features`."""
    return np.asarray(score(fetch(head), jnp.asarray(features)))


def _slices(bucket: Bucket, size: int) -> Iterator[Bucket]:
    """Pieces of exactly `size` rows (the last one repeats its first rows), so that one program serves all."""
    for start in range(0, len(bucket.index), size):
        rows = np.arange(start, start + size)
        yield _take(bucket, np.where(rows < len(bucket.index), rows, start))


def _take(bucket: Bucket, rows: Int[np.ndarray, " n"]) -> Bucket:
    prefix = None if bucket.prefix is None else bucket.prefix[rows]
    return Bucket(bucket.index[rows], bucket.tokens[rows], bucket.mask[rows], prefix)


def rated_batches(
    buckets: Sequence[Bucket], ratings: Float[np.ndarray, " N"], batch_size: int, rng: np.random.Generator
) -> list[Comparisons]:
    """One epoch of batches of rated texts, in random order; within a batch every pair with different ratings counts."""
    batches = []
    for bucket in buckets:
        shuffled = _take(bucket, rng.permutation(len(bucket.index)))
        batches += [_compare(piece, ratings[piece.index]) for piece in _slices(shuffled, batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _compare(piece: Bucket, ratings: Float[np.ndarray, " N"]) -> Comparisons:
    better = ratings[:, None] > ratings[None, :]
    _, first = np.unique(piece.index, return_index=True)
    real = np.zeros(len(ratings), bool)
    real[first] = True  # a row that only fills up the batch is not compared
    better &= real[:, None] & real[None, :]
    margin = np.zeros(better.shape, np.float32)
    return Comparisons(piece.tokens, piece.mask, better, margin, piece.prefix)  # type: ignore[arg-type]


def rated_pairs(
    ratings: Float[np.ndarray, " N"], count: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """Random pairs (better, worse) of rows with different ratings; about `count` of them."""
    i, j = rng.integers(len(ratings), size=(2, count))
    i, j = (side[ratings[i] != ratings[j]] for side in (i, j))
    swap = ratings[i] < ratings[j]
    return np.where(swap, j, i), np.where(swap, i, j)
