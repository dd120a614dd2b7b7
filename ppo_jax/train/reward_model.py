"""Reward models from comparisons: Bradley-Terry on the head's score of the last token.

A batch scores each text once and compares every pair of rows that the data orders: n forward passes give up to
n (n-1) / 2 comparisons (Ouyang et al. 2022, section 3.5). Training has two parts, because fine-tuning around a
random head distorts good features (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features"):

    fit_head       logistic regression of the head on frozen features
    make_reward_step    then adapter and head together
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppo_jax.models.adapters import init_lora, shared_layers
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import RewardHead, last_token, score
from ppo_jax.ops.losses import bradley_terry_loss
from ppo_jax.rewards.adapter import RewardRole, score_tokens
from ppo_jax.rollout import role_hidden, shared_prefix
from ppo_jax.train.optimizer import descend
from ppo_jax.types import Metrics, PyTree


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Static choices of a reward model and its training."""

    depth: int = 0
    """Layers of the base that the reward model reads; 0: all. Sentiment, for one, is as readable half-way up."""
    lora_layers: int = 6
    """How many of those layers, counted from the top, carry LoRA; 0: the head alone is trained."""
    rank: int = 8
    """LoRA rank."""
    alpha: float = 16.0
    """LoRA scale is alpha / rank."""
    batch_size: int = 50
    """Texts per optimizer step (pairs count two)."""
    epochs: int = 1
    """Passes over the texts after the head has been fitted."""
    learning_rate: float = 3e-4
    """Adam, falling linearly to 0."""
    max_grad_norm: float = 1.0
    """Global-norm clip."""
    head_l2: float = 1e-2
    """L2 penalty of the head's fit, on standardised features."""
    head_steps: int = 300
    """Adam steps of the head's fit."""

    def __post_init__(self) -> None:
        for name in ("depth", "lora_layers", "epochs", "head_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: a comparison needs at least 2 texts")

    def trunk(self, config: ModelConfig) -> ModelConfig:
        """The description of the base cut to the layers that the reward model reads."""
        depth = self.depth or config.num_layers
        if not max(1, self.lora_layers) <= depth <= config.num_layers:
            raise ValueError(
                f"reward model of depth={depth} with lora_layers={self.lora_layers} on a base of "
                f"{config.num_layers} layers: need lora_layers <= depth <= layers"
            )
        return dataclasses.replace(config, num_layers=depth)


class Comparisons(NamedTuple):
    """Texts, right-padded, and which of them is preferred to which."""

    tokens: Int[Array, "N S"]
    mask: Bool[Array, "N S"]
    better: Bool[Array, "N N"]  # [i, j]: text i is preferred to text j
    margin: Float[Array, "N N"]  # by how much its score should lead
    prefix: Float[Array, "N S D"] | None = None  # residual stream below the adapter, where it was kept


def init_role(key: PRNGKeyArray, config: ModelConfig, reward: RewardConfig) -> RewardRole:
    """A fresh reward role on `reward.trunk(config)`: LoRA equal to the base, a random head. `key` is consumed."""
    trunk = reward.trunk(config)
    adapter_key, head_key = jax.random.split(key)
    adapter: PyTree = {}
    if reward.lora_layers:
        first = trunk.num_layers - reward.lora_layers
        adapter = init_lora(adapter_key, trunk, reward.rank, reward.alpha, first_layer=first)
    head = RewardHead().init(head_key, jnp.zeros((1, config.hidden_size)))["params"]
    return RewardRole(adapter, head)


def comparison_loss(
    role: RewardRole, base: PyTree, trunk: ModelConfig, batch: Comparisons
) -> tuple[Float[Array, ""], Metrics]:
    """Mean of -log sigmoid(s_i - s_j - margin_ij) over the ordered pairs (i, j) of the batch."""
    depth = shared_layers(role.adapter, trunk)
    scores = score_tokens(base, role, trunk, batch.tokens, batch.mask, batch.prefix, depth)
    rows, columns = jnp.broadcast_arrays(scores[:, None], scores[None, :])
    loss, metrics = bradley_terry_loss(rows, columns, batch.margin, mask=batch.better)
    pairs = jnp.sum(batch.better, dtype=jnp.float32)
    return loss, metrics | {"loss": (jax.lax.stop_gradient(loss) * pairs, pairs)}


RewardStep = Callable[
    [RewardRole, optax.OptState, PyTree, Comparisons, float], tuple[RewardRole, optax.OptState, Metrics]
]


def make_reward_step(
    trunk: ModelConfig, optimizer: optax.GradientTransformation, max_grad_norm: float = 1.0
) -> RewardStep:
    """step(role, opt_state, base, batch, learning_rate) -> (role, opt_state, metrics), jitted; gain and bias stay."""

    def step(
        role: RewardRole, opt_state: optax.OptState, base: PyTree, batch: Comparisons, learning_rate: float | Array
    ) -> tuple[RewardRole, optax.OptState, Metrics]:
        grads, metrics = jax.grad(comparison_loss, has_aux=True)(role, base, trunk, batch)
        fixed = {name: jnp.zeros_like(grads.head[name]) for name in ("gain", "bias")}
        grads = grads._replace(head=grads.head | fixed)
        role, opt_state, norm = descend(role, grads, opt_state, optimizer, learning_rate, max_grad_norm)
        return role, opt_state, metrics | norm

    return jax.jit(step, donate_argnums=(0, 1))


def fit_head(
    features: Float[np.ndarray, "N D"],
    better: Int[np.ndarray, " M"],
    worse: Int[np.ndarray, " M"],
    l2: float,
    steps: int,
    margin: Float[np.ndarray, " M"] | float = 0.0,
    learning_rate: float = 1e-2,
) -> PyTree:
    """RewardHead parameters that minimise the Bradley-Terry loss on fixed features, by full-batch Adam.

        mean over pairs of -log sigmoid(w . (z_better - z_worse) - margin) + l2 |w|^2,  z = features / their std

    Convex, so the start does not matter. Scaling is folded back: the head reads raw features. The score's mean
    over the features is moved to 0 with the head's bias, which no comparison determines.
    """
    scale = jnp.asarray(1.0 / (features.std(axis=0) + 1e-6))
    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, max(steps, 1)))

    def loss(w: Array, z: Array, i: Array, j: Array, margin: Array) -> Array:
        scores = z @ w
        return bradley_terry_loss(scores[i], scores[j], margin)[0] + l2 * jnp.sum(jnp.square(w))

    @jax.jit
    def fit(z: Array, i: Array, j: Array, margin: Array) -> Array:
        def step(carry: tuple, _: None) -> tuple:
            w, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(w, z, i, j, margin), opt_state)
            return (optax.apply_updates(w, updates), opt_state), None

        w = jnp.zeros(z.shape[1])
        return jax.lax.scan(step, (w, optimizer.init(w)), length=steps)[0][0]

    z = jnp.asarray(features) * scale
    margins = jnp.broadcast_to(jnp.asarray(margin, jnp.float32), better.shape)
    kernel = fit(z, jnp.asarray(better), jnp.asarray(worse), margins) * scale
    mean = jnp.mean(jnp.asarray(features) @ kernel)
    return {"reward": {"kernel": kernel[:, None]}, "gain": jnp.ones(()), "bias": -mean}


def normalise_head(head: PyTree, scores: Float[np.ndarray, " N"]) -> PyTree:
    """The head with gain and bias such that these scores of reference texts become mean 0, std 1.

    Ziegler et al. 2019, section 2.1 (there over samples of the reference policy).
    """
    std = float(np.std(scores, ddof=1))
    if not np.isfinite(std) or std == 0:
        raise ValueError(f"cannot normalise a reward model whose scores have standard deviation {std}")
    return head | {"gain": head["gain"] / std, "bias": (head["bias"] - float(np.mean(scores))) / std}


# -- texts of different lengths ---------------------------------------------------------------------------------------


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
    run = jax.jit(partial(shared_prefix, config=trunk, layers=layers))
    for bucket in buckets:
        if layers == 0:
            yield bucket
            continue
        parts = [run(base, tokens=b.tokens, mask=b.mask) for b in _slices(bucket, batch_size)]
        prefix = np.concatenate([np.asarray(part) for part in parts])[: len(bucket.index)]
        yield bucket._replace(prefix=prefix)


def text_features(
    base: PyTree,
    role: RewardRole,
    trunk: ModelConfig,
    buckets: Sequence[Bucket],
    batch_size: int,
    prefix_layers: int = 0,
) -> Float[np.ndarray, "N D"]:
    """What the head reads of every text, in the order of the original list; from kept prefixes if there are any."""

    @jax.jit
    def run(base: PyTree, adapter: PyTree, tokens: Array, mask: Array, prefix: Array | None) -> Array:
        return last_token(role_hidden(base, adapter, trunk, tokens, mask, prefix, prefix_layers), mask)

    features = np.zeros((sum(len(b.index) for b in buckets), trunk.hidden_size), np.float32)
    for bucket in buckets:
        parts = [run(base, role.adapter, b.tokens, b.mask, b.prefix) for b in _slices(bucket, batch_size)]
        features[bucket.index] = np.concatenate([np.asarray(part) for part in parts])[: len(bucket.index)]
    return features


def head_scores(head: PyTree, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """The head's scores of features from `text_features`."""
    return np.asarray(score(head, jnp.asarray(features)))


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
    batch = Comparisons(piece.tokens, piece.mask, better, np.zeros(better.shape, np.float32), piece.prefix)  # type: ignore[arg-type]
    return jax.tree.map(jnp.asarray, batch)
