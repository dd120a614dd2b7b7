"""What a reward is: a function on the device, one on the host, or the sum of both; and the record that a run takes.

A device reward is a pure function that is traced into the iteration; a host reward is any Python that reads text.
Both return `Scores`; a row that could not be scored is invalid, never 0 (rewards/scores.py).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Array, Float

from ppo_jax.rewards.failures import FailureLog
from ppo_jax.types import Frozen, PyTree, Rollout, Scores

SpecialTokens = Literal["drop", "keep"]


@runtime_checkable
class DeviceReward(Protocol):
    """Scores a rollout inside jit."""

    def __call__(
        self, frozen: Frozen, rollout: Rollout, prefix: Float[Array, "B S D"] | None, prefix_layers: int
    ) -> Scores:
        """Scores of every row.

        Args:
          frozen: the base and this reward's own arrays (`frozen.reward`).
          prefix: the residual stream of prompt and response below layer `prefix_layers`, computed once for all
            roles; None when nothing is shared.
        """
        ...


@runtime_checkable
class HostReward(Protocol):
    """Scores texts between two jitted halves of the iteration."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        """Scores of every row (numpy arrays): texts (`Reward.special_tokens`), metadata as the prompts file gave it."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
    """Where a run's scores come from: `device`, `host`, or both, whose scores are added (`combine.sum_scores`).

    `Reward(device=f, params=p)`, `Reward(host=g)`; from what a user names, `rewards.options.choose_reward` makes one.
    """

    device: DeviceReward | None = None
    """Scores the rollout inside jit."""
    host: HostReward | None = None
    """Scores texts."""
    params: PyTree = None
    """Arrays of the device function, which it finds in `Frozen.reward`."""
    layers: int | None = None
    """How many layers of the policy's base a LoRA reward model reads; None: all of them, or not on that base."""
    name: str = ""
    """What it is, where its arrays do not tell: a run resumes with a reward of the same name only."""
    special_tokens: SpecialTokens = "drop"
    """Whether responses keep special tokens (<think>) where the host function reads them, but for what ended them."""
    failures: FailureLog = dataclasses.field(default_factory=FailureLog)
    """What the host function tells of rows that it could not score, and why."""
    notices: tuple[str, ...] = ()
    """What the user has to be told once, at the start."""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What training said of a reward model that is the only source: accuracy, ..."""

    def __post_init__(self) -> None:
        if self.device is None and self.host is None:
            raise ValueError("a run needs a reward: give a device function, a host function, or both for their sum")
