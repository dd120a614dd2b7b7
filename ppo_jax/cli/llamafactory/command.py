"""`ppo-jax llamafactory FILE`: say what a training file of LLaMA-Factory becomes here, and run that."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppo_jax.cli.llamafactory.reading import Arguments, list_without_effect, read_arguments
from ppo_jax.cli.llamafactory.translation import Translation, translate
from ppo_jax.cli.parse import Brief
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.output.config import FieldError, from_plain
from ppo_jax.runs.output.plain_yaml import write_yaml

Stage = tuple[type, Callable[[Any], None]]  # the settings of a command, and what it does


@dataclasses.dataclass(frozen=True)
class LlamaFactorySettings:
    """Run a training file of LLaMA-Factory (stage sft, rm, ppo or dpo) here."""

    file: Annotated[Path, tyro.conf.Positional]
    """This is the training file, .yaml or .json; its paths are seen from the working directory, as there."""
    set: tuple[str, ...] = ()
    """Each of these, NAME=VALUE, is an argument of LLaMA-Factory in place of the one in the file."""
    dry_run: bool = False
    """Print the translation as a file for --config of our command, and do nothing else."""
    devices: int = 1
    """A batch is this many times as large: the file is meant for so many devices, which share the work here too."""
    resume: Resume = "auto"
    """Go on with the run that is in output_dir; auto starts one where there is none. `overwrite_output_dir` of the file
    means no."""


BRIEF = Brief(
    (
        "ppo-jax llamafactory examples/train_lora/llama3_lora_sft.yaml --dry-run",
        "ppo-jax llamafactory ppo.yaml --set learning_rate=2e-5 max_steps=10",
    )
)


def run_file(settings: LlamaFactorySettings, stages: Mapping[str, Stage]) -> None:
    """Run `ppo-jax llamafactory`.

    Args:
      stages: our commands by name.
    """
    if settings.devices < 1:
        raise ValueError(f"--devices {settings.devices} must be at least 1")
    arguments = read_arguments(settings.file, settings.set)
    translation = translate(arguments, settings.devices, settings.resume)
    kind, run = stages[translation.command]
    print(describe(translation, arguments), flush=True)
    try:
        found: Any = from_plain(kind, translation.settings)
    except FieldError as error:
        raise ValueError(f"{settings.file}: what it becomes here, {error.path}, cannot be had: {error.text}") from error
    if not settings.dry_run:
        run(found)


def describe(translation: Translation, arguments: Arguments) -> str:
    """Write a translation as YAML of ours, with what has no effect as comments."""
    lines = [f"# {arguments.source}, as `ppo-jax {translation.command} --config FILE` takes it"]
    for reason, names in list_without_effect(arguments).items():
        lines.append(f"# no effect here: {', '.join(names)} ({reason})")
    return "\n".join([*lines, write_yaml(translation.settings).rstrip()])
