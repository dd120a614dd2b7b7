"""Batches of prompts and micro-batches of responses without padding that all of their rows share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ppo_jax.parallel.members import any_row
from ppo_jax.types import Metrics, Minibatch, Policy, Prompts

Gradient = Callable[[Policy, Minibatch], tuple[Policy, Metrics]]


def bucket_lengths(length: int, buckets: int) -> list[int]:
    """The lengths that rows are cut to, shortest first: the whole and its halves, T, T / 2, T / 4, ..., rounded up."""
    return sorted({-(-length // 2**i) for i in range(buckets)})


def cut_prompts(prompts: Prompts, buckets: int) -> Prompts:
    """A left-padded batch, still on the host, in the first of `bucket_lengths` slots that hold all its prompts."""
    slots, longest = prompts.mask.shape[1], int(prompts.mask.sum(axis=1).max())
    kept = next(length for length in bucket_lengths(slots, buckets) if length >= longest)
    return prompts._replace(tokens=prompts.tokens[:, slots - kept :], mask=prompts.mask[:, slots - kept :])


def sort_by_length(minibatch: Minibatch, pieces: int) -> Minibatch:
    """The rows in an order in which micro-batch j of `optimizer.accumulate` holds the j-th shortest responses."""
    order = jnp.argsort(jnp.sum(minibatch.loss_mask, axis=1)).reshape(pieces, -1).T.reshape(-1)
    return jax.tree.map(lambda x: x[order], minibatch)


def cut_to_buckets(gradient: Gradient, buckets: int) -> Gradient:
    """`gradient` of rows whose responses are cut to the first of `bucket_lengths` that loses no token that counts.

    Each length is a program of its own inside the one. What is left out is padding: the sums are the same.
    """

    def cut(policy: Policy, rows: Minibatch) -> tuple[Policy, Metrics]:
        length = rows.loss_mask.shape[1]
        lengths = bucket_lengths(length, buckets)
        too_short = [any_row(rows.loss_mask[:, shorter:].any(axis=1)) for shorter in lengths[:-1]]
        index = sum((flag.astype(jnp.int32) for flag in too_short), jnp.zeros((), jnp.int32))
        branches = [lambda policy, rows, n=n: gradient(policy, _without_last(rows, length - n)) for n in lengths]
        return jax.lax.switch(index, branches, policy, rows)

    return cut


def _without_last(rows: Minibatch, slots: int) -> Minibatch:
    """The rows without their last slots."""
    shorter = jax.tree.map(lambda x: x[:, : x.shape[1] - slots], rows._replace(pretrain=None))
    return shorter._replace(pretrain=rows.pretrain)
