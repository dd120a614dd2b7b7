"""The stages before PPO: pairs as comparisons, the head-only reward model, and what is refused."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from ppo_jax import artifacts, metrics, rundir
from ppo_jax.data import EncodedPairs, EncodedSFT, PairBatch
from ppo_jax.display import Screen, progress
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.config import ModelConfig
from ppo_jax.rewards.adapter import RewardRole, score_tokens
from ppo_jax.runs import Model, load_model
from ppo_jax.stages import comparisons, export_model, run_reward, run_sft
from ppo_jax.train.reward_model import RewardConfig
from ppo_jax.train.sft import SFTConfig
from tests.data.tokenizer import EOS, make_tokenizer
from tests.models.tiny import random_params

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    eos_token_ids=(EOS,),
)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """Tiny programs are compiled many times and run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("random", CONFIG, random_params(CONFIG), make_tokenizer(), "f" * 64)


@pytest.fixture
def screen() -> Screen:
    with progress("test", main_process=False) as screen:
        return screen


def pairs(count: int, seed: int = 0) -> EncodedPairs:
    """Random texts; the chosen one ends in token 7, the rejected one in 8."""
    rng = np.random.default_rng(seed)
    text = lambda last: [*rng.integers(2, 40, rng.integers(1, 6)).tolist(), last]
    chosen, rejected = ([text(last) for _ in range(count)] for last in (7, 8))
    return EncodedPairs(chosen, rejected, [0.0] * count, list(range(count)), 0)


def test_comparisons_by_hand() -> None:
    """Two pairs: rows 0, 1 are chosen, rows 2, 3 rejected; only (0, 2) and (1, 3) are compared."""
    chosen, rejected = np.array([[4, 5, 6], [7, 0, 0]], np.int32), np.array([[4, 0, 0], [8, 9, 0]], np.int32)
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool), np.array([[1, 0, 0], [1, 1, 0]], bool)
    batch = PairBatch(chosen, mask[0], rejected, mask[1], np.array([0.5, 2.0], np.float32), np.arange(2))
    found = comparisons(batch)
    np.testing.assert_array_equal(found.tokens, [[4, 5, 6], [7, 0, 0], [4, 0, 0], [8, 9, 0]])
    np.testing.assert_array_equal(found.mask, np.concatenate(mask))
    np.testing.assert_array_equal(np.argwhere(found.better), [[0, 2], [1, 3]])
    assert found.margin[0, 2] == 0.5 and found.margin[1, 3] == 2.0 and np.count_nonzero(found.margin) == 2
    assert found.prefix is None


@pytest.mark.parametrize("depth", [0, 1])
def test_the_head_alone_orders_what_it_can_read(depth: int, model: Model, screen: Screen, tmp_path: Path) -> None:
    """The last token decides, and its residual stream says which it is; also on a trunk of one layer."""
    reward = RewardConfig(depth=depth, lora_layers=0, batch_size=8)
    result = run_reward(tmp_path, model, reward, pairs(150), pairs(30, seed=1), 0, screen)
    assert result.accuracy > 0.85 and result.trunk.num_layers == (depth or 2)
    assert result.role.adapter == {}
    found = artifacts.load(tmp_path / "export" / "reward", "reward")
    artifacts.check_base(found, model.fingerprint, model.config)
    assert found.meta["accuracy"] == result.accuracy and found.trunk(model.config) == result.trunk

    # the saved role scores the training texts with mean 0 and std 1
    rows = [*pairs(150).chosen, *pairs(150).rejected]
    mask = np.arange(6) < np.array([len(row) for row in rows])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    role = RewardRole(found.adapter, found.head)
    scores = np.asarray(jax.jit(lambda t, m: score_tokens(model.params, role, result.trunk, t, m))(tokens, mask))
    np.testing.assert_allclose([scores.mean(), scores.std(ddof=1)], [0, 1], atol=1e-3)


def test_margins_reach_the_fit(model: Model, screen: Screen, tmp_path: Path) -> None:
    """Before normalisation a demanded lead makes the head larger; so kernel * gain stays, and 1 / gain grows."""
    reward = RewardConfig(lora_layers=0, batch_size=8)
    gains = []
    for name, margin in (("a", 0.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        given = pairs(150)._replace(margins=[margin] * 150)
        role = run_reward(tmp_path / name, model, reward, given, pairs(8, 1), 0, screen).role
        gains.append(float(role.head["gain"]))
    assert gains[1] < 0.8 * gains[0]


def test_too_few_rows_for_a_batch(model: Model, screen: Screen, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=50 texts are 25 pairs, but there are 10"):
        run_reward(tmp_path, model, RewardConfig(lora_layers=1), pairs(10), pairs(4), 0, screen)
    rows = EncodedSFT([[2, 3, 4]] * 4, [1] * 4, list(range(4)), 0)
    with pytest.raises(ValueError, match="batch_size=16 but there are 4 demonstrations"):
        run_sft(tmp_path, model, AdapterConfig(), rows, rows, SFTConfig(), 0, screen)
    assert not list(tmp_path.iterdir())


def test_sft_measures_before_and_after(model: Model, screen: Screen, tmp_path: Path) -> None:
    rows = EncodedSFT([[2, 3, 4, 5, EOS], [6, 7, EOS]] * 4, [2, 1] * 4, list(range(8)), 0)
    sft = SFTConfig(batch_size=4, steps=6, learning_rate=1e-2, accumulate=2)
    result = run_sft(tmp_path, model, AdapterConfig(rank=4), rows, rows, sft, 0, screen)
    assert result.after["loss"] < result.before["loss"] and result.before["tokens"] == 4 * (3 + 2)
    records = metrics.read_jsonl(tmp_path / rundir.METRICS)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert records[-1]["heldout_loss"] == pytest.approx(result.after["loss"])
    # the merged model is what it says, and another base than before
    again = load_model(tmp_path / "export" / "model")
    assert again.fingerprint == result.model.fingerprint != model.fingerprint
    np.testing.assert_array_equal(again.params["layers"]["q"], result.model.params["layers"]["q"])
    np.testing.assert_array_equal(model.params["layers"]["q"], random_params(CONFIG)["layers"]["q"])  # left alone


def test_an_export_replaces_an_earlier_one(model: Model, tmp_path: Path) -> None:
    first = export_model(tmp_path / "m", model, {})
    changed = model._replace(params=model.params | {"final_norm": model.params["final_norm"] + 1})
    second = export_model(tmp_path / "m", changed, {})
    assert first.fingerprint != second.fingerprint == load_model(tmp_path / "m").fingerprint
    assert dataclasses.asdict(load_model(tmp_path / "m").config) == dataclasses.asdict(CONFIG)
