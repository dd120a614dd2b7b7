"""A training file of LLaMA-Factory -> its arguments, each known and of its kind."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.cli.llamafactory.table import NO_EFFECT, REFUSED, TRANSLATED, find_reason, read_defaults
from ppo_jax.runs.output.config import nearest, read_mapping

STAGES = {"sft": "sft", "rm": "reward", "dpo": "dpo", "ppo": "ppo"}
_NOT_HAD = {"pt": "learn from texts with `ppo-jax sft --data texts.txt`", "kto": "KTO is not had here"}


class Arguments(NamedTuple):
    """What a file says, and what LLaMA-Factory takes where it says nothing."""

    source: str  # what the file is called in messages
    given: Mapping[str, Any]  # only what the file says, unless that is null

    def get(self, name: str) -> Any:
        """Take an argument, or its default."""
        return self.given.get(name, read_defaults()[name])

    def number(self, name: str, least: float | None = None) -> Any:
        """Take a number; raise ValueError where it is none, or too small."""
        value = self.get(name)
        if isinstance(value, str):  # YAML 1.1 takes 1e-5 for text
            try:
                value = float(value)
            except ValueError:
                raise self.wrong(name, "must be a number") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "must be a number")
        if least is not None and value < least:
            raise self.wrong(name, f"must be at least {least}")
        return value

    def count(self, name: str, least: int | None = None) -> int:
        """Take a whole number."""
        value = self.number(name, least)
        if value != int(value):
            raise self.wrong(name, "must be a whole number")
        return int(value)

    def flag(self, name: str) -> bool:
        """Take true or false."""
        value = self.get(name)
        if str(value).lower() in ("yes", "true", "on", "no", "false", "off"):
            return str(value).lower() in ("yes", "true", "on")
        raise self.wrong(name, "must be true or false")

    def choose(self, name: str, *allowed: str) -> str:
        """Take one of these words."""
        value = str(self.get(name))
        if value not in allowed:
            raise self.wrong(name, f"is not had here; allowed: {', '.join(allowed)}")
        return value

    def names(self, name: str) -> list[str]:
        """Take a list, which may be written as text with commas; [] where there is none."""
        value = self.get(name)
        parts = value if isinstance(value, list) else str(value).split(",") if value is not None else []
        return [str(part).strip() for part in parts if str(part).strip()]

    def wrong(self, name: str, what: str) -> ValueError:
        """Make the error that says what is wrong with an argument."""
        return ValueError(f"{self.source}: {name}: {self.get(name)!r} {what}")


def read_arguments(path: Path, changes: Sequence[str] = ()) -> Arguments:
    """Read a file (.yaml or .json), and what is changed of it, NAME=VALUE.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no mapping, or names an argument that is unknown, or some that are refused: all are named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a training file of LLaMA-Factory (.yaml or .json)")
    try:
        found = read_mapping(path.read_text(encoding="utf-8"), str(path))  # JSON is YAML, too
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason}") from error
    for change in changes:
        name, sign, value = change.partition("=")
        if not sign:
            raise ValueError(f"--set {change}: write NAME=VALUE")
        found |= read_mapping(f"{name}: {value}", f"--set {change}")
    for name in found:
        if name not in read_defaults():
            near = nearest(str(name), read_defaults())
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"{path}: {name} is no argument of LLaMA-Factory 0.9.3{hint}")
    given = {str(name): value for name, value in found.items() if str(value) not in ("null", "None")}
    arguments = Arguments(str(path), given)
    _refuse(arguments)
    return arguments


def _refuse(arguments: Arguments) -> None:
    """Raise ValueError for all that is asked for and cannot be had."""
    stage = str(arguments.get("stage"))
    if stage not in STAGES:
        what = _NOT_HAD.get(stage, f"there are: {', '.join(STAGES)}")
        raise ValueError(f"{arguments.source}: stage: {stage} is refused: {what}")
    problems = []
    for name, value in arguments.given.items():
        reason = find_reason(REFUSED, name)
        if reason and not _same(value, read_defaults()[name]):
            problems.append(f"{name}: {value!r} is refused: {reason}")
    if problems:
        raise ValueError(f"{arguments.source}: " + "; ".join(problems))


def _same(value: Any, default: Any) -> bool:
    """Tell whether a value is the default, or asks for as little."""
    if str(value).lower() in ("false", "no", "off", "") and not default:
        return True
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in (value, default)):
        return bool(value == default)
    return str(value) == str(default) or json.dumps(value) == json.dumps(default)


def list_without_effect(arguments: Arguments) -> dict[str, list[str]]:
    """List {reason: arguments} of what a file says that changes nothing here."""
    found: dict[str, list[str]] = {}
    for name in arguments.given:
        if name not in TRANSLATED:
            reason = find_reason(NO_EFFECT, name) or "it asks for nothing, as by default"
            found.setdefault(reason, []).append(name)
    return found
