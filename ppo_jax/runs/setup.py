"""The records that describe a run, which the command line, the experiments and the stages share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.data.batches import Mixture
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards.base import Reward
from ppo_jax.rollout import Sampling
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.train.host import response_texts
from ppo_jax.train.loop import LoopConfig, OfflineLoop
from ppo_jax.train.options import PPOConfig
from ppo_jax.types import Hyper, Policy, PyTree, Rollout

# A judge scores the responses of an evaluation: (rollout, prompts, responses) -> one number per row.
Judge = Callable[[Rollout, Sequence[str], Sequence[str]], np.ndarray]


class Setup(NamedTuple):
    """What a run is about."""

    model: Model
    adapter: PyTree  # the policy's, at the start
    prompts: PromptSet
    held_out: PromptSet
    ppo: PPOConfig
    hyper: Hyper
    loop: LoopConfig
    seed: int
    reward: Reward
    pretrain: Sequence[Sequence[int]] = ()  # texts whose next-token loss is mixed in (PPO-ptx), as token rows
    judges: Mapping[str, Judge] = {}
    labels: Mapping[str, str] = {}  # what people are shown in place of a judge's name
    config: str = ""  # the resolved configuration, YAML; kept in config.yaml and in every checkpoint
    measured_on: str = "held-out"  # prompts; "training" where there were too few to hold any out
    mix: Mixture | None = None  # the shares of several files in the prompts of an update
    start: str = ""  # what the adapter was read from; "": it is fresh


class OfflineSetup(NamedTuple):
    """What a run on fixed data is about: fine-tuning, preferences, or a reward model."""

    model: Model
    train: Any  # token rows with what the stage knows of them, as `data.encode` makes them
    held_out: Any
    options: Any  # how it is trained: an SFTConfig, DPOConfig or RewardConfig
    seed: int
    adapter: AdapterConfig = AdapterConfig()  # what of a policy is trained; a reward model says so itself
    loop: OfflineLoop = OfflineLoop()
    config: str = ""  # as in `Setup`
    reference: Sequence[Sequence[int]] = ()  # what a reward model's scores are normalised on; none: the training texts
    mix: Mixture | None = None  # the shares of several files in a batch
    start: PyTree = None  # the adapter that is gone on with; None: a fresh one


class Result(NamedTuple):
    """The trained policy, and the evaluations before and after."""

    policy: Policy
    before: dict[str, float]
    after: dict[str, float]


def check_reference(reference: str, option: str, start: Any) -> None:
    """Raise ValueError where the reference is to be the adapter that training goes on with, and there is none."""
    if reference == "start" and not start:
        raise ValueError(f"{option} start needs --start: a policy without an adapter to go on with starts as the base")


def decode_responses(model: Model, sampling: Sampling, rollout: Rollout, special: bool = False) -> list[str]:
    """Decode every response, without the token that ended it; with `special` other special tokens stay."""
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.response_mask)
    return response_texts(tokens, mask, partial(model.decode, special=special), sampling.stop_ids)


def host_responses(setup: Setup, rollout: Rollout) -> list[str]:
    """Decode the responses as the host's reward reads them."""
    return decode_responses(setup.model, setup.ppo.sampling, rollout, setup.reward.special_tokens == "keep")


def with_stops(sampling: Sampling, model: Model) -> Sampling:
    """Add the model's stop tokens, unless `model_stops` is off, and its pad id; ValueError where another is named.

    Of two choices with the same stop tokens the same comes out.
    """
    if sampling.pad_id not in (Sampling.pad_id, model.pad_id):
        raise ValueError(
            f"sampling.pad_id={sampling.pad_id} has no effect: {model.name} pads with {model.pad_id}; leave it out"
        )
    stops = sampling.stop_ids
    if sampling.model_stops:
        stops = tuple(sorted({*stops, *model.stop_ids}))
    return dataclasses.replace(sampling, stop_ids=stops, model_stops=True, pad_id=model.pad_id)


def missing_stop(sampling: Sampling, model: Model) -> str:
    """Say that no token ends a response, or which of those named cannot; "" where all do."""
    tokenless = model.config.tokenless
    never = [i for i in sampling.stop_ids if any(start <= i < stop for start, stop in tokenless)]
    if len(never) < len(sampling.stop_ids):
        return f"stop_ids {never} are no tokens of {model.name} and are never drawn" if never else ""
    return (
        f"no token ends a response: {model.name} and its tokenizer name no EOS, and sampling.stop_ids none that is a "
        f"token. Every response has all {sampling.response_length} tokens, and stopping is not learnt. Name one with "
        "sampling.stop-ids"
    )
