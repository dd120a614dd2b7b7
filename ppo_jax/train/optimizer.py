"""What every stage does with gradients: sum them over micro-batches, clip them, step."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ppo_jax.models.placement import constrain_params
from ppo_jax.ops.means import merge_metrics
from ppo_jax.parallel.sharding import constrain_rows
from ppo_jax.types import Metrics, PyTree

Params = TypeVar("Params")
Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become steps. The learning rate and the clips are traced (Hyper)."""

    kind: Literal["adamw", "adafactor"] = "adamw"
    """Steps are Adam's with decoupled weight decay (Loshchilov & Hutter 2019), or Adafactor's (Shazeer & Stern 2018:
    factored second moments, no first moment, updates clipped at RMS 1)."""
    b1: float = 0.9
    """The first moment decays by this factor (adamw)."""
    b2: float = 0.999
    """The second moment decays by this factor (adamw)."""
    eps: float = 1e-8
    """This is added to the root of the second moment (adamw)."""
    eps_placement: Literal["pytorch", "tensorflow1"] = "pytorch"
    """A step is m_hat / (sqrt(v_hat) + eps), or TensorFlow 1's sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps), whose
    early steps are smaller (Huang et al. 2024, "The N Implementation Details of RLHF with PPO", detail 12)."""
    weight_decay: float = 0.0
    """This, times learning rate and parameter, is subtracted at each step."""

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "adafactor"):
            raise ValueError(f"optimizer.kind={self.kind!r} must be one of adamw, adafactor")
        if self.eps_placement not in ("pytorch", "tensorflow1"):
            raise ValueError(f"optimizer.eps_placement={self.eps_placement!r} must be one of pytorch, tensorflow1")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps={self.eps} must be positive")
        adam = (self.b1, self.b2, self.eps, self.eps_placement)
        if self.kind == "adafactor" and adam != (0.9, 0.999, 1e-8, "pytorch"):
            raise ValueError("optimizer.b1, b2, eps and eps_placement are Adam's; adafactor has none of them")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must not be negative")


def make_optimizer(config: OptimizerConfig = OptimizerConfig()) -> optax.GradientTransformation:
    """The direction d of a step params - learning_rate * d, from gradients that are clipped already."""
    if config.kind == "adafactor":
        steps = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    elif config.eps_placement == "tensorflow1":
        steps = [_scale_by_adam_tf1(config.b1, config.b2, config.eps)]
    else:
        steps = [optax.scale_by_adam(config.b1, config.b2, config.eps)]
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay))
    return optax.chain(*steps) if len(steps) > 1 else steps[0]


def _scale_by_adam_tf1(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam in the order of operations before section 2.1 of Kingma & Ba 2015: eps is added to the uncorrected root."""

    def update(
        grads: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        count: Int[Array, ""] = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        direction = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return direction, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def accumulate(
    gradient: Callable[[Params, Batch], tuple[Params, Metrics]], params: Params, batch: Batch, pieces: int
) -> tuple[Params, Metrics]:
    """Sum of `gradient` and of its metrics over `pieces` equal micro-batches of rows.

    The losses are sums divided by the count of the *whole* batch, so this is the whole batch's gradient. Summed in
    float32, since bfloat16 would lose small pieces; returned in the parameters' dtypes.
    """

    def add(total: Params, piece: Batch) -> tuple[Params, Metrics]:
        grads, metrics = gradient(params, constrain_rows(piece))
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), metrics

    if pieces == 1:
        grads, metrics = gradient(params, constrain_rows(batch))
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), metrics

    # Piece j takes rows j, j + pieces, ...: every piece spans all rows, so rows sharded over devices stay so.
    split = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = constrain_params(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    grads, metrics = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), merge_metrics(metrics)


class Stepped(NamedTuple):
    """What one optimizer step leaves."""

    params: PyTree
    opt_state: optax.OptState


def step(
    params: PyTree,
    grads: PyTree,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    learning_rate: float | Float[Array, ""],
) -> Stepped:
    """params - learning_rate * direction(grads), in the parameters' dtypes."""
    direction, opt_state = optimizer.update(grads, opt_state, params)
    return Stepped(jax.tree.map(lambda p, d: (p - learning_rate * d).astype(p.dtype), params, direction), opt_state)


def clip_scale(norm: Float[Array, ""], max_norm: float | Float[Array, ""]) -> Float[Array, ""]:
    """min(1, max_norm / norm): what a gradient of this global norm is multiplied by (Pascanu et al. 2013)."""
    return jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))


def scale_gradient(grads: Params, scale: Float[Array, ""]) -> Params:
    """grads * scale, in the gradients' dtypes."""
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


def descend(
    params: Params,
    grads: Params,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    learning_rate: float | Float[Array, ""],
    max_grad_norm: float | Float[Array, ""],
) -> tuple[Params, optax.OptState, Metrics]:
    """params - learning_rate * direction(g min(1, max_grad_norm / |g|)), |g| being the global norm.

    The metric `grad_norm` is |g| before the clip.
    """
    norm = optax.tree.norm(grads)
    clipped = scale_gradient(grads, clip_scale(norm, max_grad_norm))
    stepped = step(params, clipped, opt_state, optimizer, learning_rate)
    return stepped.params, stepped.opt_state, {"grad_norm": (norm, jnp.ones(()))}
