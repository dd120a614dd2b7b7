"""`ppo-jax sft`, `dpo` and `reward` in two real processes that gloo joins: what one process leaves, written once."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from ppo_jax.cli import main as cli
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files import artifacts, hf
from ppo_jax.rewards.loading import load_scorer
from tests.processes import forks
from tests.processes.world import free_port
from tests.small import SMALL, write_stage_files

COMMON = "--model model --held-out 7 --run-dir"
RUNS = {
    "sft": "sft --data sft.jsonl --adapter.kind full --sft.batch-size 8 --sft.steps 3",
    "dpo": "dpo --pairs pairs.jsonl --adapter.rank 2 --dpo.batch-size 8 --dpo.accumulate 2 --dpo.steps 3",
    "reward": "reward --ratings ratings.jsonl --reward.lora-layers 1 --reward.batch-size 8 --reward.head-steps 20",
    "whole": "reward --pairs pairs.jsonl --reward.kind full --reward.batch-size 8 --reward.head-steps 20",
}
MESHES = {"sft": "--mesh.fsdp 2", "dpo": "--mesh.tensor 2", "reward": "--mesh.data 2", "whole": "--mesh.fsdp 2"}
FEW = ("sft", "reward")  # a whole model and an adapter, over both axes of rows


def words(name: str, folder: str, *more: str) -> list[str]:
    return [*RUNS[name].split(), *COMMON.split(), f"{folder}/{name}", *more]


def run_commands(commands: list[list[str]]) -> int:
    """One process: the commands one after the other, until one fails."""
    return next((code for words in commands if (code := cli.main(words))), 0)


def start_two(world: Path, names: Sequence[str]) -> list[forks.Fork]:
    joined = f"--distributed.coordinator 127.0.0.1:{free_port()} --distributed.processes 2 --distributed.process"
    return [
        forks.start(
            run_commands,
            [words(name, "two", *MESHES[name].split(), *joined.split(), str(process)) for name in names],
            folder=world,
            environment={"TMPDIR": str(world / "private")},
        )
        for process in range(2)
    ]


@pytest.fixture(scope="module", params=[FEW, pytest.param(tuple(RUNS), marks=pytest.mark.long)], ids=["few", "all"])
def names(request: pytest.FixtureRequest) -> Sequence[str]:
    """The commands."""
    return request.param


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, names: Sequence[str]) -> Path:
    """The folder after all runs, once by two processes and once by this one."""
    path = tmp_path_factory.mktemp("stages")
    write_stage_files(path, dataclasses.replace(SMALL, num_kv_heads=2))
    (path / "private").mkdir()
    with forks.ending(start_two(path, names)) as started:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(path)
            assert [cli.main(words(name, "one")) for name in names] == [0] * len(names)
        assert [process.wait() for process in started] == [0, 0], forks.logs(started)
        for i, process in enumerate(started):
            (path / f"{i}.log").write_text(process.text)
    return path


def test_two_processes_leave_what_one_leaves(world: Path, names: Sequence[str]) -> None:
    for name in names:
        one, two = (read_jsonl(world / folder / name / "metrics.jsonl") for folder in ("one", "two"))
        assert [(r["step"], r["phase"]) for r in two] == [
            (r["step"], r["phase"]) for r in one
        ]  # written by one process
        for record, expected in zip(two, one, strict=True):
            for value in record.keys() - {"step", "phase", "time", "seconds"}:
                pair = np.array([record[value], expected[value]], float)  # null: a batch in which nothing is ordered
                np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6, err_msg=f"{name}: {value}")
        left, right = (
            {path.relative_to(world / folder / name) for path in (world / folder / name).rglob("*") if path.suffix}
            for folder in ("one", "two")
        )
        # Each process writes the arrays that it holds: those files have other names.
        assert {path for path in left ^ right if "events" not in path.name and "arrays" not in path.parts} == set()


def test_the_roles_are_the_same(world: Path, names: Sequence[str]) -> None:
    kinds: dict[str, artifacts.Kind] = {"sft": "policy", "dpo": "policy", "reward": "reward"}
    for name, kind in ((name, kinds[name]) for name in names if name in kinds):
        one, two = (artifacts.load(world / folder / name / "export" / kind, kind) for folder in ("one", "two"))
        for left, right in zip(*(jax.tree.leaves((x.adapter, x.head)) for x in (one, two)), strict=True):
            assert np.linalg.norm(left - right) <= 1e-5 * np.linalg.norm(left), name


def test_the_models_are_the_same(world: Path, names: Sequence[str]) -> None:
    for name in {"sft", "dpo"} & set(names):
        one, two = (hf.load(world / folder / name / "export" / "model")[1] for folder in ("one", "two"))
        for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:  # where the base of the artifact is
        patch.chdir(world)
        for name in {"reward", "whole"} & set(names):
            scores = [load_scorer(world / folder / name).score(["", ""], ["cd a", "cd b"]) for folder in ("one", "two")]
            np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)
            assert scores[0][0] != scores[0][1]


def test_only_the_first_process_speaks_and_the_other_leaves_nothing(world: Path) -> None:
    first, second = ((world / f"{i}.log").read_text() for i in range(2))
    assert "held-out perplexity" in first and "the reward model is at two/reward" in first.replace("\n", "")
    assert "held-out" not in second
    assert not list((world / "private").glob("ppo_jax-*"))
