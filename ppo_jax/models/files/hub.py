"""Where a model's files are: a local path or the Hugging Face hub; and JSON files of limited size."""

import json
from pathlib import Path
from typing import Any

from ppo_jax.data.disk import RepeatedKey, parse_json, replace_file

LARGEST_JSON = 10**8  # bytes; the index of the largest models has some 10**7


# What a model needs from the hub: configs, weights, tokenizer files; no code, no pickles, no second copies.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt", "*.model"]


HUB_SKIP = ["consolidated*", "original/*", "onnx/*"]


def resolve(path: str | Path) -> Path:
    """The local path of a model: the path itself, or the snapshot of a hub name ("organisation/model").

    Where the first part of such a name is a directory here, a path in it was meant: the hub is not asked.
    """
    where = Path(path).expanduser()
    if where.exists():
        return where
    name = str(path)
    if isinstance(path, Path) or where.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{where} does not exist; give a Hugging Face directory or a .gguf file")
    if (folder := where.parent).is_dir():
        raise FileNotFoundError(
            f"{where} does not exist, though the directory {folder} does, so the Hugging Face hub is not asked for "
            f"{name}. Give the right path; or fetch it with `hf download {name} --local-dir DIR` and give DIR"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIP))
    except MemoryError:
        raise
    except Exception as error:  # no network, no such name, no permission: the client has a class for each
        raise FileNotFoundError(
            f"{name} is not a local path, and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Give the path of a directory with "
            f"config.json and model.safetensors; with a network `hf download {name} --local-dir DIR` makes one"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of limited size. Raises ValueError without the file's name: the caller adds it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    if (size := file.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{size} bytes; at most {LARGEST_JSON} are read")
    try:
        raw = parse_json(file.read_text(encoding="utf-8"))
    except RepeatedKey:
        raise
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"not a JSON object but {type(raw).__name__}")
    return raw


def write_json(file: Path, content: dict[str, Any]) -> None:
    replace_file(file, (json.dumps(content, indent=2) + "\n").encode())
