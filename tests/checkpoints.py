"""Arrays of a checkpoint by their paths, without a state to put them into."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from ppo_jax.runs.checkpoints.errors import CheckpointError
from ppo_jax.runs.checkpoints.reading import find_step, read_document, read_leaves


def read_arrays(directory: str | Path, paths: Sequence[str], step: int | None = None) -> dict[str, np.ndarray]:
    """Some leaves of `step` (None: the newest), compared with their sums. Errors: `store.restore`."""
    path, step = find_step(directory, step)
    manifest = read_document(path, step)["manifest"]
    if missing := [name for name in paths if name not in manifest]:
        raise CheckpointError(f"{path / str(step)} has no {', '.join(missing)}")
    return read_leaves(path, step, manifest, {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in paths})
