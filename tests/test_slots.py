"""Responses drawn in fewer slots than there are rows: what `generate` gives of all rows together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.transformer import apply, init_cache, positions_from_mask, replace_rows, unstack, unstacked
from ppo_jax.rollout import Sampling, generate
from ppo_jax.types import Prompts, Rollout
from tests.models.tiny import CONFIG
from tests.test_rollout import (
    BASE,
    LENGTHS,
    POLICY,
    PROMPTS,
    SAMPLING,
    B,
    P,
    check_structure,
    make_prompts,
    responses,
    run,
)

FIVE = dataclasses.replace(SAMPLING, slots=5)


@pytest.fixture(scope="module")
def together() -> Rollout:
    return jax.device_get(run(BASE, POLICY, PROMPTS, 0))


@pytest.fixture(scope="module")
def in_slots() -> Rollout:
    return jax.device_get(run(BASE, POLICY, PROMPTS, 0, sampling=FIVE))


def assert_same(found: Rollout, expected: Rollout, atol: float = 5e-5) -> None:
    """Tokens, masks and ends bitwise; numbers to rounding: products of another number of rows are cut differently."""
    for field in ("tokens", "prompt_mask", "response_mask", "terminated", "index"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=field)
    for field in ("logprobs", "policy_logprobs", "values"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), atol=atol, err_msg=field)


def test_slots_give_the_responses_of_all_rows_together(together: Rollout, in_slots: Rollout) -> None:
    lengths = together.response_mask.sum(axis=1)
    assert lengths.min() < lengths.max() and 0 < together.terminated.sum() < B  # rows end at different steps, some cut
    assert_same(in_slots, together)
    check_structure(in_slots, PROMPTS, FIVE)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_its_slot(in_slots: Rollout) -> None:
    """Other prompts before and behind rows 6..9 end at other steps, so those come to other slots: bitwise the same."""
    strangers = make_prompts(LENGTHS, seed=5)
    kept = (np.arange(B) >= 6) & (np.arange(B) < 10)
    tokens, mask = (
        jnp.where(kept[:, None], x, y) for x, y in ((PROMPTS.tokens, strangers.tokens), (PROMPTS.mask, strangers.mask))
    )
    found = jax.device_get(run(BASE, POLICY, Prompts(tokens, mask, PROMPTS.index), 0, sampling=FIVE))
    assert responses(found)[:6] != responses(in_slots)[:6]
    for field in ("tokens", "response_mask", "logprobs", "values", "terminated"):
        np.testing.assert_array_equal(getattr(found, field)[kept], getattr(in_slots, field)[kept], err_msg=field)


def test_penalties_and_filters_follow_the_rows_through_the_slots() -> None:
    sampling = dataclasses.replace(SAMPLING, top_k=20, repetition_penalty=1.5)
    plain = jax.device_get(run(BASE, POLICY, PROMPTS, 3, sampling=sampling))
    found = jax.device_get(run(BASE, POLICY, PROMPTS, 3, sampling=dataclasses.replace(sampling, slots=8)))
    assert_same(found, plain)
    assert np.abs(found.logprobs - found.policy_logprobs).max() > 0.1


def test_as_many_slots_as_rows_are_all_rows_together(together: Rollout) -> None:
    """Bitwise: it is the same program."""
    found = jax.device_get(run(BASE, POLICY, PROMPTS, 0, sampling=dataclasses.replace(SAMPLING, slots=B)))
    jax.tree.map(np.testing.assert_array_equal, found, together)


@pytest.mark.parametrize("stacked", [True, False])
def test_rows_of_a_cache_have_lengths_of_their_own(stacked: bool) -> None:
    """A row put into a cache in which others are further on reads what it reads alone."""
    read_tokens = jax.jit(apply, static_argnums=2, static_argnames="fresh")
    tokens, mask = PROMPTS.tokens[:3], PROMPTS.mask[:3]
    positions = positions_from_mask(mask)
    decoder = (BASE, {}) if stacked else unstack(BASE, {}, CONFIG)

    def read(rows: jax.Array) -> tuple:
        cache = init_cache(CONFIG, len(rows), P + (4 if stacked else 0))
        _, cache = read_tokens(BASE, {}, CONFIG, tokens[rows], positions[rows], cache=cache, fresh=True)
        return cache if stacked else unstacked(cache, P + 4)

    def step(cache: tuple, rows: jax.Array, at: int) -> tuple:
        token, place = jnp.full((len(rows), 1), 7), positions[rows, -1:] + 1 + at
        return read_tokens(*decoder, CONFIG, token, place, cache=cache)

    alone, _ = step(read(jnp.array([2])), jnp.array([2]), 0)
    cache = read(jnp.array([0, 1]))
    cache = cache._replace(length=jnp.full(2, P, jnp.int32))
    _, cache = step(cache, jnp.array([0, 1]), 0)
    cache = replace_rows(cache, jnp.array([1]), read(jnp.array([2])))
    assert cache.length.tolist() == [P + 1, P]
    mixed, cache = read_tokens(
        *decoder, CONFIG, jnp.full((2, 1), 7), jnp.stack([positions[0, -1:] + 2, positions[2, -1:] + 1]), cache=cache
    )
    np.testing.assert_allclose(mixed[1], alone[0], atol=2e-5)
    assert cache.length.tolist() == [P + 2, P + 1]


def test_bad_numbers_of_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="slots=-1 must be 0"):
        Sampling(slots=-1)
    with jax.set_mesh(jax.make_mesh((2,), ("data",))), pytest.raises(ValueError, match="slots=5 is for one device"):
        jax.eval_shape(lambda key: generate(BASE, POLICY, CONFIG, PROMPTS, key, FIVE), jax.random.key(0))
