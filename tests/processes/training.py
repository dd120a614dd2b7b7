"""Checks of a world of processes: PPO, scores of a reward model and exports. Also the same in one process."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.models.adapters import AdapterConfig, init_adapter, init_lora
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.placement import create, create_on_mesh
from ppo_jax.ops.means import means
from ppo_jax.parallel.mesh import MeshConfig, current_mesh, make_mesh
from ppo_jax.parallel.processes import feed, fetch, is_first
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.rewards.combine import SplitReward
from ppo_jax.rewards.model import row_scorer, text_reward
from ppo_jax.rollout import Sampling
from ppo_jax.runs.checkpoints import store
from ppo_jax.train.host import host_iteration
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.ppo import make_host_iteration
from ppo_jax.train.state import TrainState, init_state
from ppo_jax.types import Frozen, Hyper, Prompts, PyTree, Scores
from tests.disk import small_disk
from tests.processes.world import one_after_another

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=False,
)
ROWS, P, T = 8, 3, 4
SAMPLING = Sampling(response_length=T, stop_ids=(2,))
HYPER = Hyper(learning_rate=1e-2, temperature=0.9, vf_coef=0.5)
LENGTHS = (3, 20, 0, 1, 31, 7, 17)  # of the texts that a reward model scores
SCORED: list[int] = []  # rows that the reward of this process was asked for, per call
FAILS: tuple[int, type[Exception]] = (-1, ValueError)  # the process whose second call of the reward fails, and how


def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict]) -> Scores:
    """Points of the response's tokens; odd rows of the table have an invalid score when the response is empty."""
    SCORED.append(len(responses))
    if jax.process_index() == FAILS[0] and len(SCORED) == 2:
        raise FAILS[1]("the reward is out of order")
    points = np.array([sum(int(word) % 7 for word in text.split()) / 10 for text in responses])
    valid = np.array([bool(text) or entry["number"] % 2 == 0 for text, entry in zip(responses, metadata, strict=True)])
    assert all(prompt == str(entry["number"]) for prompt, entry in zip(prompts, metadata, strict=True))
    return Scores(points, valid, {"half": points / 2})


def batch(step: int) -> Prompts:
    rng = np.random.default_rng(step)
    mask = np.arange(P) >= P - rng.integers(1, P + 1, (ROWS, 1))
    index = rng.permutation(ROWS).astype(np.int32)
    return Prompts(rng.integers(0, CONFIG.vocab_size, (ROWS, P)).astype(np.int32), mask, index)


def run(model: Path, config: MeshConfig, updates: int) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """State and metrics after each iteration; full tuning, from a model on disk."""
    mesh = make_mesh(config, None if config.size == jax.device_count() else jax.devices()[: config.size])
    with jax.set_mesh(mesh):
        model_config, base = hf.load(model, mesh=mesh)
        ppo = PPOConfig(sampling=SAMPLING, epochs=1, num_minibatches=2)
        optimizer = make_optimizer()

        def fresh(key: jax.Array, base: PyTree) -> TrainState:
            adapter = init_adapter(key, base, model_config, AdapterConfig("full"))
            return init_state(jax.random.key(1), adapter, model_config, optimizer, 0.05)

        state = create(fresh, mesh, jax.random.key(0), base)
        collect, learn = make_host_iteration(model_config, ppo, optimizer)
        texts = tuple(str(i) for i in range(ROWS))
        table = tuple({"number": i} for i in range(ROWS))
        iteration = host_iteration(
            collect, learn, SplitReward(reward), lambda ids: " ".join(map(str, ids)), SAMPLING, texts, table
        )
        for step in range(updates):
            state, metrics = iteration(state, Frozen(base), feed(batch(step)), HYPER)
            yield state, means(metrics)


def model_scores(model: Path, config: MeshConfig) -> list[float]:
    """What a reward model that reads text, on the mesh, says of texts of several lengths, one without tokens."""
    with jax.set_mesh(make_mesh(config, one_after_another(config.size))):
        model_config, base = hf.load(model, mesh=current_mesh())
        head = RewardHead().init(jax.random.key(3), jnp.zeros((1, CONFIG.hidden_size)))["params"]
        role = RewardRole(init_lora(jax.random.key(4), model_config, 2, 4.0), head)
        scorer = row_scorer(base, role, model_config, 32, (4,))
        encode = lambda prompts, texts: [[int(word) for word in text.split()] for text in texts]  # noqa: E731
        texts = [" ".join(str(3 + (7 * i + j) % 29) for j in range(length)) for i, length in enumerate(LENGTHS)]
        scores = SplitReward(text_reward(scorer, encode))([""] * len(texts), texts, [{}] * len(texts))
    return np.where(scores.valid, scores.reward, -99.0).tolist()


def exports(model: Path, config: MeshConfig, folder: Path) -> dict[str, Any]:
    """Writes and reads back what a fully tuned run leaves; then tries it once more, on a disk that is full for one."""
    with jax.set_mesh(make_mesh(config, jax.devices()[: config.size])):
        model_config, base = hf.load(model, mesh=current_mesh())
        tuned = create_on_mesh(lambda base: jax.tree.map(lambda w: 1.5 * w, base), base)
        head = create_on_mesh(lambda key: {"value": {"kernel": jax.random.normal(key, (16, 1))}}, jax.random.key(0))
        head["value"]["bias"] = create_on_mesh(lambda: jnp.ones(1))

        def save(adapter: PyTree, overwrite: bool = False) -> None:
            named = artifacts.Base("b", "f" * 64, model_config)
            artifacts.save(folder / "policy", "policy", adapter, head, named, overwrite=overwrite)
            hf.save(folder / "model", model_config, base, adapter=adapter, overwrite=overwrite, max_shard_bytes=2000)

        save(tuned)
        shared = folder.parent / "0" / "policy"
        found = artifacts.load(shared)
        same = jax.tree.map(lambda a, b: a.sharding == b.sharding and bool((a == b).all()), tuned, found.adapter)
        failures = []
        for action in (lambda: save(base, True), lambda: save(tuned)):  # the second one: it is there already
            with small_disk(3000) if is_first() and not failures else contextlib.nullcontext():
                try:
                    action()
                except OSError as error:
                    failures.append(f"{type(error).__name__}: {error}")
        return {"same": all(jax.tree.leaves(same)), "failures": failures}


# -- checks: what a world calls, in each of its processes --------------------------------------------------------------


def iterations(model: str, mesh: dict[str, int], updates: int, checkpoints: str) -> dict[str, Any]:
    """The metrics of `updates` iterations, and the state from the checkpoint that all have written."""
    SCORED.clear()
    metrics, state = [], None
    for latest, values in run(Path(model), MeshConfig(**mesh), updates):
        state = latest
        metrics.append(values)
        print("update", len(metrics), flush=True)
    assert state is not None
    with store.open_manager(checkpoints) as manager:
        store.save(manager, updates, state)
    restored, _ = store.restore(checkpoints, state)
    same = jax.tree.map(np.array_equal, fetch(state.policy), fetch(restored.policy))
    again = all(jax.tree.leaves(same)) and all(
        a.sharding == b.sharding for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True)
    )
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(state.policy) for shard in leaf.addressable_shards)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state.policy))
    first = is_first()
    return dict(metrics=metrics, restored=again, scored=SCORED, held=held, total=total, first=first)


def failing_iterations(model: str, mesh: dict[str, int], kind: str) -> None:
    """Iterations without end, in which the second call of the second process's reward fails."""
    global FAILS
    FAILS = (1, {"ValueError": ValueError, "KeyError": KeyError}[kind])
    for _ in run(Path(model), MeshConfig(**mesh), 10**6):
        pass


def scores_on(model: str, meshes: list[dict[str, int]]) -> list[list[float]]:
    return [model_scores(Path(model), MeshConfig(**mesh)) for mesh in meshes]


def exports_on(model: str, mesh: dict[str, int], folder: str) -> dict[str, Any]:
    return exports(Path(model), MeshConfig(**mesh), Path(folder) / str(jax.process_index()))
