"""`import ppo_jax` finds the package from every directory, also beside a clone: the clone's folder has its name too."""

import subprocess
import sys
from pathlib import Path


def test_it_is_found_beside_a_folder_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "ppo_jax" / "docs").mkdir(parents=True)
    words = [sys.executable, "-c", "import ppo_jax; print(ppo_jax.__file__, ppo_jax.Algorithm.__name__)"]
    done = subprocess.run(words, cwd=tmp_path, env={"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, name = done.stdout.split()
    assert Path(file).parent.name == "ppo_jax" and name == "Algorithm"
