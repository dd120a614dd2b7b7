"""`ppo-jax ppo` in two processes by experiments/launch/one_machine.sh: one run directory, as one process leaves it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ppo_jax.cli import main as cli
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files import artifacts
from ppo_jax.runs.checkpoints import store
from tests.processes import forks
from tests.processes.running import make_world, options
from tests.processes.world import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "launch" / "one_machine.sh"
SCRIPTS = sorted((ROOT / "experiments" / "launch").glob("*.sh"))


def start(folder: Path, command: list[str], **more: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PATH": path, "TMPDIR": str(folder / "private")} | more
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module", params=["forks", pytest.param("script", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after the run of two processes: forks that get what the script gives, and the script itself."""
    folder, port = tmp_path_factory.mktemp("launch"), str(free_port())
    make_world(folder)
    (folder / "private").mkdir()
    words, calls = [*options("two"), "--mesh.fsdp", "2"], str(folder / "two-calls-")
    if request.param == "script":
        start(folder, [str(SCRIPT), *words], PROCESSES="2", PORT=port, CALLS=calls)
        return folder
    environment = {"TMPDIR": str(folder / "private"), "CALLS": calls}
    joined = ["ppo", *words, "--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", "2"]
    with forks.ending(
        [
            forks.start(
                forks.command, [*joined, "--distributed.process", str(i)], folder=folder, environment=environment
            )
            for i in range(2)
        ]
    ) as both:
        assert [process.wait() for process in both] == [0, 0], forks.logs(both)
    return folder


def test_two_processes_leave_one_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [(r["step"], r["phase"]) for r in read_jsonl(world / "two" / "metrics.jsonl")]
    assert records == [(0, "eval"), (1, "ppo"), (2, "ppo"), (2, "eval")]  # written by one process
    # Each process was asked for its half of every batch, in training and in evaluation.
    calls = [sorted(p.read_text().split()) for p in world.glob("two-calls-*")]
    assert calls == [["2", "2", "4", "4"]] * 2
    assert (world / "two" / "report.html").is_file()
    assert store.latest_step(world / "two" / "checkpoints") == 2
    assert not list((world / "private").glob("ppo_jax-*"))  # what the second process wrote for itself is gone
    # What the run has left is what the command writes, from the policy and from the checkpoint of both.
    left = (world / "two" / "export" / "model" / "model.safetensors").read_bytes()
    shutil.copytree(world / "two", tmp_path / "two")
    monkeypatch.chdir(world)
    for folder in ("from policy", "from checkpoint"):
        given = ["--model", str(world / "model"), "--to", str(tmp_path / folder)]
        assert cli.main(["export", str(tmp_path / "two"), *given]) == 0
        assert (tmp_path / folder / "model.safetensors").read_bytes() == left
        shutil.rmtree(tmp_path / "two" / "export" / "policy", ignore_errors=True)


@pytest.mark.long
def test_two_processes_leave_what_one_leaves(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CALLS", str(world / "one-calls-"))
    assert cli.main(["ppo", *options("one")]) == 0
    one, two = (read_jsonl(world / name / "metrics.jsonl") for name in ("one", "two"))
    assert [(r["step"], r["phase"]) for r in two] == [(r["step"], r["phase"]) for r in one]
    for record, expected in zip(two, one, strict=True):
        for name in ("reward", "kl", "policy_loss", "response_length"):
            if name in expected:
                np.testing.assert_allclose(record[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    policies = [artifacts.load(world / name / "export" / "policy", "policy").adapter for name in ("one", "two")]
    for left, right in zip(*map(jax.tree.leaves, policies), strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("code", [0, 3])
def test_the_script_starts_every_process_and_fails_with_the_first_that_fails(tmp_path: Path, code: int) -> None:
    """The command replaced by a recorder: the script's own logic is run."""
    recorder = tmp_path / "ppo-jax"
    said = (
        'echo "$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES $@" > begun-$$ && mv begun-$$ said-$$'  # or it is killed in between
    )
    recorder.write_text(f"#!/bin/sh\n{said}\nexit {code}\n")
    recorder.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PROCESSES": "2", "PORT": "7", "DEVICES": "3"}
    done = subprocess.run([str(SCRIPT), "--run-dir", "x y"], cwd=tmp_path, env=environment, check=False, timeout=60)
    assert done.returncode == code
    found = sorted(path.read_text() for path in tmp_path.glob("said-*"))
    joined = "--distributed.coordinator 127.0.0.1:7 --distributed.processes 2 --distributed.process"
    expected = [f"cpu 3 ppo --run-dir x y {joined} {i}\n" for i in range(2)]
    assert found == expected if not code else set(found) <= set(expected)


def test_the_scripts_are_shell() -> None:
    assert {path.name for path in SCRIPTS} == {"one_machine.sh", "slurm_gpu.sh", "tpu_pod.sh"}
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert os.access(path, os.X_OK)


@pytest.mark.parametrize(("code", "queued"), [(0, False), (2, False), (75, True)])
def test_a_slurm_job_that_was_stopped_and_saved_is_queued_again(tmp_path: Path, code: int, queued: bool) -> None:
    """Slurm's two commands replaced by recorders: the script's own logic is run."""
    for name, text in {"srun": f"exit {code}", "scontrol": 'echo "$@" > queued'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOME": "/h", "SLURM_JOB_ID": "7"}
    script = str(ROOT / "experiments" / "launch" / "slurm_gpu.sh")
    done = subprocess.run([script], cwd=tmp_path, env=environment | {"SLURM_JOB_NAME": "ppo"}, check=False)
    assert done.returncode == code
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"
