"""Compiled programs, kept on disk from one command to the next."""

import os
import platform
import zlib
from importlib import metadata
from pathlib import Path

import filelock
import jax

MOST_BYTES = 4 * 2**30
# JAX's names: a program, the time of its last use, and the lock under which it writes first the one, then the other.
PROGRAM, USED, LOCK = "-cache", "-atime", ".lockfile"


def keep_programs(cache: Path) -> Path | None:
    """Keep what is compiled from now on below `cache`, the least used thrown away beyond 4 GiB; return where.

    None, and nothing is changed, where $JAX_COMPILATION_CACHE_DIR says where, or (empty) that there is none. A folder
    is for one version of jaxlib and one kind of processor: a program for another one may use instructions that this
    one has not, and homes are shared between machines.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or getattr(jax.config, "jax_compilation_cache_dir", None):
        return None
    folder = cache / "programs" / f"jaxlib-{metadata.version('jaxlib')}-{processor_sum():08x}"
    drop_half_written(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    return folder


def drop_half_written(folder: Path) -> None:
    """Delete what a process left that was killed, or had no disk, while it kept a program.

    JAX would write none of these again, and could keep no other program: it asks each for its time of use.
    """
    if not folder.is_dir():
        return
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            files = {path.name: path.stat().st_size for path in folder.iterdir()}
            for name in files:
                kept = name.removesuffix(PROGRAM).removesuffix(USED)
                half = not files.get(kept + PROGRAM) or files.get(kept + USED) != 8
                if name.endswith((PROGRAM, USED)) and half:
                    (folder / name).unlink(missing_ok=True)
    except (OSError, filelock.Timeout):  # it cannot be written, or another process is just keeping one
        pass


def processor_sum() -> int:
    """Sum up what programs of this processor may use: its architecture and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))} or {lines[0]})
    return zlib.crc32("\n".join([platform.machine(), *told]).encode())
