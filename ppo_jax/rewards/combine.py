"""One reward out of several."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ppo_jax.parallel.processes import own_rows
from ppo_jax.rewards.base import DeviceReward, HostReward
from ppo_jax.rewards.scores import only_finite, to_scores
from ppo_jax.types import Frozen, Rollout, Scores


class SplitReward:
    """A host reward of which each process scores its own rows, whose scores all processes then exchange.

    So each response is scored once, and a reward that is not a function (a server, a sampler) cannot let the processes
    disagree. The reward must name the same parts in every process. A reward model on the mesh (`rewards.model`) needs
    all processes for every row; it exchanges the rows by itself.
    """

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        """Scores of every row, see `rewards.base.HostReward`."""
        total, count = len(responses), jax.process_count()
        if count == 1 or total == 0:
            return self.reward(prompts, responses, metadata)
        own = own_rows(total)
        if own.start == own.stop:  # fewer rows than processes: a row whose result is not used names the parts
            own = slice(0, 1)
        scores = self.reward(prompts[own], responses[own], metadata[own])
        names = sorted(scores.parts)
        tokens = () if scores.tokens is None else np.asarray(scores.tokens).T
        columns = [scores.reward, scores.valid, *(scores.parts[name] for name in names), *tokens]
        packed = np.zeros((len(columns), -(-total // count)), np.float64)
        for row, column in zip(packed, columns, strict=True):
            row[: len(column)] = np.asarray(column)
        # As words of 32 bits: jax would round float64.
        words = np.asarray(multihost_utils.process_allgather(packed.view(np.uint32)))
        every = words.view(np.float64).reshape(count, *packed.shape)
        shares = [own_rows(total, index) for index in range(count)]
        joined = np.concatenate([every[i, :, : s.stop - s.start] for i, s in enumerate(shares)], axis=1)
        reward, valid = joined[:2]
        parts, slots = joined[2 : 2 + len(names)], joined[2 + len(names) :]
        per_token = jnp.asarray(slots.T, jnp.float32) if len(slots) else None
        return Scores(reward, valid.astype(bool), dict(zip(names, parts, strict=True)), per_token)


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
            scores = only_finite(one(prompts, responses, metadata))
            part = np.asarray(scores.reward)
            total = total + weight * part.astype(
                np.float64
            )  # NaN * 0 is NaN: a failed part fails the row, at any weight
            if scores.tokens is not None:
                extra = weight * np.asarray(scores.tokens, np.float64)
                tokens = extra if tokens is None else tokens + extra
            parts |= {name: part} | {f"{name}/{inner}": np.asarray(x) for inner, x in scores.parts.items()}
        return to_scores(total, parts, tokens)

    return reward


def scaled(reward: DeviceReward, weight: float) -> DeviceReward:
    """weight * r for a reward on the device; its parts stay as they are."""

    def scaled_reward(frozen: Frozen, rollout: Rollout, prefix: Any, prefix_layers: int) -> Scores:
        scores = reward(frozen, rollout, prefix, prefix_layers)
        tokens = None if scores.tokens is None else weight * scores.tokens
        return scores._replace(reward=weight * scores.reward, tokens=tokens)

    return scaled_reward
