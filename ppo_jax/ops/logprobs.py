"""Log-probabilities and entropies: one definition for sampler, old policy, reference and loss.

All arithmetic is float32 whatever the dtype of the input.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

# exp(LOWEST - anything finite) is 0, and 0 * LOWEST is 0 where 0 * -inf would be NaN.
LOWEST = -1e30

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
    logprobs = shifted - normaliser
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def hidden_logprobs(
    hidden: Float[Array, "*B D"],
    unembedding: Float[Array, "V D"],
    tokens: Int[Array, "*B"],
    temperature: Temperature = 1.0,
    chunk: int | None = 256,
) -> Float[Array, "*B"]:
    """`token_logprobs(hidden @ unembedding.T, tokens, temperature)` without the logits of all positions at once.

    Positions are flattened and visited in equal pieces of at most `chunk`, each rematerialised in the backward pass,
    so neither direction holds more than `chunk * V` logits. With `chunk` None or 0, or with no more than `chunk`
    positions, everything is one piece, without scan or rematerialisation.

    Args:
      hidden: final hidden states (after the last norm), any float dtype. Matrix products accumulate in float32.
      temperature: of sampling (see `tempered`); may be traced.
      chunk: positions per piece.
    """
    return _in_pieces(hidden, unembedding, tokens, temperature, chunk, with_entropy=False)[0]


def hidden_logprobs_and_entropy(
    hidden: Float[Array, "*B D"],
    unembedding: Float[Array, "V D"],
    tokens: Int[Array, "*B"],
    temperature: Temperature = 1.0,
    chunk: int | None = 256,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(`hidden_logprobs`, `entropy`) of the same tempered distributions from one pass over the logits."""
    logprobs, entropies = _in_pieces(hidden, unembedding, tokens, temperature, chunk, with_entropy=True)
    assert entropies is not None
    return logprobs, entropies


def _in_pieces(
    hidden: Float[Array, "*B D"],
    unembedding: Float[Array, "V D"],
    tokens: Int[Array, "*B"],
    temperature: Temperature,
    chunk: int | None,
    with_entropy: bool,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"] | None]:
    def piece(
        hidden: Float[Array, "*b D"], tokens: Int[Array, "*b"]
    ) -> tuple[Float[Array, "*b"], Float[Array, "*b"] | None]:
        logits = jnp.einsum("...d,vd->...v", hidden, unembedding, preferred_element_type=jnp.float32)
        logprobs = token_logprobs(logits, tokens, temperature)
        return logprobs, entropy(logits, temperature) if with_entropy else None

    positions = tokens.size
    if not chunk or positions <= chunk:
        return piece(hidden, tokens)

    # Equal pieces waste less padding than full ones and a rest: 300 positions at chunk 256 are 2 * 150.
    pieces = -(-positions // chunk)
    size = -(-positions // pieces)
    padding = pieces * size - positions
    flat_hidden = jnp.pad(hidden.reshape(positions, -1), ((0, padding), (0, 0)))
    flat_tokens = jnp.pad(tokens.reshape(positions), (0, padding))
    # Piece j takes positions j, j + pieces, ...: every piece spans all rows, so rows sharded over devices stay so.
    split_hidden = flat_hidden.reshape(size, pieces, -1).swapaxes(0, 1)
    split_tokens = flat_tokens.reshape(size, pieces).swapaxes(0, 1)
    results = jax.lax.map(lambda xs: jax.checkpoint(piece)(*xs), (split_hidden, split_tokens))

    def join(x: Float[Array, "pieces size"]) -> Float[Array, "*B"]:
        return x.swapaxes(0, 1).reshape(-1)[:positions].reshape(tokens.shape)

    return jax.tree.map(join, results)
