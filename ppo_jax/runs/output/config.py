"""Configurations: frozen dataclasses (and NamedTuples) to and from YAML.

Strict where libraries are lenient: an unknown or repeated key, a value of another type and a missing field are
`ConfigError`s that name file, line, dotted field and, for a key, the nearest right one. Only plain YAML is read.
"""

import collections.abc
import dataclasses
import difflib
import enum
import os
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union

from ppo_jax.data.disk import read_bytes
from ppo_jax.runs.output.plain_yaml import ConfigError, Word, find_line, join, read_yaml, write_yaml
from ppo_jax.types import Off

C = TypeVar("C")
_SEQUENCES = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}
# YAML 1.1 reads 1e-4 (no dot) and inf as text; nobody who writes them for a float means text.
_FLOAT = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)e[-+]?\d+|inf|infinity)", re.IGNORECASE)
_LEADING_ZERO = re.compile(r"[-+]?0\d+")


class FieldError(ConfigError):
    """A value that a field cannot take: the field's dotted path ("" for the whole), and what is wrong."""

    def __init__(self, path: str, text: str):
        super().__init__(f"{path}: {text}" if path else text)
        self.path, self.text = path, text


def to_yaml(config: Any) -> str:
    """Write plain YAML in field order; `from_yaml(type(config), to_yaml(config)) == config`.

    Tuples become lists, paths and enum members text. Raises ConfigError for a value that YAML cannot say plainly.
    """
    return write_yaml(to_plain(config))


def from_yaml(cls: type[C], text: str, source: str = "configuration", base: C | None = None) -> C:
    """Build `cls` from YAML text; keys that are absent take their value from `base`, else the field's default.

    A field whose type allows several records (`A | B`) is written as a mapping with `type: A` beside A's keys. `off`
    stands for the value that turns a field off (`types.Off`), and `~` at the start of a path for the home directory.

    Args:
        source: what errors call the text, usually its file's path.
    """
    data, lines = read_yaml(text, source)
    try:
        return from_plain(cls, {} if data is None else data, base)
    except FieldError as problem:
        line = find_line(lines, problem.path)
        place = f"{source}, line {line}" if line else source
        raise ConfigError(f"{place}: {problem}") from problem.__cause__


def read_mapping(text: str, source: str = "configuration") -> dict[Any, Any]:
    """Read the mapping that YAML text holds, checked as in `from_yaml` but for no fields in particular."""
    data, _ = read_yaml(text, source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping, got {_shown(data)}")
    return data


def load(cls: type[C], path: str | Path, base: C | None = None) -> C:
    """Read a YAML file written by `to_yaml` or by hand, see `from_yaml`."""
    path = Path(os.path.expanduser(path))
    try:
        text = read_bytes(path).decode()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such configuration file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return from_yaml(cls, text, source=str(path), base=base)


# -- records and their fields ------------------------------------------------------------------------------------------


def dotted_fields(cls: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, type) of every field of a record and of the records in it. `Annotated` stays as it is."""
    for name, kind in _field_types(cls).items():
        yield join(path, name), kind
        bare = _bare(kind)
        for inner in typing.get_args(bare) if _is_union(bare) else (bare,):
            if is_record(inner):
                yield from dotted_fields(inner, join(path, name))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Find the dotted name most like `name`, as a whole or by its last part alone; None where nothing is alike."""

    def likeness(other: str) -> float:
        ends = name.rpartition(".")[2], other.rpartition(".")[2]
        return max(_ratio(name, other), 0.9 * _ratio(*ends))

    best = max(names, key=lambda other: (likeness(other), -len(other)), default="")
    return best if best and likeness(best) >= 0.4 else None


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def is_record(kind: Any) -> bool:
    """Tell whether a type is a dataclass or a NamedTuple."""
    return dataclasses.is_dataclass(kind) or (isinstance(kind, type) and hasattr(kind, "_fields"))


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def _bare(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _field_types(cls: type) -> dict[str, Any]:
    """Collect {name: type} of what the constructor takes."""
    hints = typing.get_type_hints(cls, include_extras=True)
    if dataclasses.is_dataclass(cls):
        return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    return {name: hints.get(name, Any) for name in cls._fields}  # type: ignore[attr-defined]


def _has_default(cls: type, name: str) -> bool:
    if dataclasses.is_dataclass(cls):
        field = cls.__dataclass_fields__[name]
        return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    return name in cls._field_defaults  # type: ignore[attr-defined]


# -- plain data -> records ---------------------------------------------------------------------------------------------


def from_plain(cls: type[C], data: Any, base: C | None = None) -> C:
    """Build `cls` from dicts, lists and scalars, as `from_yaml` does from text. Raises FieldError."""
    return typing.cast(C, _record(cls, data, "", base))


def _record(cls: type, value: Any, path: str, base: Any = None) -> Any:
    """Build a dataclass or NamedTuple from a mapping."""
    if not isinstance(value, dict):
        raise FieldError(path, f"expected a mapping with the fields of {cls.__name__}, got {_shown(value)}")
    kinds = _field_types(cls)
    if rename := getattr(cls, "of_earlier_code", None):
        value = rename(value)
    for key in value:
        if key not in kinds:
            _refuse_key(cls, key, kinds, path)
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
        raise FieldError(path, f"{cls.__name__} needs {', '.join(missing)}, which is not given") from error
    except ValueError as error:
        raise FieldError(path, str(error)) from error


def _refuse_key(cls: type, key: object, kinds: Mapping[str, Any], path: str) -> NoReturn:
    near = nearest(str(key), [name for name, _ in dotted_fields(cls)])
    hint = f"did you mean {join(path, near)}?" if near else f"{cls.__name__} has: {', '.join(kinds)}"
    raise FieldError(join(path, key), f"unknown key; {hint}")


def _value(kind: Any, value: Any, path: str, base: Any = None) -> Any:
    """Read `value` as `kind`, or raise FieldError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        off = [mark.value for mark in args[1:] if isinstance(mark, Off) and value == "off"]
        return _value(args[0], off[0] if off else value, path, base)
    if kind is Any:
        return value
    if is_record(kind):
        return _record(kind, value, path, base if isinstance(base, kind) else None)
    if _is_union(kind):
        return _union(args, value, path, base)
    if origin is Literal:
        return _choice(args, value, path)
    if (origin or kind) in _SEQUENCES and isinstance(value, list):
        return _sequence(origin or kind, args, value, path)
    if (origin or kind) in _MAPPINGS and isinstance(value, dict):
        of_key, of_value = args or (Any, Any)
        return {_value(of_key, k, path): _value(of_value, v, join(path, k)) for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str) and value in kind.__members__:
        return kind[value]
    if kind is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise FieldError(path, f"expected an int of 64 bits, got {reprlib.repr(value)}")
    if kind in (bool, int, type(None)) and type(value) is kind:
        return value
    if kind is bool and isinstance(value, Word) and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    if kind is float and (type(value) in (int, float) or isinstance(value, str) and _FLOAT.fullmatch(value)):
        return float(value)
    if kind is str and isinstance(value, str):
        return str(value)
    if kind is Path and isinstance(value, str):
        return Path(os.path.expanduser(value))
    raise FieldError(path, f"expected {_allowed(kind)}, got {_shown(value)}{_hint([kind], value)}")


def _choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    """Choose a value of a Literal. `yes` and `no`, and what YAML files say for them, mean `on` and `off` too."""
    value = str(value) if isinstance(value, Word) else value
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    if value == "None" and None in choices:
        return None
    truth = _TRUTH.get(value.lower()) if isinstance(value, str) else value
    for word in {True: ("yes", "on"), False: ("no", "off")}.get(truth, ()) if isinstance(truth, bool) else ():
        if word in choices:
            return word
    raise FieldError(path, f"expected {_allowed(Literal[choices])}, got {_shown(value)}")


def _sequence(kind: type, args: tuple[Any, ...], value: list[Any], path: str) -> Any:
    if kind is not tuple or (len(args) == 2 and args[1] is ...) or not args:
        of = [args[0] if args else Any] * len(value)
    elif len(args) == len(value):
        of = list(args)
    else:
        raise FieldError(path, f"expected {len(args)} values, got {len(value)}: {_shown(value)}")
    items = [_value(each, item, f"{path}[{i}]") for i, (each, item) in enumerate(zip(of, value, strict=True))]
    return items if kind is list else tuple(items)


def _union(choices: tuple[Any, ...], value: Any, path: str, base: Any) -> Any:
    records = {kind.__name__: kind for kind in choices if is_record(kind)}
    if isinstance(value, dict) and records:
        if len(records) == 1:
            return _value(next(iter(records.values())), value, path, base)
        name = value.get("type", type(base).__name__ if base is not None else None)
        if not isinstance(name, str) or name not in records:
            raise FieldError(path, f"expected `type:` to be one of {', '.join(records)}, got {_shown(name)}")
        return _value(records[name], {key: item for key, item in value.items() if key != "type"}, path, base)
    if isinstance(value, Word) and value == "None" and type(None) in choices:
        return None  # as on the command line
    for kind in sorted(choices, key=lambda kind: kind is float):  # 1 is an int before it is a float
        try:
            return _value(kind, value, path)
        except FieldError as problem:
            if problem.path != path:  # the right kind of container, a wrong item in it
                raise
    expected = " or ".join(map(_allowed, choices))
    raise FieldError(path, f"expected {expected}, got {_shown(value)}{_hint(choices, value)}")


def _hint(kinds: collections.abc.Sequence[Any], value: Any) -> str:
    """Say what to write instead of a value that is nearly right."""
    if isinstance(value, str) and {int, float} & set(kinds) and _LEADING_ZERO.fullmatch(value):
        return f"; write {int(value)}, without the zeros"
    if isinstance(value, str) and type(None) in kinds and value.lower() in ("none", "null"):
        return "; write null"
    if {str, Path} & set(kinds) and not isinstance(value, str | list | dict) and value is not None:
        return "; put text that looks like another value in quotes"
    return ""


def _allowed(kind: Any) -> str:
    """Describe a type in the words of a YAML file."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _allowed(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if _is_union(kind):
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
    return f"{reprlib.repr(value)} ({type(value).__name__})" if not isinstance(value, str) else reprlib.repr(str(value))


# -- records -> plain data ---------------------------------------------------------------------------------------------


def to_plain(value: Any, path: str = "", tagged: bool = False) -> Any:
    """Turn `value` into dicts, lists and scalars. `tagged`: several records are allowed here, so the class is named."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a NumPy or JAX scalar
    if is_record(type(value)):
        kinds = _field_types(type(value))
        head = {"type": type(value).__name__} if tagged else {}
        return head | {
            name: to_plain(getattr(value, name), join(path, name), _several(kind)) for name, kind in kinds.items()
        }
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_plain(item, f"{path}[{i}]", tagged) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {to_plain(key, path): to_plain(item, join(path, key), tagged) for key, item in value.items()}
    raise ConfigError(f"{path or 'configuration'}: {type(value).__name__} cannot be written as YAML")


def _several(kind: Any) -> bool:
    """Tell whether a value of this type, or an item of it, may be one of several records."""
    args = typing.get_args(kind)
    return (_is_union(kind) and sum(map(is_record, args)) > 1) or any(map(_several, args))
