"""The templates: shipped, escaped where they are HTML, and with numbers as a reader expects them."""

import tomllib
from pathlib import Path

import jinja2
import pytest

from ppo_jax.report.templates import TEMPLATES, mark_options, real_minus, render, signed, table_cell

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
    assert callable(TEMPLATES.autoescape) and [TEMPLATES.autoescape(name) for name in ("page.html", "card.md")] == [
        True,
        False,
    ]


def test_options_stand_out_and_what_is_around_them_is_escaped() -> None:
    marked = mark_options("Raise --hyper.kl-coef (now <0>), or --ppo.kl.control adaptive; - and -- stay.")
    assert marked == (
        "Raise <code>--hyper.kl-coef</code> (now &lt;0&gt;), or <code>--ppo.kl.control</code> adaptive; - and -- stay."
    )


def test_what_a_template_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("card.md", front="", title="")


def test_numbers_have_a_real_minus_and_zero_has_none() -> None:
    assert real_minus("-1.5, -0.00") == "−1.5, 0.00" and real_minus("well-known -0") == "well-known 0"
    assert real_minus("-0.0 nats, -0.01 per token, 1e-05, -0%") == "0.0 nats, −0.01 per token, 1e−05, 0%"
    assert [signed(x) for x in (1.005, -2, -0.001, None, float("nan"))] == ["+1.00", "−2.00", "0.00", "–", "–"]


def test_a_cell_is_one_line_without_bars() -> None:
    assert table_cell("a |\n# b") == "a \\| # b"
