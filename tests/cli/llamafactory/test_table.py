"""Every argument of LLaMA-Factory is translated, without effect, or refused: none is dropped in silence."""

import json
from collections import Counter
from pathlib import Path

from ppo_jax.cli.llamafactory import table

DOCS = Path(__file__).parents[3] / "docs" / "llamafactory.md"


def test_the_table_covers_every_argument_once() -> None:
    """The names are those of its dataclasses, as tests/parity/make_llamafactory_rows.py wrote them down."""
    names = table.read_defaults()
    groups = json.loads(Path(table.__file__).with_name("arguments.json").read_text())
    sizes = {group: len(members) for group, members in groups.items()}
    assert sizes == {
        "ModelArguments": 67, "DataArguments": 27, "TrainingArguments": 141,
        "FinetuningArguments": 84, "GeneratingArguments": 10,
    }  # fmt: skip
    listed = Counter(table.TRANSLATED.keys())
    for part in (table.NO_EFFECT, table.REFUSED):
        listed.update(name for members in part.values() for name in members.split())
    assert set(listed) == set(names) and len(names) == sum(sizes.values()) and set(listed.values()) == {1}


def test_the_page_says_what_the_table_says() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = [f"| `{name}` | {what} |" for name, what in table.TRANSLATED.items()]
    for part in (table.REFUSED, table.NO_EFFECT):
        rows += [f"| {', '.join(f'`{name}`' for name in names.split())} | {why} |" for why, names in part.items()]
    assert [row for row in rows if row not in text] == []
