"""One optimizer step and the epochs: what a gradient may depend on, and that it is clipped and shuffled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax.models.roles import shared_prefix
from ppo_jax.train.buckets import bucket_lengths, cut_to_buckets, sort_by_length
from ppo_jax.train.optimizer import accumulate as sum_pieces
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.ppo import update, update_epochs
from ppo_jax.types import Minibatch, Policy
from tests.train import toy
from tests.train.toy import CONFIG, FROZEN, HYPER, assert_close, numbers

B, P, T = 8, 4, 5
UNCLIPPED = HYPER._replace(max_grad_norm=1e9, clip_low=0.1, clip_high=0.15, value_clip=0.1)

# "Optimizers" that keep what they are given, so that a test can read it: the last gradient, or all their norms.
LAST = optax.GradientTransformation(
    lambda policy: jax.tree.map(jnp.zeros_like, policy), lambda grads, _, policy=None: (grads, grads)
)


def norms(length: int) -> optax.GradientTransformation:
    def keep(grads, state, policy=None):
        count, history = state
        return grads, (count + 1, history.at[count].set(optax.tree.norm(grads)))

    return optax.GradientTransformation(lambda policy: (jnp.zeros((), jnp.int32), jnp.zeros(length)), keep)


@functools.cache
def step(accumulate: int = 1, buckets: int = 1):
    ppo = PPOConfig(sampling=toy.SAMPLING, accumulate=accumulate, length_buckets=buckets)
    return jax.jit(lambda state, rows, hyper: update(toy.algorithm(ppo, LAST), state, FROZEN, rows, hyper))


def gradient(
    rows: Minibatch, hyper=UNCLIPPED, accumulate: int = 1, kind: str = "lora above a shared prefix", buckets: int = 1
):
    state, metrics = step(accumulate, buckets)(policy(kind), rows, hyper)
    return given(state), metrics


def given(state) -> Policy:
    """What LAST kept: the gradient of each group, as one tree."""
    return Policy(state.opt_state.policy, **state.opt_state.critic)


def policy(kind: str = "lora above a shared prefix"):
    return toy.moved(toy.start(toy.ADAPTERS[kind](), optimizer=LAST))


def minibatch(left: int = 0, right: int = 0, garbage: float = 0.0, seed: int = 0) -> Minibatch:
    """Ragged rows, with `left` and `right` more slots of padding than they need and `garbage` in what is masked."""
    rng = np.random.default_rng(seed)
    prompt_lengths, lengths = rng.integers(1, P + 1, B), rng.integers(1, T + 1, B)
    content = rng.integers(0, CONFIG.vocab_size, (B, P + T))
    floats = (
        rng.normal(0, 1, (4, B, T)) * np.array([0.2, 1, 1, 1])[:, None, None] - np.array([2, 0, 0, 0])[:, None, None]
    )
    padding = np.random.default_rng(seed + left + right)
    tokens = padding.integers(0, CONFIG.vocab_size, (B, left + P + T + right))
    tokens[:, left : left + P + T] = content
    slots = np.arange(left + P + T + right)
    mask = (slots >= left + P - prompt_lengths[:, None]) & (slots < left + P + lengths[:, None])
    loss_mask = mask[:, left + P :]
    columns = [np.where(loss_mask, np.pad(x, ((0, 0), (0, right))), garbage) for x in floats]
    logprobs, values, advantages, returns = (jnp.asarray(x, jnp.float32) for x in columns)
    return Minibatch(
        jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), None, jnp.asarray(loss_mask),
        logprobs, values, advantages, returns,
    )  # fmt: skip


def test_gradient_does_not_depend_on_micro_batches():
    """Defect 15. The rows are ragged, so a mean of the micro-batches' means would differ."""
    rows = minibatch()
    tokens = np.asarray(rows.loss_mask).sum(axis=1)
    assert len({tokens[:4].sum(), tokens[4:].sum()}) == 2
    whole, expected = gradient(rows)
    assert numbers(expected)["clip_fraction"] > 0
    for accumulate in (2, 4):
        parts, metrics = gradient(rows, accumulate=accumulate)
        assert_close(parts, whole, rtol=1e-4, atol=1e-6)
        assert_close(numbers(metrics), numbers(expected))


def test_gradient_does_not_depend_on_length_buckets():
    """T = 5 has the lengths 2, 3 and 5; what lies in the padding that is cut off is never read."""
    rows = minibatch(garbage=np.nan)
    prefix = shared_prefix(FROZEN.base, CONFIG, rows.tokens, rows.mask, 1)
    rows = rows._replace(prefix=prefix)
    whole, expected = gradient(rows)
    for accumulate in (1, 4):
        parts, metrics = gradient(rows, accumulate=accumulate, buckets=3)
        assert_close(parts, whole, rtol=1e-5, atol=1e-6)
        assert_close(numbers(metrics), numbers(expected))


def test_micro_batches_of_similar_length_are_cut_to_the_first_bucket_that_holds_them():
    """Lengths 1 1 2 3 | 4 6 8 5 in 4 micro-batches of 2: the sorted pairs (1 1) (2 3) (4 5) (6 8), of buckets 2 4 8."""
    lengths = jnp.array([4, 1, 8, 3, 1, 6, 2, 5])
    mask = jnp.arange(8) < lengths[:, None]
    whole = jnp.pad(mask, ((0, 0), (3, 0)), constant_values=True)
    floats = jnp.where(mask, lengths[:, None].astype(jnp.float32), jnp.nan)
    batch = Minibatch(whole.astype(jnp.int32), whole, None, mask, floats, floats, floats, floats)

    def count(policy: Policy, rows: Minibatch):
        slots = rows.loss_mask.shape[1]
        assert rows.tokens.shape[1] == rows.mask.shape[1] == 3 + slots and rows.values.shape[1] == slots
        total = jnp.sum(jnp.where(rows.loss_mask, rows.values, 0))
        return jax.tree.map(lambda p: p * total, policy), {
            f"slots/{n}": (jnp.float32(n == slots), jnp.ones(())) for n in (2, 4, 8)
        }

    assert bucket_lengths(8, 3) == [2, 4, 8] and bucket_lengths(5, 3) == [2, 3, 5] and bucket_lengths(3, 4) == [1, 2, 3]
    total, metrics = sum_pieces(cut_to_buckets(count, 3), Policy(jnp.ones(()), {}), sort_by_length(batch, 4), 4)
    assert float(total.adapter) == float(jnp.sum(lengths**2))
    assert {name: float(pair[0]) for name, pair in metrics.items()} == {"slots/2": 1, "slots/4": 1, "slots/8": 2}


def test_gradient_does_not_depend_on_the_order_of_rows():
    rows = minibatch()
    order = np.random.default_rng(1).permutation(B)
    whole, expected = gradient(rows)
    shuffled, metrics = gradient(jax.tree.map(lambda x: x[order], rows))
    assert_close(shuffled, whole, rtol=1e-4, atol=1e-6)
    assert_close(numbers(metrics), numbers(expected))


def test_gradient_does_not_depend_on_padding_or_what_lies_in_it():
    whole, expected = gradient(minibatch())
    for rows in (minibatch(garbage=np.nan), minibatch(left=3, right=2, garbage=np.inf)):
        padded, metrics = gradient(rows)
        assert_close(padded, whole, rtol=1e-4, atol=1e-6)
        assert_close(numbers(metrics), numbers(expected))


def test_a_shared_prefix_changes_no_gradient():
    rows = minibatch()
    whole, _ = gradient(rows)
    prefix = shared_prefix(FROZEN.base, CONFIG, rows.tokens, rows.mask, 1)
    shared, _ = gradient(rows._replace(prefix=prefix))
    assert_close(shared, whole, rtol=1e-4, atol=1e-6)
    # A prefix is read, not recomputed: another one gives another gradient.
    other, _ = gradient(rows._replace(prefix=jax.tree.map(lambda x: x + 1, prefix)))
    assert abs(float(optax.tree.norm(other)) / float(optax.tree.norm(whole)) - 1) > 0.01


def test_gradients_are_clipped_by_their_global_norm():
    """Defect 16: g * max_norm / |g| over all arrays together; the metric is the norm before clipping."""
    rows = minibatch()
    whole, metrics = gradient(rows)
    norm = np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(whole)))
    assert numbers(metrics)["grad_norm"] == pytest.approx(norm, rel=1e-5)
    limit = norm / 3
    clipped, metrics = gradient(rows, UNCLIPPED._replace(max_grad_norm=limit))
    assert_close(clipped, jax.tree.map(lambda x: x / 3, whole), rtol=1e-4, atol=1e-7)
    assert numbers(metrics)["grad_norm"] == pytest.approx(norm, rel=1e-5)
    loose, _ = gradient(rows, UNCLIPPED._replace(max_grad_norm=norm * 1.01))
    assert_close(loose, whole)


def test_the_step_is_the_learning_rate_times_what_the_optimizer_returns():
    before = policy()
    after, _ = step()(before, minibatch(), UNCLIPPED._replace(learning_rate=0.25))
    expected = jax.tree.map(lambda p, g: p - 0.25 * g, before.policy, given(after))
    assert_close(after.policy, expected, atol=1e-7)


def test_the_last_token_of_a_response_is_trained_like_the_first():
    """Defect 6."""
    rows = minibatch()
    unlimited = UNCLIPPED._replace(value_clip=1e9)
    whole, _ = gradient(rows, unlimited)
    last = np.asarray(rows.loss_mask).sum(axis=1) - 1
    for row in range(B):
        for slot in (0, last[row]):
            other = rows._replace(returns=rows.returns.at[row, slot].add(1.0))
            change = jax.tree.map(jnp.subtract, gradient(other, unlimited)[0], whole)
            assert optax.tree.norm(change) > 1e-3


def test_a_minibatch_without_valid_rows_has_gradient_0():
    rows = minibatch()
    rows = rows._replace(loss_mask=jnp.zeros_like(rows.loss_mask), returns=rows.returns * np.nan)
    nothing, metrics = gradient(rows)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing))
    assert float(metrics["policy_loss"][1]) == 0 and np.isfinite(metrics["policy_loss"][0])


@pytest.mark.parametrize("field", ["logprobs", "values", "advantages", "returns"])
def test_a_nan_inside_the_mask_is_not_hidden(field: str):
    """Defect 21: the step is left out and counted; no number is made up in its place."""
    rows = minibatch()
    rows = rows._replace(**{field: getattr(rows, field).at[0, 0].set(np.nan)})
    before = policy()
    after, metrics = step()(before, rows, UNCLIPPED)
    assert_close(after.policy, before.policy, rtol=0, atol=0)
    assert_close(after.opt_state, before.opt_state, rtol=0, atol=0)
    assert int(after.nonfinite) == 1 and float(metrics["nonfinite_updates"][0]) == 1
    assert float(metrics["policy_loss"][1]) == float(metrics["grad_norm"][1]) == 0, "not measured"
    again, _ = step()(after, rows, UNCLIPPED)
    assert int(again.nonfinite) == 2
    good, metrics = step()(again, minibatch(), UNCLIPPED)
    assert int(good.nonfinite) == 0 and float(metrics["nonfinite_updates"][0]) == 0


def test_every_epoch_and_update_visits_all_rows_once_in_an_order_of_its_own():
    """Defect 4. One row per minibatch and a learning rate of 0: a gradient's norm tells which row it came from."""
    epochs = 3
    ppo = PPOConfig(sampling=toy.SAMPLING, epochs=epochs, num_minibatches=B)
    optimizer = norms(epochs * B)
    state = toy.moved(toy.start(optimizer=optimizer))
    frozen_rate = UNCLIPPED._replace(learning_rate=0.0)

    @jax.jit
    def run(key):
        after, _ = update_epochs(toy.algorithm(ppo, optimizer), state, FROZEN, minibatch(), key, frozen_rate)
        return after.opt_state.policy

    def orders(seed: int) -> list[tuple[int, ...]]:
        count, history = run(jax.random.key(seed))
        assert int(count) == epochs * B
        visits = np.asarray(history).reshape(epochs, B)
        rows = np.sort(visits[0])
        assert np.all(np.diff(rows) > 1e-4 * rows[:-1]), "rows are told apart"
        np.testing.assert_allclose(np.sort(visits, axis=1), np.tile(rows, (epochs, 1)), rtol=1e-5)
        return [tuple(np.argsort(np.argsort(epoch))) for epoch in visits]

    assert orders(0) == orders(0)
    assert len({*orders(0), *orders(1)}) == 2 * epochs


def test_micro_batches_that_do_not_divide_are_refused():
    ppo = dataclasses.replace(toy.ONCE, num_minibatches=2, accumulate=3)
    with pytest.raises(ValueError, match="8 responses do not divide .*use a multiple of 6"):
        update_epochs(toy.algorithm(ppo, LAST), policy(), FROZEN, minibatch(), jax.random.key(0), HYPER)
