"""Where compiled programs are kept between commands."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import jax
from ppo_jax.parallel.programs import keep_programs
from pathlib import Path
print(keep_programs(Path({cache!r})))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **kept: hits.append(name))
jax.jit(lambda x: x * 2 + 1)(1.0)
print("/jax/compilation_cache/cache_hits" in hits)
"""


def run(cache: Path, **environment: str) -> list[str]:
    words = [sys.executable, "-c", COMMAND.format(cache=str(cache))]
    done = subprocess.run(words, env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."} | environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().split()


def test_the_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert first[0] == second[0] and first[0].startswith(f"{tmp_path}/programs/jaxlib-")
    assert (first[1], second[1]) == ("False", "True")


@pytest.mark.parametrize("chosen", ["", "elsewhere"])
def test_the_environment_has_the_last_word(tmp_path: Path, chosen: str) -> None:
    folder = str(tmp_path / chosen) if chosen else ""
    assert run(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=folder)[0] == "None"
    assert not (tmp_path / "ours").exists()
