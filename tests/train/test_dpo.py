"""Direct preference optimisation: the loss by hand, against torch and TRL, what it may depend on, that it learns."""

import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from trl import DPOTrainer

from ppo_jax.models.adapters import init_full, init_lora, init_top_k, merge
from ppo_jax.models.files import hf
from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.train.dpo import (
    DPOConfig,
    DPOScalars,
    Preferences,
    counted,
    dpo_gradient,
    evaluate,
    make_dpo_step,
    make_measure,
    preference_loss,
    train_dpo,
)
from tests.models.tiny import CONFIG, random_params
from tests.train.toy import assert_close

BASE = random_params(CONFIG)
B, S = 8, 11
SCALARS = DPOScalars(1e-2, 1e9, 0.3, 0.1)


@partial(jax.jit, static_argnums=3)
def loss_of(adapter, rows: Preferences, scalars: DPOScalars = SCALARS, chunk: int = 256):
    count = jnp.sum(counted(rows), dtype=jnp.float32)
    return preference_loss(adapter, BASE, rows, count, CONFIG, scalars, chunk)


@partial(jax.jit, static_argnums=2)
def gradient_of(adapter, rows: Preferences, accumulate: int = 1):
    return dpo_gradient(adapter, BASE, rows, CONFIG, DPOConfig(accumulate=accumulate), SCALARS)


def noisy_lora(seed: int = 0, first_layer: int = 1):
    """LoRA away from the base, above a shared prefix of one layer."""
    rng = np.random.default_rng(seed)
    lora = init_lora(jax.random.key(seed), CONFIG, rank=2, alpha=2.0, first_layer=first_layer)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), lora)


def batch(seed: int = 0, rows: int = B, left: int = 0, right: int = 0) -> Preferences:
    """Pairs with a common prompt and responses of different lengths; padding holds random ids."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, 2, S)).astype(np.int32)
    starts, ends = rng.integers(1, 4, rows)[:, None, None], rng.integers(4, S + 1, (rows, 2, 1))
    slots = np.arange(S)
    tokens = np.where(slots < starts, tokens[:, :1], tokens)
    mask = np.broadcast_to(slots < ends, tokens.shape)
    wide = ((0, 0), (0, 0), (left, right))
    junk = np.random.default_rng(left + right).integers(0, CONFIG.vocab_size, (rows, 2, left + S + right))
    padded = np.where(np.pad(mask, wide), np.pad(tokens, wide), junk).astype(np.int32)
    return Preferences(*map(jnp.asarray, (padded, np.pad(mask, wide), np.pad(mask & (slots >= starts), wide))))


def means(metrics) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in metrics.items()}


def test_the_loss_from_log_probs_that_are_known() -> None:
    """With all-equal weights every distribution is uniform over the 67 tokens, whatever the text, except that the
    trained unembedding makes token 5 likelier. Its log-probs can be written down.

    Final hidden state h = c for every position (embedding rows are equal, so the residual stream is), logits of the
    base are 0; the policy's are 1 at token 5 and 0 elsewhere:

        Z = e + 66,  log pi(5) - log ref(5) = 1 - ln Z + ln 67 = 1 - d,  any other: -d,   d = ln(Z / 67)

    Pair: chosen [5, 9, 5] (3 response tokens, two of them 5), rejected [9, 5] (one 5):

        chosen ratio 2 - 3d, rejected 1 - 2d,  h = beta (1 - d)
    """
    base = jax.tree.map(jnp.zeros_like, BASE)
    base = base | {"embedding": jnp.ones_like(BASE["embedding"]), "final_norm": jnp.ones_like(BASE["final_norm"])}
    base["unembedding"] = jnp.zeros((CONFIG.vocab_size, CONFIG.hidden_size))
    # RMS norm of a constant row is a row of ones (up to its epsilon): weights of 1/D give a logit of 1.
    adapter = {"unembedding": base["unembedding"].at[5].set(1 / CONFIG.hidden_size)}
    tokens = jnp.array([[[3, 5, 9, 5], [3, 9, 5, 0]]])
    loss_mask = jnp.array([[[False, True, True, True], [False, True, True, False]]])
    rows = Preferences(tokens, jnp.array([[[True] * 4, [True] * 3 + [False]]]), loss_mask)

    scalars = DPOScalars(1.0, 1.0, 0.5, 0.2)
    loss, metrics = preference_loss(adapter, base, rows, jnp.ones(()), CONFIG, scalars)
    d = math.log((math.e + 66) / 67)
    chosen, rejected = 0.5 * (2 - 3 * d), 0.5 * (1 - 2 * d)
    h = chosen - rejected
    assert h == pytest.approx(0.5 * (1 - d))
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))
    assert float(loss) == pytest.approx(-0.8 * log_sigmoid(h) - 0.2 * log_sigmoid(-h), abs=1e-4)
    values = means(metrics)
    assert values["chosen_reward"] == pytest.approx(chosen, abs=1e-4)
    assert values["rejected_reward"] == pytest.approx(rejected, abs=1e-4)
    assert values["margin"] == pytest.approx(h, abs=1e-4)
    assert values["accuracy"] == 1
    assert values["chosen_logprob"] == pytest.approx(2 - 3 * math.log(math.e + 66), abs=1e-4)


def test_loss_and_gradient_against_torch() -> None:
    """With the unembedding trained the hidden states stay those of the base, and torch can do the rest."""
    rows = batch()
    table = BASE.get("unembedding", BASE["embedding"])
    adapter = {"unembedding": table + 0.1 * jax.random.normal(jax.random.key(0), table.shape)}
    flat = jax.tree.map(lambda x: x.reshape(-1, S), rows)
    hidden = apply(BASE, {}, CONFIG, flat.tokens, positions_from_mask(flat.mask))

    double = lambda x: torch.from_numpy(np.array(x, np.float64))
    policy = double(adapter["unembedding"]).requires_grad_()
    labels = torch.from_numpy(np.array(flat.tokens[:, 1:], np.int64))[..., None]

    def response(weights: torch.Tensor) -> torch.Tensor:
        logs = torch.log_softmax(double(hidden)[:, :-1] @ weights.T, dim=-1).gather(-1, labels)[..., 0]
        return (logs * torch.from_numpy(np.array(flat.loss_mask[:, 1:]))).sum(dim=1).reshape(B, 2)

    rewards = SCALARS.beta * (response(policy) - response(double(table)))
    h = rewards[:, 0] - rewards[:, 1]
    log_sigmoid = torch.nn.functional.logsigmoid
    expected = (-0.9 * log_sigmoid(h) - 0.1 * log_sigmoid(-h)).mean()
    expected.backward()

    loss, metrics = loss_of(adapter, rows, SCALARS, 7)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert means(metrics)["accuracy"] == pytest.approx((h > 0).double().mean().item())
    assert 0 < means(metrics)["accuracy"] < 1
    grads, _ = gradient_of(adapter, rows)
    np.testing.assert_allclose(grads["unembedding"], policy.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trl_computes_the_same_loss(smoothing: float, tmp_path: Path) -> None:
    """TRL 1.9's own `DPOTrainer._compute_loss`, on two saved models read by transformers.

    On purpose ours differs from TRL's loss with label smoothing, `robust` (Chowdhury et al. 2024: the flipped term is
    subtracted and the whole divided by 1 - 2 eps, which is unbiased but unbounded below); conservative DPO adds the
    flipped term. It is assembled here from TRL's losses of the pairs and of the swapped pairs.
    """

    rows, adapter = batch(), noisy_lora()
    models = {}
    for name, params in {"policy": merge(BASE, adapter, CONFIG), "reference": BASE}.items():
        hf.save(tmp_path / name, CONFIG, params, None)
        models[name] = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    gather = lambda x: x
    trainer = SimpleNamespace(
        model=models["policy"], ref_model=models["reference"], aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=False, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        beta=SCALARS.beta, label_smoothing=0.0, use_weighting=False, _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=gather, gather_for_metrics=gather, unwrap_model=gather, num_processes=1
        ),
    )  # fmt: skip

    def by_trl(rows: Preferences) -> float:
        side = lambda x: torch.from_numpy(np.concatenate([np.array(x[:, 0]), np.array(x[:, 1])]).astype(np.int64))
        inputs = {"input_ids": side(rows.tokens), "attention_mask": side(rows.mask)}
        inputs["completion_mask"] = side(rows.loss_mask)
        with torch.no_grad():
            return float(DPOTrainer._compute_loss(trainer, models["policy"], inputs, False))

    swapped = jax.tree.map(lambda x: x[:, ::-1], rows)
    expected = (1 - smoothing) * by_trl(rows) + smoothing * by_trl(swapped)
    loss, metrics = loss_of(adapter, rows, SCALARS._replace(label_smoothing=smoothing))
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    theirs = {name.split("/")[1]: values[0] for name, values in trainer._metrics["eval"].items() if "rewards/" in name}
    values = means(metrics)
    for ours, name in {"accuracy": "accuracies", "margin": "margins", "chosen_reward": "chosen"}.items():
        assert values[ours] == pytest.approx(theirs[name], abs=2e-4), name


@pytest.mark.parametrize("kind", ["lora", "top-k", "full", "nothing"])
def test_the_first_loss_is_ln_2(kind: str) -> None:
    adapter = {
        "lora": lambda: init_lora(jax.random.key(0), CONFIG, 2, 2.0),
        "top-k": lambda: init_top_k(BASE, CONFIG, 1),
        "full": lambda: init_full(BASE),
        "nothing": dict,
    }[kind]()
    loss, metrics = loss_of(adapter, batch())
    assert float(loss) == pytest.approx(math.log(2), abs=1e-4)
    assert means(metrics)["margin"] == pytest.approx(0, abs=1e-4)


def test_accumulation_padding_prefix_and_order_change_nothing() -> None:
    adapter = noisy_lora()
    whole, metrics = gradient_of(adapter, batch())
    order = np.random.default_rng(1).permutation(B)
    others = {
        "two micro-batches": gradient_of(adapter, batch(), 2),
        "four micro-batches": gradient_of(adapter, batch(), 4),
        "padding": gradient_of(adapter, batch(left=3, right=2)),
        "order": gradient_of(adapter, jax.tree.map(lambda x: x[order], batch())),
    }
    for grads, measured in others.values():
        assert_close(grads, whole, rtol=2e-4, atol=1e-6)
        assert_close(means(measured), means(metrics), rtol=1e-4, atol=1e-5)
    # The same function without a shared prefix: a LoRA from layer 0 on whose first layer is 0.
    deep = jax.tree.map(lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x]), adapter)
    assert float(loss_of(deep, batch())[0]) == pytest.approx(float(loss_of(adapter, batch())[0]), rel=1e-5)


def test_the_prompt_is_no_part_of_the_loss_and_cancels() -> None:
    """Tokens before the responses are equal on both sides, so counting them too changes no margin and no loss."""
    adapter, rows = noisy_lora(), batch()
    counting = rows._replace(loss_mask=rows.mask)
    (loss, metrics), (longer, more) = loss_of(adapter, rows), loss_of(adapter, counting)
    assert float(loss) == pytest.approx(float(longer), rel=1e-5)
    assert abs(means(metrics)["chosen_logprob"] - means(more)["chosen_logprob"]) > 1


def test_pairs_that_fill_up_a_batch_do_not_count() -> None:
    rows, adapter = batch(), noisy_lora()
    first = jax.tree.map(lambda x: x[:5], rows)
    filled = rows._replace(loss_mask=rows.loss_mask & (jnp.arange(B) < 5)[:, None, None])
    (loss, metrics), (same, filled_metrics) = loss_of(adapter, first), loss_of(adapter, filled)
    assert float(loss) == pytest.approx(float(same), rel=1e-5)
    assert_close(means(metrics), means(filled_metrics), rtol=1e-4, atol=1e-5)
    measure = make_measure(CONFIG, DPOConfig(beta=SCALARS.beta, label_smoothing=SCALARS.label_smoothing))
    values = evaluate(measure, adapter, BASE, [first, jax.tree.map(lambda x: x[5:], rows)])
    assert values["pairs"] == B and values["loss"] == pytest.approx(float(loss_of(adapter, rows)[0]), rel=1e-5)


def test_a_step_is_the_clipped_gradient_and_nothing_recompiles() -> None:
    rows, adapter = batch(), noisy_lora()
    grads, _ = gradient_of(adapter, rows)
    norm = float(optax.tree.norm(grads))
    step = make_dpo_step(CONFIG, DPOConfig(), optax.identity())
    for clip, factor in [(norm / 4, 0.25), (norm * 4, 1.0)]:
        scalars = SCALARS._replace(learning_rate=0.5, max_grad_norm=clip)
        moved, _, metrics = step(jax.tree.map(jnp.copy, adapter), optax.EmptyState(), BASE, rows, scalars)
        assert_close(moved, jax.tree.map(lambda p, g, f=factor: p - 0.5 * f * g, adapter, grads), 1e-4, 1e-6)
        np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-4)
    step(jax.tree.map(jnp.copy, adapter), optax.EmptyState(), BASE, rows, SCALARS._replace(beta=0.7))
    assert step._cache_size() == 1


def test_the_implicit_reward_learns_the_preference() -> None:
    """Chosen responses hold token 7, rejected ones 8; pairs that were never seen are ordered too."""

    def pairs(seed: int) -> Preferences:
        rows = batch(seed)
        words = jnp.array([7, 8])[None, :, None]
        hit = rows.loss_mask & (jax.random.uniform(jax.random.key(seed), rows.tokens.shape) < 0.5)
        return rows._replace(tokens=jnp.where(hit, words, rows.tokens))

    dpo = DPOConfig(beta=0.1, batch_size=B, learning_rate=1e-2)
    measure = make_measure(CONFIG, dpo)
    held_out, log = [pairs(1000 + i) for i in range(4)], []
    adapter = init_lora(jax.random.key(0), CONFIG, rank=4, alpha=8.0)
    before = evaluate(measure, adapter, BASE, held_out)
    adapter = train_dpo(adapter, BASE, CONFIG, dpo, pairs, 40, lambda step, values: log.append((step, values)))
    after = evaluate(measure, adapter, BASE, held_out)
    assert before["accuracy"] == 0.5 and before["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert after["accuracy"] > 0.85 and after["loss"] < 0.5
    assert after["rejected_reward"] < after["chosen_reward"]
    assert [step for step, _ in log] == list(range(1, 41))
    assert log[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-4) and log[0][1]["learning_rate"] == 1e-2


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    base = BASE | {"final_norm": BASE["final_norm"].at[0].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        train_dpo(noisy_lora(), base, CONFIG, DPOConfig(), lambda _: batch(), 3, lambda *_: None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "beta=0.0 must be a positive number"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must lie in \[0, 0.5\)"),
        ({"label_smoothing": float("nan")}, "label_smoothing=nan"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size=6 is not a multiple of accumulate=4"),
        ({"steps": -1}, "steps=-1"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
    ],
)
def test_bad_settings_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPOConfig(**fields)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="a batch of 7 rows does not divide into accumulate=2"):
        dpo_gradient(noisy_lora(), BASE, batch(rows=7), CONFIG, DPOConfig(accumulate=2), SCALARS)
    assert DPOConfig(batch_size=16).num_steps(33) == 3 and DPOConfig(steps=7).num_steps(33) == 7
