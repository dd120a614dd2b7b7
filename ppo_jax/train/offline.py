"""What training on fixed data has in common: fine-tuning (`sft`), preferences (`dpo`) and reward models.

All of it runs on one device or on the mesh of `jax.set_mesh` (`ppo_jax.sharding`): batches are the host's until the
step that needs them, each process hands over its own rows, and every state keeps the layout that it was born with.
Losses are sums divided by the count of the whole batch, so neither micro-batches nor devices change them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.adapters import unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.placement import constrain_params, create_on_mesh
from ppo_jax.models.roles import role_hidden
from ppo_jax.models.transformer import finish_logits
from ppo_jax.ops.logprobs import hidden_logprobs
from ppo_jax.ops.means import means
from ppo_jax.parallel.processes import feed
from ppo_jax.parallel.sharding import constrain
from ppo_jax.train.optimizer import accumulate, descend, make_optimizer
from ppo_jax.types import Metrics, Prefix, PyTree

Params = TypeVar("Params")


class Masked(Protocol):
    """A batch (a NamedTuple of arrays) whose loss is that of the tokens under `loss_mask`."""

    @property
    def tokens(self) -> Array: ...
    @property
    def loss_mask(self) -> Array: ...


Batch = TypeVar("Batch")
MaskedBatch = TypeVar("MaskedBatch", bound=Masked)
# step(params, opt_state, batch, learning_rate), which may donate the first two
ParamStep: TypeAlias = Callable[[PyTree, optax.OptState, Batch, float], tuple[PyTree, optax.OptState, Metrics]]


@dataclasses.dataclass(frozen=True)
class OfflineConfig:
    """How a policy is trained on fixed data, and for how long."""

    epochs: float = 1.0
    """The data are passed over this many times, unless `steps` says otherwise."""
    steps: int = 0
    """Training takes this many optimizer steps; 0 means as many as `epochs` needs."""
    batch_size: int = 16
    """An optimizer step has this many demonstrations, or pairs."""
    accumulate: int = 1
    """An optimizer step has this many micro-batches, a divisor of batch_size. It changes memory, not the result."""
    learning_rate: float = 1e-4
    """Adam starts at this learning rate, which falls linearly to 0."""
    max_grad_norm: float = 1.0
    """The gradient is clipped to this global norm."""
    logprob_chunk: int = 256
    """The loss holds the logits of this many positions at once; 0 means all of a micro-batch."""

    def __post_init__(self) -> None:
        check_least(self, steps=0, batch_size=1, accumulate=1, logprob_chunk=0)
        check_positive(self, "epochs", "learning_rate", "max_grad_norm")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")

    def num_steps(self, rows: int) -> int:
        """Optimizer steps of a run over `rows` demonstrations or pairs; a pass that has begun is finished."""
        return self.steps or math.ceil(self.epochs * rows / self.batch_size)

    @property
    def micro_batch(self) -> int:
        """Rows that are on the devices at once."""
        return self.batch_size // self.accumulate


def check_least(config: Any, **least: float) -> None:
    """Raises ValueError, which names the field, unless these fields are finite and at least so large."""
    for name, lowest in least.items():
        if not lowest <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {lowest}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError, which names the field, unless these fields are finite and above 0."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be a positive number")


# -- losses and gradients --------------------------------------------------------------------------------------------


def target_logprobs(
    adapter: PyTree,
    base: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "N S"],
    mask: Bool[Array, "N S"],
    loss_mask: Bool[Array, "N S"],
    logprob_chunk: int,
    prefix: Prefix | None = None,
) -> Float[Array, "N S-1"]:
    """log pi(token | what stands before it) in nats of slots 1 .. S-1, and 0 outside `loss_mask`.

    Args:
      prefix: of these texts (`models.roles.shared_prefix`); None: start at the tokens.
    """
    hidden = role_hidden(base, adapter, config, tokens, mask, prefix)
    table = constrain(unembedding(base, adapter), "table")  # gathered once, not once a chunk
    finish = partial(finish_logits, config)
    logprobs = hidden_logprobs(hidden[:, :-1], table, tokens[:, 1:], chunk=logprob_chunk, finish=finish)
    return jnp.where(loss_mask[:, 1:], logprobs, 0.0)  # nothing stands before the first token


def batch_gradient(
    loss: Callable[[Params, MaskedBatch], tuple[Float[Array, ""], Metrics]],
    params: Params,
    batch: MaskedBatch,
    pieces: int,
) -> tuple[Params, Metrics]:
    """Gradient of `loss(params, rows) -> (value, metrics)`, summed over `pieces` micro-batches of the batch's rows.

    Raises ValueError when the rows do not divide.
    """
    rows = batch.tokens.shape[0]
    if rows % pieces:
        raise ValueError(f"a batch of {rows} rows does not divide into accumulate={pieces}")
    return accumulate(jax.grad(loss, has_aux=True), params, batch, pieces)


def descended(
    params: Params,
    gradient: tuple[Params, Metrics],
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    learning_rate: float | Float[Array, ""],
    max_grad_norm: float | Float[Array, ""],
) -> tuple[Params, optax.OptState, Metrics]:
    """Take one optimizer step (`optimizer.descend`) by (gradient, metrics); what it returns lies as what it was given.

    Where the loss or the norm of the gradient is not finite nothing changes, and the metric `nonfinite_updates` is 1.
    """
    grads, metrics = gradient
    stepped, moved, norm = descend(params, constrain_params(grads), opt_state, optimizer, learning_rate, max_grad_norm)
    finite = jnp.isfinite(norm["grad_norm"][0]) & jnp.isfinite(metrics["loss"][0])
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (stepped, moved), (params, opt_state)
    )
    metrics = metrics | norm | {"nonfinite_updates": (1.0 - finite, jnp.ones(()))}
    return constrain_params(params), constrain_params(opt_state), metrics


# -- the state of a run ------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class OfflineState:
    """The carry of training on fixed data, with the names that `train.loop.train` asks for.

    Base and data are not in it: they are named by the run's config and never change. Which rows a step reads is a
    function of its number alone.
    """

    step: PyTree  # Int[Array, ""]: steps done; also the data cursor
    params: PyTree  # an adapter, or a reward role
    opt_state: optax.OptState
    nonfinite: PyTree  # Int[Array, ""]: steps in a row that were skipped because something was not finite
    best: PyTree  # Float[Array, ""]: of the evaluations so far, the best value of the metric that chooses checkpoints


def init_offline_state(params: PyTree, optimizer: optax.GradientTransformation) -> OfflineState:
    """Make the state before the first step; a pure function."""
    return OfflineState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        nonfinite=jnp.zeros((), jnp.int32),
        best=jnp.asarray(-jnp.inf, jnp.float32),
    )


def fall_linearly(peak: float, steps: int) -> Callable[[int], float]:
    """Make number -> peak (1 - number / steps), the learning rate of step `number`."""
    return lambda number: peak * (1 - number / steps)


def make_update(
    step: ParamStep[Batch], batches: Callable[[int], Batch], learning_rate: Callable[[int], float]
) -> Callable[[OfflineState, int], tuple[OfflineState, Metrics]]:
    """Make update(state, number) -> (state, metrics) of a step(params, opt_state, batch, learning_rate).

    Args:
      batches: number -> rows on the host; a pure function, and the same in every process.
      learning_rate: number -> the rate of that step, which is in the metrics.
    """

    @jax.jit
    def count(done: Array, nonfinite: Array, skipped: Array) -> tuple[Array, Array]:
        return done + 1, jnp.where(skipped > 0, nonfinite + 1, 0)

    def update(state: OfflineState, number: int) -> tuple[OfflineState, Metrics]:
        rate = learning_rate(number)
        params, opt_state, metrics = step(state.params, state.opt_state, feed(batches(number)), rate)
        done, nonfinite = count(state.step, state.nonfinite, metrics["nonfinite_updates"][0])
        metrics |= {"learning_rate": (rate, 1.0)}  # type: ignore[dict-item]  # the host's, in all its digits
        return OfflineState(done, params, opt_state, nonfinite, state.best), metrics

    return update


# -- the host's side -------------------------------------------------------------------------------------------------


def learn(
    params: Params,
    make_step: Callable[[optax.GradientTransformation], ParamStep[Batch]],
    batches: Callable[[int], Batch],
    steps: int,
    learning_rate: float,
    write: Callable[[int, Mapping[str, float]], Any],
) -> Params:
    """Train `params` (whose buffers are donated) by Adam for `steps` and return them.

    Args:
      make_step: of an optimizer; its step(params, opt_state, batch, learning_rate) -> (params, opt_state, metrics).
      batches: step -> rows on the host; a pure function of the step, and the same in every process.
      learning_rate: of the first step; falls linearly to 0.
      write: called after every step with the number of steps done and the means of the metrics, `learning_rate` added.

    Raises:
      FloatingPointError: the loss or the gradient's norm is no longer finite; the message names which.
    """
    optimizer = make_optimizer()
    update = make_update(make_step(optimizer), batches, fall_linearly(learning_rate, steps))
    state = create_on_mesh(lambda params: init_offline_state(params, optimizer), params)
    for number in range(steps):
        state, metrics = update(state, number)
        values = means(metrics)
        write(number + 1, values)
        # A batch that holds nothing to learn from has no loss, and changes nothing.
        for name in ("loss", "grad_norm") if float(metrics["loss"][1]) else ("grad_norm",):
            if not math.isfinite(values[name]):
                raise FloatingPointError(f"step {number + 1}: the {name} is {values[name]}; lower the learning rate")
    return state.params


def totals(measure: Callable[[Batch], Metrics], batches: Iterable[Batch]) -> dict[str, tuple[float, float]]:
    """{name: (total, count)} of the metrics over all batches, which are the host's."""
    found: dict[str, tuple[float, float]] = {}
    for batch in batches:
        for name, (total, count) in jax.device_get(measure(feed(batch))).items():
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + float(total), before[1] + float(count))
    return found


def in_order(rows: MaskedBatch, batch_size: int) -> Iterator[MaskedBatch]:
    """All rows once, in batches of one size: the last one is filled up with rows whose loss mask is empty."""
    count = len(rows.tokens)
    for start in range(0, count, batch_size):
        index = np.arange(start, start + batch_size)
        piece = jax.tree.map(lambda x: np.asarray(x)[np.minimum(index, count - 1)], rows)  # noqa: B023 (called here)
        real = (index < count).reshape(-1, *[1] * (piece.loss_mask.ndim - 1))
        yield piece._replace(loss_mask=piece.loss_mask & real)
