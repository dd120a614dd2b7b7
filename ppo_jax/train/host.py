"""An iteration whose reward is computed on the host."""

import time
from collections.abc import Callable

import jax
import numpy as np

from ppo_jax.parallel.processes import fetch
from ppo_jax.rewards.base import HostReward
from ppo_jax.rewards.failures import GivenUp
from ppo_jax.rewards.scores import as_scores
from ppo_jax.rollout import Sampling
from ppo_jax.train.state import Collect, Iteration, Learn, TrainState
from ppo_jax.types import Frozen, Hyper, Metrics, Prompts


def host_iteration(
    collect: Collect,
    learn: Learn,
    reward: HostReward,
    decode: Callable[[np.ndarray], str],
    sampling: Sampling,
    texts: tuple[str, ...],
    metadata: tuple[dict, ...],
    stopping: Callable[[], bool] = lambda: False,
) -> Iteration:
    """An iteration whose reward is computed on the host between its two jitted halves.

    The metrics gain the seconds of its three parts: `rollout_seconds`, `reward_seconds`, `learn_seconds`.

    Args:
      decode: token ids -> text.
      texts, metadata: the prompts' table; `Rollout.index` is the row.
      stopping: asked before the reward, which may take long; True leaves the iteration by `GivenUp`.
    """

    def iteration(state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper) -> tuple[TrainState, Metrics]:
        times = [time.perf_counter()]
        rollout = collect(state, frozen, prompts, hyper)
        tokens, mask, rows = map(np.asarray, fetch((rollout.tokens, rollout.response_mask, rollout.index)))
        responses = response_texts(tokens, mask, decode, sampling.stop_ids)
        times.append(time.perf_counter())
        if stopping():
            raise GivenUp
        found = reward([texts[i] for i in rows], responses, [metadata[i] for i in rows])
        scores = as_scores(found, len(rows), mask.shape[1])
        times.append(time.perf_counter())
        state, metrics = jax.block_until_ready(learn(state, frozen, rollout, scores, hyper, prompts.pretrain))
        times.append(time.perf_counter())
        spans = np.diff(times).astype(np.float32)
        parts = zip(("rollout_seconds", "reward_seconds", "learn_seconds"), spans, strict=True)
        return state, metrics | {name: (seconds, np.float32(1)) for name, seconds in parts}

    return iteration


def response_texts(
    tokens: np.ndarray, response_mask: np.ndarray, decode: Callable[[np.ndarray], str], stop_ids: tuple[int, ...]
) -> list[str]:
    """The text of each response, [B,S] and [B,T] -> B strings, without the stop token that ended it."""
    length = response_mask.shape[1]
    keep = response_mask & ~np.isin(tokens[:, -length:], stop_ids)
    return [decode(row[-length:][on]) for row, on in zip(tokens, keep, strict=True)]
