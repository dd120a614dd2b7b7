"""Ranges of fields, as text: what is searched, found by dotted name and checked before anything compiles.

    0.1 0.2 0.3          these values (words, too: gae rloo)
    0.1..0.5             every number between, both ends included; whole numbers where the field is one
    0.1..0.5 step 0.1    0.1, 0.2, ... 0.5
    log 0.005..0.2       even on a logarithmic scale
    log 0.005..0.2 in 5  five values, evenly apart on that scale (also without log)

A range of `seed` is not searched: it says with which seeds every setting is run.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import yaml

from ppo_jax.runs.output.config import dotted_fields, from_yaml, nearest
from ppo_jax.types import Hyper

Settings = TypeVar("Settings")
SEED = "seed"
MOST = 10_000  # values of a range that are counted one by one
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_SPAN = re.compile(
    rf"(?P<log>log\s+)?(?P<low>{_NUMBER})\s*\.\.\s*(?P<high>{_NUMBER})"
    rf"(?:\s+(?P<how>step|in)\s+(?P<by>{_NUMBER}))?"
)


class Range(NamedTuple):
    """What one field may be: one of `values`, or, where there are none, a number from `low` to `high`."""

    path: str  # dotted, as the settings spell it: hyper.kl_coef
    text: str
    values: tuple[Any, ...] = ()
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    whole: bool = False  # whole numbers only

    @property
    def traced(self) -> bool:
        """Whether members of one program may differ in it: a scalar of `Hyper`."""
        head, _, name = self.path.rpartition(".")
        return head == "hyper" and name in Hyper._fields


def read_ranges(cls: type, given: Mapping[str, str], base: Any) -> dict[str, Range]:
    """The ranges by path, `seed` first, in the order given. `base` is an instance of the settings `cls`.

    Raises ValueError for a name that is no field, a text that is no range, or a value that the field does not take.
    """
    found: dict[str, Range] = {}
    for name, text in given.items():
        path = name.strip().replace("-", "_")
        if path in found:
            raise ValueError(f"ranges: {path} is given twice")
        if path in ("run_dir", "resume", "overwrite", "sweep", "ranges"):
            raise ValueError(f"ranges: {path} belongs to the sweep itself; it cannot be searched")
        found[path] = _read_range(cls, path, str(text).strip(), base)
    if SEED in found and not found[SEED].values:
        raise ValueError(f"ranges: {SEED}: {found[SEED].text}: name the seeds, as 0..4 or 0 1 2")
    return found


def _read_range(cls: type, path: str, text: str, base: Any) -> Range:
    where = f"ranges: {path}"
    kind = field_type(cls, path, where)
    span = _SPAN.fullmatch(text)
    if span is None:
        if ".." in text or text.startswith("log ") or not text:
            raise ValueError(
                f"{where}: {text!r} is no range. Write values (0.1 0.2 0.3), LOW..HIGH, log LOW..HIGH, and behind "
                "these step SIZE or in COUNT where only some values are wanted"
            )
        made = Range(path, text, tuple(_word(part) for part in re.split(r"[\s,]+", text)))
    else:
        made = _read_span(span, path, text, kind, where)
    if len(set(map(repr, made.values))) != len(made.values):
        raise ValueError(f"{where}: {text}: a value is given twice")
    for value in made.values or (_end(made, made.low), _end(made, made.high)):
        set_fields(base, {path: value}, where)
    return made


def _read_span(span: re.Match[str], path: str, text: str, kind: Any, where: str) -> Range:
    if kind not in (int, float):
        raise ValueError(f"{where}: {text}: only numbers have a range from..to; name the values instead")
    whole, log = kind is int, bool(span["log"])
    low, high = float(span["low"]), float(span["high"])
    if whole and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"{where}: {text}: the field is a whole number")
    if not low < high:
        raise ValueError(f"{where}: {text}: the lower end comes first, and the two differ")
    if log and low <= 0:
        raise ValueError(f"{where}: {text}: a logarithmic range starts above 0")
    values: tuple[Any, ...] = ()
    if span["how"] == "step":
        values = _steps(low, high, float(span["by"]), log, f"{where}: {text}")
    elif span["how"] == "in":
        values = _evenly(low, high, span["by"], log, f"{where}: {text}")
    elif whole and not log and high - low < MOST:
        values = tuple(range(int(low), int(high) + 1)) if path == SEED else ()
    if whole:
        values = tuple(dict.fromkeys(round(value) for value in values))
    return Range(path, text, values, low, high, log, whole)


def _steps(low: float, high: float, step: float, log: bool, where: str) -> tuple[float, ...]:
    count = (high - low) / step + 1e-9 if step > 0 else math.inf
    if log or count >= MOST:
        raise ValueError(f"{where}: step is a positive number, at most {MOST} of which lie in the range, without log")
    return tuple(float(f"{low + i * step:.12g}") for i in range(int(count) + 1))


def _evenly(low: float, high: float, count: str, log: bool, where: str) -> tuple[float, ...]:
    number = int(count) if count.isdigit() else 0
    if not 2 <= number <= MOST:
        raise ValueError(f"{where}: in COUNT wants a whole number from 2")
    shares = [i / (number - 1) for i in range(number)]
    spaced = (low * (high / low) ** x if log else low + x * (high - low) for x in shares)
    return tuple(float(f"{value:.12g}") for value in spaced)


def _word(text: str) -> Any:
    """A number, true or false where it reads as one, else the word."""
    if re.fullmatch(_NUMBER, text):
        return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    return {"true": True, "false": False}.get(text, text)


def _end(range_: Range, value: float) -> float | int:
    return int(value) if range_.whole else value


def field_type(cls: type, path: str, where: str) -> Any:
    """The type of the field at a dotted path; ValueError where there is none, or where it is a group of fields."""
    kind: Any = cls
    parts = path.split(".")
    for i, name in enumerate(parts):
        names = _fields(kind)
        if name not in names:
            inside = ".".join(parts[:i])
            known = ", ".join(f"{inside}.{other}" if inside else other for other in names)
            near = nearest(path, [field for field, _ in dotted_fields(cls)]) if known else None
            hint = f"did you mean {near}? There are: {known}" if near else f"there are: {known}"
            raise ValueError(f"{where}: unknown field; {hint if known else inside + ' is one value'}")
        kind = names[name]
    if _fields(kind):
        raise ValueError(f"{where}: this is a group of fields; name one of {', '.join(_fields(kind))}")
    return kind


def _fields(kind: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    if isinstance(kind, type) and hasattr(kind, "_fields"):
        hints = typing.get_type_hints(kind)
        return {name: hints[name] for name in kind._fields}
    return {}


def set_fields(settings: Settings, values: Mapping[str, Any], where: str = "ranges") -> Settings:
    """The settings with the fields at some dotted paths set; checked as a configuration file would be.

    Raises ValueError (`config.ConfigError`) that names the field.
    """
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    text = yaml.safe_dump(nested, sort_keys=False)
    return from_yaml(type(settings), text, where, settings)


def label(value: Any) -> str:
    """A value as people and file formats are shown it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe(values: Mapping[str, Any], paths: Sequence[str] | None = None) -> str:
    """`hyper.kl_coef 0.05, policy.rank 8`, without `hyper.`: what people call the fields."""
    names = values if paths is None else paths
    return ", ".join(f"{name.removeprefix('hyper.')} {label(values[name])}" for name in names if name in values)
