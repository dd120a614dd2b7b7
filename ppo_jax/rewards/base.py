"""Where rewards come from: one protocol on the device, one on the host.

A device reward is a pure function that is traced into the iteration; a host reward is any Python that reads text.
Both return `Scores`; a row that could not be scored is invalid, never 0.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float

from ppo_jax.rewards.failures import FailureLog
from ppo_jax.types import Frozen, PyTree, Rollout, Scores


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
        """Scores of every row (numpy arrays): texts without special tokens, metadata as the prompts file gave it."""
        ...


class ChosenReward(NamedTuple):
    """A reward as `runs.Setup` takes it: on the device or on the host."""

    device: DeviceReward | None
    params: PyTree  # `Frozen.reward` of the device reward
    host: HostReward | None
    failures: FailureLog  # what the host reward tells of rows that it could not score
    notices: tuple[str, ...]  # what the user has to be told once
    meta: dict[str, Any]  # of a reward model, where it is the only source: accuracy, ...
    name: str  # what must stay the same when the run is resumed; a service may have moved


class LoadedReward(NamedTuple):
    """A reward model as PPO uses it. Exactly one of `device_reward` and `host_reward` is given."""

    kind: Literal["lora", "full", "retokenised"]
    device_reward: DeviceReward | None
    reward_params: PyTree  # `Frozen.reward` of the device reward
    host_reward: HostReward | None
    notice: str  # what the user has to be told once; "" if nothing
    meta: dict[str, Any]  # what training said of it: accuracy, ...
