"""Supervised fine-tuning: the loss against torch, what it may depend on, and that it learns."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ppo_jax.models.adapters import init_full, init_lora, init_top_k, unembedding
from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.train.offline import descended, in_order, learn
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.sft import (
    Demonstrations,
    SFTConfig,
    evaluate,
    loss_tokens,
    make_sft_loss,
    make_sft_step,
    sft_gradient,
    sft_loss,
    train_sft,
)
from tests.models.tiny import CONFIG, random_params

BASE = random_params(CONFIG)
B, S = 8, 11


@partial(jax.jit, static_argnums=3)
def loss_of(adapter, rows: Demonstrations, count, chunk: int = 256):
    return sft_loss(adapter, BASE, rows, count, CONFIG, chunk)


@partial(jax.jit, static_argnums=2)
def gradient_of(adapter, rows: Demonstrations, accumulate: int):
    return sft_gradient(adapter, BASE, rows, CONFIG, SFTConfig(accumulate=accumulate))


@jax.jit
def hidden_of(adapter, rows: Demonstrations):
    return apply(BASE, adapter, CONFIG, rows.tokens, positions_from_mask(rows.mask))


def noisy_lora(seed: int = 0):
    rng = np.random.default_rng(seed)
    lora = init_lora(jax.random.key(seed), CONFIG, rank=2, alpha=2.0)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), lora)


def batch(seed: int = 0, rows: int = B) -> Demonstrations:
    """Rows of different lengths and different prompts, so that micro-batches hold different numbers of tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, S)).astype(np.int32)
    ends, starts = rng.integers(4, S + 1, rows), rng.integers(1, 4, rows)
    slots = np.arange(S)
    mask = slots < ends[:, None]
    return Demonstrations(*map(jnp.asarray, (tokens, mask, mask & (slots >= starts[:, None]))))


def test_loss_is_torch_cross_entropy() -> None:
    rows, adapter = batch(), noisy_lora()
    hidden = hidden_of(adapter, rows)
    logits = torch.tensor(np.asarray(hidden)) @ torch.tensor(np.asarray(unembedding(BASE, adapter))).T
    labels = torch.tensor(np.where(rows.loss_mask, rows.tokens, -100)).long()  # -100: torch's "not a target"
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss, metrics = loss_of(adapter, rows, loss_tokens(rows), 7)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], expected, rtol=1e-5)
    assert metrics["loss"][1] == int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_accumulation_changes_nothing(kind: str) -> None:
    adapter = noisy_lora() if kind == "lora" else init_full(BASE)
    rows = batch()
    counts = [int(piece.sum()) for piece in np.split(np.asarray(rows.loss_mask), 4)]
    assert len(set(counts)) > 1  # else a mean of means would pass too
    whole, metrics = gradient_of(adapter, rows, 1)
    pieces, piece_metrics = gradient_of(adapter, rows, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), whole, pieces)
    np.testing.assert_allclose(metrics["loss"], piece_metrics["loss"], rtol=1e-5)


def test_gradient_is_that_of_the_loss_and_reaches_every_array() -> None:
    """Directional derivative by central differences in float32: relative error about eps^2 + 1e-7 / eps."""
    rows, adapter = batch(), noisy_lora()
    grads, _ = gradient_of(adapter, rows, 4)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    direction = jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)
    eps = 3e-3
    up, down = (
        sft_loss(jax.tree.map(lambda p, d, e=e: p + e * d, adapter, direction), BASE, rows, loss_tokens(rows), CONFIG)[
            0
        ]
        for e in (eps, -eps)
    )
    np.testing.assert_allclose((up - down) / (2 * eps), optax.tree.norm(grads), rtol=2e-2)


def test_only_response_tokens_are_targets() -> None:
    """What stands in padding is irrelevant; a prompt token matters as context only."""
    rows, adapter = batch(), noisy_lora()

    def token_losses(rows: Demonstrations) -> np.ndarray:
        one = lambda b: jax.tree.map(lambda x: x[b : b + 1], rows)
        return np.array([loss_of(adapter, one(b), jnp.ones(()))[0] for b in range(B)])

    before = token_losses(rows)
    junk = (rows.tokens + 5) % CONFIG.vocab_size
    padded = rows._replace(tokens=jnp.where(rows.mask, rows.tokens, junk))
    np.testing.assert_array_equal(token_losses(padded), before)

    # row 0: drop response token t from the loss, and exactly its log-prob goes missing
    t = int(np.flatnonzero(rows.loss_mask[0])[1])
    without = rows._replace(loss_mask=rows.loss_mask.at[0, t].set(False))
    hidden = hidden_of(adapter, rows)
    logprobs = jax.nn.log_softmax(hidden[0] @ unembedding(BASE, adapter).T)
    np.testing.assert_allclose(before[0] - token_losses(without)[0], -logprobs[t - 1, rows.tokens[0, t]], rtol=1e-4)
    np.testing.assert_array_equal(token_losses(without)[1:], before[1:])

    # a prompt token is no target: with the rest of the loss masked away its own log-prob has no gradient
    nothing = rows._replace(loss_mask=jnp.zeros_like(rows.loss_mask))
    grads, metrics = gradient_of(adapter, nothing, 1)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads)) and metrics["loss"][1] == 0


def test_the_first_token_is_never_a_target() -> None:
    rows = batch()
    first = rows._replace(loss_mask=rows.loss_mask.at[:, 0].set(True))
    assert loss_tokens(first) == loss_tokens(rows)
    losses = [loss_of(noisy_lora(), x, loss_tokens(x))[0] for x in (rows, first)]
    assert losses[0] == losses[1]


def test_a_step_is_the_clipped_gradient_through_the_optimizer() -> None:
    """With the identity for an optimizer: p - lr * g * min(1, clip / |g|)."""
    rows, adapter = batch(), noisy_lora()
    grads, _ = gradient_of(adapter, rows, 1)
    norm = float(optax.tree.norm(grads))
    step = make_sft_step(CONFIG, SFTConfig(), optax.identity())
    for clip, factor in [(norm / 4, 0.25), (norm * 4, 1.0)]:
        moved, _, metrics = step(jax.tree.map(jnp.copy, adapter), optax.EmptyState(), BASE, rows, 0.5, clip)
        expected = jax.tree.map(lambda p, g, f=factor: p - 0.5 * f * g, adapter, grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, expected)
        np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-4)  # before the clip
    assert step._cache_size() == 1  # both numbers are traced


def test_adam_compiles_once_and_keeps_float32_masters() -> None:
    """On a bfloat16 base: what is trained stays float32, or small steps would vanish."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    base = random_params(config)
    adapter, optimizer = init_top_k(base, config, 1), make_optimizer()
    step, opt_state = make_sft_step(config, SFTConfig(accumulate=2), optimizer), optimizer.init(adapter)
    for number in range(3):
        adapter, opt_state, metrics = step(adapter, opt_state, base, batch(number), 1e-3 / (1 + number), 1.0 + number)
    assert step._cache_size() == 1
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"][0].dtype == jnp.float32


def test_a_tiny_model_memorises_a_few_sequences() -> None:
    rows = batch(seed=3, rows=4)
    adapter = init_lora(jax.random.key(0), CONFIG, rank=8, alpha=16.0)
    sft = SFTConfig(batch_size=4, learning_rate=2e-2, accumulate=2)
    losses: list[float] = []
    trained = train_sft(adapter, BASE, CONFIG, sft, lambda _: rows, 60, lambda _, values: losses.append(values["loss"]))
    assert losses[0] > 4 and losses[-1] < 0.1
    predicted = np.argmax(hidden_of(trained, rows) @ unembedding(BASE, trained).T, axis=-1)[:, :-1]
    target = np.asarray(rows.loss_mask)[:, 1:]
    assert (predicted == np.asarray(rows.tokens)[:, 1:])[target].all()


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    base = BASE | {"final_norm": BASE["final_norm"].at[0].set(jnp.nan)}
    seen: list[int] = []
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        train_sft(noisy_lora(), base, CONFIG, SFTConfig(), lambda _: batch(), 3, lambda step, _: seen.append(step))
    assert seen == [1]  # written before it stops


def test_a_gradient_that_is_not_finite_is_named_where_the_loss_is() -> None:
    """The slope of sqrt(x) at 0."""

    def make_step(optimizer):
        def step(params, opt_state, rows, rate):
            loss, grads = jax.value_and_grad(lambda p: 2.5 + jnp.sqrt(p["x"]))(params)
            return descended(params, (grads, {"loss": (loss, jnp.ones(()))}), opt_state, optimizer, rate, 1.0)

        return step

    with pytest.raises(FloatingPointError, match="step 1: the grad_norm is inf; lower the learning rate"):
        learn({"x": jnp.zeros(())}, make_step, lambda _: batch(), 3, 1e-3, lambda *_: None)


def test_evaluate_is_exact_over_batches_of_any_size() -> None:
    rows, adapter = batch(rows=7), noisy_lora()
    whole = float(loss_of(adapter, rows, loss_tokens(rows))[0])
    loss = make_sft_loss(CONFIG)
    for size in (7, 3):
        result = evaluate(loss, adapter, BASE, in_order(rows, size))
        np.testing.assert_allclose(result["loss"], whole, rtol=1e-5)
        np.testing.assert_allclose(result["perplexity"], math.exp(whole), rtol=1e-4)
        assert result["tokens"] == float(loss_tokens(rows))
    assert loss._cache_size() == 2  # one program per batch size, the filled-up last batch included


def test_evaluate_of_nothing_is_nan() -> None:
    assert math.isnan(evaluate(make_sft_loss(CONFIG), {}, BASE, [])["loss"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size=6 is not a multiple of accumulate=4"),
        ({"steps": -1}, "steps=-1"),
        ({"epochs": 0.0}, "epochs=0.0 must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"logprob_chunk": -1}, "logprob_chunk=-1"),
    ],
)
def test_bad_settings_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTConfig(**fields)


def test_number_of_steps() -> None:
    assert SFTConfig(batch_size=16).num_steps(33) == 3  # 33 / 16 = 2.06: a begun pass is finished
    assert SFTConfig(batch_size=16, epochs=0.5).num_steps(32) == 1
    assert SFTConfig(batch_size=16, steps=7).num_steps(32) == 7


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="a batch of 7 rows does not divide into accumulate=2"):
        sft_gradient(noisy_lora(), BASE, batch(rows=7), CONFIG, SFTConfig(accumulate=2))
