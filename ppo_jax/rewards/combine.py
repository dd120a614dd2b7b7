"""One reward out of several."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ppo_jax.parallel.processes import own_rows
from ppo_jax.rewards.base import DeviceReward, HostReward, Reward
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


def sum_scores(weighted: Sequence[tuple[str, Scores, float]]) -> Scores:
    """r = sum_i w_i r_i over scores (name_i, r_i, w_i) of the same rows, on the device or on the host.

    A row is valid only if every r_i is, at any weight; an invalid one is NaN. `parts` holds each r_i before its weight
    under its name (logged as reward/NAME; under "" it is left out), and parts of its own as NAME/PART. Rewards of
    single tokens are weighed and summed too.
    """
    total: Any = None
    valid: Any = None
    tokens: Any = None
    parts: dict[str, Any] = {}
    for name, given, weight in weighted:
        scores = only_finite(given)
        reward: Any = scores.reward
        term = weight * (reward if isinstance(reward, jax.Array) else reward.astype(np.float64))
        total, valid = (term, scores.valid) if total is None else (total + term, valid & scores.valid)
        if scores.tokens is not None:
            extra = weight * scores.tokens
            tokens = extra if tokens is None else tokens + extra
        parts |= {name: reward} if name else {}
        parts |= {f"{name}/{inner}" if name else inner: part for inner, part in scores.parts.items()}
    return to_scores(total, parts, tokens, valid)


def add_scores(device: Scores | None, host: Scores | None) -> Scores:
    """What the functions of a `Reward` gave, of which there are one or both: their sum, with the parts of each."""
    given = [scores for scores in (device, host) if scores is not None]
    return given[0] if len(given) == 1 else sum_scores([("", scores, 1.0) for scores in given])


def weighted_sum(rewards: Mapping[str, tuple[HostReward, float]]) -> HostReward:
    """The sum (`sum_scores`) of rewards {name: (r_i, w_i)}, called in this order with the same texts."""

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        return sum_scores(
            [(name, one(prompts, responses, metadata), weight) for name, (one, weight) in rewards.items()]
        )

    return reward


def device_sum(rewards: Mapping[str, tuple[DeviceReward, float]]) -> DeviceReward:
    """The sum (`sum_scores`) of rewards {name: (r_i, w_i)}; `frozen.reward` is {name: the arrays of r_i}."""

    def reward(frozen: Frozen, rollout: Rollout, prefix: Any, prefix_layers: int) -> Scores:
        terms = []
        for name, (one, weight) in rewards.items():
            own = frozen._replace(reward=frozen.reward[name])
            terms.append((name, one(own, rollout, prefix, prefix_layers), weight))
        return sum_scores(terms)

    return reward


def sum_rewards(rewards: Mapping[str, tuple[Reward, float]]) -> Reward:
    """The sum (`sum_scores`) of rewards {name: (r_i, w_i)}: on the device what can be there, the rest on the host."""
    device = {name: (one.device, weight) for name, (one, weight) in rewards.items() if one.device is not None}
    host = {name: (one.host, weight) for name, (one, weight) in rewards.items() if one.host is not None}
    arrays = {name: one.params for name, (one, _) in rewards.items() if name in device}
    return Reward(device_sum(device) if device else None, weighted_sum(host) if host else None, arrays or None)


def scaled(reward: DeviceReward, weight: float) -> DeviceReward:
    """weight * r for a reward on the device; its parts stay as they are."""

    def scaled_reward(frozen: Frozen, rollout: Rollout, prefix: Any, prefix_layers: int) -> Scores:
        scores = reward(frozen, rollout, prefix, prefix_layers)
        tokens = None if scores.tokens is None else weight * scores.tokens
        return scores._replace(reward=weight * scores.reward, tokens=tokens)

    return scaled_reward
