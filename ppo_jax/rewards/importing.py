"""A Python function, from a file or a module, by its name."""

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(source: str, per_sample: bool = False) -> Callable[..., Any]:
    """The function that `package.module:name` or `file.py:name` names.

    A module is looked for in the working directory too; a file's own folder comes last on the import path.

    Raises ValueError or FileNotFoundError: no such file, module or name, it cannot be imported, or it is not a plain
    function of three arguments.
    """
    where, _, name = source.rpartition(":")
    module = _load_file(source, Path(where).expanduser()) if where.endswith(".py") else _load_module(source, where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [n for n in vars(found) if not n.startswith("_")], n=1)
            hint = f"did you mean {near[0]}?" if near else f"give {where}:FUNCTION"
            raise ValueError(f"--reward {source}: {where} has no {part!r}; {hint}")
        found = getattr(found, part)
    what = "(prompt, response, metadata)" if per_sample else "(prompts, responses, metadata)"
    if not callable(found) or inspect.isclass(found):
        raise ValueError(f"--reward {source}: {name} is a {type(found).__name__}; give a function of {what}")
    if inspect.iscoroutinefunction(found):
        raise ValueError(f"--reward {source}: {name} is async; give a plain function of {what}")
    try:
        inspect.signature(found).bind(None, None, None)
    except TypeError as error:
        raise ValueError(f"--reward {source}: {name} cannot be called with {what}: {error}") from None
    except ValueError:  # some functions in C have no signature
        pass
    return found


def _load_file(source: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"--reward {source}: {path} is not a file")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"ppo_jax_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass in it looks its module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--reward {source}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _load_module(source: str, name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a console command does not look here
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--reward {source}: {name} cannot be imported: {type(error).__name__}: {error}") from error
