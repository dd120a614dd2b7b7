"""A role = adapter + head on a base; what all roles share below their adapters."""

from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.adapters import shared_layers
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.types import Policy, Prefix, PyTree


def shared_prefix(
    base: PyTree, config: ModelConfig, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], layers: int
) -> Prefix | None:
    """The residual stream below layer `layers`, equal for all roles whose adapters start there; None for 0 layers.

    The last layer is never part of it (an adapter may touch no layer at all): what follows it is the final norm,
    which belongs to the role.
    """
    layers = min(layers, config.num_layers - 1)
    if layers == 0:
        return None
    return Prefix(apply(base, {}, config, tokens, positions_from_mask(mask), layers=(0, layers)), layers)


def role_hidden(
    base: PyTree,
    adapter: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    prefix: Prefix | None = None,
) -> Float[Array, "B S D"]:
    """Final hidden states of whole sequences under one role, from the shared prefix where there is one."""
    positions = positions_from_mask(mask)
    if prefix is None:
        return apply(base, adapter, config, tokens, positions)
    rest = (prefix.layers, config.num_layers)
    return apply(base, adapter, config, None, positions, hidden=prefix.hidden, layers=rest)


def before_response(hidden: Float[Array, "B S D"], response_length: int) -> Float[Array, "B T D"]:
    """The states in which the response tokens were chosen: slots P-1 .. S-2."""
    return hidden[:, -response_length - 1 : -1]


def policy_depth(policy: Policy, config: ModelConfig) -> int:
    """How many layers, from the bottom, the policy, its critic and the base share."""
    return min(shared_layers(adapter, config) for adapter in (policy.adapter, policy.critic or {}))


def own_trunk(base: PyTree, adapter: PyTree) -> tuple[PyTree, PyTree]:
    """(base, adapter) of a role; an adapter that replaces everything is a base of its own, and ours is not read."""
    whole = {"embedding", "layers", "final_norm"} <= adapter.keys()
    return (adapter, {}) if whole else (base, adapter)
