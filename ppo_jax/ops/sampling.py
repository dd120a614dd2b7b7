"""Drawing tokens, with the log-probability of the distribution they were really drawn from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real

from ppo_jax.ops.logprobs import LOWEST, tempered, token_logprobs

Scalar = float | Real[Array, ""]  # a Python number (compiled in) or traced

_BLOCK = 256  # logits per block of the two-level cumulative sum


def _off(value: Scalar, neutral: float) -> bool:
    """Whether a filter is known to be off while tracing; a traced value never is."""
    return isinstance(value, int | float) and value == neutral


def filter_logits(
    logits: Float[Array, "*B V"], top_k: Scalar = 0, top_p: Scalar = 1.0, min_p: Scalar = 0.0
) -> Float[Array, "*B V"]:
    """Logits with every token outside the top-k, then outside the nucleus, at -1e30 (probability exactly 0).

    min_p, first, keeps the tokens whose probability is at least min_p times that of the most probable one. top_k keeps
    exactly the k largest (0: all). top_p keeps the smallest set of the largest, by their probabilities after the other
    filters, whose mass reaches p, at least one token. Ties go to the lower id. All may be traced; a Python 0 or 1.0
    compiles to nothing. Which tokens are kept is not differentiated.

    Apply the temperature first. NaN logits stay NaN.

    References:
      Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (nucleus);
      Nguyen et al. 2024, "Turning Up the Heat" (min-p).
    """
    logits = logits.astype(jnp.float32)
    if not _off(min_p, 0.0):
        frozen = jax.lax.stop_gradient(logits)
        # p_i >= min_p p_max, without exponentials; a NaN compares as kept, so that it shows.
        below = frozen - jnp.max(frozen, axis=-1, keepdims=True) < jnp.log(jnp.asarray(min_p, jnp.float32))
        logits = jnp.where(below, LOWEST, logits)
    if not _off(top_k, 0):
        kept = _keep_largest(logits, jnp.ones_like(logits), top_k)
        logits = jnp.where(jnp.asarray(top_k) > 0, kept, logits)
    if not _off(top_p, 1.0):
        kept = _keep_largest(logits, jax.nn.softmax(logits, axis=-1), top_p)
        # Rounding may let the mass reach 1 early: p >= 1 keeps everything, by definition.
        logits = jnp.where(jnp.asarray(top_p) < 1, kept, logits)
    return logits


def penalise_repetition(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], penalty: Scalar
) -> Float[Array, "*B V"]:
    """Logits of tokens that were `seen` divided by `penalty` where positive, multiplied by it where negative.

    References:
      Keskar et al. 2019, "CTRL", section 4.1 (and the sign rule of its later implementations).
    """
    logits = logits.astype(jnp.float32)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _keep_largest(logits: Float[Array, "*B V"], weights: Float[Array, "*B V"], target: Scalar) -> Float[Array, "*B V"]:
    """Keeps the fewest of the largest logits whose weights sum to `target`, at least one; the rest becomes -1e30.

    The smallest kept logit is found by bisection on the ordered bits of a float32, 32 masked sums, instead of sorting
    (measured on a CPU at [64, 49152]: 5 times faster, and k may be traced). `weights` are a function of the logit.
    """
    weights = jax.lax.stop_gradient(weights)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(logits), jnp.int32)
    ranks = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # the same order, as integers
    ranks = jnp.where(logits == 0, 0, ranks)  # -0 is 0
    ranks = jnp.where(jnp.isnan(logits), jnp.iinfo(jnp.int32).max, ranks)  # a NaN is kept, so that it shows
    target = jnp.maximum(jnp.asarray(target, jnp.float32), 1e-30)

    def mass(selected: Bool[Array, "*B V"]) -> Float[Array, "*B 1"]:
        return jnp.sum(jnp.where(selected, weights, 0), axis=-1, keepdims=True)

    def halve(_: Int[Array, ""], bounds: tuple[Int[Array, "*B 1"], Int[Array, "*B 1"]]) -> tuple:
        low, high = bounds  # the threshold lies in [low, high]
        middle = (low | high) - ((low ^ high) >> 1)  # the mean rounded up, without overflow
        enough = mass(ranks >= middle) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    bounds = (jnp.min(ranks, axis=-1, keepdims=True), jnp.max(ranks, axis=-1, keepdims=True))
    threshold, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    tied = ranks == threshold
    missing = target - mass(ranks > threshold)  # how much of the ties is needed
    before = (jnp.cumsum(tied, axis=-1) - 1) * weights
    return jnp.where((ranks < threshold) | (tied & (before >= missing)), LOWEST, logits)


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
    # Greedy sharpens until only the largest logits weigh anything: one pass, where a branch per logit costs three.
    weights = jnp.exp(shifted * jnp.where(greedy, 1e30, 1.0))
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
    top_k: Scalar = 0,
    top_p: Scalar = 1.0,
    min_p: Scalar = 0.0,
) -> tuple[Int[Array, "*B"], Float[Array, "*B"]]:
    """One token per row, and its log-probability in nats under the distribution it was drawn from.

    That distribution is softmax(logits / temperature), filtered by `filter_logits` and renormalised. With a filter on,
    these log-probs differ from those of `token_logprobs` on the same logits, and a KL estimate that mixes the two is
    biased (it can turn negative).

    Args:
      key: consumed; the caller must not use it again. One key serves all rows of this call.
      temperature: 0 is greedy (ties to the lower id), and the log-probs are then those at temperature 1, after the
        filters. May be traced.
      top_k, top_p, min_p: see `filter_logits`; Python 0 and 1.0 compile to no filter and no sort.
    """
    logits = filter_logits(tempered(logits, temperature), top_k, top_p, min_p)
    greedy = temperature == 0
    tokens = _draw(key, logits, greedy)
    return tokens, token_logprobs(logits, tokens)
