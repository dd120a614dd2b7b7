"""Means, variances and whitening over the positions that count.

Positions outside the mask are replaced (`jnp.where`), never multiplied by zero: 0 * NaN is NaN, so a product would
let garbage in padding through. A NaN *inside* the mask is a fault of the caller and shows in the result.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

Axis = int | tuple[int, ...] | None

EPSILON = 1e-8  # added to the variance, as in lm-human-preferences (Ziegler et al. 2019)


def prepare(x: Shaped[Array, "..."], mask: Shaped[Array, "..."]) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """x in at least float32 with 0 outside the mask, and the mask as booleans of x's shape."""
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mask = jnp.broadcast_to(jnp.asarray(mask).astype(bool), x.shape)
    return jnp.where(mask, x, 0), mask


def _count(mask: Bool[Array, "..."], axis: Axis, dtype: jnp.dtype, keepdims: bool = False) -> Float[Array, "..."]:
    return jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=dtype)


def deviations(
    x: Shaped[Array, "..."], mask: Shaped[Array, "..."], axis: Axis = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(x - mean, mean), masked, with the mean's dimensions kept; deviations are 0 outside the mask.

    The mean is refined by the mean of its own residuals. Equal values then deviate by exactly 0; without this,
    rounding in the mean would be divided by an equally small standard deviation and come out as noise of size 1.
    """
    x, mask = prepare(x, mask)
    count = jnp.maximum(_count(mask, axis, x.dtype, keepdims=True), 1)
    mean = jnp.sum(x, axis=axis, keepdims=True) / count
    residual = jnp.where(mask, x - mean, 0)
    mean = mean + jnp.sum(residual, axis=axis, keepdims=True) / count
    return jnp.where(mask, x - mean, 0), mean


def masked_mean(x: Shaped[Array, "..."], mask: Shaped[Array, "..."], axis: Axis = None) -> Float[Array, "..."]:
    """Mean of x over the mask: sum_{i in mask} x_i / |mask|; 0 where the mask is empty.

    Args:
      x: any shape. The mask (bool or 0/1) broadcasts to it.
      axis: as in `jnp.mean`.
    """
    x, mask = prepare(x, mask)
    return jnp.sum(x, axis=axis) / jnp.maximum(_count(mask, axis, x.dtype), 1)


def masked_var(
    x: Shaped[Array, "..."], mask: Shaped[Array, "..."], axis: Axis = None, unbiased: bool = True
) -> Float[Array, "..."]:
    """Variance of x over the mask: sum_i (x_i - mean)^2 / (n - 1), or / n when not `unbiased`.

    With n <= 1 valid positions it is 0, so that nothing downstream divides by zero.
    """
    deviation, _ = deviations(x, mask, axis)
    mask = jnp.broadcast_to(jnp.asarray(mask).astype(bool), deviation.shape)
    count = _count(mask, axis, deviation.dtype) - (1 if unbiased else 0)
    return jnp.sum(jnp.square(deviation), axis=axis) / jnp.maximum(count, 1)


def masked_whiten(x: Shaped[Array, "..."], mask: Shaped[Array, "..."], shift_mean: bool = True) -> Float[Array, "..."]:
    """(x - mean) / sqrt(var + 1e-8) over the whole mask, with the unbiased variance; 0 outside the mask.

    `shift_mean=False` adds the mean back, so that only the scale changes (used for rewards, whose sign matters).
    With one valid position, or with equal values, the deviation is 0 and the result is 0 (the mean itself when
    `shift_mean=False`): never NaN.

    References:
      Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences" (`whiten` in its code).
    """
    deviation, mean = deviations(x, mask)
    whitened = deviation * jax.lax.rsqrt(masked_var(x, mask) + EPSILON)
    if shift_mean:
        return whitened
    return jnp.where(jnp.asarray(mask).astype(bool), whitened + mean, 0)
