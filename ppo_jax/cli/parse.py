"""The command line: presets, a YAML file and options, read into a settings record."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ppo_jax.runs.output.config import C, ConfigError, _At, _plain, _record, load


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
