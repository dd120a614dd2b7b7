"""Where rewards come from: one protocol on the device, one on the host.

A device reward is a pure function that is traced into the iteration; a host reward is any Python that reads text.
Both return `Scores`; a row that could not be scored is invalid, never 0.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from ppo_jax.types import Frozen, Rollout, Scores


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
