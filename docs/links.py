"""Hooks of mkdocs: the order of the pages; links to files of the repository outside docs/ become their names, after a
look that they exist."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
# These come first; all others follow by their names.
FIRST = ("index", "getting-started", "data", "hyperparameters", "troubleshooting", "health", "accelerators")


def on_config(config: Any) -> Any:
    """Put the pages in order."""
    names = [path.stem for path in Path(config.docs_dir).glob("*.md")]
    order = [name for name in FIRST if name in names] + sorted(name for name in names if name not in FIRST)
    config.nav = [f"{name}.md" for name in order]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page. Raises FileNotFoundError for one whose target is not there."""
    folder = Path(page.file.abs_src_path).parent

    def rewrite(found: re.Match[str]) -> str:
        text, target = found[1], folder / found[2]
        if target.suffix == ".md" and target.parent.resolve() == folder and target.exists():
            return found[0]  # a page of the site, which mkdocs checks
        if target.exists():
            return text if text.startswith("`") else f"`{text}`" if "/" in text or "." in text else text
        raise FileNotFoundError(f"{page.file.src_path} links to {found[2]}, which does not exist")

    return LINK.sub(rewrite, markdown)
