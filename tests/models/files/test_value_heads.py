"""Reward models that LLaMA-Factory trained: scores are its own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppo_jax.models.files import classifiers, hf, peft_reading, value_heads
from ppo_jax.models.pretrained import load_model
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.rewards.loading import load_reward, load_scorer
from ppo_jax.rewards.model import row_scorer
from tests.cli.llamafactory.tiny import REWARD, save_base

GOLDEN = json.loads((REWARD / "scores.json").read_text())


def test_an_adapter_with_a_value_head_scores_as_its_own_trainer(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    model = load_model(tmp_path / "base")
    role = RewardRole(
        peft_reading.read_lora(model.config, REWARD), value_heads.load_head(REWARD, model.config.hidden_size)
    )
    scores = row_scorer(model.params, role, model.config, 64)(GOLDEN["rows"])
    np.testing.assert_allclose(scores, GOLDEN["scores"], rtol=1e-4, atol=1e-5)
    bare = row_scorer(model.params, role._replace(adapter={}), model.config, 64)(GOLDEN["rows"])
    assert np.abs(bare - scores).max() > 0.1  # the adapter counts
    reward = load_reward(REWARD, model, at="sampled")
    assert reward.device is not None and "end token where it has one" in reward.notices[0]
    with pytest.raises(ValueError, match="read in PPO alone"):
        load_scorer(REWARD)


def test_a_language_model_with_a_value_head_is_a_reward_model(tmp_path: Path) -> None:
    """The whole model is read as it stands, with w . h + b of the head's file."""
    save_base(tmp_path / "base")
    shutil.copy(REWARD / value_heads.FILE, tmp_path / "base")
    found, base = classifiers.load(tmp_path / "base"), hf.load(tmp_path / "base")[1]
    assert not found.ours and float(found.head["gain"]) == 1
    scores = row_scorer(found.params, RewardRole({}, found.head), found.config, 64)(GOLDEN["rows"])
    head = value_heads.load_head(REWARD, found.config.hidden_size)
    np.testing.assert_allclose(scores, row_scorer(base, RewardRole({}, head), found.config, 64)(GOLDEN["rows"]), 1e-6)
    tensors = load_file(REWARD / value_heads.FILE)
    assert float(head["bias"]) == tensors["v_head.summary.bias"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True contradicts the magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"r": 3}, "has rank 4, but adapter_config.json says 3"),
        ({"r": None}, "has rank 4, but adapter_config.json says 8"),  # peft's own default
    ],
)
def test_other_adapters_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    shutil.copytree(REWARD, tmp_path / "reward")
    file = tmp_path / "reward" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        peft_reading.read_lora(load_model(tmp_path / "base").config, tmp_path / "reward")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / value_heads.PICKLE).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"value_head.bin is a pickle, which is not read: .*save_safetensors: true"):
        value_heads.load_head(tmp_path, 16)
    save_file({"v_head.summary.weight": np.ones((1, 8), np.float32)}, tmp_path / value_heads.FILE)
    with pytest.raises(ValueError, match="tensor v_head.summary.bias is missing"):
        value_heads.load_head(tmp_path, 8)
    tensors = {"v_head.summary.weight": np.ones((1, 8), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}
    save_file(tensors, tmp_path / value_heads.FILE)
    with pytest.raises(ValueError, match=r"has shape \(1, 8\); on this model it is \(1, 16\)"):
        value_heads.load_head(tmp_path, 16)
