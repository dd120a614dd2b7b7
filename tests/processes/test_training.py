"""Real processes on this machine, joined by gloo: the numbers of one process, and an end when one of them dies."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ppo_jax.parallel.launch import DistributedConfig, is_one_of_several
from ppo_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
from ppo_jax.parallel.processes import feed, fetch, own_rows
from ppo_jax.rewards.combine import SplitReward
from ppo_jax.train.options import PPOConfig, check_micro_batches
from tests.processes import forks, training, world
from tests.processes.world import Check, World


@pytest.fixture(scope="module")
def alone(model: Path) -> list[dict[str, float]]:
    """The metrics of three iterations on one device."""
    return [values for _, values in training.run(model, MeshConfig(), 3)]


@pytest.mark.parametrize(("name", "share"), [("two", 1 / 2), pytest.param("four", 1 / 2, marks=pytest.mark.long)])
def test_processes_give_the_metrics_of_one(
    request: pytest.FixtureRequest, alone: list[dict], name: str, share: float
) -> None:
    """Two processes of two devices (fsdp 2 x tensor 2), and four of one (data 2 x fsdp 2)."""
    records = request.getfixturevalue(name).found("iterations")
    for record in records:
        assert record["scored"] == [training.ROWS // len(records)] * 3  # each row is scored by one process
        assert record["restored"]  # from the checkpoint that all have written
        assert record["held"] < 1.3 * share * record["total"]
        assert len(record["metrics"]) == 3
        for values, expected in zip(record["metrics"], alone, strict=True):
            for name in (name for name in expected if not name.endswith("_seconds")):
                np.testing.assert_allclose(values[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert [record["first"] for record in records] == [True] + [False] * (len(records) - 1)


def test_a_reward_model_that_reads_text_gives_the_scores_of_one_process(two: World, model: Path) -> None:
    """Its program spans both processes, so both must put the same rows into it: split over tensor and over rows."""
    expected = training.model_scores(model, MeshConfig())
    assert len(set(expected)) == len(training.LENGTHS) and expected[2] == -99  # no text, no score
    for found in two.found("scores"):
        for scores in found:
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["exports", "exports of rows"])
def test_the_first_of_two_writes_what_one_writes(two: World, tmp_path: Path, model: Path, name: str) -> None:
    """Spread over both, arrays are saved bitwise and read shard by shard; a full disk fails both and harms nothing."""
    training.exports(model, MeshConfig(), tmp_path / "alone" / "0")
    first, second = two.found(name)
    expected, found = (
        {file.relative_to(top).as_posix(): file.read_bytes() for file in top.rglob("*") if file.is_file()}
        for top in (tmp_path / "alone", two.folder / name)
    )
    assert found == expected and len(expected) > 6  # all of them in the first one's folder
    assert first["same"] and second["same"]
    assert "File too large" in first["failures"][0] and first["failures"][1].startswith("FileExistsError")
    for own, other in zip(second["failures"], first["failures"], strict=True):
        assert own == f"OSError: process 0 could not write: {other}"


@pytest.mark.parametrize(("kind", "code"), [("ValueError", 2), pytest.param("KeyError", 1, marks=pytest.mark.long)])
def test_one_that_fails_does_not_wait_for_the_others_nor_they_for_it(
    tmp_path: Path, model: Path, kind: str, code: int
) -> None:
    """A mistake of the user (one line) and a bug (its traceback): far below the 300 s of jax's farewell."""
    failing = Check("iterations", training.failing_iterations, [str(model), {"data": 2}, kind])
    with forks.ending(world.start(tmp_path, [failing], heartbeat=10)) as started:
        codes = [process.wait(100) for process in started]  # raises when it hangs
        assert codes[1] == code and codes[0] != 0
        log = started[1].text
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
    prompts = training.batch(0)
    assert own_rows(8) == slice(0, 8)
    assert np.array_equal(feed(prompts).tokens, prompts.tokens)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    fed = feed(prompts, mesh)
    assert fed.tokens.addressable_shards[0].data.shape == (1, training.P)
    for one, other in zip(fetch(fed), prompts, strict=True):
        assert (one is None and other is None) or np.array_equal(one, other)
    seven = jax.tree.map(lambda x: x[:7], prompts)  # does not divide: every device holds all rows
    assert feed(seven, mesh).tokens.addressable_shards[0].data.shape == (7, training.P)
    scores = SplitReward(training.reward)(["0"], ["3 4"], [{"number": 0}])
    assert scores.reward.tolist() == [0.7]
