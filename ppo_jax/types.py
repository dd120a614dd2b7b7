"""The records that flow through PPO, and the legend of shape letters.

    B  sequences in the logical batch      P  prompt slots (left-padded)
    T  response slots (right-padded)       S  = P + T, slots of a whole sequence
    V  vocabulary                          D  hidden width
    L  layers                              K  key/value heads, H  head width

Masks are made by the sampler and carried; nothing is ever inferred from `token != pad`.
"""

import dataclasses
import math
from typing import Annotated, Any, NamedTuple

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
    totals: Float[Array, " B"]  # sum of each response's rewards as the advantages were estimated from: whitened, too


class Policy(NamedTuple):
    """What PPO trains."""

    adapter: PyTree  # models.adapters
    value_head: PyTree  # parameters of a ValueHead
    critic: PyTree = None  # the adapter that values are read from; None: the policy's own (shared trunk)


class Frozen(NamedTuple):
    """What PPO reads and never changes."""

    base: PyTree  # the trunk that all roles share
    reward: PyTree = None  # what the on-device reward needs: adapter and head, or a whole model
    reference: PyTree = {}  # the adapter that the KL is measured to; {}: the base itself


class Off(NamedTuple):
    """In `Annotated[int, Off(0)]`: the value of a setting that the word "off" stands for."""

    value: float | str


FloatOrOff = Annotated[float, Off(math.inf)]


class Hyper(NamedTuple):
    """Scalars of PPO: Python floats on the host, traced float32 inside jit.

    Changing one never recompiles, and `vmap` over them is a sweep. Where infinity is off, settings may say `off`.
    """

    learning_rate: float = 1e-4  # The policy learns at this rate at its peak; 0 lets `ppo-jax ppo` choose it.
    temperature: float = 0.7  # Sampling and every log-prob divide the logits by this temperature.
    gamma: float = 1.0  # Rewards are discounted by this factor per token.
    lam: float = 0.95  # This is the lambda of GAE.
    max_grad_norm: float = 1.0  # The gradient is clipped to this global norm.
    # -- KL to the reference ------------------------------------------------------------------------------------------
    kl_coef: float = 0.05  # Beta weighs the KL penalty (its start value, where it changes).
    kl_target: float = 6.0  # The adaptive coefficient steers to this KL, in nats per response.
    kl_horizon: float = 10_000.0  # The adaptive coefficient adapts over this many episodes.
    kl_coef_end: float = 0.0  # A linear schedule of the coefficient ends here.
    kl_steps: float = 100.0  # A linear schedule of the coefficient takes this many iterations.
    # -- scores -------------------------------------------------------------------------------------------------------
    score_clip: FloatOrOff = math.inf  # Scores are clipped to [-score_clip, score_clip]; inf is off.
    missing_eos: float = 1.0  # A cut response's score loses this, or becomes minus this (ppo.score.missing_eos).
    length_penalty: float = 0.0  # The score loses this for every response token.
    # -- policy loss --------------------------------------------------------------------------------------------------
    clip_low: float = 0.2  # The ratio is clipped to [1 - clip_low, 1 + clip_high].
    clip_high: float = 0.2  # The ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip: FloatOrOff = math.inf  # This bounds the ratio where the advantage is negative; inf is off.
    entropy_coef: float = 0.0  # The entropy bonus has this weight.
    importance_cap: FloatOrOff = 2.0  # The importance weights policy / behaviour are cut off at this; inf is off.
    ptx_coef: float = 0.0  # The pretraining loss (PPO-ptx) has this weight.
    target_kl: FloatOrOff = math.inf  # An iteration makes no update beyond this KL to the old policy; inf is off.
    ratio_threshold: FloatOrOff = math.inf  # A minibatch is skipped beyond this mean ratio; inf is off.
    # -- critic -------------------------------------------------------------------------------------------------------
    vf_coef: float = 0.1  # The value loss has this weight.
    # A value moves at most this far from its old one, in units of the return; inf is off. 0 lets `ppo-jax ppo` choose.
    value_clip: FloatOrOff = 0.2
    huber_delta: FloatOrOff = math.inf  # Value errors beyond this count linearly; inf is off.
    critic_lr_scale: float = 1.0  # The critic's own parameters learn at this times learning_rate.
    critic_max_grad_norm: float = 0.0  # The critic's own gradient is clipped to this; 0: together with the policy's.
    critic_warmup: float = 0.0  # Only the critic learns in this many first iterations.
