"""The classic TRL pipeline (0.11.4), from log-probs to losses: its numbers, made by make_trl_classic.py, are ours.

Where we differ on purpose a test says so, and shows that the difference is that one and no other.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops.advantages import gae
from ppo_jax.ops.kl import adaptive_kl, kl_full, kl_penalty
from ppo_jax.ops.logprobs import entropy
from ppo_jax.ops.losses import clipped_policy_loss, clipped_value_loss
from ppo_jax.ops.masked import masked_mean, masked_var, masked_whiten
from ppo_jax.ops.rewards import shape_rewards

TRL = json.loads(Path(__file__).with_name("trl_classic.json").read_text())
SETTINGS = TRL["settings"]
INPUTS = {name: jnp.asarray(x, jnp.float32) for name, x in TRL["inputs"].items()}
MASKS = {name: jnp.asarray(x, bool) for name, x in TRL["masks"].items()}

close = lambda ours, theirs, tol=2e-5: np.testing.assert_allclose(ours, np.asarray(theirs), rtol=tol, atol=tol)


def shaped(mask: jax.Array) -> jax.Array:
    kl = kl_penalty(INPUTS["old_logprobs"], INPUTS["ref_logprobs"], "k1")
    return shape_rewards(INPUTS["scores"], kl, mask, SETTINGS["kl_coef"])


def mean_of(metrics: dict, name: str) -> float:
    total, count = metrics[name]
    return float(total / count)


@pytest.mark.parametrize(("ours", "theirs"), [("k1", "kl"), ("abs", "abs"), ("k2", "mse")])
def test_kl_penalties(ours, theirs: str) -> None:
    close(kl_penalty(INPUTS["old_logprobs"], INPUTS["ref_logprobs"], ours), TRL["penalties"][theirs])


def test_full_kl() -> None:
    close(kl_full(INPUTS["logits"], INPUTS["ref_logits"]), TRL["penalties"]["full"])


@pytest.mark.parametrize("name", MASKS)
def test_shaped_rewards(name: str) -> None:
    """TRL leaves the penalty of padding in the array and multiplies by the mask later; ours is 0 there at once."""
    mask = np.asarray(MASKS[name])
    close(shaped(MASKS[name]), np.where(mask, TRL["batches"][name]["rewards"], 0))


CASES = [(name, i) for name in MASKS for i in range(len(TRL["batches"]["whole"]["advantages"]))]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_gae_and_losses(name: str, case: int) -> None:
    mask = MASKS[name]
    batch, expected = TRL["batches"][name]["losses"][case], TRL["batches"][name]["advantages"][case]
    rewards = shaped(mask)
    if expected["whiten_rewards"]:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
        if name == "ragged":
            # On purpose: TRL whitens after it has set padding to 0, which turns that 0 into mean - mean / std, and GAE
            # then carries these rewards of padding into the responses before them. Put in, they give TRL's numbers.
            plain = shaped(mask)
            mean, std = masked_mean(plain, mask), jnp.sqrt(masked_var(plain, mask) + 1e-8)
            leak = jnp.broadcast_to(mean - mean / std, mask.shape)
            ours, _ = gae(rewards, INPUTS["values"], mask, expected["gamma"], expected["lam"])
            everywhere = jnp.ones_like(mask)
            rewards = jnp.where(mask, rewards, leak)
            values = jnp.where(mask, INPUTS["values"], 0.0)
            advantages, returns = gae(rewards, values, everywhere, expected["gamma"], expected["lam"])
            if expected["lam"] > 0:
                assert float(jnp.max(jnp.abs(jnp.where(mask, advantages - ours, 0.0)))) > 1e-2
            close(jnp.where(mask, returns, 0.0), np.where(mask, expected["returns"], 0), 1e-4)
            return
    advantages, returns = gae(rewards, INPUTS["values"], mask, expected["gamma"], expected["lam"])
    advantages = masked_whiten(advantages, mask)
    close(returns, np.where(mask, expected["returns"], 0), 1e-4)
    # TRL's whitening leaves -mean / std in padding, ours 0: nothing reads it, in either.
    close(advantages, np.where(mask, expected["advantages"], 0), 2e-4)

    policy, policy_metrics = clipped_policy_loss(
        INPUTS["logprobs"], INPUTS["old_logprobs"], advantages, mask, SETTINGS["clip"], SETTINGS["clip"]
    )
    value, value_metrics = clipped_value_loss(
        INPUTS["new_values"], INPUTS["values"], returns, mask, SETTINGS["value_clip"]
    )
    close(policy, batch["policy"], 1e-4)
    close(value, batch["loss/value"], 1e-4)
    close(policy + SETTINGS["vf_coef"] * value, batch["loss/total"], 1e-4)
    close(mean_of(policy_metrics, "clip_fraction"), batch["policy/clipfrac"], 1e-6)
    close(mean_of(value_metrics, "value_clip_fraction"), batch["val/clipfrac"], 1e-6)
    close(mean_of(value_metrics, "value_error"), batch["val/error"], 1e-4)
    close(mean_of(policy_metrics, "approx_kl_k1"), batch["policy/policykl"])
    close(masked_mean(entropy(INPUTS["logits"]), mask), batch["policy/entropy"])
    close(masked_var(INPUTS["values"], mask), batch["val/var"])
    assert batch["policy/clipfrac"] > 0 and batch["val/clipfrac"] > 0  # the comparison is not vacuous


def test_approx_kl_is_another_estimator() -> None:
    """On purpose: TRL's approxkl is k2, half the mean square of the log-ratio; ours is k3, which is unbiased."""
    mask, batch = MASKS["ragged"], TRL["batches"]["ragged"]["losses"][0]
    k2 = kl_penalty(INPUTS["old_logprobs"], INPUTS["logprobs"], "k2")
    close(masked_mean(k2, mask), batch["policy/approxkl"])
    _, metrics = clipped_policy_loss(
        INPUTS["logprobs"], INPUTS["old_logprobs"], jnp.zeros(mask.shape), mask, SETTINGS["clip"], SETTINGS["clip"]
    )
    close(
        mean_of(metrics, "approx_kl"), masked_mean(kl_penalty(INPUTS["old_logprobs"], INPUTS["logprobs"], "k3"), mask)
    )
    assert abs(mean_of(metrics, "approx_kl") - batch["policy/approxkl"]) > 1e-4


def test_adaptive_and_fixed_coefficients() -> None:
    run = TRL["controllers"]
    coefficient, found = run["start"], []
    for observed, episodes in zip(run["observed"], run["episodes"], strict=True):
        coefficient = adaptive_kl(coefficient, observed, episodes, run["target"], run["horizon"])
        found.append(float(coefficient))
    np.testing.assert_allclose(found, run["adaptive"], rtol=2e-6)
    assert run["fixed"] == run["start"]


def test_a_batch_whose_mean_ratio_is_too_large_is_skipped_by_the_same_number() -> None:
    """On purpose: TRL multiplies the losses by 0 and steps all the same, so Adam moves on by its old momentum; here the
    step is left out (train.ppo.update, hyper.ratio_threshold)."""
    mask, skipped = MASKS["whole"], TRL["skipped"]
    _, metrics = clipped_policy_loss(INPUTS["logprobs"], INPUTS["old_logprobs"], INPUTS["values"], mask, 0.2, 0.2)
    assert mean_of(metrics, "ratio") > skipped["threshold"] and skipped["policy"] == skipped["value_times_coef"] == 0
    close(
        mean_of(metrics, "ratio"), np.exp(np.subtract(TRL["inputs"]["logprobs"], TRL["inputs"]["old_logprobs"])).mean()
    )
