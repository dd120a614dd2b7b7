"""Compiled programs, kept on disk from one command to the next."""

import os
import platform
import zlib
from importlib import metadata
from pathlib import Path

import jax

MOST_BYTES = 4 * 2**30


def keep_programs(cache: Path) -> Path | None:
    """Keep what is compiled from now on below `cache`, the least used thrown away beyond 4 GiB; return where.

    None, and nothing is changed, where $JAX_COMPILATION_CACHE_DIR says where, or (empty) that there is none. A folder
    is for one version of jaxlib and one kind of processor: a program for another one may use instructions that this
    one has not, and homes are shared between machines.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or getattr(jax.config, "jax_compilation_cache_dir", None):
        return None
    folder = cache / "programs" / f"jaxlib-{metadata.version('jaxlib')}-{processor_sum():08x}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    return folder


def processor_sum() -> int:
    """Sum up what programs of this processor may use: its architecture and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))} or {lines[0]})
    return zlib.crc32("\n".join([platform.machine(), *told]).encode())
