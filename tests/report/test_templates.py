"""The templates: shipped, escaped where they are HTML, and with numbers as a reader expects them."""

import tomllib
from pathlib import Path

import jinja2
import pytest

from ppo_jax.report.templates import TEMPLATES, real_minus, render, signed, table_cell

ROOT = Path(__file__).parent.parent.parent


def test_every_file_that_is_no_module_is_in_the_wheel() -> None:
    """setuptools takes what package-data names, and leaves out the rest without a word."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["ppo_jax"]
    package = ROOT / "ppo_jax"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    others = {p for p in package.rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
    assert others == shipped and {"page.html", "page.css", "card.md"} <= {path.name for path in shipped}


@pytest.mark.parametrize("name", [name for name in TEMPLATES.list_templates() if not name.endswith((".py", ".pyc"))])
def test_every_template_is_one(name: str) -> None:
    TEMPLATES.get_template(name)


def test_html_is_escaped_and_markdown_is_not() -> None:
    assert TEMPLATES.is_async is False and "&lt;b&gt;" in _page(title="<b>")
    assert TEMPLATES.autoescape("card.md") is False  # type: ignore[operator]


def _page(**values: object) -> str:
    blank = dict.fromkeys(("task", "verdict", "source", "rows", "accuracies", "samples", "facts", "notes"))
    return render("page.html", **{**blank, "plots": [], "config": None, "prompts": None, **values})


def test_what_a_template_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("card.md", front="", title="")


def test_numbers_have_a_real_minus_and_zero_has_none() -> None:
    assert real_minus("-1.5, -0.00") == "−1.5, 0.00" and real_minus("well-known -0") == "well-known 0"
    assert [signed(x) for x in (1.005, -2, -0.001, None, float("nan"))] == ["+1.00", "−2.00", "0.00", "–", "–"]


def test_a_cell_is_one_line_without_bars() -> None:
    assert table_cell("a |\n# b") == "a \\| # b"
