"""Prompts to responses: one prefill and one while_loop; and the log-probs of responses that exist."""

import dataclasses
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ppo_jax.models.adapters import unembedding
from ppo_jax.models.cache import Cache, init_cache, unstacked
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import value
from ppo_jax.models.placement import gathered
from ppo_jax.models.transformer import apply, finish_logits, positions_from_mask, unstack
from ppo_jax.ops.logprobs import token_logprobs, unembed
from ppo_jax.ops.sampling import penalise_repetition, sample
from ppo_jax.parallel.members import any_row
from ppo_jax.parallel.sharding import abstract_mesh, constrain
from ppo_jax.types import Off, Policy, Prompts, PyTree, Rollout


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Static choices of generation."""

    response_length: int = 24
    """A response has at most this many tokens (T)."""
    top_k: Annotated[int, Off(0)] = 0
    """Tokens are sampled from the k most probable ones only; 0 is off."""
    top_p: Annotated[float, Off(1.0)] = 1.0
    """Tokens are sampled from the smallest set whose probability reaches p; 1 is off."""
    min_p: Annotated[float, Off(0.0)] = 0.0
    """Tokens are sampled from those at least this fraction as probable as the most probable one; 0 is off."""
    repetition_penalty: Annotated[float, Off(1.0)] = 1.0
    """Positive logits of tokens in prompt or response are divided by this, negative ones multiplied; 1 is off."""
    gather_weights: bool = False
    """Bring what fsdp has cut on a mesh together once per rollout, not once per token: faster, for more memory."""
    stop_ids: tuple[int, ...] = ()
    """A response ends with the first of these token ids, which belongs to it."""
    model_stops: bool = True
    """In commands stop_ids are joined by the stop tokens of model and tokenizer; without, they stand alone."""
    pad_id: int = 0
    """This id fills the slots after the end; never read back, it may equal a stop id. Commands take the tokenizer's."""

    def __post_init__(self) -> None:
        if self.response_length < 1:
            raise ValueError(f"response_length={self.response_length} must be at least 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1)")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive")

    @property
    def filtered(self) -> bool:
        """Whether the behaviour policy differs from the tempered policy."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.repetition_penalty != 1


class _Given(NamedTuple):
    """What stays the same while tokens are drawn."""

    base: PyTree
    policy: Policy
    config: ModelConfig
    sampling: Sampling
    temperature: float | Array
    keys: PRNGKeyArray  # one for each row
    table: Float[Array, "V D"]  # the policy's unembedding
    lengths: Int[Array, " B"]  # of the prompts


class _Loop(NamedTuple):
    """What changes with every token."""

    step: Int[Array, ""]
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    policy_logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"]
    alive: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None  # tokens of prompt and response, where repetition is penalised
    cache: Cache


def generate(
    base: PyTree,
    policy: Policy,
    config: ModelConfig,
    prompts: Prompts,
    key: PRNGKeyArray,
    sampling: Sampling,
    temperature: float | Array = 1.0,
) -> Rollout:
    """Samples one response per prompt row, with its log-probs and values on the way.

    a_t ~ softmax(logits(prompt, a_<t) / temperature), after the filters of `sampling`, until a stop token or T
    tokens. The loop ends when every row has. temperature 0 decodes greedily. `key` is consumed; row b draws
    with fold_in(key, b), so a row's response depends on the key, its number and its prompt, not on its neighbours.
    """
    _check_ids(sampling, config)
    batch, prompt_length = prompts.tokens.shape
    length = sampling.response_length
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if sampling.gather_weights:
        base, policy = gathered(base), policy._replace(adapter=gathered(policy.adapter))
    table = constrain(unembedding(base, policy.adapter), "table")  # gathered once, not once a token
    lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
    given = _Given(base, policy, config, sampling, temperature, keys, table, lengths)
    apart = _layers_apart(config)
    cache = init_cache(config, batch, prompt_length + (0 if apart else length))
    positions = positions_from_mask(prompts.mask)
    hidden, cache = apply(base, policy.adapter, config, prompts.tokens, positions, cache=cache, fresh=True)
    if apart:
        layers, adapter = unstack(base, policy.adapter, config)
        given = given._replace(base=layers, policy=policy._replace(adapter=adapter))
        cache = unstacked(cache, prompt_length + length)
    loop = _draw(given, _nothing_drawn(prompts, config, sampling, cache), hidden[:, -1])
    loop = jax.lax.while_loop(
        lambda loop: (loop.step < length) & any_row(loop.alive), lambda loop: _advance(given, loop), loop
    )
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, loop.tokens], axis=1),
        prompt_mask=prompts.mask,
        response_mask=loop.mask,
        logprobs=loop.logprobs,
        policy_logprobs=loop.policy_logprobs,
        values=loop.values,
        terminated=~loop.alive,
        index=prompts.index,
    )


def _layers_apart(config: ModelConfig) -> bool:
    """Whether the loop runs on a copy of the weights, layer by layer, and not on the stack.

    For shallow models on CPUs, where a slice of the stack is copied before every product: a quarter of a step's time.
    Every layer is compiled apart: 30 took 25 s for 4 s, and as many of a step's weights again in memory.
    Accelerators keep the stack: their memory has no room for the weights twice.
    """
    exact = config.dtype == "float32"  # in bfloat16 another program rounds otherwise than the loss does
    return exact and jax.default_backend() == "cpu" and abstract_mesh() is None and config.num_layers <= 12


def _advance(given: _Given, loop: _Loop) -> _Loop:
    """Feeds the last drawn token and draws the next one."""
    t = loop.step - 1
    positions = jnp.where(loop.alive, given.lengths + t, -1)[:, None]
    tokens = jax.lax.dynamic_slice_in_dim(loop.tokens, t, 1, axis=1)
    hidden, cache = apply(given.base, given.policy.adapter, given.config, tokens, positions, cache=loop.cache)
    return _draw(given, loop._replace(cache=cache), hidden[:, 0])


def _draw(given: _Given, loop: _Loop, hidden: Float[Array, "B D"]) -> _Loop:
    """Token `step` of every living row, from the hidden state before it."""
    t, sampling, temperature = loop.step, given.sampling, given.temperature
    logits = constrain(finish_logits(given.config, unembed(hidden, given.table)), "logits")
    if given.config.logit_divisor != 1 or given.config.logit_cap is not None:
        # XLA computes them anew where they are used, rounds otherwise there, and the largest is then no logit's.
        logits = jax.lax.optimization_barrier(logits)
    keys = jax.vmap(jax.random.fold_in, (0, None))(given.keys, t)
    offered = logits if loop.seen is None else penalise_repetition(logits, loop.seen, sampling.repetition_penalty)
    tokens, logprobs = jax.vmap(lambda k, x: sample(k, x, temperature, sampling.top_k, sampling.top_p, sampling.min_p))(
        keys, offered
    )
    whole = token_logprobs(logits, tokens, temperature) if sampling.filtered else logprobs
    alive = loop.alive

    def put(array: Array, column: Array) -> Array:
        return array.at[:, t].set(jnp.where(alive, column, array[:, t]))

    return loop._replace(
        step=t + 1,
        tokens=put(loop.tokens, tokens.astype(jnp.int32)),
        mask=loop.mask.at[:, t].set(alive),
        logprobs=put(loop.logprobs, logprobs),
        policy_logprobs=put(loop.policy_logprobs, whole),
        values=put(loop.values, value(given.policy.value_head, hidden)),
        alive=alive & ~jnp.isin(tokens, jnp.array(sampling.stop_ids, jnp.int32)),
        seen=None if loop.seen is None else loop.seen.at[jnp.arange(len(tokens)), tokens].set(True),
    )


def _nothing_drawn(prompts: Prompts, config: ModelConfig, sampling: Sampling, cache: Cache) -> _Loop:
    """The loop before its first token."""
    batch, length = prompts.tokens.shape[0], sampling.response_length
    nothing = jnp.zeros((batch, length), jnp.float32)
    seen = None
    if sampling.repetition_penalty != 1:
        rows = jnp.arange(batch)[:, None]
        seen = jnp.zeros((batch, config.vocab_size), bool).at[rows, prompts.tokens].max(prompts.mask)
    return _Loop(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, length), sampling.pad_id, jnp.int32),
        mask=jnp.zeros((batch, length), bool),
        logprobs=nothing,
        policy_logprobs=nothing,
        values=nothing,
        alive=jnp.ones((batch,), bool),
        seen=seen,
        cache=cache,
    )


def _check_ids(sampling: Sampling, config: ModelConfig) -> None:
    for name, ids in (("pad_id", (sampling.pad_id,)), ("stop_ids", sampling.stop_ids)):
        if not all(0 <= i < config.vocab_size for i in ids):
            raise ValueError(f"{name}={getattr(sampling, name)} must lie in the vocabulary [0, {config.vocab_size})")
