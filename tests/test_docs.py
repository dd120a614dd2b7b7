"""The pages in docs/ against the code: messages, options, commands and files that they name are there."""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest

from ppo_jax.cli.main import COMMANDS
from ppo_jax.cli.parse import find_options, parse
from ppo_jax.data import read_pairs, read_prompts, read_sft
from ppo_jax.data.reading import read_choices, read_ratings
from ppo_jax.rewards.importing import load_function
from ppo_jax.runs.health import CHECKS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"


@functools.cache
def said() -> str:
    """All texts of the package, a line each; what is put into one is "...", so are parts that stand side by side."""
    found = []
    for path in (ROOT / "ppo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(x.value if isinstance(x, ast.Constant) else "..." for x in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def rows(page: str) -> list[str]:
    """The first cells of all tables of a page."""
    lines = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| ")]
    return [line.split("|")[1].strip() for line in lines]


def test_the_messages_of_troubleshooting_are_said() -> None:
    quoted = [text for cell in rows("troubleshooting.md") for text in re.findall("`([^`]+)`", cell)]
    known = said() + "\n".join(check.__name__ for check in CHECKS)
    assert len(quoted) > 25
    parts = {part.strip() for text in quoted for part in text.split("...")}
    assert {part for part in parts if part not in known} == set()


def test_the_checks_of_health_are_those_of_the_page() -> None:
    assert {name.strip("`") for name in rows("health.md")} >= {check.__name__ for check in CHECKS}


def test_options_in_the_pages_are_options() -> None:
    known = {option for command in COMMANDS.values() for option in find_options(command.settings, ["--config"])}
    known |= {option.rpartition(".")[0] for option in known}  # `--scoring.api.*`
    for page in ("getting-started.md", "troubleshooting.md", "hyperparameters.md", "accelerators.md", "health.md"):
        named = re.findall(r"(?<![\w-])--[a-z][\w.-]*[\w]", (DOCS / page).read_text())
        foreign = {"--local-dir", "--mesh", "--version"}  # of `hf`, and of a group of options
        assert set(named) - known - foreign == set(), page


def commands(page: Path) -> list[str]:
    """The commands in the indented blocks of a page, without comments and with lines that go on joined."""
    text = page.read_text().replace("\\\n", " ")
    return [line.strip().split("  #")[0] for line in text.splitlines() if line.startswith("    ppo-jax ")]


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md", "docs/hyperparameters.md"])
def test_commands_in_the_pages_are_understood(page: str) -> None:
    found = [line for line in commands(ROOT / page) if "--help" not in line and "..." not in line]
    assert found
    for line in found:
        words = shlex.split(line)[1:]
        name, rest = (" ".join(words[:2]), words[2:]) if words[0] == "sweep" else (words[0], words[1:])
        parse(COMMANDS[name].settings, rest, prog=name)


def test_the_files_to_copy_can_be_read() -> None:
    assert len(read_sft(EXAMPLES / "demonstrations.jsonl")) == len(read_pairs(EXAMPLES / "preferences.jsonl")) == 96
    assert len(read_ratings(EXAMPLES / "ratings.jsonl")) == 96 and len(read_choices(EXAMPLES / "choices.jsonl")) == 48
    assert len(read_prompts(EXAMPLES / "prompts.jsonl")) == 80  # 64 of them after a fifth is held out: a batch of PPO
    for name in ("good_words", "brevity"):
        score = load_function(f"{EXAMPLES}/rewards.py:{name}")
        assert list(map(float, score(["p", "p"], [" great", " bad"], [{}, {}])))[0] != 0
