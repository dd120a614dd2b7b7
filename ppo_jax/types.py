"""The records that flow through PPO, and the legend of shape letters.

    B  sequences in the logical batch      P  prompt slots (left-padded)
    T  response slots (right-padded)       S  = P + T, slots of a whole sequence
    V  vocabulary                          D  hidden width
    L  layers                              K  key/value heads, H  head width

Masks are made by the sampler and carried; nothing is ever inferred from `token != pad`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A tree of arrays (parameters, an adapter, a gradient). Its structure is documented where it is made.
PyTree = Any

# {name: (total, count)}: sums over micro-batches, devices and hosts stay exact; the value is total / count.
Metrics = dict[str, tuple[Array, Array]]


class Texts(NamedTuple):
    """Right-padded texts whose next-token loss PPO-ptx mixes in: one row for each response."""

    tokens: Int[Array, "B N"]
    mask: Bool[Array, "B N"]


class Prompts(NamedTuple):
    """A batch of prompts on the device."""

    tokens: Int[Array, "B P"]  # left-padded
    mask: Bool[Array, "B P"]  # True on prompt tokens
    index: Int[Array, " B"]  # type: ignore[assignment]  # row of the host's table; the name hides tuple.index
    pretrain: Texts | None = None  # of PPO-ptx; None: off


class Rollout(NamedTuple):
    """Prompts and the responses that the policy sampled for them.

    Response position t holds the action a_t; `logprobs`, `policy_logprobs` and `values` at t belong to the
    state *before* that token, (prompt, a_0 .. a_{t-1}).
    """

    tokens: Int[Array, "B S"]  # prompt, then response; what lies in slots that are off in the masks means nothing
    prompt_mask: Bool[Array, "B P"]
    response_mask: Bool[Array, "B T"]  # True up to and including the stop token
    logprobs: Float[Array, "B T"]  # behaviour policy: at the sampling temperature, after top-k/top-p
    policy_logprobs: Float[Array, "B T"]  # same temperature, whole vocabulary; equal when nothing is filtered
    values: Float[Array, "B T"]  # V(state before token t)
    terminated: Bool[Array, " B"]  # ended by a stop token (False: cut by length)
    index: Int[Array, " B"]  # type: ignore[assignment]

    @property
    def mask(self) -> Bool[Array, "B S"]:
        """True on prompt and response tokens."""
        return jnp.concatenate([self.prompt_mask, self.response_mask], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What all roles share of some sequences, computed once: the residual stream below their adapters."""

    hidden: PyTree  # Float[Array, "B S D"]; tree functions also put shapes here, so no array type is claimed
    layers: int = dataclasses.field(metadata={"static": True})  # it has passed layers 0 .. layers - 1


class Collected(NamedTuple):
    """A rollout with what the updates after it share."""

    rollout: Rollout
    prefix: Prefix | None = None  # None: the roles share no layer
    pretrain: Texts | None = None


class Scores(NamedTuple):
    """What a reward said of each response. A failed reward is invalid, never 0."""

    reward: Float[Array, " B"]
    valid: Bool[Array, " B"]  # False: masked out of the loss, of baselines and of running statistics
    parts: dict[str, Float[Array, " B"]]  # named components, for the log
    tokens: Float[Array, "B T"] | None = None  # rewards of single tokens, beside the score of the whole response


class Minibatch(NamedTuple):
    """Only what the loss may read; the whole logical batch, or some rows of it."""

    tokens: Int[Array, "B S"]
    mask: Bool[Array, "B S"]  # prompt and response tokens: what attention may see
    prefix: Prefix | None  # None: start at the tokens
    loss_mask: Bool[Array, "B T"]  # response tokens of rows whose score is valid
    logprobs: Float[Array, "B T"]  # old policy, the denominator of the ratio
    values: Float[Array, "B T"]  # old values
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"] | None = None  # for a KL term in the loss
    ref_hidden: Float[Array, "B T D"] | None = None  # the same, where the KL is over the whole distribution
    weights: Float[Array, "B T"] | None = None  # truncated importance weights policy / behaviour; None: all 1
    pretrain: Texts | None = None


class Experience(NamedTuple):
    """What one rollout becomes after reference, KL shaping and GAE; computed once per rollout."""

    batch: Minibatch
    rewards: Float[Array, "B T"]  # shaped: score at the last token, KL penalty at every token
    kl: Float[Array, "B T"]  # of the policy to the reference, the estimator that shapes the reward
    scores: Scores


class Policy(NamedTuple):
    """What PPO trains."""

    adapter: PyTree  # models.adapters
    value_head: PyTree  # parameters of a ValueHead
    critic: PyTree = None  # the adapter that values are read from; None: the policy's own (shared trunk)


class Frozen(NamedTuple):
    """What PPO reads and never changes."""

    base: PyTree  # the trunk that all roles share
    reward: PyTree = None  # what the on-device reward needs: adapter and head, or a whole model


class Hyper(NamedTuple):
    """Scalars of PPO: Python floats on the host, traced float32 inside jit.

    Changing one never recompiles, and `vmap` over them is a sweep. Where infinity is the default, it means off.
    """

    learning_rate: float = 1e-4  # of the policy, at its peak
    temperature: float = 0.7  # of sampling and of every log-prob
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of GAE
    max_grad_norm: float = 1.0  # global-norm clip of the gradient
    # -- KL to the reference ------------------------------------------------------------------------------------------
    kl_coef: float = 0.05  # beta of the KL penalty (start value when it changes)
    kl_target: float = 6.0  # nats per response, for the adaptive coefficient
    kl_horizon: float = 10_000.0  # episodes, for the adaptive coefficient
    kl_coef_end: float = 0.0  # where a linear schedule of the coefficient ends
    kl_steps: float = 100.0  # iterations that a linear schedule takes
    # -- scores -------------------------------------------------------------------------------------------------------
    score_clip: float = math.inf  # scores are clipped to [-score_clip, score_clip]
    missing_eos: float = 1.0  # subtracted from the score of a response that was cut, or in its place (PPOConfig)
    length_penalty: float = 0.0  # subtracted from the score for every response token
    # -- policy loss --------------------------------------------------------------------------------------------------
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # see clip_low
    dual_clip: float = math.inf  # bound on the ratio where the advantage is negative
    entropy_coef: float = 0.0  # weight of the entropy bonus
    importance_cap: float = 2.0  # truncation of the importance weights policy / behaviour
    ptx_coef: float = 0.0  # weight of the pretraining loss (PPO-ptx)
    target_kl: float = math.inf  # approximate KL to the old policy beyond which an iteration's updates end
    ratio_threshold: float = math.inf  # mean ratio beyond which a minibatch is skipped
    # -- critic -------------------------------------------------------------------------------------------------------
    vf_coef: float = 0.1  # weight of the value loss
    value_clip: float = 0.2  # how far a value may move from its old one, in units of the return
    huber_delta: float = math.inf  # errors beyond it count linearly
    critic_lr_scale: float = 1.0  # learning rate of the critic's own parameters / learning_rate
    critic_max_grad_norm: float = 0.0  # clip of the critic's own gradient; 0: together with the policy's
    critic_warmup: float = 0.0  # iterations in which only the critic learns
