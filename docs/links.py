"""A hook of mkdocs: links to files of the repository outside docs/ become their names, after a look that they exist."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
# Pages of other branches: linked once they are there.
PENDING = {"data.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page. Raises FileNotFoundError for one whose target is not there."""
    folder = Path(page.file.abs_src_path).parent

    def rewrite(found: re.Match[str]) -> str:
        text, target = found[1], folder / found[2]
        if target.suffix == ".md" and target.parent.resolve() == folder and target.exists():
            return found[0]  # a page of the site, which mkdocs checks
        if target.exists() or found[2] in PENDING:
            return text if text.startswith("`") else f"`{text}`" if "/" in text or "." in text else text
        raise FileNotFoundError(f"{page.file.src_path} links to {found[2]}, which does not exist")

    return LINK.sub(rewrite, markdown)
