"""The full kind of reward model: a model of its own, perhaps of another family, with a scalar head.

    score = gain * (w . h_last) + bias,      h_last: the hidden state at the last real token

Where its tokenizer is the policy's, the rollout's token ids are used as they are and it runs on the device
(`model_reward`). Else the texts are tokenised again, on the host (`text_reward`).
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.placement import place_on_mesh
from ppo_jax.parallel import processes
from ppo_jax.rewards.adapter import RewardRole, score_tokens, text_mask
from ppo_jax.rewards.base import DeviceReward, HostReward
from ppo_jax.rewards.reading import close_rows
from ppo_jax.rewards.scores import to_scores
from ppo_jax.types import Frozen, PyTree, Rollout, Scores

# Token rows -> their scores in order; NaN for a row without tokens.
ScoreRows = Callable[[Sequence[Sequence[int]]], np.ndarray]


class FullReward(NamedTuple):
    """The arrays of a reward model of its own; what `Frozen.reward` holds for `model_reward`."""

    params: PyTree
    head: PyTree  # parameters of a RewardHead


def full_scores(
    model: FullReward, config: ModelConfig, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], micro_batch: int = 0
) -> Float[Array, " B"]:
    """The head's value at each row's last real token, `micro_batch` rows at a time (0: all at once).

    Only one micro-batch's activations are alive; the rows that fill up the last one are not read back.
    """
    role = RewardRole({}, model.head)
    rows = tokens.shape[0]
    if not 0 < micro_batch < rows:
        return score_tokens(model.params, role, config, tokens, mask)
    place = jnp.arange(-(-rows // micro_batch) * micro_batch) % rows
    pieces = jax.tree.map(lambda x: x[place].reshape(-1, micro_batch, *x.shape[1:]), (tokens, mask))
    scores = jax.lax.map(lambda piece: score_tokens(model.params, role, config, *piece), pieces)
    return scores.reshape(-1)[:rows]


def model_reward(
    config: ModelConfig, stop_ids: tuple[int, ...], micro_batch: int = 0, closing: tuple[int, ...] = ()
) -> DeviceReward:
    """A device reward that reads `frozen.reward` as a FullReward of this configuration.

    The policy's token ids are used as they are, so both must have one tokenizer (`same_tokens`). The text is prompt and
    response without the stop token that ended it, as for the LoRA kind (`rewards.adapter`), and `closing` behind it.
    """

    def reward(frozen: Frozen, rollout: Rollout, prefix: Float[Array, "B S D"] | None, prefix_layers: int) -> Scores:
        mask = text_mask(rollout, stop_ids)
        tokens = jnp.where(mask, rollout.tokens, 0)  # the policy's pad and stop ids may be unknown to this model
        tokens, mask = close_rows(tokens, mask, closing)
        return to_scores(full_scores(frozen.reward, config, tokens, mask, micro_batch))

    return reward


def same_tokens(ours: Any, theirs: Any) -> bool:
    """Whether two transformers tokenizers give every text the same ids: same vocabulary, merges and pre-splitting."""
    if ours is theirs:
        return True
    if ours.get_vocab() != theirs.get_vocab():
        return False
    return _pipeline(ours) == _pipeline(theirs)


def _pipeline(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer)
    parts = json.loads(backend.to_str())
    return [parts.get(name) for name in ("normalizer", "pre_tokenizer", "model")]


def row_scorer(
    base: PyTree,
    role: RewardRole,
    config: ModelConfig,
    max_length: int,
    batch_sizes: Sequence[int] = (16,),
    pad_id: int = 0,
    most_tokens: int | None = None,
) -> ScoreRows:
    """A scorer of token rows of any lengths, 1 to `max_length`, on the host's side of one jitted function.

    Rows are sorted by length and padded to one of few lengths (16, 32, 64, ..., `max_length`) and to one of
    `batch_sizes` rows, so at most lengths x batch sizes programs are ever compiled. Of these a batch of more than
    `most_tokens`, padded, has the smallest. A full reward model is the role ({}, head) on its own parameters.

    On a mesh (`jax.set_mesh`) the model is laid out on it. Of several processes each gives its own rows and is given
    their scores: a program on a mesh needs the same arguments in all of them, so together they score the rows of all.
    All must call the scorer the same number of times.

    Raises ValueError when a row is longer than `max_length`.
    """
    sizes, run = sorted(batch_sizes), jax.jit(score_tokens, static_argnums=2)
    base, role = place_on_mesh((base, role))

    def score_rows(rows: Sequence[Sequence[int]]) -> np.ndarray:
        every, own = processes.gather_rows(rows)
        return score_all(every)[own]

    def score_all(rows: Sequence[Sequence[int]]) -> np.ndarray:
        lengths = np.array([len(row) for row in rows], np.int64)
        if lengths.size and lengths.max() > max_length:
            raise ValueError(f"a text has {lengths.max()} tokens, the reward model reads at most {max_length}")
        scores = np.full(len(rows), np.nan, np.float32)
        todo = [int(i) for i in np.argsort(lengths, kind="stable") if lengths[i]]
        while todo:
            # The longest first: a batch costs as much as its longest row.
            length = padded_length(int(lengths[todo[-1]]), max_length)
            fit = [size for size in sizes if not most_tokens or size * length <= most_tokens] or sizes[:1]
            count = next((size for size in fit if size >= len(todo)), fit[-1])
            take, todo = todo[-count:], todo[:-count]
            tokens, mask = np.full((count, length), pad_id, np.int32), np.zeros((count, length), bool)
            mask[:, 0] = True  # rows that fill up the batch have one token
            for place, i in enumerate(take):
                tokens[place, : lengths[i]], mask[place, : lengths[i]] = rows[i], True
            found = run(base, role, config, *processes.feed((tokens, mask)))
            scores[take] = processes.fetch(found)[: len(take)]
        return scores

    return score_rows


def padded_length(length: int, max_length: int) -> int:
    """The next of 16, 32, 64, ... that holds `length` tokens, at most `max_length`."""
    return min(max(16, 1 << (length - 1).bit_length()), max_length)


def text_reward(score_rows: ScoreRows, encode: Callable[[Sequence[str], Sequence[str]], list[list[int]]]) -> HostReward:
    """A host reward that tokenises prompt and response by itself. A text without tokens is invalid.

    Args:
      encode: (prompts, responses) -> token rows that `score_rows` accepts.
    """

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        return to_scores(score_rows(encode(prompts, responses)))

    return reward
