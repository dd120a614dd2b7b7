"""Signs of life: each slice counts in the study, and watches the others count.

No clock is compared with another machine's: a slice is dead when its count has stood still for the whole of the grace
time *while this slice could read it*. So nobody is taken for dead because the database was away, or clocks differ.
"""

import contextlib
import os
import re
import socket
import threading
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

import optuna

PREFIX = "slice "


class Heartbeat:
    """Counts for the slice `name` in a thread, until `stop`."""

    def __init__(self, study: optuna.Study, name: str, interval: float, grace: float) -> None:
        self.study, self.name, self.interval, self.grace = study, name, interval, grace
        self.counts: dict[str, Any] = {}
        self.still: dict[str, float] = {}  # seconds for which each count has been seen to stand still
        self.seen: float | None = None  # when the others were last looked at
        self.unowned: dict[int, float] = {}  # trials without a slice, by number: when first seen
        self.beats = 0
        self.over = threading.Event()
        self._beat()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.over.wait(self.interval):
            try:
                self._beat()
            except Exception:  # the storage is away: those who need it now say so
                self.seen = None

    def _beat(self) -> None:
        self.beats += 1
        self.study.set_user_attr(PREFIX + self.name, self.beats)
        now = time.monotonic()
        # A long time between two looks says nothing of what was between.
        passed = 0.0 if self.seen is None else min(now - self.seen, 2 * self.interval)
        self.seen = now
        for key, count in self.study.user_attrs.items():
            if key.startswith(PREFIX) and key != PREFIX + self.name:
                same = self.counts.get(key) == count
                self.still[key] = self.still.get(key, 0.0) + passed if same else 0.0
                self.counts[key] = count

    def is_dead(self, name: str | None, trial: int) -> bool:
        """Whether the slice that has `trial` is dead. None: it died between taking the trial and saying who it is."""
        if name == self.name:
            return True  # an attempt that this very slice does not hold: it gave it up
        if name is None:
            first = self.unowned.setdefault(trial, time.monotonic())
            return time.monotonic() - first > self.grace
        return _process_is_gone(name) or self.still.get(PREFIX + name, 0.0) > self.grace

    def stop(self) -> None:
        self.over.set()
        self.thread.join()


def name_slice() -> str:
    """A name for this process as a slice: its machine, its number there, and something of its own."""
    return f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _machine() -> str:
    """The host's name, and what tells its boots and its containers (each with process numbers of its own) apart."""
    inside = ""
    with contextlib.suppress(OSError):
        inside = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}-{zlib.crc32(inside.encode()):08x}"


def _process_is_gone(name: str) -> bool:
    """Whether a slice of this very machine is known to have ended."""
    found = re.fullmatch(r"(.*)-(\d+)-[0-9a-f]{8}", name)
    if not found or found[1] != _machine():
        return False
    try:
        os.kill(int(found[2]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
