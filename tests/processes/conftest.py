"""The shared worlds: one of two processes with two devices each, and one of four."""

from pathlib import Path

import pytest

from ppo_jax.models.files import hf
from tests.models.tiny import random_params
from tests.processes import checkpoints, training, world
from tests.processes.world import Check, World


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the model that worlds train."""
    path = tmp_path_factory.mktemp("model")
    hf.save(path, training.CONFIG, random_params(training.CONFIG))
    return path


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory, model: Path) -> World:
    folder, given = tmp_path_factory.mktemp("two"), str(model)
    for name in ("damages", "failures"):
        (folder / name).mkdir()
    checks = [
        Check("iterations", training.iterations, [given, {"fsdp": 2, "tensor": 2}, 3, str(folder / "checkpoints")]),
        Check("scores", training.scores_on, [given, [{"tensor": 2}, {"data": 2}]]),
        Check("exports", training.exports_on, [given, {"fsdp": 2, "tensor": 2}, str(folder / "exports")]),
        Check("exports of rows", training.exports_on, [given, {"data": 2, "fsdp": 2}, str(folder / "exports of rows")]),
        Check("damages", checkpoints.damages, [str(folder / "damages")]),
        Check("failures", checkpoints.failures, [str(folder / "failures")]),
    ]
    return world.run(folder, checks, processes=2, devices=2)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory, model: Path) -> World:
    folder = tmp_path_factory.mktemp("four")
    arguments = [str(model), {"data": 2, "fsdp": 2}, 3, str(folder / "checkpoints")]
    return world.run(folder, [Check("iterations", training.iterations, arguments)], processes=4)
