"""`ppo-jax ppo` with a tiny model in a process of its own, whose words are read as it says them."""

import contextlib
import ctypes
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.files import hf
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from tests.checkpoints import read_arrays
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import random_params
from tests.processes import forks
from tests.processes.forks import LIMIT
from tests.small import SMALL

MODEL = SMALL
REWARD = """
import os
def length(prompts, responses, metadata):
    with open(os.environ["CALLS"] + str(os.getpid()), "a") as log:
        print(len(responses), file=log)
    return [len(response) / 10 for response in responses]
"""
ASKED = """
import time
calls = 0
def length(prompts, responses, metadata):
    global calls
    calls += 1
    print("asked", calls, flush=True)
    time.sleep(0.02)
    return [len(response) / 10 for response in responses]
"""
CAPABILITIES = 0x20080522  # version 3 of the kernel's record of what a process may do
OVERRIDE = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


def make_world(folder: Path, reward: str = REWARD) -> None:
    hf.save(folder / "model", MODEL, random_params(MODEL), make_tokenizer())
    (folder / "reward.py").write_text(reward)
    texts = ["abcd"[: 1 + i % 4] + "efghijkl"[i // 4] for i in range(30)]
    lines = [json.dumps({"prompt": text, "metadata": {"n": i}}) + "\n" for i, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("".join(lines))


def options(name: str) -> list[str]:
    text = (
        f"--model model --prompts prompts.jsonl --reward reward.py:length --run-dir {name} --loop.updates 2 "
        "--held-out 4 --loop.batch-size 8 --ppo.sampling.response-length 4 --ppo.epochs 1 --ppo.num-minibatches 2 "
        "--policy.kind full"
    )
    return text.split()


def as_anybody(words: list[str]) -> int:
    """The command as anybody's: mode bits count, also for root, who is above them by two capabilities."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~OVERRIDE  # effective; then permitted, inheritable
    assert libc.capset(header, sets) == 0
    return forks.command(words)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_world(tmp_path, ASKED)
    return tmp_path


class Run:
    """The command in a process of its own, and what it says, in order."""

    def __init__(self, folder: Path, *more: str) -> None:
        words = ["ppo", *options("run"), "--loop.eval-every", "0", "--loop.checkpoint-every", "1"]
        words += ["--loop.schedule", "constant", *more]
        self.process = forks.start(as_anybody, words, folder=folder, environment={"COLUMNS": "400"})
        self.read = 0  # characters of what it has said

    def until(self, *words: str) -> None:
        """Waits until every one of `words` has been said, from now on."""
        self.read = self.process.until(*words, since=self.read)

    def goes_on(self) -> None:
        """Waits for three more updates."""
        for _ in range(3):
            self.until("asked")

    def ends(self) -> int:
        return self.process.wait()

    @property
    def text(self) -> str:
        return self.process.text


@contextlib.contextmanager
def running(folder: Path, *more: str) -> Iterator[Run]:
    run = Run(folder, *more)
    with forks.ending([run.process]):
        yield run


def saved(folder: Path) -> None:
    """Waits until there are checkpoints."""
    end = time.monotonic() + LIMIT
    while (store.latest_step(folder / "run" / rundir.CHECKPOINTS) or 0) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)


def last_good(folder: Path) -> int:
    """The newest checkpoint, every array of which is what was saved."""
    path = folder / "run" / rundir.CHECKPOINTS
    arrays = read_arrays(path, [n for n, e in store.read_manifest(path).items() if 0 not in e["shape"]])
    assert all(np.isfinite(x).all() for x in arrays.values() if np.issubdtype(x.dtype, np.floating))
    found = store.latest_step(path)
    assert found is not None
    return found


def updates(folder: Path) -> list[int]:
    return [r["step"] for r in read_jsonl(folder / "run" / rundir.METRICS) if r["phase"] == "ppo"]


def resume_to(folder: Path, last: int) -> None:
    with running(folder, "--resume", "--loop.updates", str(last)) as run:
        assert run.ends() == 0, run.text
    assert updates(folder) == list(range(1, last + 1))
    assert last_good(folder) == last
    assert (folder / "run" / rundir.REPORT).is_file()
