"""The newer TRL pipeline (`trl.experimental.ppo`, 1.9), live: its own functions, and its loop rebuilt.

TRL's reward shaping, GAE and losses stand inside `PPOTrainer.train`, so they cannot be called; `pipeline` below
computes them row by row from the definitions, for TRL's conventions, with TRL's functions where there are any.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.experimental.ppo import ppo_trainer as trl
from trl.experimental.utils import first_true_indices

from ppo_jax.ops.advantages import gae
from ppo_jax.ops.kl import kl_penalty
from ppo_jax.ops.losses import clipped_policy_loss, clipped_value_loss
from ppo_jax.ops.masked import masked_mean, masked_var, masked_whiten
from ppo_jax.ops.rewards import last_token, shape_rewards, truncation_mask

B, T = 5, 6
EOS, PAD = 2, 0
WHOLE, RAGGED = [T] * B, [6, 4, 1, 6, 3]  # 6: cut by length, shorter ones end in EOS
COEF, CLIP, VALUE_CLIP = 0.15, 0.2, 0.1

double = lambda x: torch.from_numpy(np.array(x, np.float64))
close = lambda ours, theirs, tol=5e-5: np.testing.assert_allclose(ours, np.asarray(theirs), rtol=tol, atol=tol)


def batch(lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal = lambda std, *shape: rng.normal(0, std, shape).astype(np.float32)
    old = normal(0.5, B, T) - 1.5
    values = normal(0.6, B, T)
    responses = rng.integers(3, 9, (B, T))
    for row, length in enumerate(lengths):
        if length < T:
            responses[row, length - 1], responses[row, length:] = EOS, PAD
    return {
        "responses": responses, "mask": np.arange(T) < np.array(lengths)[:, None], "scores": normal(1, B) + 0.3,
        "old": old, "ref": old + normal(0.4, B, T), "new": old + normal(0.25, B, T),
        "values": values, "new_values": values + normal(0.2, B, T),
    }  # fmt: skip


def pipeline(data: dict[str, np.ndarray], kind: str, gamma: float, lam: float, whiten: bool) -> dict[str, torch.Tensor]:
    """What TRL's loop computes. Its responses have one slot more than tokens, the state after EOS, if there is room:
    the score stands there, and the value of that state is trained towards it."""
    lengths = first_true_indices(torch.from_numpy(data["responses"] == PAD))
    slots = torch.arange(T)
    tokens = slots < lengths[:, None]
    states = slots <= lengths[:, None]  # TRL's complement of padding_mask_p1
    old, ref, new = (torch.where(tokens, double(data[name]), 1.0) for name in ("old", "ref", "new"))
    values = torch.where(states, double(data["values"]), 0.0)
    difference = old - ref
    kl = difference if kind == "k1" else torch.exp(-difference) - 1 + difference
    rewards = -COEF * kl
    for row, length in enumerate(lengths.tolist()):
        rewards[row, min(length, T - 1)] += double(data["scores"])[row]
    if whiten:
        rewards = torch.where(states, trl.masked_whiten(rewards, states, shift_mean=False), 0.0)
    advantages = torch.zeros(B, T, dtype=torch.float64)
    for row in range(B):
        following, next_value = 0.0, 0.0
        for t in reversed(range(T)):
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            following = delta + gamma * lam * following
            advantages[row, t], next_value = following, values[row, t]
    returns = advantages + values
    white = torch.where(tokens, trl.masked_whiten(advantages, tokens), 0.0)

    ratio = torch.exp(new - old)
    first, second = -white * ratio, -white * ratio.clamp(1 - CLIP, 1 + CLIP)
    new_values = torch.where(states, double(data["new_values"]), 0.0)
    near = torch.maximum(torch.minimum(new_values, values + VALUE_CLIP), values - VALUE_CLIP)
    squares = torch.maximum((new_values - returns) ** 2, (near - returns) ** 2)
    return {
        "rewards": rewards, "advantages": white, "returns": returns, "tokens": tokens, "states": states,
        "policy_loss": trl.masked_mean(torch.maximum(first, second), tokens),
        "clip_fraction": trl.masked_mean((second > first).double(), tokens),
        "value_loss": 0.5 * trl.masked_mean(squares, states),
        "value_loss_on_tokens": 0.5 * trl.masked_mean(squares, tokens),
    }  # fmt: skip


def ours(data: dict[str, np.ndarray], kind: str, gamma: float, lam: float, whiten: bool) -> dict[str, jax.Array]:
    data = jax.tree.map(jnp.asarray, data)
    mask = data["mask"]
    rewards = shape_rewards(data["scores"], kl_penalty(data["old"], data["ref"], kind), mask, COEF)
    shaped = masked_whiten(rewards, mask, shift_mean=False) if whiten else rewards
    advantages, returns = gae(shaped, data["values"], mask, gamma, lam)
    advantages = masked_whiten(advantages, mask)
    policy, metrics = clipped_policy_loss(data["new"], data["old"], advantages, mask, CLIP, CLIP)
    value, _ = clipped_value_loss(data["new_values"], data["values"], returns, mask, VALUE_CLIP)
    total, count = metrics["clip_fraction"]
    return {
        "rewards": shaped, "advantages": advantages, "returns": returns, "policy_loss": policy, "value_loss": value,
        "clip_fraction": total / count,
    }  # fmt: skip


# -- TRL's own functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [WHOLE, RAGGED])
def test_masked_moments_and_whitening(lengths: list[int]) -> None:
    data = batch(lengths)
    x, mask = jnp.asarray(data["values"]), jnp.asarray(data["mask"])
    theirs = double(x), torch.from_numpy(data["mask"])
    close(masked_mean(x, mask), trl.masked_mean(*theirs))
    close(masked_mean(x, mask, axis=1), trl.masked_mean(*theirs, axis=1))
    for unbiased in (True, False):
        close(masked_var(x, mask, unbiased=unbiased), trl.masked_var(*theirs, unbiased=unbiased))
    for shift in (True, False):
        # On purpose: ours is 0 outside the mask; TRL's holds whitened padding, which its loop then clears.
        close(masked_whiten(x, mask, shift_mean=shift), np.where(mask, trl.masked_whiten(*theirs, shift), 0))


def test_one_valid_token_is_where_trl_gives_nan_and_we_do_not() -> None:
    """On purpose (defect 14): n / (n - 1) at n = 1."""
    x, mask = np.array([[0.5, 1.0]], np.float32), np.array([[True, False]])
    assert not np.isfinite(np.asarray(trl.masked_whiten(double(x), torch.from_numpy(mask)))).all()
    np.testing.assert_array_equal(masked_whiten(jnp.asarray(x), jnp.asarray(mask)), [[0, 0]])


def test_a_response_ends_where_trl_truncates_it() -> None:
    """Our mask is made by the sampler. TRL's, read off pads, is the same if no pad was sampled before the end."""
    data = batch(RAGGED)
    tail = np.where(data["responses"] == PAD, 7, data["responses"])  # tokens sampled on after EOS
    truncated = trl.truncate_response(EOS, PAD, torch.from_numpy(tail))
    np.testing.assert_array_equal(truncated, data["responses"])
    last = first_true_indices(truncated == PAD) - 1
    np.testing.assert_array_equal(np.argwhere(last_token(jnp.asarray(data["mask"])))[:, 1], last)
    mask, ended = truncation_mask(jnp.asarray(tail), jnp.ones(tail.shape, bool), (EOS,))  # our own truncation
    np.testing.assert_array_equal(mask, data["mask"])
    np.testing.assert_array_equal(ended, [length < T for length in RAGGED])
    # On purpose (defect 8): with a pad id sampled inside, TRL takes the response to end there. We do not look at ids.
    inside = truncated.clone()
    inside[0, 2] = PAD
    assert int(first_true_indices(inside == PAD)[0]) == 2


# -- its loop ----------------------------------------------------------------------------------------------------------

SETTINGS = [("k1", 1.0, 0.95, False), ("k3", 0.9, 0.8, True), ("k1", 1.0, 1.0, True), ("k1", 1.0, 0.0, False)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_padding_everything_is_the_same(setting: tuple) -> None:
    data = batch(WHOLE)
    left, right = ours(data, *setting), pipeline(data, *setting)
    for name, value in left.items():
        close(value, right[name], 2e-4)


@pytest.mark.parametrize("gamma_lam", [(1.0, 0.95), (1.0, 1.0), (1.0, 0.0)])
def test_with_padding_the_state_after_eos_is_the_one_difference(gamma_lam: tuple[float, float]) -> None:
    """On purpose: TRL gives the score one slot after EOS, to a state whose value is learnt and discounted once more.

    We give it to EOS, the last action. Where the value of that extra state is the score itself, its delta is 0 and
    (at gamma = 1) it hands on exactly the score: then all that the policy sees is the same. The value loss is a mean
    over one state more.
    """
    data = batch(RAGGED)
    known = data["values"].copy()
    for row, length in enumerate(RAGGED):
        if length < T:
            known[row, length] = data["scores"][row]
    left = ours(data, "k1", *gamma_lam, False)
    right = pipeline(data | {"values": known}, "k1", *gamma_lam, False)
    tokens = right["tokens"].numpy()
    for name in ("advantages", "returns"):
        close(left[name], np.where(tokens, right[name], 0), 2e-4)
    for name in ("policy_loss", "clip_fraction"):
        close(left[name], right[name], 2e-4)
    close(left["value_loss"], right["value_loss_on_tokens"], 2e-4)
    assert abs(float(left["value_loss"]) - float(right["value_loss"])) > 1e-3

    # With any other value of that state the advantages differ, unless lambda = 1 lets no value through.
    other = pipeline(data, "k1", *gamma_lam, False)
    gap = np.abs(np.asarray(other["advantages"]) - np.asarray(left["advantages"])).max()
    assert gap < 1e-4 if gamma_lam == (1.0, 1.0) else gap > 1e-2


def test_with_padding_rewards_are_whitened_over_the_tokens_alone() -> None:
    """On purpose: TRL's mean and variance include the extra state, where nothing but the score stands."""
    data = batch(RAGGED)
    left, right = (run(data, "k1", 1.0, 0.95, True)["rewards"] for run in (ours, pipeline))
    plain = ours(data, "k1", 1.0, 0.95, False)["rewards"]
    mask = data["mask"]
    ratio = np.asarray(left)[mask] - np.asarray(plain)[mask].mean()
    close(ratio.std(ddof=1), 1, 1e-4)
    assert np.abs(np.asarray(left)[mask] - np.asarray(right)[mask]).max() > 1e-2
