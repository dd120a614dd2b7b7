"""Where a model's files are: a local path or the Hugging Face hub; and JSON files of limited size."""

import json
import os
from pathlib import Path
from typing import Any

LARGEST_JSON = 10**8  # bytes; the index of the largest models has some 10**7


# What a model needs from the hub: configs, weights, tokenizer files; no code, no pickles, no second copies.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt", "*.model"]


HUB_SKIP = ["consolidated*", "original/*", "onnx/*"]


def resolve(path: str | Path) -> Path:
    """The local path of a model: the path itself, or the snapshot of a hub name ("organisation/model")."""
    where = Path(path).expanduser()
    if where.exists():
        return where
    name = str(path)
    if isinstance(path, Path) or where.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{where} does not exist; give a Hugging Face directory or a .gguf file")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIP))
    except MemoryError:
        raise
    except Exception as error:  # no network, no such name, no permission: the client has a class for each
        raise FileNotFoundError(
            f"{name} is not a local path, and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Give the path of a directory with config.json and model.safetensors"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of limited size. Raises ValueError without the file's name: the caller adds it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    if (size := file.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{size} bytes; at most {LARGEST_JSON} are read")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"not a JSON object but {type(raw).__name__}")
    return raw


def write_json(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)
