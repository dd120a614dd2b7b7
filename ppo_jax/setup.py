"""What a PPO run is about: the records that the command line, the experiments and `runs.run_ppo` share."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ppo_jax.models.config import ModelConfig
from ppo_jax.rewards.base import DeviceReward, HostReward
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.rollout import Sampling
from ppo_jax.train.loop import LoopConfig, response_texts
from ppo_jax.train.ppo import PPOConfig
from ppo_jax.types import Hyper, Policy, PyTree, Rollout


class Model(NamedTuple):
    """A base model with its tokenizer."""

    name: str  # the path or hub name the user gave
    config: ModelConfig
    params: PyTree
    tokenizer: Any
    fingerprint: str  # of the weight files: adapters only fit the base they were trained on

    @property
    def pad_id(self) -> int:
        """Fills empty slots; masks say which those are, so any id serves."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a response: the model's EOS ids and the tokenizer's."""
        own = self.tokenizer.eos_token_id
        return tuple(sorted({*self.config.eos_token_ids, *(() if own is None else (int(own),))}))

    def decode(self, ids: np.ndarray) -> str:
        """Token ids of a response -> its text without special tokens, as it stands behind the prompt's.

        Decoders of the SentencePiece kind drop the space before the first token of a text, and a response is not its
        beginning: prompt + response would be another text than the tokens say. So a token of known text goes first and
        is cut off again. (A tokenizer without a decoder only puts spaces between its tokens, and none before.)
        """
        read = partial(self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        row = [int(token) for token in ids]
        if getattr(self.tokenizer, "is_fast", False) and self.tokenizer.backend_tokenizer.decoder is None:
            return str(read(row))
        guard = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        before, text = str(read(guard)), str(read([*guard, *row]))
        return text[len(before) :] if before and text.startswith(before) else str(read(row))


class PromptSet(NamedTuple):
    """Prompts as token rows and as text, with whatever else the user gave for each."""

    rows: Sequence[Sequence[int]]
    texts: Sequence[str]
    metadata: Sequence[dict[str, Any]]


# A judge scores the responses of an evaluation: (rollout, prompts, responses) -> one number per row.
Judge = Callable[[Rollout, Sequence[str], Sequence[str]], np.ndarray]


class Setup(NamedTuple):
    """What a run is about. Exactly one of the two rewards is given."""

    model: Model
    adapter: PyTree  # the policy's, at the start
    prompts: PromptSet
    held_out: PromptSet
    ppo: PPOConfig
    hyper: Hyper
    loop: LoopConfig
    seed: int
    device_reward: DeviceReward | None = None
    reward_params: PyTree = None  # `Frozen.reward`
    host_reward: HostReward | None = None
    failures: FailureLog | None = None  # what the host reward tells of rows that it could not score
    pretrain: Sequence[Sequence[int]] = ()  # texts whose next-token loss is mixed in (PPO-ptx), as token rows
    judges: Mapping[str, Judge] = {}
    labels: Mapping[str, str] = {}  # what people are shown in place of a judge's name
    config: str = ""  # the resolved configuration, YAML; kept in config.yaml and in every checkpoint
    reward_name: str = ""  # what the reward is, where its arrays do not tell: a run resumes with the same one only


class Result(NamedTuple):
    """The trained policy, and the evaluations before and after."""

    policy: Policy
    before: dict[str, float]
    after: dict[str, float]


def decode_responses(model: Model, sampling: Sampling, rollout: Rollout) -> list[str]:
    """The text of every response."""
    return response_texts(
        np.asarray(rollout.tokens), np.asarray(rollout.response_mask), model.decode, sampling.stop_ids
    )
