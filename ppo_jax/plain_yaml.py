"""YAML text -> plain data, and the line of every key. Bounded in size, depth and what its aliases expand to."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

LARGEST = 10**6  # characters of a text, and values that its aliases may expand to


class ConfigError(ValueError):
    """A configuration that cannot be used: says where (file, line, field), what was given and what is allowed."""


def parsed(text: str, source: str) -> tuple[Any, dict[str, int]]:
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
