"""Demonstrations -> SFT, comparisons -> reward model, prompts -> PPO: the classic pipeline in a minute on a laptop.

    python -m experiments.pipeline
    python -m experiments.pipeline --hyper.kl-coef 0.05     # more reward, further from the fine-tuned model

The same as `ppo-jax demo`, into runs/pipeline; what it does stands in ppo_jax/cli/demo/command.py, from top to bottom.
"""

import dataclasses
import sys
from pathlib import Path

from ppo_jax.cli.demo.command import BRIEF as SHOWN
from ppo_jax.cli.demo.command import DemoSettings, demo
from ppo_jax.cli.main import exit_code
from ppo_jax.cli.parse import Brief, parse


@dataclasses.dataclass(frozen=True)
class PipelineConfig(DemoSettings):
    """Train a toy model by SFT, a reward model and PPO, in a minute on a laptop."""

    run_dir: Path = Path("runs/pipeline")
    """All results go into this directory; each stage has a folder of its own."""


BRIEF = Brief(
    ("python -m experiments.pipeline", "python -m experiments.pipeline --run-dir runs/again --hyper.kl-coef 0.1"),
    {PipelineConfig if kind is DemoSettings else kind: names for kind, names in SHOWN.fields.items()},
)


def main(args: list[str] | None = None) -> Path:
    """Run the three stages; return the path of the report."""
    return demo(parse(PipelineConfig, args, prog="experiments.pipeline", brief=BRIEF))


if __name__ == "__main__":
    sys.exit(exit_code("experiments.pipeline", main, resumable=True))
