"""One reward out of several."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppo_jax.rewards.base import DeviceReward, HostReward
from ppo_jax.rewards.failures import to_scores
from ppo_jax.types import Frozen, Rollout, Scores


def weighted_sum(rewards: Mapping[str, tuple[HostReward, float]]) -> HostReward:
    """r = sum_i w_i r_i over the rewards {name: (r_i, w_i)}, called in this order with the same texts.

    A row is valid only if every r_i is; an invalid one is NaN. `parts` holds each r_i before its weight under its name
    (logged as reward/NAME), and parts of its own as NAME/PART. Rewards of single tokens are weighed and summed too.
    """

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        total = np.zeros(len(responses), np.float64)
        parts: dict[str, np.ndarray] = {}
        tokens: Any = None
        for name, (one, weight) in rewards.items():
            scores = one(prompts, responses, metadata)
            good = np.asarray(scores.valid, bool) & np.isfinite(scores.reward)
            part = np.where(good, scores.reward, np.nan)
            total = total + weight * part  # NaN * 0 is NaN: a failed part fails the row at any weight
            if scores.tokens is not None:
                extra = weight * np.asarray(scores.tokens, np.float64)
                tokens = extra if tokens is None else tokens + extra
            parts |= {name: part} | {f"{name}/{inner}": np.asarray(x) for inner, x in scores.parts.items()}
        return to_scores(total, parts)._replace(tokens=tokens)

    return reward


def scaled(reward: DeviceReward, weight: float) -> DeviceReward:
    """weight * r for a reward on the device; its parts stay as they are."""

    def scaled_reward(frozen: Frozen, rollout: Rollout, prefix: Any, prefix_layers: int) -> Scores:
        scores = reward(frozen, rollout, prefix, prefix_layers)
        tokens = None if scores.tokens is None else weight * scores.tokens
        return scores._replace(reward=weight * scores.reward, tokens=tokens)

    return scaled_reward
