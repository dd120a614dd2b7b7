"""`ppo-jax export`: the result of a run as a directory for other programs, with a model card.

    merged   config.json, model.safetensors: base and adapter in one, for transformers and every server that reads them
    peft     adapter_config.json, adapter_model.safetensors: the LoRA adapter alone, for `peft` on the same base

Both hold the tokenizer with its chat template, generation_config.json and README.md, the card.
"""

import dataclasses
import json
import os
import shutil
import uuid
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro

from ppo_jax import artifacts, card, rundir, trained
from ppo_jax.models import families, hf, peft
from ppo_jax.models.adapters import merge
from ppo_jax.models.families import Dtype
from ppo_jax.runs import load_model


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Write the result of a run as a Hugging Face directory or a PEFT adapter, with a model card."""

    to: Path
    """New directory."""
    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Run directory of `ppo-jax ppo`, `sft` or `dpo`, or the adapter in it; without one --model itself is written."""
    format: Literal["merged", "peft"] = "merged"
    """Base and adapter in one; or the LoRA adapter alone, as the peft library reads it."""
    step: int | None = None
    """Update of the run whose checkpoint is taken; by default the newest."""
    model: str | None = None
    """The base, where the run's name for it is no longer right: directory, name on the hub, or .gguf file."""
    dtype: Dtype = "float32"
    """Of the merged weights."""
    overwrite: bool = False
    """Replace an earlier export in that directory."""


def export(settings: ExportSettings) -> None:
    """`ppo-jax export`."""
    target = settings.to.expanduser()
    check_target(target, settings)
    if settings.run is None:
        if settings.model is None:
            raise ValueError("nothing to export: give a run, or a --model to write as a Hugging Face directory")
        if settings.step is not None or settings.format == "peft":
            raise ValueError("--step and --format peft need a run")
        base = load_model(settings.model)
        found = trained.Trained(base, {}, {}, None, "the model itself", base.name, {}, {})
    else:
        found = trained.find(settings.run, settings.step, settings.model)
    write(target, found, settings)
    print(f"{found.source} of {settings.run or settings.model} is at {settings.to}")


def write(target: Path, found: trained.Trained, settings: ExportSettings) -> None:
    """Makes the directory beside `target` and renames it: it is there whole or not at all."""
    model = found.model
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (target.parent / f".{target.name}.{word}-{uuid.uuid4().hex[:8]}" for word in ("partial", "old"))
    try:
        if settings.format == "peft":
            peft.save(partial, found.adapter, model.config, base_name(found, settings))
            hf.save_tokenizer(partial, model.tokenizer)
            ids = {"bos": model.config.bos_token_id, "eos": families.eos_field(model.config)}
            ids["pad"] = model.tokenizer.pad_token_id
            text = json.dumps({f"{name}_token_id": value for name, value in ids.items() if value is not None}, indent=2)
            (partial / "generation_config.json").write_text(text + "\n", encoding="utf-8")
        else:
            config = dataclasses.replace(model.config, dtype=settings.dtype)
            params = merge(model.params, found.adapter, model.config)
            params = jax.tree.map(lambda x: x.astype(jnp.dtype(settings.dtype)), params)
            hf.save(partial, config, params, model.tokenizer)
        facts = card.Facts(
            title=target.name,
            format=settings.format,
            base=base_name(found, settings),
            licence=card.licence(hf.resolve(settings.model or found.base)),
            date=date.today().isoformat(),
        )
        (partial / "README.md").write_text(card.text(found, facts), encoding="utf-8")
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def base_name(found: trained.Trained, settings: ExportSettings) -> str:
    """What the export calls the base: as the user gave it. A path that some program chose is cut to its last part."""
    if settings.model:
        return settings.model
    given = found.settings.get("model")
    return found.base if found.base == given or not Path(found.base).is_absolute() else Path(found.base).name


def check_target(target: Path, settings: ExportSettings) -> None:
    """Raises before anything is read when the directory cannot be taken, so that nothing of the user's is replaced."""
    if settings.run is not None:
        run, here = settings.run.expanduser().resolve(), target.resolve()
        if run == here or here in run.parents or here == run / rundir.EXPORT:
            raise ValueError(f"--to {settings.to} would replace the run {settings.run}; choose another directory")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not settings.overwrite:
        raise FileExistsError(f"{settings.to} already exists; choose another --to, or pass --overwrite")
    exported = any((target / name).is_file() for name in ("config.json", peft.CONFIG))
    if not exported or (target / rundir.CONFIG).exists() or (target / artifacts.DESCRIPTION).exists():
        raise FileExistsError(f"{settings.to} is not an exported model, so it is not replaced; choose another --to")
