"""Plain YAML: text to dicts, lists and scalars with the line of every key, and back. Nothing in it is ever run.

It departs from YAML 1.1 where that misleads: `yes`, `no`, `on`, `off` and `None` stay the words that were written
(`Word`; the field says what they mean), and `010` and `1:30` are text, not 8 and 90.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

LARGEST = 10**6  # characters of a text, and values that its aliases may expand to
_TAG = "tag:yaml.org,2002:"


class ConfigError(ValueError):
    """A configuration that cannot be used: says where (file, line, field), what was given and what is allowed."""


class Word(str):
    """One of the words yes, no, on, off and None, written without quotes."""


class _Loader(yaml.SafeLoader):
    """Reads whole numbers as people write them, and leaves words to the fields."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in (f"{_TAG}bool", f"{_TAG}int")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_WHOLE = r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"
_WORD = r"^(yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|None)$"
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(_WHOLE), list("-+0123456789"))
_Loader.add_implicit_resolver("!word", re.compile(_WORD), list("yYnNoO"))
_Loader.add_constructor("!word", lambda loader, node: Word(node.value))


class _Dumper(yaml.SafeDumper):
    """Writes the line ends of Unicode as escapes (raw, PyYAML would read them back as spaces), and None in quotes."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("!word", re.compile("^None$"), ["N"])


def write_yaml(data: Any) -> str:
    """Write dicts, lists and scalars as text, in the order that they have."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_yaml(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """Read (plain data, {dotted path: line}). Raise ConfigError, in which `source` is what the text is called."""
    if len(text) > LARGEST:
        raise ConfigError(f"{source}: {len(text)} characters; at most {LARGEST} are read")
    try:
        root = yaml.compose(text, Loader=_Loader)
        if (size := _count_values(root, {})) > LARGEST:
            raise ConfigError(f"{source}: its aliases (*name) expand to {size:.0e} values; at most {LARGEST} are read")
        lines = dict(_find_lines(root, source))
        data = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}, line {mark.line + 1}" if mark else source
        raise ConfigError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # nested a thousand deep; a date such as 2024-13-45; `!!int ""` is an IndexError there
        raise ConfigError(f"{source}: not a configuration: {error!s}") from None
    return data, lines


def find_line(lines: Mapping[str, int], path: str) -> int | None:
    """Find the line of the innermost key on the way to `path` (a.b[0].c: of a.b where items have no line)."""
    while path and path not in lines:
        path = re.sub(r"(^|\.)[^.\[]*$|\[\d+\]$", "", path)
    return lines.get(path)


def join(path: str, name: object) -> str:
    """Join the dotted path of `name` below `path`."""
    return f"{path}.{name}" if path else str(name)


def _count_values(node: Any, known: dict[int, int]) -> int:
    """Count the values that a node stands for when every alias is written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    children: list[Any] = [] if node is None or isinstance(node, yaml.ScalarNode) else node.value
    flat = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
    known[id(node)] = 1 + sum(_count_values(part, known) for part in flat)
    return known[id(node)]


def _find_lines(root: Any, source: str) -> Iterator[tuple[str, int]]:
    """Yield (dotted path, line) of every key; a key given twice is an error (YAML would take the last)."""
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
