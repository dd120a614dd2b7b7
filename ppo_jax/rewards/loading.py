"""Reward models on disk: what a directory holds, how PPO uses it, and the same model as a plain scorer of texts.

Kinds of directory that are understood, also inside a run directory of `ppo-jax reward` (its export/reward):

    artifact.json                               LoRA and head on a base (`ppo_jax.artifacts`)
    config.json, ...ForSequenceClassification   a model of its own (`models.seqcls`), ours or anybody's
    value_head.safetensors                      LLaMA-Factory's: beside a PEFT adapter on the policy's base, or a model
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ppo_jax.data.chat import end_ids
from ppo_jax.data.tokens import leading_bos, with_bos, without_ends
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import artifacts, classifiers, peft_reading, value_heads
from ppo_jax.models.files.artifacts import EXPORT, REWARD
from ppo_jax.models.files.foreign import describe_directory
from ppo_jax.models.files.hub import resolve
from ppo_jax.models.files.tokenizer import check_vocabulary, load_tokenizer
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.parallel.mesh import current_mesh
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rewards.base import Reward
from ppo_jax.rewards.endings import MARGIN, Side, cut_sides, end_rows, longest_token
from ppo_jax.rewards.model import FullReward, ScoreRows, model_reward, row_scorer, same_tokens, text_reward
from ppo_jax.rewards.reading import At, Reading, choose_reading


def load_reward(
    path: str | Path,
    policy_model: Model,
    stop_ids: tuple[int, ...] | None = None,
    micro_batch: int = 16,
    at: At = "auto",
) -> Reward:
    """The reward model in a directory, ready for a run: a device function and its arrays, or a host function.

    A LoRA artifact must have been trained on the policy's base, and costs its adapter and head alone. A model of its
    own runs on the device where its tokenizer is the policy's; else it reads text, which is tokenised again: a notice
    says so. It lies on the current mesh like the policy's base, and is run in that one's dtype.

    Args:
      path: an artifact, a sequence-classification directory, or the run directory of `ppo-jax reward`.
      stop_ids: what ends a response (`Sampling.stop_ids`); by default those of the policy's model.
      micro_batch: rows that a model of its own scores at once; on a mesh rounded up to fill the devices that cut rows.
      at: where the score is read (`rewards.reading`).

    Raises:
      FileNotFoundError: there is neither.
      ValueError: it is damaged, of another base, or of an unsupported kind.
    """
    where = find_reward(path)
    stop_ids = policy_model.stop_ids if stop_ids is None else stop_ids
    if (where / artifacts.DESCRIPTION).is_file():
        found = artifacts.load(where, "reward")
        artifacts.check_base(found, policy_model.fingerprint, policy_model.config)
        reading = choose_reading(str(path), at, policy_model.tokenizer, ours=True)
        ends = () if reading.sampled else stop_ids
        device = adapter_reward(found.trunk(policy_model.config), ends, reading.closing)
        role = RewardRole(found.adapter, found.head)
        return _told(Reward(device, params=role, layers=found.layers, metadata=found.meta), reading)
    if peft_reading.is_adapter(where):
        return _load_their_adapter(where, str(path), policy_model, stop_ids, at)
    mesh = current_mesh()
    model, tokenizer = classifiers.load(where, policy_model.config.dtype, mesh), load_tokenizer(where)
    check_vocabulary(model.config, tokenizer)
    if mesh is not None:
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        micro_batch = -(-micro_batch // parts) * parts
    reading = choose_reading(str(path), at, tokenizer, model.ours, model.pad_id)
    if same_tokens(policy_model.tokenizer, tokenizer):
        device = model_reward(model.config, () if reading.sampled else stop_ids, micro_batch, reading.closing)
        return _told(Reward(device, params=FullReward(model.params, model.head), metadata=model.meta), reading)
    if reading.sampled:
        raise ValueError(f"--scoring.at sampled: the reward model {path} has another tokenizer, so it reads text alone")
    notice = (
        f"the reward model {path} has another tokenizer than {policy_model.name}: responses are scored as text, which "
        "is tokenised again. A chat template's markers in the prompts reach it as the text that they are"
    )
    length = model.config.max_positions
    rows = row_scorer(model.params, RewardRole({}, model.head), model.config, length, (micro_batch,))
    host = text_reward(rows, _scorer(str(path), tokenizer, length, rows, {}, reading).encode)
    return _told(Reward(host=host, notices=(notice,), metadata=model.meta), reading)


def _load_their_adapter(where: Path, name: str, policy_model: Model, stop_ids: tuple[int, ...], at: At) -> Reward:
    """Load LLaMA-Factory's adapter with a value head, on the policy's base."""
    config = policy_model.config
    role = RewardRole(peft_reading.read_lora(config, where), value_heads.load_head(where, config.hidden_size))
    reading = choose_reading(name, at, policy_model.tokenizer, ours=False)
    device = adapter_reward(config, () if reading.sampled else stop_ids, reading.closing)
    return _told(Reward(device, params=role), reading)


def _told(reward: Reward, reading: Reading) -> Reward:
    """The reward, which says where it is read: to the user, and, where that is not as ever, to those who resume."""
    name = f"read behind {list(reading.closing)}" if reading.closing else ""
    notices = (*reward.notices, *filter(None, [reading.notice]))
    return dataclasses.replace(reward, name=name, notices=notices)


class Scorer(NamedTuple):
    """A reward model as a function of texts."""

    name: str
    tokenizer: Any
    bos: list[int]  # what comes before every text: [the BOS id] or []
    max_length: int  # longest text in tokens; of a longer one the last are read
    score_rows: ScoreRows
    meta: dict[str, Any]
    ends: tuple[int, ...] = ()  # end tokens, of which none is read at the end of a text, as in training
    reading: Reading = Reading()  # what is put behind a text
    longest: int = 128  # characters of the tokenizer's longest token

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """Token rows of prompt + response, as in training (`data.tokens`); [] for a text without tokens."""
        return self.encode_sides(list(zip(prompts, responses, strict=True)))

    def encode_texts(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token rows of whole texts; of those longer than `max_length` BOS and the last tokens."""
        return self.encode_sides([("", text) for text in texts], [max_length] * len(texts))

    def encode_sides(self, sides: Sequence[Side], lengths: Sequence[int | None] = ()) -> list[list[int]]:
        """Token rows of (prompt, response); each is cut to its length (None: `max_length`). Long ends alone are read.

        Far beyond that length only the end of a text is tokenised (`rewards.endings`).
        """
        fixed = len(self.bos) + len(self.reading.closing)
        rooms = [
            max(min(most or self.max_length, self.max_length) - fixed, 1) for most in lengths or [None] * len(sides)
        ]
        rows = end_rows(sides, self.tokenizer, rooms, self.longest, self._text)
        closing = list(self.reading.closing)
        return [self.bos + row[-room:] + closing if row else [] for row, room in zip(rows, rooms, strict=True)]

    def cut(self, side: Side) -> Side:
        """Cut off the beginning of a long text, which no row of `encode_sides` depends on."""
        return cut_sides(side, self.longest * (self.max_length + MARGIN))

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """The score of each response; NaN for a text without tokens."""
        return self.score_rows(self.encode(prompts, responses))

    def _text(self, ids: Sequence[int]) -> list[int]:
        """The tokens that are the text's own: without BOS, the closing of its turn, and end tokens."""
        bos, written = self.bos, list(self.reading.written)
        row = with_bos(ids, bos)
        if written and row[-len(written) :] == written:
            row = row[: -len(written)]
        return without_ends(row, self.ends, len(bos))[len(bos) :]


def load_scorer(
    path: str | Path,
    base: str | None = None,
    max_length: int = 0,
    batch_sizes: Sequence[int] = (16,),
    at: At = "auto",
    most_tokens: int | None = None,
) -> Scorer:
    """A reward model from a directory (as `load_reward`) as a function of texts.

    Args:
      base: of a LoRA artifact, where the one that it names has moved.
      max_length: longest text in tokens; 0: the model's limit.
      batch_sizes: numbers of rows that a program is compiled for.
      at: where the score is read (`rewards.reading`).
      most_tokens: in a batch (`rewards.model.row_scorer`).

    Raises: as `load_reward`; also ValueError for a `max_length` beyond the model's.
    """
    where = find_reward(path)
    if at == "sampled":
        raise ValueError("at=sampled is for the responses of PPO; texts are read at last-text or end-token")
    if peft_reading.is_adapter(where):
        raise ValueError(
            f"{where} is an adapter of LLaMA-Factory with a value head, which is read in PPO alone; merge it into its "
            "base (`llamafactory-cli export`)"
        )
    if not (where / artifacts.DESCRIPTION).is_file():
        if base is not None:
            raise ValueError(f"{where} is a model of its own, so it has no base; leave --model out")
        model, tokenizer = classifiers.load(where, mesh=current_mesh()), load_tokenizer(where)
        check_vocabulary(model.config, tokenizer)
        reading = choose_reading(str(path), at, tokenizer, model.ours, model.pad_id)
        role, config, params, meta = RewardRole({}, model.head), model.config, model.params, model.meta
    else:
        found, below = _with_base(where, base)
        params, tokenizer, meta = below.params, below.tokenizer, found.meta
        reading = choose_reading(str(path), at, tokenizer, ours=True)
        role, config = RewardRole(found.adapter, found.head), found.trunk(below.config)
    if not 0 <= max_length <= config.max_positions or max_length == 1:
        raise ValueError(f"max_length={max_length} must be from 2 to the model's {config.max_positions}; 0: that")
    max_length = max_length or config.max_positions
    rows = row_scorer(params, role, config, max_length, batch_sizes, most_tokens=most_tokens)
    return _scorer(str(path), tokenizer, max_length, rows, meta, reading)


def export_reward(path: str | Path, out: str | Path, base: str | None = None, overwrite: bool = False) -> Path:
    """Writes a LoRA reward artifact as a Hugging Face sequence-classification directory, merged with its base.

    The head's gain is in score.weight; its bias is `ppo_jax_bias` of config.json, which `transformers` does not add
    (`models.seqcls`). Arguments and errors as `load_scorer` and `seqcls.save`.
    """
    where = find_reward(path)
    if not (where / artifacts.DESCRIPTION).is_file():
        raise ValueError(f"{where} is a sequence-classification directory already; copy it")
    found, below = _with_base(where, base)
    role, trunk = RewardRole(found.adapter, found.head), found.trunk(below.config)
    return save_full(out, below, role, trunk, found.meta, overwrite)


def save_full(
    out: str | Path, model: Model, role: RewardRole, trunk: ModelConfig, meta: dict[str, Any], overwrite: bool = False
) -> Path:
    """A role on a base as one sequence-classification directory: base cut to the role's trunk, adapter merged."""
    cut = model.params
    if trunk.num_layers < model.config.num_layers:
        cut = cut | {"layers": jax.tree.map(lambda w: w[: trunk.num_layers], cut["layers"])}
    return classifiers.save(out, trunk, cut, role.head, model.tokenizer, meta, overwrite, role.adapter)


def find_reward(path: str | Path) -> Path:
    """The directory that holds the reward model: `path`, or export/reward in the run directory `path`."""
    given = Path(path).expanduser()
    for where in (given, given / EXPORT / REWARD):
        if (where / artifacts.DESCRIPTION).is_file() or (where / "config.json").is_file():
            return where
        if value_heads.has_value_head(where) and peft_reading.is_adapter(where):
            return where
    if not given.exists():
        return resolve(path)  # a hub name, or its error
    if what := describe_directory(given):
        raise FileNotFoundError(what)
    raise FileNotFoundError(
        f"{given} holds no reward model: neither {artifacts.DESCRIPTION} (of `ppo-jax reward`) nor config.json (of a "
        "Hugging Face sequence classifier) is in it, nor in its export/reward"
    )


def _with_base(where: Path, base: str | None) -> tuple[artifacts.Artifact, Model]:
    found = artifacts.load(where, "reward")
    try:
        model = load_model(base or found.base)
    except FileNotFoundError as error:
        if base:
            raise
        raise FileNotFoundError(f"{error} (the base that {where} names; give --model if it has moved)") from error
    artifacts.check_base(found, model.fingerprint, model.config)
    return found, model


def _scorer(
    name: str, tokenizer: Any, max_length: int, score_rows: ScoreRows, meta: dict[str, Any], reading: Reading
) -> Scorer:
    """With what its tokenizer says of the beginnings and ends of texts."""
    bos, ends, longest = leading_bos(tokenizer), end_ids(tokenizer), longest_token(tokenizer)
    return Scorer(name, tokenizer, bos, max_length, score_rows, meta, ends, reading, longest)
