"""Kills runs of all stages (SIGKILL) at every place again and again, and compares what is left with a run that nobody
disturbed: `python -m tests.processes.kills --kills 200 --out experiments/results/kills.json`.

A round is one run directory: a life for each place, in random order, in which the process is killed there, and one that
comes to its end. A thread of the process looks where the main thread is, and kills it at a random moment of a visit of
the place. The record holds where each process was when it died. Stopped itself, the command goes on from its record.

Python 3.11 crashes now and then where a thread walks the frames of another one (twice in 300 lives on a busy machine,
in the thread that looks). Such a life counts as none; what it left is gone on with like that of a kill.
"""

import argparse
import collections
import contextlib
import datetime
import faulthandler
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    import tests.conftest  # noqa: F401  the programs are compiled lightly, once

import jax

from experiments import soak_report
from ppo_jax.cli import main as cli
from ppo_jax.data.disk import replace_file
from ppo_jax.runs.facts import environment
from ppo_jax.runs.output import rundir
from tests.processes import forks
from tests.processes.running import MODEL, REWARD
from tests.small import SMALL, write_stage_files

OFTEN = "--loop.checkpoint-every 1 --loop.eval-every 2 --resume auto"
HEAD = "--reward.lora-layers 1 --reward.rank 2 --reward.batch-size 8 --reward.head-steps 10 --reward.epochs 2"
STAGES = {
    "sft": f"sft --model model --data sft.jsonl --adapter.kind full --sft.batch-size 8 --sft.steps 8 {OFTEN}",
    "dpo": f"dpo --model model --pairs pairs.jsonl --adapter.rank 2 --dpo.batch-size 8 --dpo.steps 8 {OFTEN}",
    "reward": f"reward --model model --pairs pairs.jsonl --held-out 7 {HEAD} {OFTEN}",
    "ppo": (
        "ppo --model model --prompts prompts.jsonl --reward reward.py:length --held-out 4 --loop.updates 6 "
        "--loop.batch-size 8 --ppo.sampling.response-length 4 --ppo.epochs 2 --ppo.num-minibatches 2 "
        f"--policy.rank 2 {OFTEN}"
    ),
}
BEFORE, AFTER = ["start", "compile", "rollout", "save", "evaluation", "files"], ["report", "export"]
PLACES = (*BEFORE, *AFTER)  # "files": between two of them; "rollout": a step of any stage, with its rollout
# Where a process is: the first of these that it runs a function of. A name that ends in "/" stands for a folder.
FUNCTIONS = {
    "files": ("ppo_jax/data/disk.py", "ppo_jax/data/jsonl.py"),
    "compile": ("jax/_src/compiler.py",),
    "report": ("ppo_jax/report/",),
    "export": ("ppo_jax/runs/exports.py", "ppo_jax/models/files/artifacts.py:save", "ppo_jax/models/files/hf.py:save"),
    "evaluation": ("ppo_jax/runs/evaluation.py", "ppo_jax/runs/offline.py:measure"),
    "save": ("ppo_jax/runs/checkpoints/saving.py", "ppo_jax/runs/checkpoints/store.py:save"),
    "rollout": ("ppo_jax/train/loop.py:train",),
}
LOOK = 0.0005  # seconds between two looks
LIFE = 7200.0  # seconds: at the lowest priority of a busy machine a life takes long


# -- a life: in a process of its own -----------------------------------------------------------------------------------


def live(words: list[str], where: str, place: str | None, visit: int, delay: float) -> int:
    """The command; killed so many seconds after it has come to the place for the so-many-eth time. None: never."""
    faulthandler.enable()  # says which thread has crashed
    if place == "compile":  # nothing is there yet
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(dir=Path(where).parent))
    seen = Visits(threading.main_thread().ident or 0)
    watcher = threading.Thread(target=watch, args=[seen, Path(where), place, visit, delay], daemon=True)
    watcher.start()
    code = cli.main(words)
    Path(where).write_text(json.dumps(seen.record))
    return code


class Visits:
    """Where a thread has been: place -> visits and seconds."""

    def __init__(self, thread: int) -> None:
        self.thread, self.at, self.since, self.trained = thread, "", time.monotonic(), False
        self.record: dict[str, list[float]] = {}

    def look(self) -> str:
        found = find_place(sys._current_frames().get(self.thread))
        self.trained |= found == "rollout"
        found = found or ("end" if self.trained else "start")
        now = time.monotonic()
        if found != self.at:
            self.record.setdefault(found, [0, 0.0])[0] += 1
            self.at = found
        self.record[found][1] += now - self.since
        self.since = now
        return found


def watch(seen: Visits, where: Path, place: str | None, visit: int, delay: float) -> None:
    while True:
        if seen.look() == place and seen.record[place][0] >= visit:
            time.sleep(delay)
            where.write_text(json.dumps(seen.look()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LOOK)


def find_place(frame: FrameType | None) -> str | None:
    names = []
    while frame is not None:
        names.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
        frame = frame.f_back
    for place, functions in FUNCTIONS.items():
        for name in names:
            for function in functions:
                _, found, rest = name.rpartition(function)
                if found and (function.endswith("/") or rest == "" or (rest.startswith(":") and ":" not in function)):
                    return place
    return None


# -- rounds ------------------------------------------------------------------------------------------------------------


def make_files(folder: Path) -> None:
    write_stage_files(folder, SMALL)
    assert MODEL.vocab_size == SMALL.vocab_size
    (folder / "reward.py").write_text(REWARD)
    texts = ["abcd"[: 1 + i % 4] + "efghijkl"[i // 4] for i in range(30)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def run_life(
    folder: Path, stage: str, name: str, place: str | None = None, visit: int = 1, delay: float = 0.0
) -> tuple[int, Any, str]:
    """Exit code, where it was killed (else what it has visited), and what it has said."""
    where = folder / "where.json"
    where.unlink(missing_ok=True)
    words = [*STAGES[stage].split(), "--run-dir", name]
    environment = {"CALLS": str(folder / "calls-"), "COLUMNS": "200"}
    process = forks.start(live, words, str(where), place, visit, delay, folder=folder, environment=environment)
    with forks.ending([process]):
        code = process.wait(LIFE)
    return code, json.loads(where.read_text()) if where.exists() else None, process.text


def run_quiet(folder: Path, stage: str) -> dict[str, list[float]]:
    """The run that nobody disturbs: {place: visits and seconds}. It is left in the folder of its stage's name."""
    while True:
        shutil.rmtree(folder / stage, ignore_errors=True)
        code, seen, said = run_life(folder, stage, stage)
        if not is_of_watcher(code, said):
            assert code == 0, said
            return seen


def is_of_watcher(code: int, said: str) -> bool:
    """Whether a process was ended by the thread that looks, and not by the command."""
    crashed = said.partition("Current thread")[2].partition("\n\n")[0]
    return code == -signal.SIGSEGV and "in look\n" in crashed


def run_round(
    folder: Path, stage: str, places: list[str], quiet: dict[str, list[float]], rng: random.Random
) -> dict[str, Any]:
    """One run that is killed once at each of `places` (the last ones where it ends), and what differs at its end."""
    name, killed, differs = f"{stage}-killed", collections.Counter[str](), None
    shutil.rmtree(folder / name, ignore_errors=True)
    for place in [*places, None]:
        visits, seconds = quiet.get(place or "", [1, 0.0])
        visit = 1 if place == "start" else rng.randint(1, max(1, min(4, int(visits))))
        most = seconds if place == "start" else seconds / visits  # how long it is there, about
        code, where, said = run_life(folder, stage, name, place, visit, rng.uniform(0, most))
        while place is None and is_of_watcher(code, said):
            code, where, said = run_life(folder, stage, name)
        if is_of_watcher(code, said):
            continue
        if code == -signal.SIGKILL:
            killed[where or "start"] += 1
        elif code:
            differs = f"after {dict(killed)} a life ended with {code}: {said[-2000:]}"
            break
    if differs is None:
        try:
            soak_report.compare(folder / name, folder / stage)
            assert (folder / name / rundir.REPORT).is_file(), "there is no report"
        except (soak_report.SoakError, AssertionError, ValueError, OSError) as error:
            differs = f"after {dict(killed)}: {type(error).__name__}: {error}"
    return {"stage": stage, "killed": dict(killed), "differs": differs}


@contextlib.contextmanager
def world() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kills-") as made:
        make_files(Path(made))
        yield Path(made)


def choose_places(rounds: list[dict[str, Any]], stage: str, rng: random.Random) -> list[str]:
    """All places in random order, those that come at the end of a run last; before them first the rarest so far."""
    count = collections.Counter[str]()
    for done in rounds:
        count.update(done["killed"] if done["stage"] == stage else {})
    before, after = rng.sample(BEFORE, len(BEFORE)), rng.sample(AFTER, len(AFTER))
    return [*sorted(before, key=lambda place: count[place]), *after]


def sum_up(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    table = {stage: collections.Counter[str]() for stage in STAGES}
    for done in rounds:
        table[done["stage"]].update(done["killed"])
    places = sum(table.values(), collections.Counter[str]())
    return {
        "kills": sum(places.values()),
        "rounds": len(rounds),
        "differences": sum(done["differs"] is not None for done in rounds),
        "by_place": dict(sorted(places.items())),
        "by_stage": {stage: dict(sorted(found.items())) for stage, found in table.items()},
    }


def main() -> None:
    """Kill until there were so many, and record each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=200, help="End after this many kills, those of the record included."
    )
    parser.add_argument("--out", type=Path, default=Path("kills.json"), help="Keep the record in this file.")
    parser.add_argument("--minutes", type=float, default=1e9, help="Stop after this many minutes; go on another time.")
    given = parser.parse_args()
    stop = time.monotonic() + 60 * given.minutes
    rounds: list[dict[str, Any]] = json.loads(given.out.read_text())["rounds"] if given.out.exists() else []
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    quiet: dict[str, dict[str, list[float]]] = {}
    with world() as folder:
        while sum_up(rounds)["kills"] < given.kills and time.monotonic() < stop:
            stage, rng = list(STAGES)[len(rounds) % len(STAGES)], random.Random(len(rounds))
            quiet[stage] = quiet.get(stage) or run_quiet(folder, stage)
            start = time.monotonic()
            done = run_round(folder, stage, choose_places(rounds, stage, rng), quiet[stage], rng)
            rounds.append(done | {"commit": commit, "seconds": round(time.monotonic() - start)})
            facts = environment()
            head = {
                "command": f"python -m tests.processes.kills --kills {given.kills}",
                "date": datetime.date.today().isoformat(),
                "machine": facts["machine"],
                "versions": facts["versions"],
                **sum_up(rounds),
            }
            replace_file(given.out, (json.dumps(head | {"rounds": rounds}, indent=1) + "\n").encode())
            print(json.dumps(rounds[-1]), flush=True)
    total = sum_up(rounds)
    print(json.dumps(total))
    sys.exit(bool(total["differences"]))


if __name__ == "__main__":
    from tests.processes import kills  # the processes look for their function by its module's name

    kills.main()
