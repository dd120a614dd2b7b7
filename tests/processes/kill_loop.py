"""Kills a run again and again. A process of `forks` forks each life of the run, so that a life costs no more than its
programs."""

import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments import smoke, soak_run
from ppo_jax.cli.main import PREEMPTED
from ppo_jax.data.jsonl import append_jsonl
from ppo_jax.runs import ppo
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.output.tensorboard import tensorboard_writer
from ppo_jax.train.loop import Interrupted
from ppo_jax.types import Scores

ENDLESS = 10**6
UNFINISHED = "*orbax-checkpoint-tmp*"  # what Orbax calls a save that is not complete
PLACES = ("save", "anywhere", "SIGTERM", "update", "reward", "evaluation")


def kill(where: str, kills: int, others: list[str]) -> None:
    """Lives until so many were killed, one that is not, and the other runs; lives.jsonl says what happened."""
    folder = Path(where)
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))  # some die while they write to it
    tensorboard_writer(folder / "unused")  # imports it before the forks
    killed = folder / "killed"
    for seed in range(10 * kills):
        place = PLACES[seed % len(PLACES)]
        before = store.latest_step(killed / rundir.CHECKPOINTS)
        status = life(killed, ENDLESS, place, seed)
        unfinished = len(list((killed / rundir.CHECKPOINTS).glob(UNFINISHED)))
        where = (folder / "died").read_text() if status == -signal.SIGKILL else place
        record = {"place": where, "before": before, "status": status, "unfinished": unfinished}
        append_jsonl(folder / "lives.jsonl", [record])
        if status not in (-signal.SIGKILL, PREEMPTED):
            raise SystemExit(f"a life ended with {status}")
        kills -= status == -signal.SIGKILL
        if not kills:
            break
    target = (store.latest_step(killed / rundir.CHECKPOINTS) or 0) + 3
    for name in ("killed", *others):
        if status := life(folder / name, target):
            raise SystemExit(f"{name} ended with {status}")


def life(folder: Path, updates: int, place: str | None = None, seed: int = 0) -> int:
    """The run until it is killed at `place`, in a fork; its exit status, negative for a signal."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            train(folder, updates, place, random.Random(seed))
            code = 0
        except Interrupted:
            code = PREEMPTED
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def train(folder: Path, updates: int, place: str | None, rng: random.Random) -> None:
    settings = soak_run.SoakRun(server="", run_dir=folder)
    loop = dataclasses.replace(settings.loop, updates=updates, eval_every=7, checkpoint_every=1)
    checkpoints = folder / rundir.CHECKPOINTS
    start = store.latest_step(checkpoints) or 0
    hasty = rng.random() < 0.2  # killed before this life has saved anything
    after = rng.randint(0, 2)  # updates that follow the first checkpoint of this life

    def die(where: str) -> None:
        (folder.parent / "died").write_text(where)
        os.kill(os.getpid(), signal.SIGKILL)

    def die_later(where: str, seconds: float) -> None:
        threading.Timer(seconds, die, [where]).start()

    def die_in_a_save(seconds: float) -> None:
        """As soon as there is a checkpoint that is not complete, or a moment after."""
        older = set(checkpoints.glob(UNFINISHED))

        def wait() -> None:
            while set(checkpoints.glob(UNFINISHED)) <= older:
                time.sleep(0.0005)
            time.sleep(seconds)
            die("save")

        threading.Thread(target=wait, daemon=True).start()

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict]) -> Scores:
        nonlocal after
        evaluating = len(prompts) != loop.batch_size or prompts[0] in setup.held_out.texts
        after -= not evaluating and (hasty or (store.latest_step(checkpoints) or 0) > start)
        if place == "evaluation" and evaluating and rng.random() < 0.7:
            die("evaluation")
        if (after < 0 and place == "reward") or (after < -7 and place):
            die("reward")
        if after < 0 and place == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        if after < 0 and place in ("update", "anywhere"):
            die_later(place, rng.uniform(0, 0.01 if place == "update" else 0.2))
        points = [sum((w in smoke.GOOD) - (w in smoke.BAD) for w in text.split()) for text in responses]
        return Scores(np.array(points, np.float32), np.ones(len(points), bool), {})

    setup = soak_run.make_setup(dataclasses.replace(settings, loop=loop), reward)

    def save(*args: object) -> None:
        if place == "save" and after <= 0:
            die_in_a_save(rng.uniform(0, 0.005))
        original(*args)  # returns while files are still written

    original: Callable[..., None] = store.save
    store.save = save
    directory = rundir.open_run(folder, "auto")
    with progress("killed", main_process=False) as screen:
        ppo.run_ppo(directory, setup, screen, "auto")
