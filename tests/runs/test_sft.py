"""Supervised fine-tuning in a run directory, and models as exports."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ppo_jax.data import EncodedSFT
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.runs.exports import write_model
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.runs.sft import run_sft
from ppo_jax.train.sft import SFTConfig
from tests.data.tokenizer import EOS
from tests.models.tiny import random_params
from tests.small import SMALL, small_model


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


def test_too_few_rows_for_a_batch(model: Model, screen: Screen, tmp_path: Path) -> None:
    rows = EncodedSFT([[2, 3, 4]] * 4, [1] * 4, list(range(4)), 0)
    with pytest.raises(ValueError, match="batch_size=16 but there are 4 demonstrations"):
        run_sft(tmp_path, OfflineSetup(model, rows, rows, SFTConfig(), 0, AdapterConfig()), screen)
    assert not list(tmp_path.iterdir())


def test_sft_measures_before_and_after(model: Model, screen: Screen, tmp_path: Path) -> None:
    rows = EncodedSFT([[2, 3, 4, 5, EOS], [6, 7, EOS]] * 4, [2, 1] * 4, list(range(8)), 0)
    sft = SFTConfig(batch_size=4, steps=6, learning_rate=1e-2, accumulate=2)
    result = run_sft(tmp_path, OfflineSetup(model, rows, rows, sft, 0, AdapterConfig(rank=4)), screen)
    assert result.after["loss"] < result.before["loss"] and result.before["tokens"] == 4 * (3 + 2)
    records = read_jsonl(tmp_path / rundir.METRICS)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert records[-1]["heldout_loss"] == pytest.approx(result.after["loss"])
    # the merged model is what it says, and another base than before
    again = load_model(tmp_path / "export" / "model")
    assert again.fingerprint == result.model.fingerprint != model.fingerprint
    np.testing.assert_array_equal(again.params["layers"]["q"], result.model.params["layers"]["q"])
    np.testing.assert_array_equal(model.params["layers"]["q"], random_params(SMALL)["layers"]["q"])  # left alone


def test_an_export_replaces_an_earlier_one(model: Model, tmp_path: Path) -> None:
    changed = model._replace(params=model.params | {"final_norm": model.params["final_norm"] + 1})
    found = []
    for one in (model, changed):
        write_model(tmp_path / "m", one, {})
        found.append(load_model(tmp_path / "m"))
        np.testing.assert_array_equal(found[-1].params["final_norm"], one.params["final_norm"])
    assert found[0].fingerprint != found[1].fingerprint
    assert dataclasses.asdict(load_model(tmp_path / "m").config) == dataclasses.asdict(SMALL)
