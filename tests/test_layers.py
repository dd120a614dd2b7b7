"""The house: which package may import which, read from the imports; and how large its pieces may be."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module imports from its own package and from those on lower floors; packages that share a floor do not
# import one another. What the root holds besides these is `__init__`, `py.typed`, and nothing else.
FLOORS = (
    ("types",),
    ("ops", "data", "parallel"),
    ("models",),
    ("rollout", "rewards"),
    ("train",),
    ("runs",),
    ("report",),
    ("cli",),
    ("experiments",),
)
# Inside these packages some modules lie below the others: (package, the lower ones).
LOWER_INSIDE = {"ppo_jax.runs": ("output", "checkpoints"), "ppo_jax.cli": ("common", "parse")}
OPS_MAY_IMPORT = {"jax", "chex", "jaxtyping", "typing", "collections", "functools", "math"}
# HTTP, checkpoints, screens and options stay out of the arithmetic, the network and the algorithms.
OUTSIDE = {"httpx", "orbax", "requests", "rich", "tensorboardX", "tyro", "urllib", "wandb", "mlflow", "trackio", "yaml"}
PURE = {"types", "ops", "parallel", "models", "rollout", "train"}
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 350, 60, 8
# The trunk is a public contract: its four keyword-only arguments (cache, fresh, layers, hidden) are each of one use,
# absent in most calls, and a record of them would have to be made wherever one is given.
MAY_TAKE_MORE = {"ppo_jax.models.transformer.apply"}


def package(module: str) -> str:
    """`ppo_jax.ops.kl` -> `ops`; an experiment -> `experiments`; ppo_jax itself -> ``."""
    top, *rest = module.split(".")
    return "experiments" if top == "experiments" else rest[0] if rest else ""


def floor(name: str) -> int:
    """The floor of a package; what is none (a name that ppo_jax itself exports) is on no floor."""
    return next((number for number, names in enumerate(FLOORS) if name in names), -1)


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Every module that `source` imports, at any depth of nesting, relative imports resolved.

    `from a import b` may bring in the module a.b or a name in a; it counts as a.b.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(parent[: len(parent) - node.level + 1] + ([base] if base else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import of `module` that the house does not allow."""
    wrong, own = [], package(module)
    for name in sorted(imports(source, module, is_package)):
        top, other = name.split(".")[0], package(name)
        if top in ("ppo_jax", "experiments"):
            if own and other != own and floor(other) >= floor(own):
                wrong.append(f"{module} imports {name}, which lies on its own floor or above")
            if own and own != "experiments" and floor(other) < 0:
                wrong.append(f"{module} imports {name}: a name is imported from where it is defined")
        elif own == "ops" and top not in OPS_MAY_IMPORT:
            wrong.append(f"{module}: ops may import {', '.join(sorted(OPS_MAY_IMPORT))} only, not {name}")
        elif own in PURE and top in OUTSIDE:
            wrong.append(f"{module} imports {name}, which has no place in {own}")
        wrong += inside(module, name)
    return wrong


def inside(module: str, name: str) -> Iterator[str]:
    """The rules within `runs` (what lies below never imports a stage) and `cli` (no command imports another)."""
    for where, lower in LOWER_INSIDE.items():
        if not (module.startswith(f"{where}.") and name.startswith(f"{where}.")):
            continue
        here, there = module.split(".")[2], name.split(".")[2]
        if here != there and here in lower and there not in lower:
            yield f"{module} imports {name}, which lies above it"
        if where == "ppo_jax.cli" and here not in ("main", "__main__", there) and there not in lower:
            yield f"{module} imports {name}: what two commands share is in cli.common"


def modules() -> list[tuple[str, Path]]:
    paths = sorted((ROOT / "ppo_jax").rglob("*.py")) + sorted((ROOT / "experiments").rglob("*.py"))
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path) for path in paths]


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_downward(module: str, path: Path) -> None:
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ppo_jax.ops.kl", "import numpy"),
        ("ppo_jax.ops.kl", "import flax.linen as nn"),
        ("ppo_jax.ops.kl", "from ppo_jax.models import config"),
        ("ppo_jax.ops.kl", "from ..models.config import ModelConfig"),
        ("ppo_jax.ops.kl", "from ppo_jax.parallel import mesh"),
        ("ppo_jax.types", "from ppo_jax.ops.masked import masked_mean"),
        ("ppo_jax.parallel.sharding", "from ppo_jax.models.config import ModelConfig"),
        ("ppo_jax.models.heads", "def f():\n    from ppo_jax.rollout import generate"),
        ("ppo_jax.rollout", "import ppo_jax.rewards.base"),
        ("ppo_jax.rewards.base", "from ppo_jax.train.ppo import update"),
        ("ppo_jax.train.ppo", "from ppo_jax.runs.checkpoints import store"),
        ("ppo_jax.train.ppo", "from experiments.sentiment import main"),
        ("ppo_jax.train.ppo", "from ppo_jax import Hyper"),
        ("ppo_jax.rollout", "import httpx"),
        ("ppo_jax.runs.ppo", "from ppo_jax.report import page"),
        ("ppo_jax.runs.output.rundir", "from ppo_jax.runs.setup import Setup"),
        ("ppo_jax.cli.ppo", "from ppo_jax.cli import sft"),
        ("ppo_jax.cli.common", "from ppo_jax.cli.main import main"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ppo_jax.ops.kl", "import jax.numpy as jnp\nfrom jaxtyping import Float\nfrom ppo_jax.types import Hyper"),
        ("ppo_jax.ops.losses", "from .masked import masked_mean"),
        ("ppo_jax.models.transformer", "from ppo_jax.parallel import sharding\nfrom ppo_jax.ops import masked"),
        ("ppo_jax.train.ppo", "from ppo_jax.rollout import generate\nfrom ppo_jax.rewards import base"),
        ("ppo_jax.runs.ppo", "from ppo_jax.runs.output import rundir\nfrom ppo_jax.runs.checkpoints import store"),
        ("ppo_jax.cli.main", "from ppo_jax.cli import sft, ppo\nimport tyro"),
        ("ppo_jax.cli.ppo", "from ppo_jax.cli.common import RunSettings"),
        ("experiments.sentiment", "from ppo_jax.data import assets\nfrom ppo_jax import Hyper"),
    ],
)
def test_a_right_import_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_modules_do_not_import_one_another_in_circles() -> None:
    paths = dict(modules())
    below = {m: {n if n in paths else n.rpartition(".")[0] for n in imports(p.read_text(), m, p.name == "__init__.py")}
             for m, p in paths.items()}  # fmt: skip
    done: set[str] = set()

    def visit(module: str, on_the_way: tuple[str, ...]) -> None:
        assert module not in on_the_way, " -> ".join((*on_the_way, module))
        if module not in done:
            for other in below[module] & paths.keys() - {module}:
                visit(other, (*on_the_way, module))
            done.add(module)

    for module in paths:
        visit(module, ())


def test_the_root_holds_the_packages_and_nothing_else() -> None:
    here = {path.stem for path in (ROOT / "ppo_jax").iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert here == {name for names in FLOORS for name in names} - {"experiments"} | {"__init__"}


def test_every_package_says_in_one_sentence_what_it_is_for_and_the_readme_names_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "ppo_jax").glob("*/__init__.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert re.fullmatch(r"[A-Z][^\n]+\.", said.split("\n\n")[0]), f"{path}: {said!r}"
        assert f"{path.parent.name}/" in readme, path


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_stage_has_one_name_on_every_floor(stage: str) -> None:
    for floor in ("train", "runs", "cli"):
        assert (ROOT / "ppo_jax" / floor / f"{stage}.py").is_file(), floor


def test_files_stay_short() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in modules()}
    assert {module: n for module, n in lengths.items() if n > LONGEST_FILE} == {}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", node


def test_functions_stay_short() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}


def test_functions_take_few_arguments() -> None:
    """`ops` may take more: there every argument is a symbol of the equation."""

    def count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return len([a for a in named if a.arg not in ("self", "cls")])

    many = {name: count(node) for name, node in functions() if count(node) > MOST_PARAMETERS}
    many = {name: n for name, n in many.items() if not name.startswith("ppo_jax.ops.")}
    assert many.keys() - MAY_TAKE_MORE == set(), many
    assert many.keys() >= MAY_TAKE_MORE, "an exemption that nobody needs any more"
