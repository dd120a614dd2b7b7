"""An hour of training with something breaking every few seconds; at the end, bit for bit the undisturbed run.

    python -m experiments.soak --minutes 60
    python -m experiments.soak --minutes 30 --pieces 48 --record runs/soak.json   # a day; stopped, it goes on
    python -m experiments.soak_report runs/soak-*.json > docs/soak.md             # of pieces made side by side

`experiments.soak_run` trains in a process of its own. Meanwhile, at random moments: SIGKILL; SIGTERM, which has to save
and exit in time; a full disk; a reward server that answers 503, drops connections, is slow, or is down; and, between
two lives of the process, a damaged newest checkpoint. When the time is up both that run and a quiet one go to the same
update, and everything they leave is compared: parameters, optimizer state and all else in the checkpoint, metrics
(without times), samples, the exported policy. The first process lives for half of the time, so that memory, files and
threads that grow would be seen.
"""

import dataclasses
import datetime
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from experiments.failing_server import MODES, RewardServer
from experiments.soak_report import SoakError, compare, report
from ppo_jax.cli.main import PREEMPTED, exit_code
from ppo_jax.cli.parse import parse
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.facts import commit_of_code, environment
from ppo_jax.runs.output import rundir

ENDLESS = 10**7  # updates of the tormented run, until the time is up
WARM = 3  # updates of a first run, which compiles
CALM = 60  # updates that both runs still make after the last fault
DISK = 2000  # bytes that a file may have while the disk is full


@dataclasses.dataclass(frozen=True)
class SoakConfig:
    """Train while things break, and compare with a quiet run."""

    minutes: float = 60.0
    """Things break for this many minutes."""
    run_dir: Path = Path("runs/soak")
    """Both runs go into this directory, which is deleted first."""
    report: Path | None = None
    """The report is also written to this file, as Markdown."""
    pieces: int = 1
    """So many soaks are made, one after another; the first has the seed, the next one the seed after it."""
    record: Path | None = None
    """Each piece is written to this file, as JSON, and those in it are not made again."""
    seed: int = 0
    """This number seeds the faults."""
    pause: float = 6.0
    """Two faults are this many seconds apart in the mean."""
    score: float = 0.0
    """A score takes the reward server this many seconds, so that a long soak leaves the machine to others."""
    limit: float = 120.0
    """A process must end within this many seconds after SIGTERM."""


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Makes the pieces that are not recorded; returns all records. SoakError if anything is lost or differs."""
    settings = parse(SoakConfig, args, prog="experiments.soak")
    done = json.loads(settings.record.read_text()) if settings.record and settings.record.is_file() else []
    for seed in range(settings.seed, settings.seed + settings.pieces):
        if all(piece["seed"] != seed for piece in done):
            piece = soak(dataclasses.replace(settings, seed=seed))
            done.append(piece)
            print(json.dumps(piece))
            if settings.record:
                settings.record.write_text(json.dumps(done, indent=1) + "\n")
    text = report(done)
    print(text)
    if settings.report:
        settings.report.write_text(text, encoding="utf-8")
    return done


def soak(settings: SoakConfig) -> dict[str, Any]:
    """One piece; returns what is recorded of it."""
    shutil.rmtree(settings.run_dir, ignore_errors=True)
    settings.run_dir.mkdir(parents=True)
    hurt, quiet = settings.run_dir / "hurt", settings.run_dir / "quiet"
    with RewardServer() as server, (settings.run_dir / "soak.log").open("w") as log:
        warm = Child(settings.run_dir / "warm", server, WARM, log)  # fills the cache of programs
        if (code := warm.process.wait()) != 0:
            raise SoakError(f"the run does not work: exit status {code}; see {log.name}")
        torment = Torment(settings, hurt, server, log)
        server.takes = settings.score
        torment.run()
        server.takes = 0.0
        target = (store.latest_step(hurt / rundir.CHECKPOINTS) or 0) + CALM
        say(log, f"the time is up: {dict(torment.counts)}; both runs go to update {target}")
        server.mode = "works"
        for folder in (hurt, quiet):
            child = Child(folder, server, target, log)
            if (code := child.process.wait()) != 0:
                raise SoakError(f"{folder}: the last part ended with exit status {code}; see {log.name}")
    compared = compare(hurt, quiet, torment.counts["full disk"] > 0)
    facts = environment()
    return {
        "seed": settings.seed,
        "date": datetime.date.today().isoformat(),
        "commit": commit_of_code(),
        "machine": facts["machine"],
        "versions": {name: facts["versions"][name] for name in ("python", "jax", "orbax-checkpoint")},
        "minutes": settings.minutes,
        "options": f"--minutes {settings.minutes:g} --pause {settings.pause:g} --score {settings.score:g}",
        "updates": target,
        "faults": dict(sorted(torment.counts.items())),
        "requests": dict(sorted(server.failures.items())),
        "longest_stop_seconds": round(torment.longest, 1),
        "long_life": [usage._asdict() for usage in torment.usage[:: max(len(torment.usage) // 8, 1)]],
        "compared": compared,
    }


class Usage(NamedTuple):
    """What a process holds."""

    minutes: float
    megabytes: float
    files: int
    threads: int


# -- the run and its faults --------------------------------------------------------------------------------------------


class Child:
    """`experiments.soak_run` in a process; what it says goes to the log."""

    def __init__(self, folder: Path, server: RewardServer, updates: int, log: Any) -> None:
        self.metrics = folder / rundir.METRICS
        self.before = size(self.metrics)
        command = [sys.executable, "-m", "experiments.soak_run", "--run-dir", str(folder), "--server", server.url]
        command += ["--loop.updates", str(updates), "--resume", "auto"]
        # Restarts read their programs from a cache.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"), "JAX_PLATFORMS": "cpu"}
        cache |= {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | cache, text=True
        )

        def copy() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                say(log, f"  {line.rstrip()}")

        threading.Thread(target=copy, daemon=True).start()

    def trains(self) -> bool:
        """Whether it has done an update since it started."""
        if self.process.poll() is not None or size(self.metrics) <= self.before:
            return False
        with self.metrics.open("rb") as file:
            file.seek(self.before)
            return b'"phase": "ppo"' in file.read()


class Torment:
    """Breaks things until the time is up."""

    def __init__(self, settings: SoakConfig, folder: Path, server: RewardServer, log: Any) -> None:
        self.settings, self.folder, self.server, self.log = settings, folder, server, log
        self.random = random.Random(settings.seed)
        self.counts: Counter[str] = Counter()
        self.longest = 0.0  # seconds from SIGTERM to the end
        self.usage: list[Usage] = []  # of the first process
        self.began = time.monotonic()
        self.end = self.began + 60 * settings.minutes

    def run(self) -> None:
        while time.monotonic() < self.end:
            child = Child(self.folder, self.server, ENDLESS, self.log)
            self.counts["lives"] += 1
            try:
                self.life(child)
            finally:
                if child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()

    def life(self, child: Child) -> None:
        """Server failures and full disks, and after the first updates one end."""
        fatal = self.random.choice(("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM"))
        first = self.counts["lives"] == 1
        after: float | None = None  # when the end comes
        while True:
            time.sleep(min(self.random.expovariate(1 / self.settings.pause), 3 * self.settings.pause) / 2)
            if first and child.process.poll() is None:
                self.look(child)
            if child.process.poll() is not None:
                raise SoakError(f"the run ended by itself, exit status {child.process.returncode}; see {self.log.name}")
            if after is None and child.trains():
                after = time.monotonic() + self.random.uniform(0, 3 * self.settings.pause)
                if first:
                    after = max(after, (self.began + self.end) / 2)
            if after is not None and time.monotonic() >= after:
                break
            if not child.trains():
                continue
            if self.random.random() < 0.6:
                mode = self.random.choice(MODES)
                self.note(f"the server {mode}")
                self.server.fail(mode, self.random.uniform(0.3, 2.0))
            else:
                self.note("full disk")
                with full_disk(child.process.pid):
                    time.sleep(self.random.uniform(0.5, 4.0))
        self.kill(child) if fatal == "SIGKILL" else self.terminate(child)

    def look(self, child: Child) -> None:
        """Notes what the process holds."""
        process = psutil.Process(child.process.pid)
        with process.oneshot(), suppress(psutil.NoSuchProcess):
            megabytes = process.memory_info().rss / 2**20
            minutes = (time.monotonic() - self.began) / 60
            self.usage.append(Usage(round(minutes, 2), round(megabytes, 1), process.num_fds(), process.num_threads()))

    def kill(self, child: Child) -> None:
        """At once; sometimes with damage to the newest checkpoint as well."""
        time.sleep(self.random.uniform(0, 0.5))
        self.note("SIGKILL")
        child.process.kill()
        child.process.wait()
        steps = store.all_steps(self.folder / rundir.CHECKPOINTS)
        if len(steps) > 1 and self.random.random() < 0.3:
            files = sorted(p for p in (self.folder / rundir.CHECKPOINTS / str(steps[-1])).rglob("*") if p.is_file())
            file = self.random.choice([file for file in files if file.stat().st_size])
            self.note("damaged checkpoint")
            self.damage(file)

    def damage(self, file: Path) -> None:
        """A byte changed, half of it gone, or all."""
        data = file.read_bytes()
        at = self.random.randrange(len(data))
        how = self.random.choice(("flipped", "cut", "gone"))
        say(self.log, f"{file}: {how}")
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(data[:at] + (bytes([data[at] ^ 0xFF]) + data[at + 1 :] if how == "flipped" else b""))

    def terminate(self, child: Child) -> None:
        """Politely: it has to save and say so by its exit status, in time."""
        self.note("SIGTERM")
        began = time.monotonic()
        child.process.send_signal(signal.SIGTERM)
        try:
            code = child.process.wait(self.settings.limit)
        except subprocess.TimeoutExpired:
            late = f"SIGTERM did not end the run within {self.settings.limit:g} s; see {self.log.name}"
            raise SoakError(late) from None
        self.longest = max(self.longest, time.monotonic() - began)
        if code != PREEMPTED:
            raise SoakError(f"SIGTERM ended the run with exit status {code}, not {PREEMPTED}; see {self.log.name}")

    def note(self, what: str) -> None:
        self.counts[what] += 1
        say(self.log, f"*** {what}")


@contextmanager
def full_disk(process: int) -> Iterator[None]:
    """No file of that process grows beyond a little; what it writes in place of that fails, as on a full disk."""
    soft, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    try:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (DISK, hard))
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def say(log: Any, text: str) -> None:
    log.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    log.flush()


if __name__ == "__main__":
    sys.exit(exit_code("experiments.soak", main))
