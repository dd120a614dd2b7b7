"""The mutants are of the code as it stands; `python -m tests.mutants` tries them."""

from pathlib import Path

import pytest

import ppo_jax
from tests.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.file)
def test_what_a_mutant_changes_stands_once(mutant: Mutant) -> None:
    text = (Path(ppo_jax.__file__).parent / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.right) == 1
