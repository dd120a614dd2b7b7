"""`--compute.*`: from the command line to the model that runs, and a whole PPO iteration in bfloat16."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import smoke
from experiments.sentiment import SentimentConfig, world
from ppo_jax.cli.dpo import DPOSettings
from ppo_jax.cli.generate import GenerateSettings
from ppo_jax.cli.parse import parse
from ppo_jax.cli.ppo import PPOSettings
from ppo_jax.cli.reward import RewardSettings
from ppo_jax.cli.sft import SFTSettings
from ppo_jax.models.adapters import init_full
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.files import hf
from ppo_jax.models.pretrained import load_model
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.ppo import make_iteration
from ppo_jax.train.state import init_state
from ppo_jax.types import Frozen
from tests.train import toy

SMALL = ModelOptions("bfloat16", "dots", "xla", "int8")
FLAGS = ["--compute.dtype", "bfloat16", "--compute.remat", "dots", "--compute.attention", "xla"]
FLAGS += ["--compute.quantise", "int8"]


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        (SFTSettings, ["--model", "m", "--data", "d"]),
        (DPOSettings, ["--model", "m", "--pairs", "d"]),
        (RewardSettings, ["--model", "m", "--pairs", "d"]),
        (GenerateSettings, []),
        (PPOSettings, ["--model", "m", "--prompts", "d", "--reward", "r"]),
        (SentimentConfig, []),
    ],
)
def test_the_command_line_reaches_every_stage(settings: type, needed: list[str]) -> None:
    assert parse(settings, [*needed, *FLAGS]).compute == SMALL
    assert parse(settings, needed).compute == ModelOptions()


def test_a_model_is_loaded_to_be_run_that_way(tmp_path: Path) -> None:
    made = smoke.model()
    hf.save(tmp_path / "model", made.config, made.params, made.tokenizer)
    found = load_model(tmp_path / "model", SMALL)
    assert SMALL.of(found.config) == found.config
    dtypes = {jax.tree_util.keystr(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(found.params)}
    assert {dtypes.pop(name).name for name in list(dtypes) if name.endswith(".codes")} == {"int8"}
    assert {dtypes.pop(name).name for name in list(dtypes) if name.endswith(".scales")} == {"float32"}
    assert set(dtypes.values()) == {jnp.dtype(jnp.bfloat16)}
    toy_world, _ = world(SentimentConfig(smoke=True, compute=SMALL))
    assert toy_world.config.remat == "dots" and toy_world.params["embedding"].dtype == jnp.bfloat16
    assert toy_world.params["layers"]["q"].codes.dtype == jnp.int8


def test_a_whole_iteration_trains_float32_masters_of_a_bfloat16_base() -> None:
    """A step of 1e-5 is seen in every kind of array, and nothing changes its dtype on the way."""
    half = ModelOptions("bfloat16", "full").of(toy.CONFIG)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.BASE)
    optimizer = make_optimizer()
    state = init_state(jax.random.key(0), init_full(base), half, optimizer, 0.05)
    before = jax.tree.map(jnp.copy, state)
    hyper = toy.HYPER._replace(learning_rate=1e-5)
    after, metrics = make_iteration(half, toy.ONCE, optimizer, toy.worth)(
        state, Frozen(base, toy.WORTH), toy.prompts(), hyper
    )
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert dtypes(before) == dtypes(after)
    assert set(dtypes(after.policy)) == {jnp.dtype(jnp.float32)}
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.policy.adapter, before.policy.adapter)
    assert all(0 < step < 1.1e-5 for step in jax.tree.leaves(moved)), moved
    assert toy.numbers(metrics)["kl"] == pytest.approx(0, abs=0.05)
