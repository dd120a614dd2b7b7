"""Configurations: frozen dataclasses (and NamedTuples) to and from YAML and the command line.

Strict where libraries are lenient: an unknown or repeated key, a value of another type and a missing field are
`ConfigError`s that name file, line, dotted field and, for a key, the nearest right one. Only plain YAML is read.
"""

import argparse
import collections.abc
import dataclasses
import difflib
import enum
import re
import reprlib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union

import tyro
import yaml

from ppo_jax.plain_yaml import ConfigError, join, line_of, parsed

C = TypeVar("C")
_SEQUENCES = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)
# YAML 1.1 reads 1e-4 (no dot) as text; nobody who writes it means text.
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class _Dumper(yaml.SafeDumper):
    """Writes the line ends of Unicode as escapes; raw, PyYAML would read them back as spaces."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def to_yaml(config: Any) -> str:
    """Plain YAML in field order; `from_yaml(type(config), to_yaml(config)) == config`.

    Tuples become lists, paths and enum members text. Raises ConfigError for a value that YAML cannot say plainly.
    """
    return yaml.dump(_plain(config, ""), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def from_yaml(cls: type[C], text: str, source: str = "configuration", base: C | None = None) -> C:
    """Builds `cls` from YAML text; keys that are absent take their value from `base`, else the field's default.

    A field whose type allows several records (`A | B`) is written as a mapping with `type: A` beside A's keys.

    Args:
        source: what errors call the text, usually its file's path.
    """
    data, lines = parsed(text, source)
    try:
        return typing.cast(C, _record(cls, {} if data is None else data, "", base))
    except _At as problem:
        line = line_of(lines, problem.path)
        place = f"{source}, line {line}" if line else source
        named = f"{problem.path}: " if problem.path else ""
        raise ConfigError(f"{place}: {named}{problem.text}") from problem.__cause__


def plain(text: str, source: str = "configuration") -> dict[Any, Any]:
    """The mapping that YAML text holds, checked as in `from_yaml` but for no fields in particular."""
    data, _ = parsed(text, source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping, got {_shown(data)}")
    return data


def load(cls: type[C], path: str | Path, base: C | None = None) -> C:
    """Reads a YAML file written by `to_yaml` or by hand, see `from_yaml`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return from_yaml(cls, text, source=str(path), base=base)


def parse(
    cls: type[C],
    args: Sequence[str] | None = None,
    *,
    presets: Mapping[str, C] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> C:
    """Reads the command line: `--preset NAME`, over it `--config FILE`, over both `--field.sub-field VALUE`.

    Options, types and help come from the fields of `cls` and their comments or docstrings (tyro). Any mistake
    prints one message to standard error and exits with status 2.

    Args:
        args: the words after the command; None takes those of the process.
        presets: named starting points; without `--preset` the defaults of `cls` count.
    """
    args = _spelled_out(cls, sys.argv[1:] if args is None else list(args))
    presets = presets or {}
    # These two decide the defaults of all others, so they are read first; tyro reads them again and checks them.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    first.add_argument("--config", nargs="?")
    chosen, _ = first.parse_known_args(args)
    try:
        base = presets.get(chosen.preset)
        if chosen.config and not {"-h", "--help"} & set(args):
            base = load(cls, chosen.config, base)
    except (ConfigError, FileNotFoundError) as error:
        print(f"{prog or Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    def option(name: str, kind: Any, text: str) -> tuple[str, Any, Any]:
        return name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=None)

    fields: list[Any] = []
    if presets:
        names = Literal[tuple(presets)]  # type: ignore[valid-type]
        fields.append(option("preset", names | None, "Start from these values."))
    fields.append(option("config", Path | None, "YAML file whose values come before the options below."))
    settings: Any = ("settings", Annotated[cls, tyro.conf.arg(name="")])
    if base is not None:
        settings += (dataclasses.field(default_factory=lambda: base),)
    command = dataclasses.make_dataclass("Command", [*fields, settings], kw_only=True, frozen=True)
    written = cls.__doc__ or ""
    doc = description or ("" if written.startswith(f"{cls.__name__}(") else written)  # else: made by @dataclass
    settings = tyro.cli(command, args=args, prog=prog, description=doc).settings
    try:
        _record(cls, _plain(settings, ""), "")  # what a file may not say, an option may not either
    except _At as problem:
        option_name = problem.path.replace("_", "-")
        print(f"{prog or Path(sys.argv[0]).name}: --{option_name}: {problem.text}", file=sys.stderr)
        raise SystemExit(2) from None
    return typing.cast(C, settings)


def _spelled_out(cls: type, args: list[str]) -> list[str]:
    """`--field` without a value means yes where the field's choices include "yes"."""
    kinds = typing.get_type_hints(cls)
    flags = {f"--{name.replace('_', '-')}" for name, kind in kinds.items() if "yes" in typing.get_args(kind)}
    spelled = []
    for i, word in enumerate(args):
        bare = word in flags and (i + 1 == len(args) or args[i + 1].startswith("-"))
        spelled += [word, "yes"] if bare else [word]
    return spelled


class _At(Exception):
    """A problem at a dotted path; `from_yaml` adds the file and the line."""

    def __init__(self, path: str, text: str):
        super().__init__(path, text)
        self.path, self.text = path, text


def _is_record(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or (isinstance(kind, type) and hasattr(kind, "_fields"))


def _field_types(cls: type) -> dict[str, Any]:
    """{name: type} of what the constructor takes."""
    hints = typing.get_type_hints(cls)
    if dataclasses.is_dataclass(cls):
        return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    return {name: hints.get(name, Any) for name in cls._fields}  # type: ignore[attr-defined]


def _record(cls: type, value: Any, path: str, base: Any = None) -> Any:
    """A dataclass or NamedTuple from a mapping."""
    if not isinstance(value, dict):
        raise _At(path, f"expected a mapping with the fields of {cls.__name__}, got {_shown(value)}")
    kinds = _field_types(cls)
    for key in value:
        if key not in kinds:
            _unknown_key(cls, key, kinds, path)
    given = {} if base is None else {name: getattr(base, name) for name in kinds}
    for name in value:
        nested = given.get(name)
        given[name] = _value(kinds[name], value[name], join(path, name), nested)
    try:
        return cls(**given)
    except TypeError as error:
        missing = [name for name in kinds if name not in given and not _has_default(cls, name)]
        if not missing:
            raise
        raise _At(path, f"{cls.__name__} needs {', '.join(missing)}, which is not given") from error
    except ValueError as error:
        raise _At(path, str(error)) from error


def _has_default(cls: type, name: str) -> bool:
    if dataclasses.is_dataclass(cls):
        field = cls.__dataclass_fields__[name]
        return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    return name in cls._field_defaults  # type: ignore[attr-defined]


def _unknown_key(cls: type, key: object, kinds: Mapping[str, Any], path: str) -> NoReturn:
    near = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.4)
    hint = f"did you mean {join(path, near[0])}?" if near else f"{cls.__name__} has: {', '.join(kinds)}"
    raise _At(join(path, key), f"unknown key; {hint}")


def _value(kind: Any, value: Any, path: str, base: Any = None) -> Any:
    """`value` as `kind`, or `_At`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if _is_record(kind):
        return _record(kind, value, path, base if isinstance(base, kind) else None)
    if origin in (Union, types.UnionType):
        return _union(args, value, path, base)
    if origin is Literal and isinstance(value, bool) and {"yes", "no"} <= set(args):
        return "yes" if value else "no"  # YAML 1.1 reads an unquoted yes or no as a truth value
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in args):
        return value
    if (origin or kind) in _SEQUENCES and isinstance(value, list):
        return _sequence(origin or kind, args, value, path)
    if (origin or kind) in _MAPPINGS and isinstance(value, dict):
        of_key, of_value = args or (Any, Any)
        return {_value(of_key, k, path): _value(of_value, v, join(path, k)) for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str) and value in kind.__members__:
        return kind[value]
    if kind in (None, type(None)) and value is None:
        return None
    if kind is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise _At(path, f"expected an int of 64 bits, got {reprlib.repr(value)}")
    if kind in (bool, int, str) and type(value) is kind:
        return value
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind is float and isinstance(value, str) and _FLOAT.fullmatch(value):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise _At(path, f"expected {_allowed(kind)}, got {_shown(value)}")


def _sequence(kind: type, args: tuple[Any, ...], value: list[Any], path: str) -> Any:
    if kind is not tuple or (len(args) == 2 and args[1] is ...) or not args:
        of = [args[0] if args else Any] * len(value)
    elif len(args) == len(value):
        of = list(args)
    else:
        raise _At(path, f"expected {len(args)} values, got {len(value)}: {_shown(value)}")
    items = [_value(each, item, f"{path}[{i}]") for i, (each, item) in enumerate(zip(of, value, strict=True))]
    return items if kind is list else tuple(items)


def _union(choices: tuple[Any, ...], value: Any, path: str, base: Any) -> Any:
    records = {kind.__name__: kind for kind in choices if _is_record(kind)}
    if isinstance(value, dict) and records:
        if len(records) == 1:
            return _value(next(iter(records.values())), value, path, base)
        name = value.get("type", type(base).__name__ if base is not None else None)
        if not isinstance(name, str) or name not in records:
            raise _At(path, f"expected `type:` to be one of {', '.join(records)}, got {_shown(name)}")
        return _value(records[name], {key: item for key, item in value.items() if key != "type"}, path, base)
    for kind in sorted(choices, key=lambda kind: kind is float):  # 1 is an int before it is a float
        try:
            return _value(kind, value, path)
        except _At as problem:
            if problem.path != path:  # the right kind of container, a wrong item in it
                raise
    raise _At(path, f"expected {' or '.join(map(_allowed, choices))}, got {_shown(value)}")


def _allowed(kind: Any) -> str:
    """A type in the words of a YAML file."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_allowed, args))
    if (origin or kind) in _SEQUENCES:
        return f"a list of {_allowed(args[0])}" if args else "a list"
    if (origin or kind) in _MAPPINGS:
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(kind.__members__)
    words = {bool: "true or false", int: "an int", float: "a float", str: "text", Path: "a path", type(None): "null"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{reprlib.repr(value)} ({type(value).__name__})" if not isinstance(value, str) else reprlib.repr(value)


def _plain(value: Any, path: str, tagged: bool = False) -> Any:
    """`value` as dicts, lists and scalars. `tagged`: several records are allowed here, so the class is named."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a NumPy or JAX scalar
    if _is_record(type(value)):
        kinds = _field_types(type(value))
        head = {"type": type(value).__name__} if tagged else {}
        return head | {
            name: _plain(getattr(value, name), join(path, name), _several(kind)) for name, kind in kinds.items()
        }
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item, f"{path}[{i}]", tagged) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_plain(key, path): _plain(item, join(path, key), tagged) for key, item in value.items()}
    raise ConfigError(f"{path or 'configuration'}: {type(value).__name__} cannot be written as YAML")


def _several(kind: Any) -> bool:
    """Whether a value of this type, or an item of it, may be one of several records."""
    args = typing.get_args(kind)
    is_union = typing.get_origin(kind) in (Union, types.UnionType)
    return (is_union and sum(map(_is_record, args)) > 1) or any(map(_several, args))
