"""The templates of this package (page.html, card.md), filled with what a run knows, and how they write numbers.

What goes into HTML is escaped, whatever it is: a policy may well write HTML.
"""

import math
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape


def render(name: str, **values: Any) -> str:
    """The template of that name with these values; jinja2.UndefinedError where one is missing."""
    return TEMPLATES.get_template(name).render(**values)


def real_minus(text: str) -> str:
    """The text with a real minus before numbers, and none before a zero."""
    return re.sub(r"-(?=\d)", "−", re.sub(r"-(?=0(?:\.0+)?(?!\.?\d))", "", text))


def signed(value: float | None) -> str:
    """A score with its sign and two decimals; a dash where there is none."""
    if value is None or not math.isfinite(float(value)):
        return "–"
    return real_minus(f"{float(value):+.2f}")


def mark_options(text: str) -> Markup:
    """The text as HTML, in which options of the command line stand out and are not broken over two lines."""
    return Markup(re.sub(r"--[a-z][\w.-]*\w", r"<code>\g<0></code>", str(escape(text))))


def table_cell(value: Any) -> str:
    """The text on one line of a Markdown table, within its column."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


TEMPLATES = Environment(
    loader=PackageLoader("ppo_jax", "report"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {
    "minus": real_minus,
    "cell": table_cell,
    "options": mark_options,
    "quoted": repr,
    "signed": signed,
}
