"""The LoRA kind of reward model: the policy's own frozen base with another adapter and a scalar head."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.adapters import shared_layers
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import last_token, score
from ppo_jax.models.roles import role_hidden
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.rewards.reading import close_rows
from ppo_jax.rewards.scores import to_scores
from ppo_jax.types import Frozen, Prefix, PyTree, Rollout, Scores


class RewardRole(NamedTuple):
    """Adapter and head of a reward model on a shared base."""

    adapter: PyTree
    head: PyTree  # parameters of a RewardHead


def score_tokens(
    base: PyTree,
    role: RewardRole,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    prefix: Prefix | None = None,
) -> Float[Array, " B"]:
    """The head's value at each row's last real token, wherever the padding lies."""
    if prefix is not None and shared_layers(role.adapter, config) < prefix.layers:
        prefix = None  # this role already differs, or ends, below the shared layers
    hidden = role_hidden(base, role.adapter, config, tokens, mask, prefix)
    return score(role.head, last_token(hidden, mask))


def text_mask(rollout: Rollout, stop_ids: tuple[int, ...]) -> Bool[Array, "B S"]:
    """Prompt and response without the stop token that ended it: what a reader of the text sees.

    Reward models are trained on texts without an end token, so the score is read at the last token of the text
    whether the response ended by itself or was cut. (In the KL-shaped rewards it is still *credited* to the last
    response token, the stop token included.)
    """
    length = rollout.response_mask.shape[1]
    ends = jnp.isin(rollout.tokens[:, -length:], jnp.array(stop_ids, jnp.int32))
    return jnp.concatenate([rollout.prompt_mask, rollout.response_mask & ~ends], axis=1)


def adapter_reward(config: ModelConfig, stop_ids: tuple[int, ...], closing: tuple[int, ...] = ()) -> DeviceReward:
    """A device reward that reads `frozen.reward` as a RewardRole on `frozen.base`.

    Args:
      closing: what is put behind the text, whose last token is read (`rewards.reading`); (): the text's own.
    """

    def reward(frozen: Frozen, rollout: Rollout, prefix: Float[Array, "B S D"] | None, prefix_layers: int) -> Scores:
        tokens, mask = close_rows(rollout.tokens, text_mask(rollout, stop_ids), closing)
        # The prefix was computed with the stop token visible only to itself and later padding: it stays valid. Of a
        # closing it knows nothing.
        shared = None if prefix is None or closing else Prefix(prefix, prefix_layers)
        return to_scores(score_tokens(frozen.base, frozen.reward, config, tokens, mask, shared))

    return reward
