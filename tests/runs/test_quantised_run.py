"""A run on a base in 8 bits: it goes on bit by bit, only on the same bits, and leaves a plain model."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from ppo_jax.models.adapters import merge
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.files import hf
from ppo_jax.models.files.artifacts import EXPORT, MODEL
from ppo_jax.models.pretrained import load_model
from ppo_jax.models.quantised import quantise_params
from ppo_jax.runs import offline
from ppo_jax.runs.checkpoints.resuming import IncompatibleRun
from tests.runs.test_resume_stages import Killed, die_at, leavings, run, update_that
from tests.small import small_model


def test_it_goes_on_and_leaves_a_plain_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = small_model()
    hf.save(tmp_path / "base", plain.config, plain.params, plain.tokenizer)
    model = load_model(tmp_path / "base", ModelOptions(quantise="int8"))
    config = ModelOptions(quantise="int8").of(plain.config)
    for one, other in zip(*map(jax.tree.leaves, (model.params, quantise_params(config, plain.params))), strict=True):
        np.testing.assert_array_equal(one, other)

    whole, again = tmp_path / "whole", tmp_path / "again"
    found = run("sft", whole, model=model)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(offline, "make_update", update_that(die_at(3)))
        run("sft", again, model=model)
    with pytest.raises(IncompatibleRun, match="compute.quantise: int8 in the checkpoint, nothing now"):
        run("sft", again, model=load_model(tmp_path / "base"))
    run("sft", again, model=model)
    assert leavings(again) == leavings(whole)

    _, exported = hf.load(whole / EXPORT / MODEL)
    expected = merge(model.params, found.adapter, model.config)
    assert found.model.config == dataclasses.replace(model.config, quantise="none")
    for tree in (exported, found.model.params):
        assert jax.tree.structure(tree) == jax.tree.structure(plain.params)
        for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
