"""Prompts to responses: one prefill and one while_loop; and the log-probs of responses that exist."""

import dataclasses
import math
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ppo_jax.models.adapters import unembedding, with_gains
from ppo_jax.models.cache import Cache, init_cache, replace_rows, unstacked
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import value
from ppo_jax.models.placement import gathered
from ppo_jax.models.transformer import apply, finish_logits, positions_from_mask, unstack
from ppo_jax.ops.logprobs import token_logprobs, unembed
from ppo_jax.ops.sampling import penalise_repetition, sample
from ppo_jax.parallel.members import any_row
from ppo_jax.parallel.sharding import abstract_mesh, constrain
from ppo_jax.types import Off, Policy, Prompts, PyTree, Rollout

_MOST_COPIED = 2**31  # bytes of layers in float32 that a rollout may hold twice


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
    slots: Annotated[int, Off(0)] = 0
    """So many responses are drawn at a time, and one that has ended makes room for the next; 0 is off."""
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
        if self.slots < 0:
            raise ValueError(f"slots={self.slots} must be 0 (all responses together) or positive")
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
    decoder: tuple[PyTree, PyTree]  # base and adapter as single tokens are read with
    config: ModelConfig
    sampling: Sampling
    temperature: float | Array
    keys: PRNGKeyArray  # one for each row
    table: Float[Array, "V D"]  # the policy's unembedding
    prompts: Prompts
    lengths: Int[Array, " B"]  # of the prompts


class _Responses(NamedTuple):
    """What is written token by token."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    policy_logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"]


class _Loop(NamedTuple):
    """What changes with every token."""

    step: Int[Array, ""]
    responses: _Responses
    alive: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None  # tokens of prompt and response, where repetition is penalised
    cache: Cache


class _Slots(NamedTuple):
    """What changes with every token where N slots work off a queue of rows."""

    row: Int[Array, " N"]  # what a slot works on; B: nothing
    step: Int[Array, " N"]  # tokens drawn of it
    last: Int[Array, " N"]  # the newest of them
    alive: Bool[Array, " N"]
    taken: Int[Array, ""]  # the first row that waits
    responses: _Responses
    ended: Bool[Array, " B"]
    seen: Bool[Array, "N V"] | None
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
    with fold_in(key, b), so a row's response depends on the key, its number and its prompt, not on its neighbours
    and not on the slot that it is drawn in.
    """
    _check(sampling, config)
    batch = prompts.tokens.shape[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if sampling.gather_weights:
        base, policy = gathered(base), policy._replace(adapter=gathered(policy.adapter))
    policy = policy._replace(adapter=with_gains(base["layers"], policy.adapter, config))  # once, not once a token
    table = constrain(unembedding(base, policy.adapter), "table")  # gathered once, not once a token
    lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
    decoder = unstack(base, policy.adapter, config) if _layers_apart(base, config) else (base, policy.adapter)
    given = _Given(base, policy, decoder, config, sampling, temperature, keys, table, prompts, lengths)
    responses, terminated = (_draw_in_slots if 0 < sampling.slots < batch else _draw_together)(given)
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, responses.tokens], axis=1),
        prompt_mask=prompts.mask,
        response_mask=responses.mask,
        logprobs=responses.logprobs,
        policy_logprobs=responses.policy_logprobs,
        values=responses.values,
        terminated=terminated,
        index=prompts.index,
    )


def _layers_apart(base: PyTree, config: ModelConfig) -> bool:
    """Whether the loop runs on a copy of the weights, layer by layer, and not on the stack.

    On CPUs, where a slice of the stack is copied before every product: a tenth to a third of a step's time. It takes
    the layers' weights again in memory, and the compiler 0.25 s of the processors for every layer. Accelerators keep
    the stack: their memory has no room for the weights twice.
    """
    exact = config.dtype == "float32"  # in bfloat16 another program rounds otherwise than the loss does
    exact &= config.quantise == "none"  # apart, XLA widens all codes before the loop: the whole base in float32
    small = config.num_layers <= 32 and 4 * sum(x.size for x in jax.tree.leaves(base["layers"])) <= _MOST_COPIED
    return exact and small and jax.default_backend() == "cpu" and abstract_mesh() is None


def _read_prompts(given: _Given, rows: Int[Array, " b"] | slice) -> tuple[Float[Array, "b D"], Cache]:
    """The states in which first tokens are drawn, and a cache with room for the responses."""
    tokens, mask = given.prompts.tokens[rows], given.prompts.mask[rows]
    (batch, length), responses = tokens.shape, given.sampling.response_length
    apart = isinstance(given.decoder[0]["layers"], tuple)
    cache = init_cache(given.config, batch, length + (0 if apart else responses))
    hidden, cache = apply(
        given.base, given.policy.adapter, given.config, tokens, positions_from_mask(mask), cache=cache, fresh=True
    )
    return hidden[:, -1], unstacked(cache, length + responses) if apart else cache


def _sample(
    given: _Given, keys: Key[Array, " b"], hidden: Float[Array, "b D"], seen: Array | None
) -> tuple[Array, ...]:
    """tokens, whether they stop, log-probs under what they were drawn from and under the policy, values of states."""
    sampling, temperature = given.sampling, given.temperature
    logits = constrain(finish_logits(given.config, unembed(hidden, given.table)), "logits")
    if given.config.logit_divisor != 1 or given.config.logit_cap is not None:
        # XLA computes them anew where they are used, rounds otherwise there, and the largest is then no logit's.
        logits = jax.lax.optimization_barrier(logits)
    offered = logits if seen is None else penalise_repetition(logits, seen, sampling.repetition_penalty)
    tokens, logprobs = jax.vmap(lambda k, x: sample(k, x, temperature, sampling.top_k, sampling.top_p, sampling.min_p))(
        keys, offered
    )
    whole = token_logprobs(logits, tokens, temperature) if sampling.filtered else logprobs
    stops = jnp.isin(tokens, jnp.array(sampling.stop_ids, jnp.int32))
    return tokens.astype(jnp.int32), stops, logprobs, whole, value(given.policy.value_head, hidden)


def _nothing_drawn(given: _Given) -> _Responses:
    batch, length = given.prompts.tokens.shape[0], given.sampling.response_length
    nothing = jnp.zeros((batch, length), jnp.float32)
    tokens = jnp.full((batch, length), given.sampling.pad_id, jnp.int32)
    return _Responses(tokens, jnp.zeros((batch, length), bool), nothing, nothing, nothing)


def _seen(given: _Given, rows: Int[Array, " b"]) -> Bool[Array, "b V"] | None:
    """Tokens of these prompts; None where repetition is not penalised."""
    if given.sampling.repetition_penalty == 1:
        return None
    seen = jnp.zeros((len(rows), given.config.vocab_size), bool)
    return seen.at[jnp.arange(len(rows))[:, None], given.prompts.tokens[rows]].max(given.prompts.mask[rows])


# -- all rows together -----------------------------------------------------------------------------------------------


def _draw_together(given: _Given) -> tuple[_Responses, Bool[Array, " B"]]:
    """Token t of every row, then token t + 1; rows that ended go along."""
    batch, length = given.prompts.tokens.shape[0], given.sampling.response_length
    hidden, cache = _read_prompts(given, slice(None))
    seen, alive = _seen(given, jnp.arange(batch)), jnp.ones((batch,), bool)
    loop = _draw(given, _Loop(jnp.zeros((), jnp.int32), _nothing_drawn(given), alive, seen, cache), hidden)
    loop = jax.lax.while_loop(
        lambda loop: (loop.step < length) & any_row(loop.alive), lambda loop: _advance(given, loop), loop
    )
    return loop.responses, ~loop.alive


def _advance(given: _Given, loop: _Loop) -> _Loop:
    """Feeds the last drawn token and draws the next one."""
    t = loop.step - 1
    positions = jnp.where(loop.alive, given.lengths + t, -1)[:, None]
    tokens = jax.lax.dynamic_slice_in_dim(loop.responses.tokens, t, 1, axis=1)
    hidden, cache = apply(*given.decoder, given.config, tokens, positions, cache=loop.cache)
    return _draw(given, loop._replace(cache=cache), hidden[:, 0])


def _draw(given: _Given, loop: _Loop, hidden: Float[Array, "B D"]) -> _Loop:
    """Token `step` of every living row, from the hidden state before it."""
    t, alive, old = loop.step, loop.alive, loop.responses
    tokens, stops, *said = _sample(given, jax.vmap(jax.random.fold_in, (0, None))(given.keys, t), hidden, loop.seen)

    def put(array: Array, column: Array) -> Array:
        return array.at[:, t].set(jnp.where(alive, column, array[:, t]))

    written = (put(array, column) for array, column in zip(old[2:], said, strict=True))
    return loop._replace(
        step=t + 1,
        responses=_Responses(put(old.tokens, tokens), old.mask.at[:, t].set(alive), *written),
        alive=alive & ~stops,
        seen=None if loop.seen is None else loop.seen.at[jnp.arange(len(tokens)), tokens].set(True),
    )


# -- in slots --------------------------------------------------------------------------------------------------------


def _draw_in_slots(given: _Given) -> tuple[_Responses, Bool[Array, " B"]]:
    """One token of every slot at a time; slots whose rows have ended take the next ones, an eighth of them together."""
    batch, slots = given.prompts.tokens.shape[0], given.sampling.slots
    group = max(1, slots // 8)

    def refill_due(now: _Slots) -> Bool[Array, ""]:
        return (now.taken < batch) & (jnp.sum(~now.alive) >= group)

    def refill_and_draw(now: _Slots) -> _Slots:
        now = _refill(given, now, group)
        return jax.lax.while_loop(lambda now: now.alive.any() & ~refill_due(now), partial(_advance_slots, given), now)

    done = jax.lax.while_loop(
        lambda now: (now.taken < batch) | now.alive.any(), refill_and_draw, _empty_slots(given, slots)
    )
    return done.responses, done.ended


def _empty_slots(given: _Given, slots: int) -> _Slots:
    batch, prompt_length = given.prompts.tokens.shape
    cache = init_cache(given.config, slots, prompt_length + given.sampling.response_length)
    if isinstance(given.decoder[0]["layers"], tuple):
        cache = unstacked(cache, cache.positions.shape[1])
    nothing = jnp.zeros((slots,), jnp.int32)
    return _Slots(
        row=nothing + batch,
        step=nothing,
        last=nothing,
        alive=jnp.zeros((slots,), bool),
        taken=jnp.zeros((), jnp.int32),
        responses=_nothing_drawn(given),
        ended=jnp.zeros((batch,), bool),
        seen=_seen(given, nothing),
        cache=cache._replace(length=nothing),
    )


def _refill(given: _Given, now: _Slots, group: int) -> _Slots:
    """The next `group` rows, or those that are left, in free slots, with their first tokens drawn."""
    batch = len(given.lengths)
    free = jnp.argsort(now.alive)[:group]
    rows = now.taken + jnp.arange(group)
    read = jnp.minimum(rows, batch - 1)
    hidden, fresh = _read_prompts(given, read)
    now = now._replace(
        row=now.row.at[free].set(jnp.minimum(rows, batch)),
        step=now.step.at[free].set(0),
        alive=now.alive.at[free].set(rows < batch),
        taken=now.taken + group,
        seen=None if now.seen is None else now.seen.at[free].set(_seen(given, read)),
        cache=replace_rows(now.cache, free, fresh),
    )
    return _draw_of(given, now, free, hidden)


def _advance_slots(given: _Given, now: _Slots) -> _Slots:
    """Feeds every slot's newest token and draws the next one."""
    positions = jnp.where(now.alive, given.lengths[now.row] + now.step - 1, -1)[:, None]
    hidden, cache = apply(*given.decoder, given.config, now.last[:, None], positions, cache=now.cache)
    return _draw_of(given, now._replace(cache=cache), jnp.arange(len(now.row)), hidden[:, 0])


def _draw_of(given: _Given, now: _Slots, slots: Int[Array, " n"], hidden: Float[Array, "n D"]) -> _Slots:
    """The next token of each of these slots that lives."""
    batch, alive, step = len(given.lengths), now.alive[slots], now.step[slots]
    keys = jax.vmap(jax.random.fold_in)(given.keys[now.row[slots]], step)
    tokens, stops, *said = _sample(given, keys, hidden, None if now.seen is None else now.seen[slots])
    to = jnp.where(alive, now.row[slots], batch)  # what is written to row B is dropped
    columns = (tokens, alive, *said)
    written = (array.at[to, step].set(new, mode="drop") for array, new in zip(now.responses, columns, strict=True))
    return now._replace(
        step=now.step.at[slots].add(1),
        last=now.last.at[slots].set(tokens),
        alive=now.alive.at[slots].set(alive & ~stops & (step + 1 < given.sampling.response_length)),
        responses=_Responses(*written),
        ended=now.ended.at[to].set(stops, mode="drop"),
        seen=None if now.seen is None else now.seen.at[slots, tokens].set(True),
    )


def _check(sampling: Sampling, config: ModelConfig) -> None:
    mesh = abstract_mesh()
    if sampling.slots and mesh is not None and mesh.size > 1:
        raise ValueError(f"slots={sampling.slots} is for one device: on a mesh of {mesh.size} rows lie apart; use 0")
    for name, ids in (("pad_id", (sampling.pad_id,)), ("stop_ids", sampling.stop_ids)):
        if not all(0 <= i < config.vocab_size for i in ids):
            raise ValueError(f"{name}={getattr(sampling, name)} must lie in the vocabulary [0, {config.vocab_size})")
