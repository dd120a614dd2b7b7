"""Configurations: frozen dataclasses (and NamedTuples) to and from YAML and the command line.

Strict where libraries are lenient: an unknown or repeated key, a value of another type and a missing field are
`ConfigError`s that name file, line, dotted field and, for a key, the nearest right one. Only plain YAML is read.
"""

import collections.abc
import dataclasses
import difflib
import enum
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

import yaml

C = TypeVar("C")
_SEQUENCES = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)
# YAML 1.1 reads 1e-4 (no dot) as text; nobody who writes it means text.
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


LARGEST = 10**6  # characters of a text, and values that its aliases may expand to


class ConfigError(ValueError):
    """A configuration that cannot be used: says where (file, line, field), what was given and what is allowed."""


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
    data, lines = parse_yaml(text, source)
    try:
        return typing.cast(C, _record(cls, {} if data is None else data, "", base))
    except _At as problem:
        line = line_of(lines, problem.path)
        place = f"{source}, line {line}" if line else source
        named = f"{problem.path}: " if problem.path else ""
        raise ConfigError(f"{place}: {named}{problem.text}") from problem.__cause__


def plain(text: str, source: str = "configuration") -> dict[Any, Any]:
    """The mapping that YAML text holds, checked as in `from_yaml` but for no fields in particular."""
    data, _ = parse_yaml(text, source)
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


def parse_yaml(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """(plain data, {dotted path: line}). Raises ConfigError; `source` is what it calls the text."""
    if len(text) > LARGEST:
        raise ConfigError(f"{source}: {len(text)} characters; at most {LARGEST} are read")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if (size := _expanded(root, {})) > LARGEST:
            raise ConfigError(f"{source}: its aliases (*name) expand to {size:.0e} values; at most {LARGEST} are read")
        lines = dict(_lines(root, source))
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}, line {mark.line + 1}" if mark else source
        raise ConfigError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except ConfigError:
        raise
    except Exception as error:  # nested a thousand deep; a date such as 2024-13-45; `!!int ""` is an IndexError there
        raise ConfigError(f"{source}: not a configuration: {error!s}") from None
    return data, lines


def line_of(lines: Mapping[str, int], path: str) -> int | None:
    """The line of the innermost key on the way to `path` (a.b[0].c: of a.b where items have no line)."""
    while path and path not in lines:
        path = re.sub(r"(^|\.)[^.\[]*$|\[\d+\]$", "", path)
    return lines.get(path)


def join(path: str, name: object) -> str:
    """The dotted path of `name` below `path`."""
    return f"{path}.{name}" if path else str(name)


def _expanded(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for when every alias is written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    children: list[Any] = [] if node is None or isinstance(node, yaml.ScalarNode) else node.value
    flat = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
    known[id(node)] = 1 + sum(_expanded(part, known) for part in flat)
    return known[id(node)]


def _lines(root: Any, source: str) -> Iterator[tuple[str, int]]:
    """(dotted path, line) of every key; a key that is given twice is an error (YAML would take the last)."""
    waiting, seen = [("", root)], set()
    while waiting:
        path, node = waiting.pop()
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:
            continue
        seen.add(id(node))  # an alias may lead back
        keys: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in keys and name != "<<":
                again = f"{join(path, name)}: given twice (first on line {keys[name]})"
                raise ConfigError(f"{source}, line {line}: {again}")
            keys[name] = line
            yield join(path, name), line
            waiting.append((join(path, name), value))
