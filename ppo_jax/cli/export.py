"""`ppo-jax export`: the result of a run as a directory for other programs, with a model card.

    merged   config.json, model.safetensors: base and adapter in one, for transformers and every server that reads them
    peft     adapter_config.json, adapter_model.safetensors: the LoRA adapter alone, for `peft` on the same base

Both hold the tokenizer with its chat template, generation_config.json and README.md, the card; and a list of all these
files, ppo_jax_export.json, by which an export is known as one: only such a directory is ever replaced.
"""

import dataclasses
import json
import re
import shlex
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ppo_jax.cli.common import next_commands
from ppo_jax.cli.parse import Brief
from ppo_jax.data.disk import make_directory, replaced_directory
from ppo_jax.data.locks import hold_target
from ppo_jax.models.files import hf, peft
from ppo_jax.models.files.families import Dtype
from ppo_jax.models.files.hub import resolve
from ppo_jax.models.files.tokenizer import save_tokenizer
from ppo_jax.models.pretrained import load_model
from ppo_jax.parallel.mesh import MeshConfig, use_mesh
from ppo_jax.report import card
from ppo_jax.runs import trained

MARK = "ppo_jax_export.json"  # {"format": "merged" or "peft", "files": what was written}


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Write the result of a run as a Hugging Face directory or a PEFT adapter, with a model card."""

    to: Path
    """The export goes into this new directory."""
    run: Annotated[Path | None, tyro.conf.Positional] = None
    """The result of this run (of `ppo-jax ppo`, `sft` or `dpo`, or the adapter in it) is exported; without one --model
    itself is."""
    format: Literal["merged", "peft"] = "merged"
    """Base and adapter are merged into one model, or (peft) the LoRA adapter is written alone, as the peft library
    reads it."""
    step: int | None = None
    """The checkpoint of this update of the run is exported; by default the newest is."""
    model: str | None = None
    """The base is this directory, name on the hub, or .gguf file, where the run's name for it is no longer right."""
    dtype: Dtype = "float32"
    """The merged weights have this type; the peft format always holds float32."""
    overwrite: bool = False
    """Replace an earlier export in that directory."""
    mesh: MeshConfig = MeshConfig()
    """Base and adapter are spread over these devices of this machine; the host then holds no whole model."""


BRIEF = Brief(
    (
        "ppo-jax export runs/ppo --to policy",
        "ppo-jax export runs/ppo --to adapter --format peft",
        "ppo-jax export runs/ppo --step 40 --to policy-40 --dtype bfloat16",
    )
)


def export(settings: ExportSettings) -> None:
    """Run `ppo-jax export`."""
    if settings.format == "peft" and settings.dtype != "float32":
        raise ValueError(f"--format peft writes float32; leave out --dtype {settings.dtype}")
    with use_mesh(settings.mesh):
        _export(settings)


def _export(settings: ExportSettings) -> None:
    target = settings.to.expanduser()
    check_target(target, settings)
    if settings.run is None:
        if settings.model is None:
            raise ValueError("nothing to export: give a run, or a --model to write as a Hugging Face directory")
        if settings.step is not None or settings.format == "peft":
            raise ValueError("--step and --format peft need a run")
    make_directory(target.parent)
    with hold_target(target):
        check_target(target, settings)  # again: another process may have been here
        _export_held(target, settings)


def _export_held(target: Path, settings: ExportSettings) -> None:
    if settings.run is None:
        assert settings.model is not None
        check_apart(target, Path(resolve(settings.model)), settings)
        base = load_model(settings.model)
        found = trained.Trained(base, {}, {}, None, "the model itself", base.name, {}, {})
    else:
        found = trained.find(settings.run, settings.step, settings.model)
        check_apart(target, Path(resolve(settings.model or found.base)), settings)
    write(target, found, settings)
    print(f"{found.source} of {settings.run or settings.model} is at {settings.to}")
    print(next_commands((upload_command(target), "to the Hugging Face hub, private; before it: hf auth login")))


def write(target: Path, found: trained.Trained, settings: ExportSettings) -> None:
    """Make the directory beside `target` and rename it: it is there whole or not at all."""
    model = found.model
    with replaced_directory(target) as partial:
        if settings.format == "peft":
            peft.save(partial, found.adapter, model.config, base_name(found, settings))
            save_tokenizer(partial, model.tokenizer)
        else:
            config = dataclasses.replace(model.config, dtype=settings.dtype)
            hf.save(partial, config, model.params, model.tokenizer, adapter=found.adapter, dtype=settings.dtype)
        hf.write_generation(partial, model.config, model.tokenizer, model.generation)
        facts = card.Facts(
            title=target.name,
            format=settings.format,
            base=base_name(found, settings),
            licence=card.licence(resolve(settings.model or found.base)),
            date=date.today().isoformat(),
        )
        (partial / "README.md").write_text(card.text(found, facts), encoding="utf-8")
        files = sorted(file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file())
        mark = json.dumps({"format": settings.format, "files": files}, indent=2)
        (partial / MARK).write_text(mark + "\n", encoding="utf-8")


def upload_command(target: Path) -> str:
    """Write the command of `huggingface_hub` that uploads a directory, as a shell takes it.

    The repository is called like the directory, in letters that the hub allows.
    """
    name = re.sub(r"[^A-Za-z0-9_]+", "-", target.resolve().name).strip("-")[:96].rstrip("-") or "model"
    path = str(target) if not str(target).startswith("-") else f"./{target}"
    return shlex.join(["hf", "upload", name, path, ".", "--private"])


def base_name(found: trained.Trained, settings: ExportSettings) -> str:
    """Name the base as the user gave it. A path that some program chose is cut to its last part."""
    if settings.model:
        return settings.model
    given = found.settings.get("model")
    return found.base if found.base == given or not Path(found.base).is_absolute() else Path(found.base).name


def check_target(target: Path, settings: ExportSettings) -> None:
    """Raise, before anything is read, when the directory cannot be taken, so that nothing of the user's is replaced."""
    if settings.run is not None:
        run, here = settings.run.expanduser().resolve(), target.resolve()
        if here == run or here in run.parents or run in here.parents:
            raise ValueError(f"--to {settings.to} would replace the run {settings.run}, or lie in it; choose another")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not settings.overwrite:
        raise FileExistsError(f"{settings.to} already exists; choose another --to, or pass --overwrite")
    if not (target / MARK).is_file():
        raise FileExistsError(
            f"{settings.to} is not an exported model (it holds no {MARK}), so it is not replaced; choose another --to"
        )
    if more := foreign_files(target):
        raise FileExistsError(
            f"{settings.to} holds files that no export wrote ({', '.join(more[:5])}), so it is not replaced; move them "
            "away, or choose another --to"
        )


def check_apart(target: Path, base: Path, settings: ExportSettings) -> None:
    """Raise when the export would take the place of the base model that it is made from."""
    here, model = target.resolve(), base.resolve()
    if here == model or here in model.parents:
        raise ValueError(f"--to {settings.to} would replace the base model {base}; choose another directory")


def foreign_files(target: Path) -> list[str]:
    """List what lies in an earlier export beside that which its list names."""
    try:
        listed = json.loads((target / MARK).read_text(encoding="utf-8"))["files"]
        known = {MARK, *map(str, listed)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FileExistsError(f"{target / MARK} cannot be read ({error}), so nothing is replaced") from error
    files = (
        path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir() or path.is_symlink()
    )
    return sorted(name for name in files if name not in known)
