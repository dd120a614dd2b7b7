"""Losses by hand, against torch, under micro-batching, and with garbage where nothing counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ppo_jax.ops.losses import bradley_terry_loss, clipped_policy_loss, clipped_value_loss, dpo_loss, token_weights

NAN, INF = jnp.nan, jnp.inf


def means(metrics):
    return {name: float(total / count) for name, (total, count) in metrics.items()}


# ratio  A   unclipped -A r   clipped -A clip(r, .8, 1.2)   larger             gradient to the log-prob (-A r / 4)
# 1.5    2   -3               -2.4                          -2.4 (clipped)     0
# 0.5   -1    0.5              0.8                           0.8 (clipped)     0
# 1.1    1   -1.1             -1.1                          -1.1               -1.1 / 4
# 1.5   -1    1.5              1.2                           1.5               +1.5 / 4
# Sum -1.2, mean -0.3. The last column of the arrays is padding.
RATIOS = np.array([1.5, 0.5, 1.1, 1.5])
OLD = jnp.array([-1.0, -2.0, -3.0, -0.5, NAN])
NEW = jnp.append(OLD[:4] + jnp.log(RATIOS), INF)
ADVANTAGES = jnp.array([2.0, -1.0, 1.0, -1.0, NAN])
MASK = jnp.array([1, 1, 1, 1, 0])


def test_policy_loss_by_hand():
    (loss, metrics), gradient = jax.value_and_grad(clipped_policy_loss, has_aux=True)(
        NEW, OLD, ADVANTAGES, MASK, 0.2, 0.2
    )
    assert float(loss) == pytest.approx(-0.3, rel=1e-5)
    np.testing.assert_allclose(gradient, [0, 0, -1.1 / 4, 1.5 / 4, 0], rtol=1e-5, atol=1e-7)
    expected = {
        "ratio": RATIOS.mean(),
        "clip_fraction": 2 / 4,
        "dual_clip_fraction": 0,
        "approx_kl": np.mean(RATIOS - 1 - np.log(RATIOS)),
        "approx_kl_k1": np.mean(-np.log(RATIOS)),
    }
    assert means(metrics) == pytest.approx(expected, rel=1e-5)
    assert all(float(count) == 4 for _, count in metrics.values())


def test_policy_loss_has_a_separate_upper_clip():
    # Ratio 1.25 with A = 1: clipped at 1.2, not at 1.28.
    arguments = jnp.log(jnp.array([1.25])), jnp.zeros(1), jnp.ones(1), jnp.ones(1), 0.2
    assert float(clipped_policy_loss(*arguments, 0.2)[0]) == pytest.approx(-1.2)
    assert float(clipped_policy_loss(*arguments, 0.28)[0]) == pytest.approx(-1.25)


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    x, advantages = jnp.array([-1.0, -2.0]), jnp.array([3.0, -5.0])
    gradient = jax.grad(lambda x: clipped_policy_loss(x, x, advantages, jnp.ones(2), 0.2, 0.2)[0])(x)
    np.testing.assert_allclose(gradient, -advantages / 2)  # old log-probs are constants, even when they are the same


def test_value_loss_by_hand():
    # V    V_old  R    (V-R)^2   V_clip = V_old + clip(V - V_old, +-0.2)   (V_clip-R)^2   larger
    # 1    0      2    1         0.2                                       3.24           3.24 (clipped)
    # 2    2      2.5  0.25      2                                         0.25           0.25
    # 0.5  1      0    0.25      0.8                                       0.64           0.64 (clipped)
    # 0.5 * (3.24 + 0.25 + 0.64) / 3 = 0.688333; only the second row has a gradient, (V - R) / 3.
    values, old = jnp.array([1.0, 2.0, 0.5, NAN]), jnp.array([0.0, 2.0, 1.0, INF])
    returns, mask = jnp.array([2.0, 2.5, 0.0, NAN]), jnp.array([1, 1, 1, 0])
    (loss, metrics), gradient = jax.value_and_grad(clipped_value_loss, has_aux=True)(values, old, returns, mask, 0.2)
    assert float(loss) == pytest.approx(4.13 / 6, rel=1e-5)
    np.testing.assert_allclose(gradient, [0, -0.5 / 3, 0, 0], rtol=1e-5, atol=1e-7)
    assert means(metrics) == pytest.approx({"value_error": 0.5, "value_clip_fraction": 2 / 3}, rel=1e-5)


def test_value_loss_without_clipping_is_half_the_mean_squared_error():
    values, returns = jax.random.normal(jax.random.key(0), (2, 4, 5))
    loss, _ = clipped_value_loss(values, jnp.zeros((4, 5)), returns, jnp.ones((4, 5)), 1e9)
    expected = 0.5 * F.mse_loss(torch.from_numpy(np.array(values)), torch.from_numpy(np.array(returns)))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def batch(seed=0, rows=6, tokens=5):
    keys = jax.random.split(jax.random.key(seed), 4)
    arrays = [jax.random.normal(key, (rows, tokens)) for key in keys[:3]]
    return *arrays, jax.random.bernoulli(keys[3], 0.6, (rows, tokens)).at[0].set(True)


LOSSES = {
    "policy": lambda x, old, target, mask, **kw: clipped_policy_loss(x, old, target, mask, 0.2, 0.3, **kw),
    "value": lambda x, old, target, mask, **kw: clipped_value_loss(x, old, target, mask, 0.2, **kw),
    "bradley_terry": lambda x, old, target, mask, **kw: bradley_terry_loss(x, old, target, mask=mask, **kw),
    "dpo": lambda x, old, target, mask, **kw: dpo_loss(x, old, target, target, 0.5, 0.1, mask=mask, **kw),
}


@pytest.mark.parametrize("name", LOSSES)
def test_defect_15_micro_batches_sum_to_the_whole(name):
    function = jax.jit(jax.value_and_grad(LOSSES[name], has_aux=True))
    data = batch()
    (loss, metrics), gradient = function(*data)
    count = data[-1].sum()  # of the whole, in every part; the parts hold different numbers of tokens
    parts = [function(*(x[i : i + 2] for x in data), count=count) for i in (0, 2, 4)]
    assert sum(float(part[0][0]) for part in parts) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, rtol=1e-5, atol=1e-7)
    summed = jax.tree.map(lambda *xs: sum(xs), *(part[0][1] for part in parts))
    assert means(summed) == pytest.approx(means(metrics), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_defect_11_values_outside_the_mask_reach_neither_loss_nor_gradient_nor_metrics(name, garbage):
    function = jax.jit(jax.value_and_grad(LOSSES[name], has_aux=True))
    *data, mask = batch(1)
    clean = function(*(jnp.where(mask, x, 0) for x in data), mask)
    dirty = function(*(jnp.where(mask, x, garbage) for x in data), mask)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_defect_14_an_empty_mask_is_0_and_not_nan(name):
    *data, mask = batch(2)
    (loss, metrics), gradient = jax.value_and_grad(LOSSES[name], has_aux=True)(*data, jnp.zeros_like(mask))
    assert float(loss) == 0 and (np.asarray(gradient) == 0).all()
    assert all(float(total) == 0 and float(count) == 0 for total, count in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_defect_21_a_nan_inside_the_mask_shows(name):
    data = list(batch(3))
    data[0] = data[0].at[0, 0].set(NAN)  # row 0 is entirely in the mask
    assert np.isnan(LOSSES[name](*data)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_are_not_differentiated(name):
    *data, mask = batch(4)
    total = lambda x: sum(t for t, _ in LOSSES[name](x, *data[1:], mask)[1].values())
    np.testing.assert_array_equal(jax.grad(total)(data[0]), 0)


def test_bradley_terry_by_hand():
    # Differences 1 and -1: ln(1 + e^-1) = 0.313262 and ln(1 + e) = 1.313262, mean 0.813262.
    loss, metrics = bradley_terry_loss(jnp.array([3.0, 0.0]), jnp.array([2.0, 1.0]))
    assert float(loss) == pytest.approx(0.813262, rel=1e-5)
    assert means(metrics) == {"accuracy": 0.5, "margin": 0.0}


def test_bradley_terry_margin_asks_for_more():
    # Difference 3, margin 2: the loss of a difference of 1.
    loss, metrics = bradley_terry_loss(jnp.array([3.0]), jnp.array([0.0]), 2.0)
    assert float(loss) == pytest.approx(0.313262, rel=1e-5)
    assert means(metrics) == {"accuracy": 1.0, "margin": 3.0}


def test_a_head_that_knows_nothing_is_half_right():
    loss, metrics = bradley_terry_loss(jnp.zeros(4), jnp.zeros(4))
    assert float(loss) == pytest.approx(np.log(2)) and means(metrics)["accuracy"] == 0.5


def test_bradley_terry_agrees_with_torch_and_survives_large_differences():
    chosen, rejected = jnp.array([0.3, -2.0, 500.0, -500.0]), jnp.array([0.1, 4.0, -500.0, 500.0])
    difference = torch.tensor([0.2, -6.0, 1000.0, -1000.0])
    assert float(bradley_terry_loss(chosen, rejected)[0]) == pytest.approx(float(-F.logsigmoid(difference).mean()))


def test_dpo_by_hand():
    # Rewards 0.1 * (-10 + 11) = 0.1 and 0.1 * (-12 + 11.5) = -0.05; h = 0.15; ln(1 + e^-0.15) = 0.620957.
    arguments = [jnp.array([x]) for x in (-10.0, -12.0, -11.0, -11.5)]
    loss, metrics = dpo_loss(*arguments)
    assert float(loss) == pytest.approx(0.620957, rel=1e-5)
    expected = {"accuracy": 1.0, "margin": 0.15, "chosen_reward": 0.1, "rejected_reward": -0.05}
    assert means(metrics) == pytest.approx(expected, rel=1e-5)
    # Smoothing 0.1 adds 0.1 * h: -log sigmoid(-h) = h - log sigmoid(h).
    assert float(dpo_loss(*arguments, label_smoothing=0.1)[0]) == pytest.approx(0.620957 + 0.015, rel=1e-5)


def test_dpo_starts_at_ln_2_and_pushes_the_pair_apart():
    c, r = jnp.array([-5.0]), jnp.array([-6.0])
    loss, gradients = jax.value_and_grad(lambda c, r, rc, rr: dpo_loss(c, r, rc, rr)[0], argnums=(0, 1, 2, 3))(
        c, r, c, r
    )
    assert float(loss) == pytest.approx(np.log(2))
    # d/dc = -beta sigmoid(-h) = -0.1 / 2; the reference is a constant.
    np.testing.assert_allclose(np.concatenate(gradients), [-0.05, 0.05, 0, 0], rtol=1e-6)


def test_dpo_agrees_with_torch():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    c, r, rc, rr = torch.from_numpy(x)
    h = 0.3 * ((c - rc) - (r - rr))
    expected = (-0.9 * F.logsigmoid(h) - 0.1 * F.logsigmoid(-h)).mean()
    ours, _ = dpo_loss(*(jnp.array(row) for row in x), beta=0.3, label_smoothing=0.1)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(Exception, match="(?i)shape|type"):  # the annotation or chex, whichever looks first
        clipped_policy_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2, 1)), jnp.ones((2, 3)), 0.2, 0.2)


# A = -1: ratio 5 costs 5, which the clip does not bound (max(5, 1.2)); the dual clip at 3 does, without gradient.
# A = +1: ratio 5 is clipped to -1.2, whatever the dual clip.
def test_dual_clip_by_hand():
    new, old = jnp.log(jnp.array([5.0, 5.0])), jnp.zeros(2)
    advantages, mask = jnp.array([-1.0, 1.0]), jnp.ones(2)

    def loss(x, dual_clip):
        return clipped_policy_loss(x, old, advantages, mask, 0.2, 0.2, dual_clip=dual_clip)

    assert float(loss(new, np.inf)[0]) == pytest.approx((5 - 1.2) / 2)
    value, metrics = loss(new, 3.0)
    assert float(value) == pytest.approx((3 - 1.2) / 2)
    assert means(metrics)["dual_clip_fraction"] == 0.5
    np.testing.assert_array_equal(jax.grad(lambda x: loss(x, 3.0)[0])(new), [0, 0])
    np.testing.assert_allclose(jax.grad(lambda x: loss(x, np.inf)[0])(new), [2.5, 0])


# Errors 0.5 and -3 with delta 1: 0.5^2 / 2 = 0.125, and 1 * (3 - 1/2) = 2.5; gradients 0.5 and -1.
def test_huber_by_hand():
    values, returns = jnp.array([0.5, -3.0]), jnp.zeros(2)

    def loss(v, delta):
        return clipped_value_loss(v, v, returns, jnp.ones(2), np.inf, huber_delta=delta)[0]

    assert float(loss(values, 1.0)) == pytest.approx((0.125 + 2.5) / 2)
    np.testing.assert_allclose(jax.grad(lambda v: loss(v, 1.0))(values), [0.25, -0.5], rtol=1e-6)
    assert float(loss(values, np.inf)) == pytest.approx((0.125 + 4.5) / 2), "infinity is the squared error"
    np.testing.assert_allclose(jax.grad(lambda v: loss(v, np.inf))(values), [0.25, -1.5], rtol=1e-6)


def test_value_clip_can_be_off():
    # V moved by 2 from its old value: with the clip at 0.2 the larger error counts, (1.2 - 3)^2; without it (3 - 3)^2.
    arguments = jnp.array([3.0]), jnp.array([1.0]), jnp.array([3.0]), jnp.ones(1)
    assert float(clipped_value_loss(*arguments, 0.2)[0]) == pytest.approx(0.5 * 1.8**2)
    assert float(clipped_value_loss(*arguments, np.inf)[0]) == 0


# Terms 1, 2 | 4 in rows of 2 and 1 tokens, T = 3: token-mean 7/3; sequence-mean (1.5 + 4) / 2; constant 7 / 6.
# The third row has no token and counts nowhere.
@pytest.mark.parametrize(
    ("aggregation", "expected"), [("token-mean", 7 / 3), ("sequence-mean", 2.75), ("constant", 7 / 6)]
)
def test_aggregations_by_hand(aggregation, expected):
    terms = jnp.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    weights, units = token_weights(mask, aggregation)
    assert float(jnp.sum(weights * terms) / jnp.sum(units)) == pytest.approx(expected)
    loss, _ = clipped_policy_loss(
        jnp.zeros((3, 3)), jnp.zeros((3, 3)), -terms, mask, 0.2, 0.2, weights=weights, count=jnp.sum(units)
    )
    assert float(loss) == pytest.approx(expected)


def test_an_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; choose one of token-mean, sequence-mean, const"):
        token_weights.__wrapped__(jnp.ones((1, 1)), "mean")  # past the annotation, which tests also check
