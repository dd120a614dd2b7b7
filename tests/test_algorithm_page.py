"""docs/algorithm.md and the docstrings that name formulas: every file and function they name is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")


def definitions(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_formula_of_the_page_is_where_it_says() -> None:
    named = re.findall(r"`([a-z_/]+\.py): (\w+)`", PAGE)
    assert len(named) > 35
    for file, name in named:
        assert name in definitions(ROOT / "ppo_jax" / file), f"{file}: {name}"


@pytest.mark.parametrize("module", ["ppo_jax/train/ppo.py", "experiments/sentiment.py"])
def test_the_six_that_matter_are_where_the_docstring_says(module: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / module).read_text())) or ""
    named = re.findall(r"([\w/]+\.py) +(\w+)$", said, re.MULTILINE)
    assert len(named) >= 6
    for file, name in named:
        folder = ROOT / ("ppo_jax" if (ROOT / "ppo_jax" / file).exists() else "")
        assert name in definitions(folder / file), f"{module}: {file} {name}"


@pytest.mark.parametrize("file", ["advantages", "losses", "kl", "rewards"])
def test_the_page_names_every_public_formula(file: str) -> None:
    """A new objective or estimator in `ops` belongs on the page; what only serves another formula does not."""
    helpers = {"last_token", "truncation_mask", "Aggregation"}
    public = {name for name in definitions(ROOT / "ppo_jax" / "ops" / f"{file}.py") if not name.startswith("_")}
    assert {name for name in public - helpers if f"`ops/{file}.py: {name}`" not in PAGE} == set()
