"""One checkpoint as it is on disk: its description, and its arrays compared with their sums. Nothing is collective."""

import contextlib
import errno
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from ppo_jax.data.disk import parse_json, read_bytes
from ppo_jax.data.documents import CheckpointMeta, find_mistake
from ppo_jax.runs.checkpoints import checksums, manifests
from ppo_jax.runs.checkpoints.errors import CheckpointError, DamagedCheckpoint
from ppo_jax.runs.checkpoints.manifests import Manifest
from ppo_jax.runs.checkpoints.quiet import quiet

FORMAT = 2
LARGEST_META = 1 << 26  # bytes of a checkpoint's description that are read


def check_path(directory: Path) -> None:
    """Raises ValueError where a checkpoint below `directory` could not be read back, for a name on the way to it."""
    where = str(directory.resolve())
    if found := sorted(set(where) & set("[*?\\")):
        raise ValueError(
            f"{directory}: checkpoints cannot be kept below a directory with {' or '.join(found)} in its name "
            f"({where}), which the library that writes them takes for a pattern; name it without"
        )


def all_steps(directory: str | Path) -> list[int]:
    """Steps of the complete checkpoints under `directory`, oldest first (empty where there are none)."""
    return sorted(ocp.utils.checkpoint_steps(Path(directory).resolve()))


def find_step(directory: str | Path, step: int | None) -> tuple[Path, int]:
    path = Path(directory).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory of checkpoints")
    steps = all_steps(path)
    if not steps:
        raise FileNotFoundError(f"{path}: holds no complete checkpoint")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{path}: holds no step {step}; it has {', '.join(map(str, steps))}")
    return path, steps[-1] if step is None else step


def read_document(path: Path, step: int) -> dict[str, Any]:
    file = path / str(step) / "meta" / "metadata"  # as ocp.JsonCheckpointHandler names it
    with read_errors(path, step):
        if (size := file.stat().st_size) > LARGEST_META:
            raise ValueError(f"meta has {size} bytes, the largest that is read is {LARGEST_META}")
        document = parse_json(read_bytes(file))
    old = isinstance(document, dict) and "checksum" not in document and document.get("format") != FORMAT
    if not old and (not isinstance(document, dict) or document.get("checksum") != manifests.document_sum(document)):
        raise DamagedCheckpoint(f"{path / str(step)}: its description (meta) is not what was saved")
    if document.get("format") != FORMAT:
        raise CheckpointError(f"{path / str(step)}: format {document.get('format')!r}, this version reads {FORMAT}")
    if wrong := manifests.malformed(document.get("manifest")):
        raise DamagedCheckpoint(f"{path / str(step)}: {wrong}")
    meta = document.get("meta")
    if wrong := find_mistake(CheckpointMeta, meta):
        raise DamagedCheckpoint(f"{path / str(step)}: its description (meta) is not one of a run: {wrong}")
    return document


def read_leaves(path: Path, step: int, manifest: Manifest, wanted: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
    """The stored arrays, compared with their sums. The handler itself is asked: it waits for no other process."""
    quiet()
    folder, handler = path / str(step) / "arrays", ocp.PyTreeCheckpointHandler()

    def read(args: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
        item = dict.fromkeys(args, 0)
        with read_errors(path, step):
            # The headers first: an array without contents takes no place on a disk, whatever its size.
            large = [
                file for file in folder.rglob("*") if file.parent.name != "d" and file.stat().st_size > LARGEST_META
            ]
            if large:
                raise ValueError(f"{large[0].name} has {large[0].stat().st_size} bytes, {LARGEST_META} are allowed")
            if wrong := manifests.other_than_stored(manifest, read_headers(folder, args), args):
                raise ValueError("; ".join(wrong[:3]))
            request = ocp.args.PyTreeRestore(item=item, restore_args=dict(args), partial_restore=True)
            return handler.restore(folder, args=request)

    arrays = read(wanted)
    whole = lambda names: read({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})  # noqa: E731
    if wrong := checksums.changed(manifest, arrays, whole):
        raise DamagedCheckpoint(f"{path / str(step)}: not the bytes that were saved: {', '.join(wrong)}")
    return arrays


def check_written(folder: Path) -> None:
    """Raises ValueError unless every array that a checkpoint describes is stored in it; reads headers only.

    Args:
      folder: of one checkpoint, which need not have its name yet.
    """
    manifest: Manifest = parse_json((folder / "meta" / "metadata").read_bytes())["manifest"]
    names = [name for name, entry in manifest.items() if 0 not in entry["shape"]]
    if wrong := manifests.other_than_stored(manifest, read_headers(folder / "arrays", names), names):
        raise ValueError(f"what was written cannot be read back: {'; '.join(wrong[:3])}")


def read_headers(folder: Path, names: Collection[str]) -> Mapping[str, Any]:
    """{name: with .shape and .dtype} of those arrays that the folder holds, from their own headers.

    Orbax's `metadata` says the same, but keeps half a megabyte of Python objects for each checkpoint (TensorStore's
    `Spec.to_json` does): a run that saves often would grow without end. Raises ValueError for one that cannot be read.
    """
    layout = parse_json((folder / "_METADATA").read_bytes())
    if not layout["use_ocdbt"] or layout["use_zarr3"]:  # not as Orbax writes by default
        return ocp.PyTreeCheckpointHandler().metadata(folder).tree
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    context, found = tensorstore.Context(), {}

    def begin(name: str) -> Any:
        spec = {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}
        return tensorstore.open(spec, open=True, read=True, context=context)

    opened = {name: begin(name) for name in names}
    for name, future in opened.items():
        try:
            array = future.result()
        except ValueError as error:
            if "NOT_FOUND" not in str(error):
                raise
        else:
            found[name] = jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
    return found


@contextlib.contextmanager
def read_errors(path: Path, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        if _passing(error):
            raise CheckpointError(f"{path / str(step)}: cannot be read now: {first_line(error)}") from error
        raise DamagedCheckpoint(f"{path / str(step)}: cannot be read: {first_line(error)}") from error


def _passing(error: BaseException | None) -> bool:
    """Whether it says nothing of the files: no memory, no permission, a disk that does not answer."""
    while error is not None:
        if isinstance(error, MemoryError | PermissionError) or getattr(error, "errno", None) == errno.EIO:
            return True
        if any(word in str(error) for word in ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED")):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: Exception) -> str:
    """Orbax adds pages of advice; TensorStore says where in its own source, and has the reason at the end."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].split(" [source locations=")[0].strip()
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-200:]}"
