"""The command line: presets, a YAML file and options, read into a settings record."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import tyro

from ppo_jax.runs.output.config import C, FieldError, dotted_fields, from_plain, is_record, load, nearest, to_plain
from ppo_jax.runs.output.plain_yaml import ConfigError
from ppo_jax.types import Off

HELP = {"-h", "--help", "--help-all"}


class Brief(NamedTuple):
    """What `--help` shows: lines that can be copied, and the options that people turn. `--help-all` shows all."""

    examples: tuple[str, ...] = ()
    fields: Mapping[type, tuple[str, ...]] = {}  # of each record that is not shown whole, the fields that are shown


WHOLE = Brief()


def parse(
    cls: type[C],
    args: Sequence[str] | None = None,
    *,
    presets: Mapping[str, C] | None = None,
    prog: str | None = None,
    brief: Brief = WHOLE,
) -> C:
    """Read the command line: `--preset NAME`, over it `--config FILE`, over both `--field.sub-field VALUE`.

    Options, types and help come from the fields of `cls` and their comments or docstrings (tyro). Any mistake
    prints one message to standard error and exits with status 2.

    Args:
        args: the words after the command; None takes those of the process.
        presets: named starting points; without `--preset` the defaults of `cls` count.
    """
    args, prog = sys.argv[1:] if args is None else list(args), prog or Path(sys.argv[0]).name
    presets = presets or {}
    try:
        args = write_out(args, find_options(cls, ["--config", *(["--preset"] if presets else [])]))
        wanted = HELP & set(args)
        base = _starting_point(cls, args, presets, read_file=not wanted)
    except (ConfigError, FileNotFoundError) as error:
        _fail(prog, str(error))
    command, text = _command(cls, base, presets), _describe(cls, brief)
    if wanted:
        whole = "--help-all" in wanted or not brief.fields
        more = "" if whole else "\n\nBelow are the options that people turn most; --help-all shows all of them."
        rules = _help_of({} if whole else brief.fields)
        tyro.cli(command, args=["--help"], prog=prog, description=text + more, registry=rules)
    settings: Any = tyro.cli(command, args=args, prog=prog, description=text).settings
    try:
        return from_plain(cls, to_plain(settings))  # what a file may not say, an option may not either
    except FieldError as problem:
        _fail(prog, f"--{problem.path.replace('_', '-')}: {problem.text}")


def _fail(prog: str, message: str) -> NoReturn:
    print(f"{prog}: {message}", file=sys.stderr)
    raise SystemExit(2)


# -- words -------------------------------------------------------------------------------------------------------------


def find_options(cls: type, more: Sequence[str] = ()) -> dict[str, Any]:
    """Collect {option: type} of every value in a settings record, of the other spelling of a flag, and of `more`."""
    found: dict[str, Any] = dict.fromkeys([*more, "--help", "--help-all"])
    for path, kind in dotted_fields(cls):
        marks = typing.get_args(kind)[1:] if typing.get_origin(kind) is Annotated else ()
        if not is_record(kind) and tyro.conf.Positional not in marks:
            parents, _, name = path.replace("_", "-").rpartition(".")
            found[f"--{parents}.{name}" if parents else f"--{name}"] = kind
            if kind is bool:
                found[f"--{parents}.no-{name}" if parents else f"--no-{name}"] = kind
    return found


def write_out(args: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Write the words as tyro reads them; raise ConfigError for an option that there is not, with the nearest one.

    Likewise for a value that is none of the few that a field may have.

    `--field` without a value means yes where the field's choices include "yes"; `off` is the value that turns a field
    off; a text may begin with a dash.
    """
    words, written = list(args), list[str]()
    while words:
        word = words.pop(0)
        if word == "--":
            return [*written, word, *words]
        typed, given, value = word.partition("=")
        name = typed.replace("_", "-")
        if not name.startswith("--") or name.startswith("--tyro-"):
            written.append(word)
            continue
        if name not in options:
            near = nearest(name[2:], [option[2:] for option in options])
            hint = f"did you mean --{near}?" if near else "--help-all shows all options"
            raise ConfigError(f"there is no option {typed}; {hint}")
        kind = options[name]
        off = [mark.value for mark in typing.get_args(kind)[1:] if isinstance(mark, Off)]
        if not given and (off or _is_text(kind)) and words and words[0] != "-h" and not words[0].startswith("--"):
            given, value = "=", words.pop(0)
        if off and value == "off":
            value = str(off[0])
        if chosen := value if given else words[0] if words and not words[0].startswith("-") else "":
            _check_choice(typed, chosen, kind)
        written.append(f"{name}{given}{value}")
        if not given and "yes" in typing.get_args(kind) and (not words or words[0].startswith("-")):
            written.append("yes")
    return written


def _check_choice(option: str, value: str, kind: Any) -> None:
    """Raise ConfigError, with the nearest one, for a value that is none of a field's few texts."""
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    choices = typing.get_args(bare) if typing.get_origin(bare) is Literal else ()
    if choices and value not in choices:
        near = nearest(value, map(str, choices))
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"{option} {value!r} must be one of {', '.join(map(str, choices))}{hint}")


def _is_text(kind: Any) -> bool:
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return bare is str or str in typing.get_args(bare) and type(None) in typing.get_args(bare)


# -- the command as tyro sees it ---------------------------------------------------------------------------------------


def _starting_point(cls: type[C], args: Sequence[str], presets: Mapping[str, C], read_file: bool) -> C | None:
    """Read what --preset and --config say; tyro reads these two again and checks them."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    first.add_argument("--config", nargs="?")
    chosen, _ = first.parse_known_args(args)
    base = presets.get(chosen.preset)
    return load(cls, chosen.config, base) if chosen.config and read_file else base


def _command(cls: type[C], base: C | None, presets: Mapping[str, C]) -> type:
    """Make a record of --preset, --config and the settings, whose defaults are `base`."""

    def option(name: str, kind: Any, text: str) -> tuple[str, Any, Any]:
        return name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=None)

    fields: list[Any] = []
    if presets:
        names = Literal[tuple(presets)]  # type: ignore[valid-type]
        fields.append(option("preset", names | None, "The run starts from these values."))
    fields.append(option("config", Path | None, "This YAML file gives the values that no option below gives."))
    settings: Any = ("settings", Annotated[cls, tyro.conf.arg(name="")])
    if base is not None:
        settings += (dataclasses.field(default_factory=lambda: base),)
    return dataclasses.make_dataclass("Command", [*fields, settings], kw_only=True, frozen=True)


def _describe(cls: type, brief: Brief) -> str:
    written = cls.__doc__ or ""
    doc = "" if written.startswith(f"{cls.__name__}(") else written  # else: made by @dataclass
    examples = "\n  ".join(("Examples:", *brief.examples)) if brief.examples else ""
    return "\n\n".join(filter(None, [doc, examples]))


def _help_of(shown: Mapping[type, tuple[str, ...]]) -> tyro.constructors.ConstructorRegistry:
    """Make rules by which tyro's help leaves out fields that are not shown, and breaks no line as the source does."""
    registry = tyro.constructors.ConstructorRegistry()
    asked: list[Any] = []

    @registry.struct_rule
    def shape(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        if info.type in asked:
            return None  # the rules of tyro itself
        asked.append(info.type)
        spec = registry.get_struct_spec(info)
        asked.remove(info.type)
        if not isinstance(spec, tyro.constructors.StructConstructorSpec):
            return None
        names = shown.get(info.type) if is_record(info.type) else None
        return dataclasses.replace(
            spec, fields=tuple(_show(field, names is None or field.name in names) for field in spec.fields)
        )

    return registry


def _show(field: tyro.constructors.StructFieldSpec, shown: bool) -> tyro.constructors.StructFieldSpec:
    def text() -> str | None:
        written = field.helptext() if callable(field.helptext) else field.helptext
        return written and " ".join(written.split())

    suppressed: Any = tyro.conf.Suppress
    return dataclasses.replace(field, helptext=text, type=field.type if shown else suppressed[field.type])
