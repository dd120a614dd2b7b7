"""Log-probabilities and entropies: one definition for sampler, old policy, reference and loss.

All arithmetic is float32 whatever the dtype of the input.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

# exp(LOWEST - anything finite) is 0, and 0 * LOWEST is 0 where 0 * -inf would be NaN.
LOWEST = -1e30

Finish = Callable[[Float[Array, "*b V"]], Float[Array, "*b V"]]  # logits -> logits
Temperature = float | Real[Array, ""]  # a Python number (compiled in) or traced


def tempered(logits: Float[Array, "*B V"], temperature: Temperature) -> Float[Array, "*B V"]:
    """logits / temperature in float32. Temperature 0 means greedy sampling, whose log-probs are those at 1."""
    logits = logits.astype(jnp.float32)
    if isinstance(temperature, int | float):
        return logits if temperature in (0, 1) else logits / temperature
    return logits / jnp.where(temperature == 0, 1.0, temperature)


def _shifted(logits: Float[Array, "*B V"]) -> tuple[Float[Array, "*B V"], Float[Array, "*B 1"]]:
    """(logits - max, log sum exp of that): log softmax is their difference.

    The maximum is never added back: log-probs near 0 would lose digits to logits that are far from it.
    """
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return shifted, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))


def token_logprobs(
    logits: Float[Array, "*B V"], tokens: Int[Array, "*B"], temperature: Temperature = 1.0
) -> Float[Array, "*B"]:
    """log softmax(logits / temperature)[token], in nats.

    Args:
      tokens: ids in [0, V), also at positions that a mask will drop.
      temperature: of sampling (see `tempered`); may be traced.
    """
    shifted, normaliser = _shifted(tempered(logits, temperature))
    return jnp.take_along_axis(shifted, tokens[..., None], axis=-1)[..., 0] - normaliser[..., 0]


def entropy(logits: Float[Array, "*B V"], temperature: Temperature = 1.0) -> Float[Array, "*B"]:
    """-sum_v p_v log p_v with p = softmax(logits / temperature), in nats. A logit of -inf contributes 0."""
    shifted, normaliser = _shifted(jnp.maximum(tempered(logits, temperature), LOWEST))
    mean = jnp.sum(jnp.exp(shifted - normaliser) * shifted, axis=-1)
    return normaliser[..., 0] - mean


def hidden_logprobs(
    hidden: Float[Array, "*B D"],
    unembedding: Float[Array, "V D"],
    tokens: Int[Array, "*B"],
    temperature: Temperature = 1.0,
    chunk: int | None = 256,
    *,
    finish: Finish | None = None,
) -> Float[Array, "*B"]:
    """`token_logprobs(hidden @ unembedding.T, tokens, temperature)` without the logits of all positions at once.

    Positions are flattened and visited in equal pieces of at most `chunk`, each rematerialised in the backward pass,
    so neither direction holds more than `chunk * V` logits. With `chunk` None or 0, or with no more than `chunk`
    positions, everything is one piece, whose logits are kept for the backward pass.

    Args:
      hidden: final hidden states (after the last norm), any float dtype. Matrix products accumulate in float32.
      temperature: of sampling (see `tempered`); may be traced.
      chunk: positions per piece.
      finish: what the model makes of these logits first (`models.transformer.finish_logits`); None: nothing.
    """

    def piece(hidden: Float[Array, "*b D"], tokens: Int[Array, "*b"]) -> Float[Array, "*b"]:
        return token_logprobs(unembed(hidden, unembedding, finish), tokens, temperature)

    return in_pieces(piece, (hidden, tokens), chunk)


def hidden_logprobs_and_entropy(
    hidden: Float[Array, "*B D"],
    unembedding: Float[Array, "V D"],
    tokens: Int[Array, "*B"],
    temperature: Temperature = 1.0,
    chunk: int | None = 256,
    keep: Finish | None = None,
    *,
    finish: Finish | None = None,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(`hidden_logprobs`, `entropy`) of the same tempered distributions from one pass over the logits.

    Args:
      keep: a filter of the tempered logits, such as `sampling.filter_logits`; both results are then those of the
        filtered distribution (a token outside it has a log-prob of about -1e30).
      finish: as for `hidden_logprobs`.
    """

    def piece(hidden: Float[Array, "*b D"], tokens: Int[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        logits = unembed(hidden, unembedding, finish)
        if keep is None:
            return token_logprobs(logits, tokens, temperature), entropy(logits, temperature)
        logits = keep(tempered(logits, temperature))
        return token_logprobs(logits, tokens), entropy(logits)

    return in_pieces(piece, (hidden, tokens), chunk)


def hidden_kl(
    hidden: Float[Array, "*B D"],
    unembedding: Float[Array, "V D"],
    ref_hidden: Float[Array, "*B D"],
    ref_unembedding: Float[Array, "V D"],
    temperature: Temperature = 1.0,
    chunk: int | None = 256,
    *,
    finish: Finish | None = None,
) -> Float[Array, "*B"]:
    """KL(policy || reference) over the whole vocabulary at each position, in nats (see `kl.kl_full`), in pieces.

    Differentiable in `hidden` and `unembedding`; both distributions are tempered.
    """

    def piece(hidden: Float[Array, "*b D"], ref_hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
        shifted, normaliser = _shifted(tempered(unembed(hidden, unembedding, finish), temperature))
        ref_shifted, ref_normaliser = _shifted(tempered(unembed(ref_hidden, ref_unembedding, finish), temperature))
        logp = shifted - normaliser
        return jnp.sum(jnp.exp(logp) * (logp - (ref_shifted - ref_normaliser)), axis=-1)

    return in_pieces(piece, (hidden, ref_hidden), chunk)


def unembed(
    hidden: Float[Array, "*B D"], unembedding: Float[Array, "V D"], finish: Finish | None = None
) -> Float[Array, "*B V"]:
    """Logits hidden @ unembedding.T, accumulated and kept in float32, and what `finish` makes of them."""
    logits = jnp.einsum("...d,vd->...v", hidden, unembedding, preferred_element_type=jnp.float32)
    return logits if finish is None else finish(logits)


def in_pieces(piece: Callable[..., Any], arrays: tuple[Array, Array], chunk: int | None) -> Any:
    """`piece(*arrays)` in equal parts of at most `chunk` positions; the first array is [*B, D], the results [*B]."""
    shape = arrays[0].shape[:-1]
    positions = arrays[0].size // arrays[0].shape[-1]
    if not chunk or positions <= chunk:
        # Of all that has the logits' size only they are kept for the backward pass.
        return jax.checkpoint(piece, policy=jax.checkpoint_policies.dots_saveable)(*arrays)

    # Equal pieces waste less padding than full ones and a rest: 300 positions at chunk 256 are 2 * 150.
    pieces = -(-positions // chunk)
    # Rows stay whole where a few pieces more allow it: no padding, and rows sharded over devices stay where they are.
    pieces = next((n for n in range(pieces, shape[-1] + 1) if shape[-1] % n == 0), pieces)
    size = -(-positions // pieces)
    padding = pieces * size - positions

    def split(x: Array) -> Array:
        # Piece j takes positions j, j + pieces, ...: every piece spans all rows, so rows sharded over devices stay so.
        flat = x.reshape(positions, *x.shape[len(shape) :])
        flat = jnp.pad(flat, ((0, padding), *[(0, 0)] * (flat.ndim - 1)))
        return flat.reshape(size, pieces, *flat.shape[1:]).swapaxes(0, 1)

    def join(x: Float[Array, "pieces size"]) -> Float[Array, "*B"]:
        return x.swapaxes(0, 1).reshape(-1)[:positions].reshape(shape)

    results = jax.lax.map(lambda xs: jax.checkpoint(piece)(*xs), tuple(map(split, arrays)))
    return jax.tree.map(join, results)
