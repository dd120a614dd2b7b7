"""A population: K runs of PPO over one frozen base, in one program.

    states, prompts and hypers get a leading axis of K members; the base has none, and is in memory once
    iterate_members = iterate under vmap

Products with the base take the rows of all members as one matrix, so that while decoding its weights are read once and
not K times; only what an adapter adds is computed member by member. A member is the run that it would be alone, with
the same seed and scalars: equal up to rounding, and so in distribution once rounding has moved a sampled token.

Members differ in the seed (`TrainState.key`, and the prompts that are given), the start adapter, and every field of
`Hyper`. A place that is not active computes like the others, and what it computes is dropped: a member that is not
finite, has stopped or has finished touches no other, and is replaced (`put`) without another compilation.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from ppo_jax.models.placement import shardings
from ppo_jax.parallel.members import feed_members, member_shardings, over_members, select_members
from ppo_jax.parallel.mesh import current_mesh
from ppo_jax.parallel.processes import fetch
from ppo_jax.rewards.base import HostReward
from ppo_jax.rewards.combine import add_scores
from ppo_jax.rewards.scores import as_scores
from ppo_jax.train.experience import score_rollout, share_prefix
from ppo_jax.train.host import response_texts
from ppo_jax.train.options import Algorithm
from ppo_jax.train.ppo import collect, iterate, learn
from ppo_jax.train.state import TrainState
from ppo_jax.types import Frozen, Hyper, Metrics, Prompts, PyTree, Rollout, Scores, Texts

# (states, frozen, prompts, hypers, active) -> (states, metrics), all but the base with a leading axis of K
Members = Callable[[TrainState, Frozen, Prompts, Hyper, Array], tuple[TrainState, Metrics]]


def iterate_members(
    algorithm: Algorithm, states: TrainState, frozen: Frozen, prompts: Prompts, hypers: Hyper, active: Bool[Array, " K"]
) -> tuple[TrainState, Metrics]:
    """One iteration of every active member, with a reward on the device; pure, not jitted."""
    step = over_members(partial(iterate, algorithm), active.shape[0], shared=(1,))
    found, metrics = step(states, frozen, prompts, hypers)
    return select_members(active, found, states), metrics


def collect_members(
    algorithm: Algorithm, states: TrainState, frozen: Frozen, prompts: Prompts, hypers: Hyper
) -> Rollout:
    """The rollouts of all members, for a reward on the host."""
    return over_members(partial(collect, algorithm), len(states.step), shared=(1,))(states, frozen, prompts, hypers)


def learn_members(
    algorithm: Algorithm,
    states: TrainState,
    frozen: Frozen,
    rollouts: Rollout,
    scores: Scores,
    hypers: Hyper,
    active: Bool[Array, " K"],
    pretrain: Texts | None = None,
) -> tuple[TrainState, Metrics]:
    """From the host's scores (and the device's, where there are both) to the next states of the active members."""

    def one(
        state: TrainState, frozen: Frozen, rollout: Rollout, scores: Scores, hyper: Hyper, pretrain: Texts | None
    ) -> tuple[TrainState, Metrics]:
        collected = share_prefix(algorithm, state.policy, frozen, rollout, pretrain)
        if algorithm.reward is not None:
            scores = add_scores(score_rollout(algorithm.reward, frozen, collected), scores)
        return learn(algorithm, state, frozen, collected, scores, hyper)

    step = over_members(one, active.shape[0], shared=(1,))
    found, metrics = step(states, frozen, rollouts, scores, hypers, pretrain)
    return select_members(active, found, states), metrics


# -- compiled --------------------------------------------------------------------------------------------------------


def make_members(algorithm: Algorithm) -> Members:
    """`iterate_members`, jitted: iteration(states, frozen, prompts, hypers, active) -> (states, metrics).

    The states are donated. Nothing recompiles but for another K or other shapes.
    """
    return jax.jit(partial(iterate_members, algorithm), donate_argnums=0)


def make_host_members(
    algorithm: Algorithm,
    reward: HostReward,
    decode: Callable[[np.ndarray], str],
    texts: Sequence[Sequence[str]],
    metadata: Sequence[Sequence[dict[str, Any]]],
) -> Members:
    """The same with a reward on the host, which scores the responses of all active members in one call.

    Args:
      decode: token ids -> text.
      texts, metadata: for each place the table that `Prompts.index` points into; read anew at every call.
    """
    first = jax.jit(partial(collect_members, algorithm))
    second = jax.jit(partial(learn_members, algorithm), donate_argnums=0)
    stop_ids = algorithm.ppo.sampling.stop_ids

    def iteration(
        states: TrainState, frozen: Frozen, prompts: Prompts, hypers: Hyper, active: Array
    ) -> tuple[TrainState, Metrics]:
        times = [time.perf_counter()]
        rollouts = first(states, frozen, prompts, hypers)
        tokens, mask, rows, alive = map(
            np.asarray, fetch((rollouts.tokens, rollouts.response_mask, rollouts.index, active))
        )
        places = np.flatnonzero(alive).tolist()
        responses = [r for i in places for r in response_texts(tokens[i], mask[i], decode, stop_ids)]
        asked = [texts[i][row] for i in places for row in rows[i]]
        times.append(time.perf_counter())
        given = reward(asked, responses, [metadata[i][row] for i in places for row in rows[i]])
        scores = _scatter(as_scores(given, len(responses), mask.shape[2]), places, mask.shape)
        times.append(time.perf_counter())
        states, metrics = jax.block_until_ready(
            second(states, frozen, rollouts, feed_members(scores), hypers, active, prompts.pretrain)
        )
        times.append(time.perf_counter())
        parts = zip(("rollout_seconds", "reward_seconds", "learn_seconds"), np.diff(times), strict=True)
        ones = np.ones(len(alive), np.float32)
        return states, metrics | {name: (np.float32(seconds) * ones, ones) for name, seconds in parts}

    return iteration


def _scatter(scores: Scores, places: Sequence[int], shape: tuple[int, ...]) -> Scores:
    """Scores of the rows of some places -> [K, B] of all; the rows of the others are invalid."""
    members, rows = shape[:2]

    def put(x: Any) -> np.ndarray:
        own = np.asarray(x)
        whole = np.zeros((members, rows, *own.shape[1:]), own.dtype)
        whole[places] = own.reshape(len(places), rows, *own.shape[1:])
        return whole

    return jax.tree.map(put, scores)


# -- members in and out ----------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Compiled once for a population of K states: how members come in and go out."""

    fill: Callable[[TrainState], TrainState]  # one state -> K copies
    put: Callable[[TrainState, Any, TrainState], TrainState]  # (states, place, state) -> states; donated the states
    take: Callable[[TrainState, Any], TrainState]  # (states, place) -> a copy of that member's state
    split: Callable[[Metrics], list[Metrics]]  # metrics of all -> those of each place


def make_places(like: TrainState, count: int) -> Places:
    """The places of `count` members whose states look like `like`; on a mesh, each state lies as a run's own would."""

    def fill(state: TrainState) -> TrainState:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), state)

    def put(states: TrainState, place: Array, state: TrainState) -> TrainState:
        return jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, place, 0), states, state)

    def take(states: TrainState, place: Array) -> TrainState:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, 0, keepdims=False), states)

    def split(metrics: Metrics) -> list[Metrics]:
        return [jax.tree.map(lambda x, i=i: x[i], metrics) for i in range(count)]

    mesh = current_mesh()
    if mesh is None:
        return Places(jax.jit(fill), jax.jit(put, donate_argnums=0), jax.jit(take), jax.jit(split))
    alone = shardings(like, mesh)
    together = member_shardings(alone, count)
    return Places(
        jax.jit(fill, out_shardings=together),
        jax.jit(put, donate_argnums=0, out_shardings=together),
        jax.jit(take, out_shardings=alone),
        jax.jit(split, out_shardings=NamedSharding(mesh, PartitionSpec())),
    )


def stack_hypers(hypers: Sequence[Hyper]) -> Hyper:
    """K scalars for each field, float32 as inside the program."""
    columns: list[Any] = [np.asarray(column, np.float32) for column in zip(*hypers, strict=True)]
    return feed_members(Hyper(*columns))


def stack_prompts(prompts: Sequence[Prompts]) -> Prompts:
    """Host batches of equal shapes, one for each place, on the devices."""
    return feed_members(jax.tree.map(lambda *rows: np.stack([np.asarray(x) for x in rows]), *prompts))


def member_means(metrics: Metrics) -> list[dict[str, float]]:
    """The means of every place (`ops.means.means`)."""
    host = fetch(metrics)
    count = len(next(iter(host.values()))[0])
    return [
        {name: float(total[i] / number[i]) if number[i] else math.nan for name, (total, number) in host.items()}
        for i in range(count)
    ]


def abstract_members(state: PyTree, count: int) -> PyTree:
    """Shapes of `count` members from those of one (`jax.ShapeDtypeStruct`s), to lower the program without arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), state)
