"""What `ppo-jax ppo` chooses where it is left open: by what is trained and by the reward, measured in
docs/hyperparameters.md. A run that goes on keeps what it began with."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ppo_jax.rewards.base import Reward
from ppo_jax.runs.output import config, rundir
from ppo_jax.types import Hyper

S = TypeVar("S", bound=Any)

OPEN = 0.0  # of a learning rate or a value clip: to be chosen
LORA_RATE = 1e-3
WHOLE_RATE = 3.2e-3  # of whole matrices, divided by the model's width: 1e-4 at 32, where it was measured
VALUE_CLIP = math.inf


def choose_rate(kind: str, width: int) -> float:
    """Choose the policy's learning rate: 1e-3 for LoRA of any model; for whole matrices 3.2e-3 / width.

    That Adam's rate goes with 1 / width is Yang et al. 2022, "Tensor Programs V", table 3; LoRA's hardly does.
    """
    return LORA_RATE if kind == "lora" else float(f"{WHOLE_RATE / width:.2g}")


def fill_in(settings: S, width: int = 0, reward: Reward | None = None) -> tuple[S, str]:
    """Choose learning rate, value clip and score normalisation, where they are open; also return a sentence on them.

    A run that goes on keeps those in its config.yaml.

    Args:
      width: of the model, `hidden_size`; 0 where it is not known yet: the rate is then some positive number.
      reward: None where it is not known yet; its scores are then taken for scores of any scale.
    """
    earlier, told = read_earlier(settings), list[str]()
    hyper, score = settings.hyper, settings.ppo.score
    if hyper.learning_rate == OPEN:
        rate = earlier.get("hyper", {}).get("learning_rate") or choose_rate(settings.policy.kind, width or 1)
        hyper = hyper._replace(learning_rate=float(rate))
        told.append(f"hyper.learning_rate {rate:g} (policy.kind {settings.policy.kind})")
    if hyper.value_clip == OPEN and not settings.ppo.has_critic:
        hyper = hyper._replace(value_clip=Hyper().value_clip)  # nothing reads it
    elif hyper.value_clip == OPEN:
        clip = float(earlier.get("hyper", {}).get("value_clip") or VALUE_CLIP)
        hyper = hyper._replace(value_clip=clip)
        told.append(f"hyper.value_clip {'off' if clip == math.inf else clip}")
    if score.normalise == "auto":
        known = earlier.get("ppo", {}).get("score", {}).get("normalise")
        how = known if known not in (None, "auto") else "off" if has_unit_scale(reward) else "scale"
        score = dataclasses.replace(score, normalise=how)
        why = "scores of this reward model have std 1" if how == "off" else "by the std of the scores so far"
        told.append(f"ppo.score.normalise {how} ({'as before' if known else why})")
    filled = dataclasses.replace(settings, hyper=hyper, ppo=dataclasses.replace(settings.ppo, score=score))
    return filled, f"chosen: {', '.join(told)} (docs/hyperparameters.md)" if told else ""


def has_unit_scale(reward: Reward | None) -> bool:
    """Whether the scores are those of one reward model whose training brought them to mean 0 and std 1."""
    training = {} if reward is None else reward.metadata.get("reward") or {}
    return bool(training.get("normalise"))


def read_earlier(settings: Any) -> Mapping[str, Any]:
    """Read config.yaml of the run that goes on; {} where none does, or it cannot be read."""
    if settings.resume == "no" or settings.overwrite:
        return {}
    file = Path(settings.run_dir).expanduser() / rundir.CONFIG
    try:
        return config.read_mapping(file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError):
        return {}
