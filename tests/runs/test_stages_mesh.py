"""Fine-tuning, preferences and reward models: what one device leaves, eight devices leave, on every mesh."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from ppo_jax.cli import main as cli
from ppo_jax.data import EncodedSFT, PairRecord
from ppo_jax.data.encode import EncodedRatings
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.files import artifacts
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.models.placement import create_on_mesh, place_on_mesh, shardings
from ppo_jax.parallel.mesh import MeshConfig, current_mesh, use_mesh
from ppo_jax.parallel.processes import feed, fetch
from ppo_jax.runs.dpo import encode, run_dpo
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.reward import run_reward, training_batches
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.runs.sft import run_sft
from ppo_jax.train.dpo import DPOConfig, DPOScalars, Preferences, make_dpo_step
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.reward import RewardConfig, init_role, make_reward_step
from ppo_jax.train.sft import Demonstrations, SFTConfig, make_sft_step
from ppo_jax.types import PyTree
from tests.data.tokenizer import EOS
from tests.parallel.test_sharding import gathered
from tests.small import SMALL, small_model, write_stage_files

CONFIG = dataclasses.replace(SMALL, num_kv_heads=2)
ONE = MeshConfig()
MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
MESHES = [MeshConfig(data=8), MeshConfig(fsdp=8), MIXED]
LORA, FULL = AdapterConfig(rank=2, layers=1), AdapterConfig("full")
SFT = SFTConfig(batch_size=16, accumulate=2, steps=3, learning_rate=1e-3, logprob_chunk=16)
DPO = DPOConfig(batch_size=16, accumulate=2, steps=3, learning_rate=1e-3, logprob_chunk=16)
REWARD = RewardConfig(lora_layers=1, rank=2, batch_size=8, head_steps=20, learning_rate=1e-3)


class Left(NamedTuple):
    """What a run leaves and says."""

    metrics: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]  # of the role that was trained
    measured: dict[str, float]  # on the held-out data, after training
    layout: tuple[PyTree, PyTree]  # shardings of what was left on the devices, and those of the table


def texts(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(2, 32, rng.integers(3, 9)).tolist(), EOS] for _ in range(count)]


def demonstrations(count: int, seed: int) -> EncodedSFT:
    return EncodedSFT(texts(count, seed), [1 + i % 3 for i in range(count)], list(range(count)), 0)


def answers(count: int, seed: int) -> list[PairRecord]:
    rng = np.random.default_rng(seed)
    say = lambda letter: letter * int(rng.integers(1, 4))
    return [PairRecord("cdefg"[: 1 + i % 4], say("a"), say("b"), 0.0, f"pairs:{i}") for i in range(count)]


def ratings(count: int, seed: int) -> EncodedRatings:
    return EncodedRatings(texts(count, seed), [float(i % 5) for i in range(count)], 0)


@functools.cache
def left(stage: str, kind: str, config: MeshConfig) -> Left:
    """One run in a directory of its own."""
    model, folder = small_model(CONFIG), Path(tempfile.mkdtemp())
    with progress("test", main_process=False) as screen, use_mesh(config):
        if stage == "sft":
            adapter = FULL if kind == "full" else LORA
            result = run_sft(
                folder, OfflineSetup(model, demonstrations(40, 0), demonstrations(11, 1), SFT, 0, adapter), screen
            )
            tree, after = result.model.params, result.after
        elif stage == "dpo":
            pairs, unseen = (encode(answers(count, count), model.tokenizer, 32) for count in (40, 11))
            adapter = AdapterConfig("top_k", layers=1) if kind == "full" else LORA
            result = run_dpo(folder, OfflineSetup(model, pairs, unseen, DPO, 0, adapter), screen)
            tree, after = result.model.params, result.after
        else:
            make = ratings if kind == "ratings" else None
            encoded = lambda count: encode(answers(count, count), model.tokenizer, 32).encoded
            train, unseen = (make(30, 0), make(11, 1)) if make else (encoded(30), encoded(11))  # type: ignore[assignment]
            reward = dataclasses.replace(REWARD, kind="full", lora_layers=0) if kind == "full" else REWARD
            found = run_reward(folder, OfflineSetup(model, train, unseen, reward, 0), screen)  # type: ignore[arg-type]
            tree, after = found.role, found.heldout
        mesh = current_mesh()
        layout = (None, None)
        if mesh is not None:
            layout = jax.tree.map(lambda x: x.sharding, tree), shardings(tree, mesh)
        if stage != "reward":  # in the merged model an adapter is hard to see
            tree = artifacts.load(folder / EXPORT / "policy").adapter
        arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(fetch(tree))}
    return Left(read_jsonl(folder / rundir.METRICS), arrays, after, layout)


# The mesh of all three axes for each stage, in turn of an adapter and a model; the others in `make test-all`.
KINDS = [("sft", "full"), ("dpo", "lora"), ("reward", "full")]
CASES: list = [(stage, kind, MIXED) for stage, kind in KINDS]
CASES += [
    pytest.param(stage, kind, MIXED, marks=pytest.mark.long)
    for stage, kind in [("sft", "lora"), ("dpo", "full"), ("reward", "lora"), ("reward", "ratings")]
]
CASES += [
    pytest.param(stage, "lora", mesh, marks=pytest.mark.long)
    for stage in ("sft", "dpo", "reward")
    for mesh in MESHES
    if mesh != MIXED
]


@pytest.mark.parametrize(("stage", "kind", "config"), CASES, ids=str)
def test_every_mesh_leaves_what_one_device_leaves(stage: str, kind: str, config: MeshConfig) -> None:
    expected, found = left(stage, kind, ONE), left(stage, kind, config)
    assert [(r["step"], r["phase"]) for r in found.metrics] == [(r["step"], r["phase"]) for r in expected.metrics]
    for record, other in zip(found.metrics, expected.metrics, strict=True):
        assert record.keys() == other.keys()
        for name in record.keys() - {"step", "phase", "time", "seconds"}:
            np.testing.assert_allclose(record[name], other[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name, value in expected.measured.items():  # `accuracy` among them
        assert found.measured[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert np.linalg.norm(found.arrays[name] - array) <= 1e-5 * np.linalg.norm(array), name
    assert found.layout[0] == found.layout[1], "not laid out as the table says"


def step_and_arguments(task: str, base: PyTree) -> tuple[Any, tuple]:
    """A jitted step of full tuning, and what it is given."""
    optimizer, full = make_optimizer(), dataclasses.replace(REWARD, kind="full", lora_layers=0)
    fresh = {"reward": lambda key, base: init_role(key, CONFIG, full, base)}.get(
        task, lambda key, base: init_adapter(key, base, CONFIG, FULL)
    )
    params = create_on_mesh(fresh, jax.random.key(0), base)
    state = (params, create_on_mesh(optimizer.init, params), base)
    ones = np.ones((16, 9), bool)
    rows = Demonstrations(*map(np.asarray, (np.full(ones.shape, 3), ones, ones)))
    if task == "sft":
        return make_sft_step(CONFIG, SFT, optimizer), (*state, feed(rows), 1e-3, 1.0)
    if task == "dpo":
        pairs = Preferences(*(np.stack([x, x], axis=1) for x in rows))
        return make_dpo_step(CONFIG, DPO, optimizer), (*state, feed(pairs), DPOScalars(1e-3, 1.0, 0.1, 0.0))
    batches, steps = training_batches(ratings(30, 0), dataclasses.replace(full, batch_size=16), 0, 0)
    assert steps and all(isinstance(x, np.ndarray) for x in jax.tree.leaves(batches(0)))  # the host's until now
    return make_reward_step(CONFIG, optimizer), (*state, feed(batches(0)), 1e-3)


@pytest.mark.parametrize("config", [MeshConfig(fsdp=8), MIXED], ids=str)
@pytest.mark.parametrize("task", ["sft", "dpo", "reward"])
def test_a_step_keeps_what_it_trains_and_its_optimizer_on_their_shards(task: str, config: MeshConfig) -> None:
    """Born as the table says and the same after the step; nothing larger than one matrix is gathered on the way."""
    with use_mesh(config):
        mesh = current_mesh()
        assert mesh is not None
        step, arguments = step_and_arguments(task, place_on_mesh(small_model(CONFIG).params))
        before = shardings(arguments[:2], mesh)
        assert jax.tree.map(lambda x: x.sharding, arguments[:2]) == before
        program = step.lower(*arguments).compile()
        after = program(*arguments)[:2]
    assert jax.tree.map(lambda x: x.sharding, after) == before
    held, total = (
        sum(map(size, jax.tree.leaves(after)))
        for size in (lambda x: x.addressable_shards[0].data.nbytes, lambda x: x.nbytes)
    )
    assert held < 1.2 * total / (config.fsdp * config.tensor)
    shapes, matrix = gathered(program.as_text()), CONFIG.vocab_size * CONFIG.hidden_size
    assert shapes and not {shape: size for shape, size in shapes.items() if size > matrix}
    assert 8 * 9 * CONFIG.hidden_size > matrix  # activations of all rows of a micro-batch would be seen


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_stage_files(tmp_path, CONFIG)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "sft --data sft.jsonl --mesh.data 8 --sft.batch-size 24 --sft.accumulate 2",
            "a micro-batch (--sft.batch-size 24 / --sft.accumulate 2) has 12 rows, which mesh.data x mesh.fsdp = 8",
        ),
        (
            "dpo --pairs pairs.jsonl --mesh.fsdp 4 --mesh.data 2 --dpo.batch-size 12",
            "a micro-batch (--dpo.batch-size 12 / --dpo.accumulate 1) has 12 rows, which mesh.data x mesh.fsdp = 8",
        ),
        (
            "reward --ratings ratings.jsonl --mesh.fsdp 8 --reward.lora-layers 1",
            "a batch (--reward.batch-size 50) has 50 rows, which mesh.data x mesh.fsdp = 8 does not divide",
        ),
        ("sft --data sft.jsonl --mesh.data 2", "needs 2 devices, but there are 8; --mesh.data 8 would use all"),
        ("dpo --pairs pairs.jsonl --mesh.tensor 8", "--mesh.tensor 8 does not divide num_kv_heads=2"),
        ("reward --ratings ratings.jsonl --distributed.process 1", "distributed.coordinator, .processes and .process"),
    ],
)
def test_meshes_that_do_not_fit_leave_nothing_behind(
    args: str, message: str, files: Path, capsys: pytest.CaptureFixture
) -> None:
    try:
        code = cli.main([*args.split(), "--model", "model", "--run-dir", "x"])
    except SystemExit as wrong:  # tyro's, of one option alone
        code = wrong.code  # type: ignore[assignment]
    assert code == cli.MISTAKE
    assert message.replace(" ", "") in "".join(capsys.readouterr().err.replace("│", "").split())
    assert not (files / "x").exists()


@pytest.mark.long
def test_a_chain_of_commands_on_meshes_is_the_chain_on_one_device(files: Path) -> None:
    """Fine-tuning, a reward model and PPO with it, each command reading what the one before left."""
    lines = [{"prompt": "cdefg"[: 1 + i % 4] + "abcdef"[i // 4]} for i in range(24)]
    (files / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def chain(name: str, mesh: str) -> list[dict[str, Any]]:
        stages = f"""
            sft --model model --data sft.jsonl --run-dir {name}/sft --adapter.kind full --sft.steps 2 --sft.batch-size 8
            reward --model {name}/sft/export/model --ratings ratings.jsonl --run-dir {name}/lora --held-out 8
                --reward.batch-size 8 --reward.lora-layers 1 --reward.head-steps 5
            ppo --model {name}/sft/export/model --prompts prompts.jsonl --run-dir {name}/ppo --held-out 8
                --reward {name}/lora --loop.updates 2 --loop.batch-size 8 --loop.eval-every 0
                --ppo.num-minibatches 1 --ppo.epochs 2 --ppo.sampling.response-length 4"""
        for words in stages.replace("\n                ", " ").strip().splitlines():
            assert cli.main([*words.split(), *mesh.split()]) == 0, words
        return read_jsonl(files / name / "ppo" / rundir.METRICS)

    one, eight = chain("one", ""), chain("eight", "--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2")
    assert [r["phase"] for r in eight] == [r["phase"] for r in one] and len(one) >= 4
    for record, expected in zip(eight, one, strict=True):
        for key in ("reward", "kl", "policy_loss", "response_length", "entropy"):
            if key in expected:
                np.testing.assert_allclose(record[key], expected[key], rtol=1e-3, atol=1e-4, err_msg=key)
