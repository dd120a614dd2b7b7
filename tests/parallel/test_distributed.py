"""Real processes on this machine, joined by gloo: the numbers of one process, and an end when one of them dies."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ppo_jax.models.files import hf
from ppo_jax.parallel.launch import DistributedConfig, is_one_of_several
from ppo_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
from ppo_jax.parallel.processes import feed, fetch, own_rows
from ppo_jax.rewards.combine import SplitReward
from ppo_jax.train.options import PPOConfig, check_micro_batches
from tests import distributed_worker as worker
from tests.models.tiny import random_params

ROOT = Path(__file__).parents[2]
LIMIT = 240  # seconds: a test that hangs has failed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    hf.save(path, worker.CONFIG, random_params(worker.CONFIG))
    return path


@pytest.fixture(scope="module")
def alone(model: Path) -> list[dict[str, float]]:
    """The metrics of three iterations on one device."""
    return [values for _, values in worker.run(model, MeshConfig(), 3)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    folder: Path,
    model: Path,
    processes: int,
    devices: int,
    mesh: MeshConfig,
    updates: int = 3,
    heartbeat: int = 100,
    **more: Any,
) -> list[subprocess.Popen]:
    coordinator = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    started = []
    for process in range(processes):
        joined = {"coordinator": coordinator, "processes": processes, "process": process, "heartbeat": heartbeat}
        spec = {
            "distributed": joined | {"timeout": 120},
            "mesh": dict(zip(("data", "fsdp", "tensor"), mesh.shape, strict=True)),
            "model": str(model),
            "updates": updates,
            "checkpoints": str(folder / "checkpoints"),
            "out": str(folder / f"{process}.json"),
        } | more
        command = [sys.executable, "-m", "tests.distributed_worker", json.dumps(spec)]
        with (folder / f"{process}.log").open("w") as log:
            pipe = subprocess.PIPE if process == 0 else log
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=log, text=True))
    return started


def finish(started: list[subprocess.Popen], folder: Path) -> None:
    """Waits for all of them; ends those that are left, whatever happens."""
    try:
        for process in started:
            process.communicate(timeout=LIMIT)
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = "".join((folder / f"{i}.log").read_text()[-3000:] for i in range(len(started)))
    assert [process.returncode for process in started] == [0] * len(started), logs


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 2, MeshConfig(fsdp=2, tensor=2)), (4, 1, MeshConfig(data=2, fsdp=2))],
    ids=["2 processes", "4 processes"],
)
def test_processes_give_the_metrics_of_one(
    tmp_path: Path, model: Path, alone: list[dict], processes: int, devices: int, mesh: MeshConfig
) -> None:
    finish(launch(tmp_path, model, processes, devices, mesh), tmp_path)
    records = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(processes)]
    for record in records:
        assert record["scored"] == [worker.ROWS // processes] * 3  # each row is scored by one process
        assert record["restored"]  # from the checkpoint that all have written
        assert record["held"] < 1.3 * record["total"] / (mesh.fsdp * mesh.tensor / devices)
        assert len(record["metrics"]) == 3
        for values, expected in zip(record["metrics"], alone, strict=True):
            for name in (name for name in expected if not name.endswith("_seconds")):
                np.testing.assert_allclose(values[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert [record["first"] for record in records] == [True] + [False] * (processes - 1)


def test_a_reward_model_that_reads_text_gives_the_scores_of_one_process(tmp_path: Path, model: Path) -> None:
    """Its program spans both processes, so both must put the same rows into it: split over tensor and over rows."""
    meshes = [{"tensor": 2}, {"data": 2}]
    finish(launch(tmp_path, model, 2, 1, MeshConfig(data=2), score=meshes), tmp_path)
    expected = worker.model_scores(model, MeshConfig())
    assert len(set(expected)) == len(worker.LENGTHS) and expected[2] == -99  # no text, no score
    for process in range(2):
        for scores in json.loads((tmp_path / f"{process}.json").read_text()):
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, tensor=2), MeshConfig(data=2, fsdp=2)], ids=str)
def test_the_first_of_two_writes_what_one_writes(tmp_path: Path, model: Path, mesh: MeshConfig) -> None:
    """Spread over both, arrays are saved bitwise and read shard by shard; a full disk fails both and harms nothing."""
    worker.exports(model, MeshConfig(), tmp_path / "alone" / "0")
    finish(launch(tmp_path, model, 2, 2, mesh, export=str(tmp_path / "several")), tmp_path)
    expected, found = (
        {file.relative_to(top).as_posix(): file.read_bytes() for file in top.rglob("*") if file.is_file()}
        for top in (tmp_path / "alone", tmp_path / "several")
    )
    assert found == expected and len(expected) > 6  # all of them in the first one's folder
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first["same"] and second["same"]
    assert "File too large" in first["failures"][0] and first["failures"][1].startswith("FileExistsError")
    for own, other in zip(second["failures"], first["failures"], strict=True):
        assert own == f"OSError: process 0 could not write: {other}"


def test_the_others_end_when_one_is_killed(tmp_path: Path, model: Path) -> None:
    started = launch(tmp_path, model, 2, 1, MeshConfig(data=2), updates=100_000, heartbeat=5)
    try:
        assert started[0].stdout is not None
        assert any("update 1" in line for line in started[0].stdout)  # after gloo's own words
        started[1].send_signal(signal.SIGKILL)
        started[0].communicate(timeout=LIMIT)  # raises when it hangs
        assert started[0].returncode not in (0, None)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert not (tmp_path / "0.json").exists()


@pytest.mark.parametrize(("kind", "code"), [("ValueError", 2), ("KeyError", 1)])
def test_one_that_fails_does_not_wait_for_the_others_nor_they_for_it(
    tmp_path: Path, model: Path, kind: str, code: int
) -> None:
    """A mistake of the user (one line) and a bug (its traceback): far below the 300 s of jax's farewell."""
    started = launch(tmp_path, model, 2, 1, MeshConfig(data=2), updates=100_000, heartbeat=5, fails=kind)
    try:
        for process in started:
            process.communicate(timeout=100)  # raises when it hangs
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert started[1].returncode == code and started[0].returncode not in (0, None)
    log = (tmp_path / "1.log").read_text()
    assert "the reward is out of order" in log and ("Traceback" in log) == (code == 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "host:1"}, "belong together"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "process=2 must be below"),
        ({"heartbeat": 0}, "heartbeat=0 must be at least 1 second"),
    ],
)
def test_options_that_cannot_be(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**given)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # an sbatch script without srun
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # inside salloc, but not started by srun
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_what_says_that_there_are_others(environment: dict, expected: bool) -> None:
    assert is_one_of_several(environment) == expected


def test_a_micro_batch_has_to_spread_over_the_devices() -> None:
    ppo = PPOConfig(num_minibatches=4)
    with pytest.raises(ValueError, match=r"loop.batch_size=16 / \(4 x 1\)\) has 4 rows, which .* = 8 does not divide"):
        check_micro_batches(MeshConfig(data=2, fsdp=4), 16, ppo)
    check_micro_batches(MeshConfig(data=2, fsdp=2, tensor=2), 16, ppo)
    check_micro_batches(MeshConfig(data=2, fsdp=4), 16, PPOConfig(num_minibatches=4, group_size=2))  # 32 responses
    with pytest.raises(ValueError, match=r"batch_size=8 x ppo.group_size=2 / \(4 x 1\)\) has 4 rows, which .* = 8 "):
        check_micro_batches(MeshConfig(data=2, fsdp=4), 8, PPOConfig(num_minibatches=4, group_size=2))


def test_one_device_needs_no_mesh() -> None:
    with use_mesh(MeshConfig()):
        assert jax.sharding.get_mesh().empty
    with use_mesh(MeshConfig(fsdp=8)):
        assert jax.sharding.get_mesh().shape["fsdp"] == 8


def test_with_one_process_nothing_changes() -> None:
    prompts = worker.batch(0)
    assert own_rows(8) == slice(0, 8)
    assert np.array_equal(feed(prompts).tokens, prompts.tokens)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    fed = feed(prompts, mesh)
    assert fed.tokens.addressable_shards[0].data.shape == (1, worker.P)
    for one, other in zip(fetch(fed), prompts, strict=True):
        assert (one is None and other is None) or np.array_equal(one, other)
    seven = jax.tree.map(lambda x: x[:7], prompts)  # does not divide: every device holds all rows
    assert feed(seven, mesh).tokens.addressable_shards[0].data.shape == (7, worker.P)
    scores = SplitReward(worker.reward)(["0"], ["3 4"], [{"number": 0}])
    assert scores.reward.tolist() == [0.7]
