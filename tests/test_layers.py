"""The dependency direction: types <- ops <- models <- rollout <- rewards <- train <- edges, read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module may import from its own layer and from those below; what is not named here is an edge.
LAYERS = ["types", "ops", "models", "rollout", "rewards", "train"]
# The mesh and the table of logical axes belong to the model, and so does what several processes share.
SAME_LAYER = {"sharding": "models", "processes": "models", "plain_json": "types"}
OPS_MAY_IMPORT = {"jax", "chex", "jaxtyping"}
# HTTP, files of models, tokenizers, checkpoints and screens stay at the edges.
EDGE_ONLY = {"httpx", "orbax", "requests", "rich", "tensorboardX", "tyro", "urllib", "wandb", "yaml"}


def layer(module: str) -> int:
    """Rank of a dotted module name such as `ppo_jax.ops.kl`; experiments and every edge rank highest."""
    parts = module.split(".")
    if parts[0] != "ppo_jax" or len(parts) == 1:
        return len(LAYERS)
    name = SAME_LAYER.get(parts[1], parts[1])
    return LAYERS.index(name) if name in LAYERS else len(LAYERS)


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Every module that `source` imports, at any depth of nesting, relative imports resolved.

    `from a import b` may bring in the module a.b or a name in a; it counts as a.b (a's rank when a is below the root).
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import of `module` that points upward or reaches outside its layer."""
    wrong = []
    rank = layer(module)
    for name in sorted(imports(source, module, is_package)):
        top = name.split(".")[0]
        if top in ("ppo_jax", "experiments"):
            if layer(name) > rank:
                wrong.append(f"{module} imports {name}, which lies above it")
            if module.startswith("ppo_jax.ops") and layer(name) > LAYERS.index("ops"):
                wrong.append(f"{module}: ops may import ppo_jax.types and ops only, not {name}")
        elif module.startswith("ppo_jax.ops") and top not in OPS_MAY_IMPORT | {"typing", "collections", "functools"}:
            wrong.append(f"{module}: ops may import jax, chex and jaxtyping only, not {name}")
        elif top in EDGE_ONLY and rank < LAYERS.index("rewards"):
            wrong.append(f"{module} imports {name}, which belongs at the edges")
    return wrong


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
        ("ppo_jax.types", "from ppo_jax.ops.masked import masked_mean"),
        ("ppo_jax.models.heads", "def f():\n    from ppo_jax.rollout import generate"),
        ("ppo_jax.sharding", "from ppo_jax import rollout"),
        ("ppo_jax.rollout", "import ppo_jax.rewards.base"),
        ("ppo_jax.rewards.base", "from ppo_jax.train.ppo import update"),
        ("ppo_jax.train.ppo", "from ppo_jax.checkpoint import save"),
        ("ppo_jax.train.ppo", "from experiments.sentiment import main"),
        ("ppo_jax.rollout", "import httpx"),
    ],
)
def test_an_upward_import_is_found(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ppo_jax.ops.kl", "import jax.numpy as jnp\nfrom jaxtyping import Float\nfrom ppo_jax.types import Hyper"),
        ("ppo_jax.ops.losses", "from .masked import masked_mean"),
        ("ppo_jax.models.transformer", "from ppo_jax import sharding\nfrom ppo_jax.ops import masked"),
        ("ppo_jax.sharding", "from ppo_jax.models.config import ModelConfig"),
        ("ppo_jax.train.ppo", "from ppo_jax.rollout import generate\nfrom ppo_jax.rewards import base"),
        ("ppo_jax.cli", "from ppo_jax.train import ppo\nimport tyro"),
        ("experiments.sentiment", "from ppo_jax import assets, checkpoint"),
    ],
)
def test_a_downward_import_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_files_stay_short() -> None:
    """Most files are under 250 lines, none over 400."""
    lengths = {module: len(path.read_text().splitlines()) for module, path in modules()}
    assert {module: n for module, n in lengths.items() if n > 400} == {}
