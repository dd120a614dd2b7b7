"""The sha256 of a model's weights: adapters only fit the base that they were trained on."""

import functools
import hashlib
from pathlib import Path

from ppo_jax.data.disk import sha256_of
from ppo_jax.models.files import hf, peft_reading
from ppo_jax.models.files.hub import resolve


def fingerprint_of(model_path: str | Path) -> str:
    """sha256 of a model's weights: of the file where there is one, else of the lines `<sha256>  <name>` of its shards.

    Of a peft adapter: of the base's, and of those of its two files.

    Args:
      model_path: as for `models.hf.load`.

    Raises:
      FileNotFoundError: there are no weights.
    """
    where = resolve(model_path)
    if where.is_file():
        return _sha256(where)
    if peft_reading.is_adapter(where):
        own = _sha256(where / peft_reading.ARRAYS), sha256_of(where / peft_reading.CONFIG)
        return hashlib.sha256("\n".join((fingerprint_of(peft_reading.base_of(where)), *own)).encode()).hexdigest()
    files = hf.weight_files(where)
    if len(files) == 1:
        return _sha256(files[0])
    lines = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(file: Path) -> str:
    stat = file.stat()
    return _sha256_of_version(file.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def _sha256_of_version(file: Path, size: int, modified: int) -> str:
    """Hashed once per process: a model of 8B parameters takes many seconds."""
    return sha256_of(file)
