"""Demonstrations -> SFT, comparisons -> reward model, prompts -> PPO: the classic pipeline in a minute on a laptop.

    ppo-jax demo
    ppo-jax demo --hyper.kl-coef 0.05     # more reward, further from the fine-tuned model

A random model of four layers learns a toy language from demonstrations ("the plot is very lovely and dull"). A reward
model on it learns from comparisons that good words are better than bad ones, and PPO makes the model say good words
while the KL to the fine-tuned model stays small. On an own model the same three stages are `ppo-jax sft`, `reward`
and `ppo` (Ouyang et al. 2022, figure 2).
"""

import dataclasses
from pathlib import Path

import numpy as np

from ppo_jax.cli.common import next_commands as list_commands
from ppo_jax.cli.demo.language import BAD, GOOD, model
from ppo_jax.cli.parse import Brief
from ppo_jax.data import PairRecord, SFTRecord, encode_pairs, encode_prompts, encode_sft
from ppo_jax.data.disk import replace_file
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.files.artifacts import EXPORT, MODEL
from ppo_jax.models.pretrained import Model
from ppo_jax.report import page
from ppo_jax.rewards.adapter import adapter_reward
from ppo_jax.rewards.base import Reward
from ppo_jax.rollout import Sampling
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.exports import write_model
from ppo_jax.runs.facts import environment, record_start
from ppo_jax.runs.output import config, rundir
from ppo_jax.runs.output.pace import PlannedPhase
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.ppo import run_ppo
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.runs.reward import RewardResult, run_reward
from ppo_jax.runs.setup import OfflineSetup, Setup
from ppo_jax.runs.sft import run_sft
from ppo_jax.train.loop import LoopConfig
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.reward import RewardConfig
from ppo_jax.train.sft import SFTConfig
from ppo_jax.train.state import key_stream
from ppo_jax.types import Hyper

TASK = (
    "A random model of four layers learned a toy language from demonstrations; a reward model on it learned from "
    "comparisons that good words are better than bad ones; PPO made it say good words."
)
OPENINGS = [f"the {noun} {verb}" for noun in ("film", "plot", "cast", "script") for verb in ("is", "was")]
MAX_LENGTH = 12
PLAN = {  # shares: seconds of each phase on two quiet cores
    "sft": PlannedPhase("SFT", 10),
    "reward": PlannedPhase("reward model", 15),
    "ppo": PlannedPhase("PPO", 30),
}
LABELS = {"judge": "the count of good words less bad ones"}


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Train a toy model by SFT, a reward model and PPO, in a minute on a laptop."""

    run_dir: Path = Path("runs/demo")
    """All results go into this directory; each stage has a folder of its own."""
    seed: int = 0
    """This number seeds data, sampling and initialisation."""
    demonstrations: int = 512
    """SFT learns from this many sentences."""
    pairs: int = 512
    """The reward model learns from this many comparisons."""
    sft: SFTConfig = SFTConfig(epochs=4, batch_size=32, learning_rate=3e-3)
    """These options say how all parameters are fine-tuned, and for how long."""
    reward: RewardConfig = RewardConfig(lora_layers=2, batch_size=32, epochs=10, learning_rate=3e-3)
    """These options describe the reward model and its training."""
    policy: AdapterConfig = AdapterConfig(layers=2, rank=8)
    """These options say what of the policy PPO trains."""
    ppo: PPOConfig = PPOConfig(sampling=Sampling(response_length=8), epochs=2, num_minibatches=4)
    """These choices of the algorithm are compiled in."""
    hyper: Hyper = Hyper(learning_rate=2e-3, temperature=1.0, kl_coef=0.3)
    """These numbers may change without compiling anew; the word off turns off what inf turns off."""
    loop: LoopConfig = LoopConfig(updates=20, batch_size=64, eval_every=10, checkpoint_every=10)
    """These options say how long the run is, and what happens when."""
    resume: Resume = "no"
    """Go on with the run that is in run_dir; auto starts one where there is none. `--resume` alone means yes."""
    overwrite: bool = False
    """Delete the run that is in run_dir and start anew."""


BRIEF = Brief(
    ("ppo-jax demo", "ppo-jax demo --run-dir runs/again --hyper.kl-coef 0.1"),
    {
        DemoSettings: (
            *("run_dir", "seed", "demonstrations", "pairs", "resume", "overwrite"),
            *("sft", "reward", "policy", "ppo", "hyper", "loop"),
        ),
        SFTConfig: ("epochs", "batch_size", "learning_rate"),
        RewardConfig: ("lora_layers", "epochs", "learning_rate"),
        AdapterConfig: ("kind", "layers", "rank"),
        PPOConfig: ("sampling", "epochs", "num_minibatches"),
        Sampling: ("response_length",),
        Hyper: ("learning_rate", "temperature", "kl_coef"),
        LoopConfig: ("updates", "batch_size", "eval_every"),
    },
)


def demo(settings: DemoSettings) -> Path:
    """Run the three stages of `ppo-jax demo`; return the path of the report."""
    directories, repeatable = open_directories(settings), repeatable_yaml(settings)
    rng, base, seed = np.random.default_rng(settings.seed), model(settings.seed), settings.seed
    with progress("ppo-jax demo", log=settings.run_dir / rundir.LOG) as screen:
        screen.plan = PLAN
        # -- 1: SFT, on sentences whose words are good and bad by chance -----------------------------------------------
        demonstrations, unseen = (
            encode_sft(sentences(rng, n), base.tokenizer, MAX_LENGTH) for n in (settings.demonstrations, 64)
        )
        setup = OfflineSetup(
            base, demonstrations, unseen, settings.sft, seed, AdapterConfig(kind="full"), config=repeatable
        )
        sft = run_sft(directories["sft"], setup, screen, settings.resume)
        write_part(directories["sft"], "SFT on a toy language", "Here is its first part.")
        screen.message(f"SFT: perplexity {sft.before['perplexity']:.1f} -> {sft.after['perplexity']:.2f}")

        # -- 2: reward model, on pairs of sentences of which one has more good words -----------------------------------
        pairs, unseen_pairs = (
            encode_pairs(comparisons(rng, n), base.tokenizer, MAX_LENGTH, eos=False) for n in (settings.pairs, 128)
        )
        setup = OfflineSetup(sft.model, pairs, unseen_pairs, settings.reward, seed, config=repeatable)
        reward = run_reward(directories["reward"], setup, screen, settings.resume)
        write_part(directories["reward"], "Reward model of a toy language", "Here is its second part.")
        screen.message(f"reward model: {reward.accuracy:.3f} of held-out pairs in the right order")

        # -- 3: PPO, from the fine-tuned model, which is also its reference --------------------------------------------
        summary = summarise(8 * len(OPENINGS), reward.accuracy, seed)
        rundir.write_summary(directories["ppo"], summary)  # for a report in the middle of the run
        result = run_ppo(directories["ppo"], make_setup(settings, sft.model, reward), screen, settings.resume)
        path = page.write(directories["ppo"], {**summary, "before": result.before, "after": result.after})
        exported = directories["ppo"] / EXPORT / MODEL
        write_model(exported, sft.model, result.policy.adapter)
        screen.message(f"report: {path}\n{next_commands(settings.run_dir)}")
    return path


def next_commands(run_dir: Path) -> str:
    """Say what to do next."""
    model = run_dir / "ppo" / EXPORT / MODEL
    return list_commands(
        (f'ppo-jax generate --model {model} --prompt "the film is"', "what it says now"),
        ("ppo-jax sft --help", "the first of the three stages with a model and texts of your own"),
        ("ppo-jax ppo --help", "PPO with your prompts and reward"),
    )


def open_directories(settings: DemoSettings) -> dict[str, Path]:
    """Open a run directory for each stage, and write the settings that repeat the run into them."""
    found = {}
    for name in ("sft", "reward", "ppo"):
        found[name] = rundir.open_run(settings.run_dir / name, settings.resume, settings.overwrite)
        if not (found[name] / rundir.CONFIG).exists():
            replace_file(found[name] / rundir.CONFIG, repeatable_yaml(settings).encode())
        record_start(found[name])
    return found


def repeatable_yaml(settings: DemoSettings) -> str:
    """Say the settings in YAML. Passed back with --config it must neither delete nor continue anything by itself."""
    return config.to_yaml(dataclasses.replace(settings, resume="no", overwrite=False))


def make_setup(settings: DemoSettings, base: Model, reward: RewardResult) -> Setup:
    """Describe the third stage."""
    rows = encode_prompts(OPENINGS * 8, base.tokenizer, MAX_LENGTH).rows
    prompts = PromptSet(rows, OPENINGS * 8, [{}] * len(rows))
    sampling = dataclasses.replace(settings.ppo.sampling, stop_ids=base.stop_ids, pad_id=base.pad_id)
    adapter = init_adapter(key_stream(settings.seed, "adapter"), base.params, base.config, settings.policy)
    return Setup(
        model=base,
        adapter=adapter,
        prompts=prompts,
        held_out=prompts,  # all there are
        measured_on="training",
        ppo=dataclasses.replace(settings.ppo, sampling=sampling),
        hyper=settings.hyper,
        loop=settings.loop,
        seed=settings.seed,
        reward=Reward(
            adapter_reward(reward.trunk, sampling.stop_ids),
            params=reward.role,
            layers=reward.trunk.num_layers,
            metadata={"accuracy": reward.accuracy, "heldout": reward.heldout},
        ),
        judges={"judge": lambda rollout, prompts, responses: np.array([goodness(text) for text in responses])},
        labels=LABELS,
        config=repeatable_yaml(settings),
    )


def write_part(directory: Path, title: str, which: str) -> None:
    """Write the report of one of the first two stages."""
    page.write(directory, {"title": title, "task": f"{TASK} {which}"})


def summarise(prompts: int, accuracy: float, seed: int) -> page.Summary:
    """Say what the report is told before there are results."""
    facts = environment()
    return {
        "title": "SFT, reward model, PPO on a toy language",
        "task": TASK,
        "prompts": prompts,
        "measured_on": "training prompts",
        "reward_accuracy": accuracy,
        "reward_accuracy_note": "held-out pairs",
        "raters": "the count of good words does",
        "seed": seed,
        "judges": LABELS,
        "versions": facts["versions"],
        "machine": facts["machine"],
    }


def sentences(rng: np.random.Generator, count: int) -> list[SFTRecord]:
    """Random sentences of the toy language: an opening, an adverb, two adjectives."""
    return [SFTRecord(OPENINGS[rng.integers(len(OPENINGS))], continuation(rng), f"sentence {i}") for i in range(count)]


def continuation(rng: np.random.Generator) -> str:
    first, second = rng.choice(GOOD + BAD, 2)
    return f" {rng.choice(['very', 'really', 'quite'])} {first} and {second}"


def comparisons(rng: np.random.Generator, count: int) -> list[PairRecord]:
    """Two continuations of one opening; the better one has more good words."""
    found: list[PairRecord] = []
    while len(found) < count:
        worse, better = sorted((continuation(rng), continuation(rng)), key=goodness)
        if goodness(better) > goodness(worse):
            found.append(PairRecord(OPENINGS[len(found) % len(OPENINGS)], better, worse, 0.0, f"pair {len(found)}"))
    return found


def goodness(text: str) -> float:
    """How many good words a text has, less its bad ones."""
    words = text.split()
    return float(sum(word in GOOD for word in words) - sum(word in BAD for word in words))
