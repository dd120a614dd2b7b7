"""Conditions that all members of a population share, and how members lie on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ppo_jax.parallel.members import any_row, branch, feed_members, member_shardings, over_members, spread
from ppo_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh


def test_a_loop_of_several_members_ends_with_the_longest_and_changes_none_of_the_others() -> None:
    def count(limit):
        """Adds 1 to a total in every round in which the member is not done yet; says how many rounds there were."""
        step = lambda s: (s[0] + 1, s[1] + (s[0] < limit))
        return jax.lax.while_loop(lambda s: any_row((s[0] < limit)[None]), step, (0, 0))

    rounds, totals = jax.vmap(count)(jnp.array([2, 5, 0, 3]))
    assert totals.tolist() == [2, 5, 0, 3]
    assert rounds.tolist() == [5] * 4
    assert [int(count(n)[0]) for n in (2, 5, 0)] == [2, 5, 0]
    # The counter is not one per member: an index made of it stays one number.
    text = jax.jit(jax.vmap(count)).lower(jnp.arange(4)).as_text()
    assert "while(" in text and "tensor<i32>, tensor<4xi32>" in text


def test_any_row_is_any_however_deep_it_is_mapped() -> None:
    flags = np.zeros((2, 3, 4), bool)
    assert not any_row(jnp.asarray(flags[0, 0]))
    assert not jax.vmap(jax.vmap(any_row))(jnp.asarray(flags)).any()
    flags[1, 2, 3] = True
    assert jax.vmap(jax.vmap(any_row))(jnp.asarray(flags)).all()


def double(x, base):
    return x * base


def negate(x, base):
    return -x + 0 * base


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_branch_is_cond_for_every_member(depth: int) -> None:
    shape = (3, 2)[:depth]
    conditions = np.random.default_rng(depth).random(shape) < 0.5
    x = np.arange(1.0, 1 + conditions.size, dtype=np.float32).reshape(shape)
    mapped = lambda condition, x, base: branch(condition, double, negate, x, base)
    for _ in range(depth):
        mapped = jax.vmap(mapped, (0, 0, None))
    for flags in (conditions, np.ones(shape, bool), np.zeros(shape, bool)):
        got = jax.jit(mapped)(flags, x, jnp.float32(2))
        np.testing.assert_array_equal(got, np.where(flags, 2 * x, -x))


def test_branch_skips_what_no_member_needs_and_copies_nothing_that_they_share() -> None:
    base = jnp.ones((7, 5))
    product = lambda x, base: x @ base
    zero = lambda x, base: jnp.zeros(5)
    step = jax.vmap(lambda c, x, base: branch(c, zero, product, x, base), (0, 0, None))
    text = jax.jit(step).lower(jnp.zeros(3, bool), jnp.ones((3, 7)), base).as_text()
    assert "stablehlo.case" in text and "tensor<3x5xf32>" in text
    assert "tensor<3x7x5xf32>" not in text  # lax.cond under vmap would have made this
    plain = jax.vmap(lambda c, x, base: jax.lax.cond(c, zero, product, x, base), (0, 0, None))
    assert "tensor<3x7x5xf32>" in jax.jit(plain).lower(jnp.zeros(3, bool), jnp.ones((3, 7)), base).as_text()


def test_a_nan_that_is_not_chosen_stays_where_it_is() -> None:
    step = jax.vmap(lambda c, x: branch(c, lambda x: x, lambda x: x / 0 * 0, x))
    assert step(jnp.array([True, False, True]), jnp.arange(3.0)).tolist()[::2] == [0.0, 2.0]


@pytest.mark.parametrize(
    ("count", "shape", "apart"), [(8, (4, 2, 1), True), (6, (4, 2, 1), False), (3, (1, 8, 1), False)]
)
def test_members_lie_on_the_data_axis_where_it_divides_them(count, shape, apart) -> None:
    mesh = make_mesh(MeshConfig(*shape))
    assert spread(count, mesh) == apart and not spread(count, None)
    one = {"a": NamedSharding(mesh, PartitionSpec("fsdp"))}
    assert member_shardings(one, count)["a"].spec == PartitionSpec("data" if apart else None, "fsdp")
    with use_mesh(MeshConfig(*shape)):
        fed = feed_members({"rows": np.zeros((count, 16, 3)), "one": np.zeros(count), "odd": np.zeros((count, 3))})
        rows = {(4, 2, 1): ("fsdp",) if apart else ("data", "fsdp"), (1, 8, 1): ("fsdp",)}[shape]
        first = "data" if apart else None
        assert fed["rows"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(first, rows)), 3)
        for name in ("one", "odd"):
            assert fed[name].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(first)), fed[name].ndim)
        got = jax.jit(over_members(lambda x, y: x.sum() + y, count, shared=(1,)))(fed["rows"] + 1, 2.0)
        np.testing.assert_array_equal(got, np.full(count, 50.0))
