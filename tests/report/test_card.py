"""The model card: what a base says of its licence, and text that stays inside its table."""

from pathlib import Path

import pytest
import yaml

from ppo_jax.models.pretrained import Model
from ppo_jax.report import card
from ppo_jax.runs import trained
from tests.finished_run import LORA, MODEL, policy
from tests.models.files.test_gguf import fields_of, tensors_of, write
from tests.models.tiny import CONFIG, random_params

FACTS = card.Facts("film-policy", "peft", "base.gguf", "apache-2.0", "2026-11-22")


def found(**changes: object) -> trained.Trained:
    model = Model("base.gguf", MODEL, {}, None, "f" * 64)
    given = trained.Trained(model, policy(LORA, 1), {}, 12, "checkpoints/12", "base.gguf", {"reward": 0.5}, {"seed": 3})
    return given._replace(**changes)


@pytest.mark.parametrize(
    ("content", "licence"),
    [
        ("---\nlicense: mit\n---\ntext", "mit"),
        ("---\nlanguage: en\nlicense:  cc-by-4.0 \n---\n", "cc-by-4.0"),
        ("license: mit\n", None),
        ("---\nother: 1\n---\nlicense: mit\n", None),
        ("---\nlicense: mit | x | y\n---\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("\xff" * 300_000, None),
    ],
)
def test_the_licence_of_a_directory(content: str, licence: str | None, tmp_path: Path) -> None:
    assert card.licence(tmp_path) is None
    (tmp_path / "README.md").write_text(content, encoding="latin-1")
    assert card.licence(tmp_path) == licence


@pytest.mark.parametrize(("stated", "licence"), [("apache-2.0", "apache-2.0"), (None, None), ("a b", None), (5, None)])
def test_the_licence_of_a_gguf_file(stated: object, licence: str | None, tmp_path: Path) -> None:
    fields = fields_of(CONFIG) | ({} if stated is None else {"general.license": stated})
    path = write(tmp_path / "base.gguf", fields, tensors_of(CONFIG, random_params(CONFIG)))
    assert card.licence(path) == licence


def test_the_card_of_an_adapter_on_a_gguf_base() -> None:
    text = card.text(found(), FACTS)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "peft" and front["license"] == "apache-2.0"
    assert "# film-policy" in text and "| Taken from | checkpoints/12, step 12 |" in text and "| Seed | 3 |" in text
    assert "ppo-jax export --model base.gguf --to BASE" in text and "PeftModel.from_pretrained(base, PATH)" in text
    assert "| reward | 0.5 |" in text and "2026-11-22" in text and "f" * 64 in text


def test_foreign_text_stays_in_its_cell() -> None:
    """Names of measures and a seed come from files that anybody may have written."""
    text = card.text(found(evaluation={"a|b\n# c": 1.0, "d": None}, settings={"seed": "1 |\n# 2"}), FACTS)
    assert "| a\\|b # c | 1 |" in text and "| Seed | 1 \\| # 2 |" in text
    above = text.split("## Use")[0].splitlines()
    assert [line for line in above if line.startswith("# ")] == ["# film-policy"]


def test_the_addresses_of_machines_are_not_published() -> None:
    settings = {"seed": 3, "distributed": {"coordinator": "10.1.2.3:4567", "processes": 2}, "reward": ["rm"]}
    text = card.text(found(settings=settings), FACTS)
    assert "10.1.2.3" not in text and "distributed" not in text and "reward:" in text
