"""How far a save raises this process's memory: `python -m tests.export_memory` prints megabytes as JSON (Linux).

A whole model of 201 MB, trained on 8 devices, is saved as an artifact and as a Hugging Face directory. Here the memory
of the devices is the process's own, so what a program puts there for a moment counts too.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from ppo_jax.models.adapters import init_full
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.layout import init_params
from ppo_jax.models.placement import create
from ppo_jax.parallel.mesh import MeshConfig, make_mesh

CONFIG = ModelConfig(
    vocab_size=16384,
    hidden_size=512,
    intermediate_size=2048,
    num_layers=10,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
)
SELF = Path("/proc/self")


def megabytes(field: str) -> float:
    """VmRSS (now) or VmHWM (the highest since it was reset) of this process."""
    line = next(line for line in (SELF / "status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def growth(action: Callable[[], object]) -> float:
    (SELF / "clear_refs").write_text("5")  # resets VmHWM
    before = megabytes("VmRSS")
    action()
    return megabytes("VmHWM") - before


def main() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = create(lambda key: init_params(key, CONFIG), mesh, jax.random.key(0))
        tuned = jax.block_until_ready(create(init_full, mesh, base))
        named = artifacts.Base("b", "f" * 64, CONFIG)
        sizes = [leaf.nbytes / 1e6 for leaf in jax.tree.leaves(tuned)]
        found = {
            "parameters": sum(sizes),
            "largest": max(sizes),
            "artifact": growth(lambda: artifacts.save(folder / "a", "policy", tuned, {}, named)),
            "model": growth(lambda: hf.save(folder / "m", CONFIG, base, adapter=tuned)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
