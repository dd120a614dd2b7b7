"""The model card (README.md) of an export: what was trained, on what, how, and how well it did."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from ppo_jax.models.files import gguf_container
from ppo_jax.report.templates import render
from ppo_jax.rewards.addresses import named_sources
from ppo_jax.runs.facts import environment
from ppo_jax.runs.trained import Trained

# Of config.yaml: what says where files and machines were and which way the command was told to go, not what was
# trained.
_LEFT_OUT = ("run_dir", "date", "resume", "overwrite", "model", "seed", "distributed")
_SECRET = ("token_env", "token_file")
_MOST = 100_000  # characters of a base's own card that are looked at


class Facts(NamedTuple):
    """What the card says beside what the run knows."""

    title: str
    format: Literal["merged", "peft"]
    base: str  # as the user gave it; of a path the card names the last part alone
    licence: str | None  # of the base; None: it does not say
    date: str


def text(found: Trained, facts: Facts) -> str:
    """The card (card.md), Markdown with the hub's front matter."""
    facts = facts._replace(base=_published_name(facts.base))
    front: dict[str, Any] = {"library_name": "peft" if facts.format == "peft" else "transformers"}
    front |= {"pipeline_tag": "text-generation", "base_model": facts.base, "tags": ["ppo_jax", "rlhf"]}
    if facts.licence:
        front["license"] = facts.licence
    rows = {
        "Base": f"`{facts.base}`",
        "Weights of the base (sha256)": f"`{found.model.fingerprint}`",
        "Licence of the base": facts.licence or "not stated in its files; look it up before you pass this on",
        "Taken from": found.source + ("" if found.step is None else f", step {found.step}"),
        "Reward": _reward(found.settings),
        "Seed": found.settings.get("seed", "not recorded"),
        "Written on": facts.date,
        "Versions": ", ".join(f"{name} {version}" for name, version in environment()["versions"].items()),
    }
    numbers = {name: value for name, value in (found.evaluation or {}).items() if isinstance(value, int | float)}
    settings = {name: _published(value) for name, value in found.settings.items() if name not in _LEFT_OUT}
    return render(
        "card.md",
        front=yaml.safe_dump(front, sort_keys=False),
        title=facts.title,
        what=_what(found, facts),
        rows=rows,
        evaluation=numbers,
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120) if settings else "",
        format=facts.format,
        base=facts.base,
    )


def licence(base: Path) -> str | None:
    """The licence that a base's files state: `license:` of its card's front matter, or general.license of a GGUF."""
    if base.suffix == ".gguf":
        found = gguf_container.read(base)[0].get("general.license")
    else:
        readme = base / "README.md"
        content = readme.read_bytes()[:_MOST].decode("utf-8", "replace") if readme.is_file() else ""
        front = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        line = re.search(r"^license: *(\S+) *$", front[1], re.MULTILINE) if front else None
        found = line[1] if line else None
    return found if isinstance(found, str) and re.fullmatch(r"[\w.+-]{1,60}", found) else None


def _what(found: Trained, facts: Facts) -> str:
    if not found.adapter:
        return f"The weights of `{facts.base}` as a Hugging Face directory."
    loras = found.adapter.get("lora", {}).values()
    kind = "DoRA" if any(lora.magnitude is not None for lora in loras) else "LoRA" if loras else "layers trained whole"
    what = "A PEFT adapter" if facts.format == "peft" else "A whole model, the adapter merged in"
    return f"{what} ({kind}): `{facts.base}`, trained with ppo_jax. " + (
        "The value head of training is not part of it."
    )


def _published_name(base: str) -> str:
    """A name on the hub as it is; of a path the last part."""
    name = Path(base)
    is_path = name.is_absolute() or base.startswith((".", "~")) or base.count("/") != 1 or name.exists()
    return name.name if is_path else base


def _published(value: Any) -> Any:
    """A setting without addresses, the places of files, and the names under which secrets are kept."""
    if isinstance(value, Mapping):
        return {name: _published(item) for name, item in value.items() if name not in _SECRET}
    if isinstance(value, list):
        return [_published(item) for item in value]
    return named_sources([value]) if isinstance(value, str) and value else value


def _reward(settings: Mapping[str, Any]) -> str:
    given = settings.get("reward")
    names = given if isinstance(given, list) else [given]
    if names and all(isinstance(name, str) for name in names):
        return ", ".join(f"`{_published(name)}`" for name in names)
    return "see the settings below" if given is not None else "not recorded"
