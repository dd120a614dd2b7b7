"""The phases of the sentiment demo with their shares of the work, in texts times layers that are passed over."""

from collections.abc import Sequence
from typing import Any

from ppo_jax.models.config import ModelConfig
from ppo_jax.runs.output.pace import PlannedPhase

LABELS = {"reward": "the reward model", "judge": "the second reward model"}
WITH_GRADIENT = 3  # a layer that is trained costs as much as so many that are read


def plan_rating_models(wanted: Sequence[Any], config: ModelConfig, test: int) -> dict[str, PlannedPhase]:
    """The phases of training these `rating_model.Wanted`, and of measuring them on `test` sentences."""
    plan: dict[str, PlannedPhase] = {}
    for name, train, reward in wanted:
        depth, trained = reward.trunk(config).num_layers, reward.lora_layers if reward.trains else 0
        plan[f"{name} features"] = PlannedPhase(f"what {LABELS.get(name, name)} reads", len(train) * (depth - trained))
        if trained:
            plan[name] = PlannedPhase(LABELS.get(name, name), WITH_GRADIENT * reward.epochs * len(train) * trained)
    if wanted:
        depth = max(one.reward.trunk(config).num_layers for one in wanted)
        plan["held-out features"] = PlannedPhase("measuring both on held-out sentences", test * depth)
    return plan


def plan_ppo(settings: Any, config: ModelConfig) -> dict[str, PlannedPhase]:
    """The phase of PPO: responses are sampled (twice the work of reading), read by reference and reward, learnt."""
    layers, trained = config.num_layers, settings.policy.layers or config.num_layers
    read = 2 * layers + layers + settings.reward.trunk(config).num_layers
    learnt = WITH_GRADIENT * trained * settings.ppo.epochs
    responses = settings.loop.updates * settings.loop.batch_size * settings.ppo.group_size
    return {"ppo": PlannedPhase("PPO", responses * (read + learnt))}


def durations(clock: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase, from the time at the end of each."""
    return {name: clock[name] - before for name, before in zip([*clock][1:], clock.values(), strict=False)}
