"""The options of `ppo-jax sft`, `dpo`, `reward` and `ppo`: one record each, read from the command line or YAML."""

import dataclasses
from pathlib import Path

from ppo_jax.data import TooLong
from ppo_jax.distributed import DistributedConfig
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.config import ModelOptions
from ppo_jax.resuming import Resume
from ppo_jax.reward_choice import RewardOptions
from ppo_jax.sharding import MeshConfig
from ppo_jax.train.dpo import DPOConfig
from ppo_jax.train.loop import LoopConfig
from ppo_jax.train.ppo import PPOConfig
from ppo_jax.train.reward_model import RewardConfig
from ppo_jax.train.sft import SFTConfig
from ppo_jax.types import Hyper


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What every stage is told. (Of what is named here only `model` may be given by place.)"""

    model: str
    """Hugging Face directory, name on the hub, or .gguf file."""
    _: dataclasses.KW_ONLY
    seed: int = 0
    """Of the order of the data, of sampling and of initialisation."""
    too_long: TooLong = "error"
    """What to do with longer texts than allowed."""
    compute: ModelOptions = ModelOptions()
    """How the model is run: memory against speed."""
    mesh: MeshConfig = MeshConfig()
    """How many devices work on what; by default one."""
    distributed: DistributedConfig = DistributedConfig()
    """How this process finds the others, where there are several."""
    overwrite: bool = False
    """Delete the run in run_dir and start anew."""


@dataclasses.dataclass(frozen=True)
class SFTSettings(RunSettings):
    """Teach a model to write the responses of demonstrations; the result is RUN_DIR/export/model."""

    data: Path
    """Demonstrations, a JSON object per line: {"prompt", "response"}, {"messages"} or {"text"}; .txt: texts."""
    run_dir: Path = Path("runs/sft")
    """Where all results go."""
    max_length: int = 512
    """Longest demonstration, in tokens."""
    held_out: int = 64
    """Demonstrations kept apart to measure on, at most a fifth; where that is none, the training ones are used."""
    adapter: AdapterConfig = AdapterConfig()
    """Which parameters are trained."""
    sft: SFTConfig = SFTConfig()
    """How, and for how long."""


@dataclasses.dataclass(frozen=True)
class DPOSettings(RunSettings):
    """Train a policy on preferences without a reward model; the result is RUN_DIR/export/model."""

    model: str
    """Base and reference: Hugging Face directory, name on the hub, or .gguf file."""
    pairs: Path
    """Preferences, a JSON object per line: {"chosen", "rejected"}, optionally "prompt". Margins are not used."""
    run_dir: Path = Path("runs/dpo")
    """Where all results go."""
    max_length: int = 512
    """Longest text (prompt, answer and EOS), in tokens."""
    held_out: int = 200
    """Pairs kept apart to measure on, at most a fifth; where that is none, the training ones are used."""
    adapter: AdapterConfig = AdapterConfig()
    """Which parameters are trained."""
    dpo: DPOConfig = DPOConfig()
    """How, and for how long."""


@dataclasses.dataclass(frozen=True)
class RewardSettings(RunSettings):
    """Train a reward model from preferences; the result is RUN_DIR/export/reward."""

    model: str
    """Base: Hugging Face directory, name on the hub, or .gguf file. LoRA only fits PPO on the same one."""
    pairs: Path | None = None
    """Preferences, a JSON object per line: {"chosen", "rejected"}, optionally "prompt" and "margin"."""
    ratings: Path | None = None
    """Or: {"response", "rating"}, optionally "prompt"; all responses of a batch are compared with one another."""
    choices: Path | None = None
    """Or: {"responses": [text, ...], "best": place from 0}, optionally "prompt"."""
    reference: Path | None = None
    """Texts on which scores get mean 0 and std 1, {"prompt", "response"} or {"text"}; by default the training texts."""
    run_dir: Path = Path("runs/reward")
    """Where all results go."""
    max_length: int = 512
    """Longest text (prompt and answer), in tokens."""
    held_out: int = 200
    """Lines kept apart to measure on, at most a fifth; where that is none, the training ones are used."""
    reward: RewardConfig = RewardConfig()
    """The reward model and its training."""


@dataclasses.dataclass(frozen=True)
class PPOSettings(RunSettings):
    """Train a policy by PPO against a reward; the result is RUN_DIR/export/model."""

    model: str
    """Base and reference: Hugging Face directory, name on the hub, or .gguf file."""
    prompts: Path
    """Prompts, a JSON object per line: {"prompt"} or {"messages"}, optionally "metadata"; .txt: a prompt per line."""
    reward: tuple[str, ...]
    """A reward model's directory, http://HOST:PORT/PATH, module:function or file.py:function; several are summed."""
    pretrain: Path | None = None
    """Texts for PPO-ptx, weighed by hyper.ptx_coef: {"text"} per line, or .txt."""
    run_dir: Path = Path("runs/ppo")
    """Where all results go."""
    max_prompt: int = 256
    """Longest prompt, in tokens."""
    held_out: int = 64
    """Prompts kept apart to evaluate on, at most a fifth; where that is none, the training ones are used."""
    scoring: RewardOptions = RewardOptions()
    """How the reward is called, and the weights of a sum."""
    policy: AdapterConfig = AdapterConfig()
    """What of the policy is trained."""
    ppo: PPOConfig = PPOConfig()
    """The algorithm's static choices. Empty sampling.stop_ids: those of model and tokenizer."""
    hyper: Hyper = Hyper()
    """Its scalars."""
    loop: LoopConfig = LoopConfig()
    """How long, and what when."""
    resume: Resume = "no"
    """Go on with the run in run_dir; auto: or start one where there is none. `--resume` alone: yes."""
