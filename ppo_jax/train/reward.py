"""Reward models from comparisons: the head's score of the last token, LoRA or a whole model below it.

A batch scores each text once and compares every pair of rows that the data orders: n forward passes give up to
n (n-1) / 2 comparisons (Ouyang et al. 2022, section 3.5). Training has two parts, because fine-tuning around a
random head distorts good features (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features"):

    fit_head       logistic regression of the head on frozen features
    train_role     then adapter and head together
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ppo_jax.models.adapters import init_full, init_lora, init_magnitudes, shared_layers
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.roles import own_trunk
from ppo_jax.ops.losses import bradley_terry_loss
from ppo_jax.parallel.sharding import constrain_rows
from ppo_jax.rewards.adapter import RewardRole, score_tokens
from ppo_jax.train.comparisons import Comparisons
from ppo_jax.train.offline import ParamStep, check_least, check_positive, descended, learn
from ppo_jax.types import Metrics, Off, Prefix, PyTree

Loss = Literal["pairwise", "best"]


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Static choices of a reward model and its training."""

    kind: Literal["lora", "full"] = "lora"
    """The model is LoRA and a head on the frozen base, which PPO shares, or one of its own (try a learning rate of
    1e-5)."""
    depth: int = 0
    """The reward model reads this many layers of the base; 0 means all. Sentiment is as readable half-way up."""
    lora_layers: int = 6
    """LoRA is carried by at most this many of the layers it reads, counted from the top; 0 trains the head alone."""
    rank: int = 8
    """A LoRA update has this rank."""
    alpha: float = 16.0
    """A LoRA update is scaled by alpha / rank."""
    dora: bool = False
    """LoRA changes the directions of the weights alone, and a length for each output is trained beside it (DoRA)."""
    batch_size: int = 50
    """An optimizer step has this many texts (a pair counts two, a choice of n counts n)."""
    epochs: int = 1
    """The texts are passed over this many times after the head has been fitted."""
    learning_rate: float = 3e-4
    """Adam starts at this learning rate, which falls linearly to 0."""
    max_grad_norm: float = 1.0
    """The gradient is clipped to this global norm."""
    head_l2: float = 1e-2
    """The head's fit has this L2 penalty, on standardised features."""
    head_steps: int = 300
    """The head's fit takes at most this many L-BFGS steps; 0 trains adapter and head together from a random head."""
    centring: Annotated[float, Off(0.0)] = 0.0
    """The loss holds scores around 0 by this weight of mean (better + worse)^2, while adapter and head are trained; 0
    is off."""
    normalise: bool = True
    """Shift and scale the scores to mean 0 and std 1 on reference texts, by default on the training texts."""

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "full"):
            raise ValueError(f"kind={self.kind!r}; allowed: lora, full")
        if self.dora and self.kind != "lora":
            raise ValueError("dora=True is a form of kind=lora; kind=full trains whole weights")
        check_least(self, depth=0, lora_layers=0, epochs=0, head_steps=0, head_l2=0, centring=0)
        check_positive(self, "rank", "alpha", "learning_rate")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be positive")
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: a comparison needs at least 2 texts")
        if not self.head_steps and not self.trains:
            raise ValueError(
                "head_steps=0 leaves the head untrained: lora_layers and epochs must be positive then, or kind full"
            )

    @property
    def trains(self) -> bool:
        """Whether more than the head is trained."""
        return bool(self.epochs and (self.kind == "full" or self.lora_layers))

    def trunk(self, config: ModelConfig) -> ModelConfig:
        """The description of the base cut to the layers that the reward model reads."""
        depth = self.depth or config.num_layers
        if not 1 <= depth <= config.num_layers:
            raise ValueError(f"reward.depth={depth}: the base has {config.num_layers} layers")
        return dataclasses.replace(config, num_layers=depth)


def init_role(key: PRNGKeyArray, config: ModelConfig, reward: RewardConfig, params: PyTree = None) -> RewardRole:
    """A fresh reward role on `reward.trunk(config)`, equal to the base, with a random head. `key` is consumed.

    Args:
      params: of the base, which the full kind copies (its adapter is a whole trunk, without unembedding) and DoRA
        measures.
    """
    trunk = reward.trunk(config)
    adapter_key, head_key = jax.random.split(key)
    adapter: PyTree = {}
    if reward.kind == "full":
        layers = jax.tree.map(lambda w: w[: trunk.num_layers], params["layers"])
        whole = {name: value for name, value in params.items() if name != "unembedding"}
        adapter = init_full(whole | {"layers": layers})
    elif reward.lora_layers:
        first = max(trunk.num_layers - reward.lora_layers, 0)
        adapter = init_lora(adapter_key, trunk, reward.rank, reward.alpha, first_layer=first)
        if reward.dora:
            adapter = init_magnitudes(params["layers"], adapter, trunk)
    head = RewardHead().init(head_key, jnp.zeros((1, config.hidden_size)))["params"]
    return RewardRole(adapter, head)


def comparison_loss(
    role: RewardRole,
    base: PyTree,
    trunk: ModelConfig,
    batch: Comparisons,
    loss: Loss = "pairwise",
    centring: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch's comparisons.

        pairwise   mean over the ordered pairs (i, j) of -log sigmoid(s_i - s_j - margin_ij)
        best       mean over the rows i that are preferred to others of -log softmax(s)_i over i and those
                   (Ziegler et al. 2019, equation 1; with one other it is the pairwise loss)
        + centring * mean over the pairs of (s_i + s_j)^2   (Eisenstein et al. 2023, "Helping or Herding?", section 2)

    Metrics: `loss` (with the centring), `accuracy` of the pairs, `margin`; for `best` also `best_accuracy`, how often
    the best has the highest score; with centring `centre`, the mean of (s_i + s_j)^2.
    """
    prefix = None if batch.prefix is None else Prefix(batch.prefix, shared_layers(role.adapter, trunk))
    base, adapter = own_trunk(base, role.adapter)
    scores = score_tokens(base, role._replace(adapter=adapter), trunk, batch.tokens, batch.mask, prefix)
    rows, columns = jnp.broadcast_arrays(scores[:, None], scores[None, :])
    value, metrics = bradley_terry_loss(rows, columns, batch.margin, mask=batch.better)
    count = pairs = jnp.sum(batch.better, dtype=jnp.float32)
    if loss == "best":
        chosen = jnp.any(batch.better, axis=1)
        count = jnp.sum(chosen, dtype=jnp.float32)
        behind = jnp.where(batch.better, columns - rows + batch.margin, -jnp.inf)
        terms = jax.nn.logsumexp(jnp.concatenate([jnp.zeros((len(scores), 1)), behind], axis=1), axis=1)
        value = jnp.sum(jnp.where(chosen, terms, 0)) / jnp.maximum(count, 1)
        wins = chosen & jnp.all(behind < 0, axis=1)
        metrics |= {"best_accuracy": (jnp.sum(wins, dtype=jnp.float32), count)}
    if centring:
        centre = jnp.sum(jnp.where(batch.better, jnp.square(rows + columns), 0))
        value += centring * centre / jnp.maximum(pairs, 1)
        metrics |= {"centre": (jax.lax.stop_gradient(centre), pairs)}
    return value, metrics | {"loss": (jax.lax.stop_gradient(value) * count, count)}


RewardStep = Callable[
    [RewardRole, optax.OptState, PyTree, Comparisons, float], tuple[RewardRole, optax.OptState, Metrics]
]


def make_reward_step(
    trunk: ModelConfig,
    optimizer: optax.GradientTransformation,
    max_grad_norm: float = 1.0,
    loss: Loss = "pairwise",
    centring: float = 0.0,
) -> RewardStep:
    """step(role, opt_state, base, batch, learning_rate) -> (role, opt_state, metrics), jitted; gain and bias stay."""
    objective = partial(comparison_loss, loss=loss, centring=centring)

    def step(
        role: RewardRole, opt_state: optax.OptState, base: PyTree, batch: Comparisons, learning_rate: float | Array
    ) -> tuple[RewardRole, optax.OptState, Metrics]:
        grads, metrics = jax.grad(objective, has_aux=True)(role, base, trunk, constrain_rows(batch))
        fixed = {name: jnp.zeros_like(grads.head[name]) for name in ("gain", "bias")}
        grads = grads._replace(head=grads.head | fixed)
        return descended(role, (grads, metrics), opt_state, optimizer, learning_rate, max_grad_norm)

    return jax.jit(step, donate_argnums=(0, 1))


def train_role(
    role: RewardRole,
    base: PyTree,
    trunk: ModelConfig,
    reward: RewardConfig,
    batches: Callable[[int], Comparisons],
    steps: int,
    write: Callable[[int, Mapping[str, float]], None],
    loss: Loss = "pairwise",
) -> RewardRole:
    """Adapter and head together for `steps` batches; Adam, its learning rate falling linearly to 0.

    Args:
      role: its buffers are donated.
      batches: step -> batch on the host, the same in every process.
      write: called after every step with the number of steps done and the means of the metrics.

    Raises:
      FloatingPointError: the loss is no longer finite.
    """
    make_step = partial(bind_reward_step, base, trunk, reward, loss)
    return learn(role, make_step, batches, steps, reward.learning_rate, write)


def bind_reward_step(
    base: PyTree, trunk: ModelConfig, reward: RewardConfig, loss: Loss, optimizer: optax.GradientTransformation
) -> ParamStep[Comparisons]:
    """Make step(role, opt_state, batch, learning_rate) of `make_reward_step` on this base."""
    step = make_reward_step(trunk, optimizer, reward.max_grad_norm, loss, reward.centring)
    return lambda role, opt_state, batch, rate: step(role, opt_state, base, batch, rate)


def fit_head(
    features: Float[np.ndarray, "N D"],
    better: Int[np.ndarray, " M"],
    worse: Int[np.ndarray, " M"],
    l2: float,
    steps: int,
    margin: Float[np.ndarray, " M"] | float = 0.0,
    loss: Loss = "pairwise",
) -> PyTree:
    """RewardHead parameters that minimise a loss of comparisons on fixed features, by L-BFGS.

        L(w . z) + l2 |w|^2,      z = (features - their mean) / their std,      L: see `comparison_loss`

    Convex, so with l2 > 0 the optimum is one, and it is reached unless `steps` end before (a gradient of 1e-6 of the
    first one's ends the fit). Scaling is folded back: the head reads raw features. The score's mean over the features
    is moved to 0 with the head's bias, which no comparison determines.
    """
    scale = jnp.asarray(1.0 / (features.std(axis=0) + 1e-6))
    rows, group = np.unique(better, return_inverse=True)  # for `best`: the comparisons of one row belong together
    margins = jnp.broadcast_to(jnp.asarray(margin, jnp.float32), better.shape)

    @jax.jit
    def fit(z: Array, i: Array, j: Array, margin: Array) -> Array:
        def objective(w: Array) -> Array:
            scores = z @ w
            penalty = l2 * jnp.sum(jnp.square(w))
            if loss == "pairwise":
                return bradley_terry_loss(scores[i], scores[j], margin)[0] + penalty
            behind = scores[j] - scores[i] + margin
            top = jnp.maximum(jax.ops.segment_max(behind, group, len(rows)), 0)
            terms = top + jnp.log(jnp.exp(-top) + jax.ops.segment_sum(jnp.exp(behind - top[group]), group, len(rows)))
            return jnp.mean(terms) + penalty

        return minimise(objective, jnp.zeros(z.shape[1]), steps)

    z = (jnp.asarray(features) - features.mean(axis=0)) * scale
    kernel = fit(z, jnp.asarray(better), jnp.asarray(worse), margins) * scale
    mean = jnp.mean(jnp.asarray(features) @ kernel)
    return {"reward": {"kernel": kernel[:, None]}, "gain": jnp.ones(()), "bias": -mean}


def minimise(
    objective: Callable[[Array], Array], start: Float[Array, " D"], steps: int, tolerance: float = 1e-6
) -> Float[Array, " D"]:
    """The minimum of a smooth convex function by L-BFGS: at most `steps` steps, fewer once the gradient is small.

    Small is `tolerance` times the gradient at `start`.

    References:
      Liu and Nocedal 1989, "On the limited memory BFGS method for large scale optimization".
    """
    optimizer = optax.lbfgs()
    measure = optax.value_and_grad_from_state(objective)
    first = optax.tree.norm(jax.grad(objective)(start))

    def unfinished(carry: tuple) -> Array:
        step, _, state = carry
        gradient = optax.tree.norm(optax.tree.get(state, "grad"))
        return (step < steps) & ((step == 0) | (gradient > tolerance * first))

    def improve(carry: tuple) -> tuple:
        step, w, state = carry
        value, gradient = measure(w, state=state)
        updates, state = optimizer.update(gradient, state, w, value=value, grad=gradient, value_fn=objective)
        return step + 1, optax.apply_updates(w, updates), state

    return jax.lax.while_loop(unfinished, improve, (0, start, optimizer.init(start)))[1]


def normalise_head(head: PyTree, scores: Float[np.ndarray, " N"]) -> PyTree:
    """The head with gain and bias such that these scores of reference texts become mean 0, std 1.

    Ziegler et al. 2019, section 2.1 (there over samples of the reference policy).
    """
    std = float(np.std(scores, ddof=1))
    if not np.isfinite(std) or std == 0:
        raise ValueError(f"cannot normalise a reward model whose scores have standard deviation {std}")
    return head | {"gain": head["gain"] / std, "bias": (head["bias"] - float(np.mean(scores))) / std}
