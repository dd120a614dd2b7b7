"""Drawing tokens, with the log-probability of the distribution they were really drawn from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppo_jax.ops.logprobs import LOWEST, token_logprobs

Scalar = float | Float[Array, ""]
Count = int | Int[Array, ""]

_BLOCK = 256  # logits per block of the two-level cumulative sum


def _off(value: Scalar | Count, neutral: float) -> bool:
    """Whether a filter is known to be off while tracing; a traced value never is."""
    return isinstance(value, int | float) and value == neutral


def filter_logits(logits: Float[Array, "*B V"], top_k: Count = 0, top_p: Scalar = 1.0) -> Float[Array, "*B V"]:
    """Logits with every token outside the top-k, then outside the nucleus, at -1e30 (probability exactly 0).

    top_k keeps exactly the k largest (0: all). top_p keeps the smallest set of the largest, by their probabilities
    after top_k, whose mass reaches p, at least one token. Ties go to the lower id. Both may be traced; a Python 0 or
    1.0 compiles to nothing, and a Python top_k is cheaper than a traced one (no full sort).

    Apply the temperature first. NaN logits stay NaN.

    References:
      Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (nucleus).
    """
    logits = logits.astype(jnp.float32)
    if _off(top_k, 0) and _off(top_p, 1.0):
        return logits
    vocab = logits.shape[-1]
    if isinstance(top_k, int):
        count: Count = top_k if 0 < top_k < vocab else vocab
        largest = jax.lax.top_k(logits, count)[0]
    else:
        count = jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)
        largest = -jnp.sort(-logits, axis=-1)
        largest = jnp.where(jnp.arange(vocab) < count, largest, LOWEST)
    if not _off(top_p, 1.0):
        probs = jax.nn.softmax(largest, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        nucleus = jnp.sum(mass_before < top_p, axis=-1, dtype=jnp.int32)
        # Rounding may let the running mass reach 1 early: p >= 1 keeps everything, by definition.
        count = jnp.where(jnp.asarray(top_p) >= 1, count, jnp.clip(nucleus, 1, count))
    return jnp.where(_beyond(logits, largest, jnp.asarray(count)), LOWEST, logits)


def _beyond(
    logits: Float[Array, "*B V"], largest: Float[Array, "*B K"], count: Int[Array, "*#B"]
) -> Bool[Array, "*B V"]:
    """True where a logit is not among the `count` largest; among equals the lower ids stay.

    Compares with the smallest kept logit instead of sorting ids along, which a float sort does several times faster.
    """
    count = jnp.broadcast_to(count, logits.shape[:-1])[..., None]
    threshold = jnp.take_along_axis(largest, count - 1, axis=-1)
    above = jnp.sum(logits > threshold, axis=-1, keepdims=True)
    tied = logits == threshold
    return (logits < threshold) | (tied & (jnp.cumsum(tied, axis=-1) > count - above))


def _pick(weights: Float[Array, "*B N"], uniform: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """First index whose cumulative weight exceeds uniform * total, among positive weights; 0 if there are none."""
    cumulative = jnp.cumsum(weights, axis=-1)
    # A parallel cumulative sum may round so that it rises at a weight of 0: such an index must not be drawn.
    reached = (cumulative > uniform[..., None] * cumulative[..., -1:]) & (weights > 0)
    fallback = weights.shape[-1] - 1 - jnp.argmax(weights[..., ::-1] > 0, axis=-1)
    return jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), fallback)


def _draw(key: PRNGKeyArray, logits: Float[Array, "*B V"], greedy: bool | Bool[Array, ""]) -> Int[Array, "*B"]:
    """A token from softmax(logits) by inverting the cumulative distribution; the first largest logit when `greedy`.

    Two levels: a block of the vocabulary by its mass, then a token inside the block, each with its own uniform. Against
    the Gumbel-argmax of `jax.random.categorical` this needs 2 random numbers per row and not V (measured on a CPU at
    [64, 49152]: 20 times faster). Probabilities are off by at most the 2^-23 steps of a float32 uniform: absolute for
    the mass of a block, relative to the block for a token inside it, so the tail is not lost to one coarse uniform.
    """
    vocab = logits.shape[-1]
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(greedy, (shifted == 0).astype(shifted.dtype), jnp.exp(shifted))
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -vocab % _BLOCK)]
    blocks = jnp.pad(weights, padding).reshape(*logits.shape[:-1], -1, _BLOCK)
    uniforms = jnp.where(greedy, 0.0, jax.random.uniform(key, (2, *logits.shape[:-1])))
    block = _pick(jnp.sum(blocks, axis=-1), uniforms[0])
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    # NaN logits pick the end of the last block: stay inside the vocabulary, and let the log-prob show the NaN.
    return jnp.minimum(block * _BLOCK + _pick(inside, uniforms[1]), vocab - 1).astype(jnp.int32)


def sample(
    key: PRNGKeyArray,
    logits: Float[Array, "*B V"],
    temperature: Scalar,
    top_k: Count = 0,
    top_p: Scalar = 1.0,
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
    """One token per row, and its log-probability in nats under the distribution it was drawn from.

    That distribution is softmax(logits / temperature), filtered by `filter_logits` and renormalised. With a filter on,
    these log-probs differ from those of `token_logprobs` on the same logits, and a KL estimate that mixes the two is
    biased (it can turn negative).

    Args:
      key: consumed; the caller must not use it again. One key serves all rows of this call.
      temperature: 0 is greedy (ties to the lower id), and the log-probs are then those at temperature 1, after the
        filters. May be traced.
      top_k, top_p: see `filter_logits`; Python 0 and 1.0 compile to no filter and no sort.
    """
    if isinstance(temperature, int | float):
        greedy: bool | Bool[Array, ""] = temperature == 0
        divisor: Scalar = temperature or 1.0
    else:
        greedy = temperature == 0
        divisor = jnp.where(greedy, 1.0, temperature)
    logits = filter_logits(logits.astype(jnp.float32) / divisor, top_k, top_p)
    tokens = _draw(key, logits, greedy)
    return tokens, token_logprobs(logits, tokens)
