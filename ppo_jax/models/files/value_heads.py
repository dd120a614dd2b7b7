"""Reward models as LLaMA-Factory saves them: a value head beside a PEFT adapter, or beside a whole language model.

value_head.safetensors     v_head.summary.weight [1, D], v_head.summary.bias [1]
score = weight . h + bias, h: the last hidden state, behind the final norm
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ppo_jax.types import PyTree

FILE, PICKLE = "value_head.safetensors", "value_head.bin"
_NAMES = ("v_head.summary.weight", "v_head.summary.bias")


def has_value_head(where: Path) -> bool:
    """Tell whether a directory is a reward model of LLaMA-Factory."""
    return (where / FILE).is_file() or (where / PICKLE).is_file()


def load_head(where: Path, width: int) -> PyTree:
    """Read the parameters of a RewardHead on hidden states of this width.

    Raises ValueError where the file is a pickle, damaged, or of another width.
    """
    file = where / FILE
    if not file.is_file():
        raise ValueError(
            f"{where / PICKLE} is a pickle, which is not read: train with save_safetensors: true, or write what "
            f"torch.load gives with safetensors.torch.save_file as {FILE}"
        )
    found = {name: array for name, array in _read(file).items() if name in _NAMES}
    if missing := [name for name in _NAMES if name not in found]:
        raise ValueError(f"{file}: tensor {missing[0]} is missing")
    weight, bias = (found[name].astype(np.float32) for name in _NAMES)
    if weight.shape != (1, width) or bias.shape != (1,):
        raise ValueError(f"{file}: {_NAMES[0]} has shape {weight.shape}; on this model it is (1, {width})")
    return {"reward": {"kernel": jnp.asarray(weight.T)}, "gain": jnp.ones(()), "bias": jnp.asarray(bias[0])}


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="numpy") as handle:
            return {name: np.asarray(handle.get_tensor(name), np.float32) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); copy it again") from error
