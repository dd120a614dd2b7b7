"""The model card (README.md) of an export: what was trained, on what, how, and how well it did."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from ppo_jax.models.files import gguf_container
from ppo_jax.runs.facts import environment
from ppo_jax.runs.trained import Trained

# Of config.yaml: what says where files and machines were and which way the command was told to go, not what was
# trained.
_LEFT_OUT = ("run_dir", "resume", "overwrite", "model", "seed", "distributed")
_MOST = 100_000  # characters of a base's own card that are looked at


class Facts(NamedTuple):
    """What the card says beside what the run knows."""

    title: str
    format: Literal["merged", "peft"]
    base: str  # as the user gave it
    licence: str | None  # of the base; None: it does not say
    date: str


def text(found: Trained, facts: Facts) -> str:
    """The card, Markdown with the hub's front matter."""
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
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {facts.title}\n",
        f"{_what(found, facts)}\n",
        "| | |\n|---|---|\n" + "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows.items()),
    ]
    if found.evaluation:
        numbers = [(name, value) for name, value in found.evaluation.items() if isinstance(value, int | float)]
        lines = "".join(f"| {_cell(name)} | {value:.4g} |\n" for name, value in numbers)
        parts.append(f"## Last evaluation\n\nOn held-out prompts.\n\n| measure | value |\n|---|---|\n{lines}")
    if how := {name: value for name, value in found.settings.items() if name not in _LEFT_OUT}:
        dumped = yaml.safe_dump(how, sort_keys=False, allow_unicode=True, width=120)
        parts.append(f"## Settings of the run\n\n```yaml\n{dumped}```\n")
    parts.append(f"## Use\n\n```python\n{_use(facts)}```\n")
    return "\n".join(parts)


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
    kind = "LoRA" if "lora" in found.adapter else "layers trained whole"
    what = "A PEFT adapter" if facts.format == "peft" else "A whole model, the adapter merged in"
    return f"{what} ({kind}): `{facts.base}`, trained with ppo_jax. " + (
        "The value head of training is not part of it."
    )


def _reward(settings: Mapping[str, Any]) -> str:
    given = settings.get("reward")
    names = given if isinstance(given, list) else [given]
    if names and all(isinstance(name, str) for name in names):
        return ", ".join(f"`{name}`" for name in names)
    return "see the settings below" if given is not None else "not recorded"


def _cell(value: Any) -> str:
    """On one line, within its column."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def _use(facts: Facts) -> str:
    head = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(PATH)\n"
    if facts.format == "merged":
        return f"{head}\nmodel = AutoModelForCausalLM.from_pretrained(PATH)\n{tokenizer}"
    note = ""
    if facts.base.endswith(".gguf"):
        note = f"# The base is a GGUF file; first `ppo-jax export --model {facts.base} --to BASE`.\n"
    base = "BASE" if note else repr(facts.base)
    return (
        f"from peft import PeftModel\n{head}\n{note}base = AutoModelForCausalLM.from_pretrained({base})\n"
        f"model = PeftModel.from_pretrained(base, PATH)\n{tokenizer}"
    )
