"""Models and tokenizers on disk: Hugging Face directories in and out, GGUF files in."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from ppo_jax.data.disk import is_out_of_memory, keep_files, replaced_directory
from ppo_jax.models.adapters import merge, merge_one
from ppo_jax.models.config import ModelConfig, Quantise
from ppo_jax.models.files import families, fields, foreign, gguf, names, peft_reading, tensor_file, weights
from ppo_jax.models.files.families import Dtype
from ppo_jax.models.files.hub import read_json, resolve, write_json
from ppo_jax.models.files.names import Stored
from ppo_jax.models.files.tokenizer import check_vocabulary, save_tokenizer
from ppo_jax.models.layout import check_params, leaf
from ppo_jax.models.quantised import quantise_params
from ppo_jax.parallel.processes import first_writes, pieces
from ppo_jax.types import PyTree

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
FLOATS = ("F64", "F32", "F16", "BF16")


def load(
    path: str | Path, dtype: Dtype = "float32", mesh: Mesh | None = None, quantise: Quantise = "none"
) -> tuple[ModelConfig, PyTree]:
    """Reads a model.

    Args:
      path: a Hugging Face directory (config.json and safetensors), a `.gguf` file, or a name on the hub. A directory of
        the peft library is its base with the adapter merged in (`peft_reading`).
      dtype: of the parameters that are returned, whatever the file holds.
      mesh: where the parameters go (`sharding.make_mesh`); by default to the default device.
      quantise: how the linear maps are kept (`models.quantised`): one stacked array after the other is quantised when
        it has been read, but a base with an adapter to merge in first is read whole.

    Returns:
      The configuration and the parameters (jax arrays, laid out as `models.layout` says). Tensors are read one at a
      time, so the host holds little more than one stacked array beside the result. On a mesh each process reads the
      slices that its devices need, and the host holds one device's shard of one stacked array at a time. (A GGUF
      file's tensors are expanded whole, and cut then.)

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or describes a model that is not supported. The message names file and field.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} is not supported; supported: float32, bfloat16")
    where = resolve(path)
    if where.suffix == ".gguf":
        return gguf.load(where, dtype, mesh, quantise)
    if where.is_file():
        raise ValueError(f"{where} is a file; give a Hugging Face directory or a .gguf file")
    if peft_reading.is_adapter(where) and not foreign.has_value_head(where):
        config, params = load(peft_reading.base_of(where), dtype, mesh)
        config = dataclasses.replace(config, quantise=quantise)
        return config, quantise_params(config, peft_reading.merge_into(config, params, where), mesh)
    if not (where / "config.json").is_file() and (what := foreign.describe_directory(where)):
        raise FileNotFoundError(what)
    config = dataclasses.replace(read_config(where, dtype), quantise=quantise)
    return config, _read_weights(where, config, mesh)


def _read_weights(where: Path, config: ModelConfig, mesh: Mesh | None) -> PyTree:
    """The parameters in the safetensors files of a directory."""
    shards = weight_files(where)
    with contextlib.ExitStack() as stack:
        source: dict[str, tuple[Path, Any]] = {}
        for shard in shards:
            handle = stack.enter_context(_open(shard))
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in source:
                    raise ValueError(f"{shard}: tensor {name} is also in {source[name][0].name}")
                source[name] = (shard, handle)
        prefix, head = names.missing_prefix(config, source), names.unembedding_name(config)
        shapes = {
            prefix + name: tuple(handle.get_slice(name).get_shape())
            for name, (_, handle) in source.items()
            if not names.is_buffer(name)
        }
        repeated = shapes.pop(prefix + head, None) if config.tie_embeddings else None

        def read(name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
            there = name.removeprefix(prefix)
            return _read_tensor(*source[there], there, part)

        try:
            params = weights.gather(config, shapes, read, mesh=mesh, read_part=read)
        except ValueError as error:
            raise ValueError(f"{shards[0] if len(shards) == 1 else where / INDEX}: {error}") from error
        if repeated is not None:
            _check_repeated(config, lambda part: read(prefix + head, part), params["embedding"], where)
    return params


def save(
    path: str | Path,
    config: ModelConfig,
    params: PyTree,
    tokenizer: Any = None,
    *,
    adapter: PyTree = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a directory that `transformers.AutoModelForCausalLM.from_pretrained` loads, whole or not at all.

    It is made beside `path` and put in its place: a directory that cannot be replaced stays as it was, and what else
    lies in it (a README.md) is kept. Of several processes, all of which have to call it, the first one writes.
    Adapters are merged, and arrays fetched, one tensor of one layer at a time.

    Args:
      path: made if absent.
      config: of the model.
      params: the parameters.
      tokenizer: a transformers tokenizer, saved beside the model.
      adapter: merged into the parameters as `models.adapters.merge` does; None: there is none.
      dtype: in which the merged parameters are stored; None: that which they have.
      max_shard_bytes: a model larger than this is split into files of at most this size (a larger tensor has one
        of its own).
      overwrite: replace a model that is already there.

    Raises:
      ValueError: the parameters do not fit the configuration, or the tokenizer has more ids than the model.
      FileExistsError: the directory holds a model, and `overwrite` is off.
      OSError: it cannot be written, also in the processes that do not write.
    """
    where = Path(path)
    files = plan_files(config, params, tokenizer, adapter, dtype, max_shard_bytes)

    def write(source: tensor_file.Pieces) -> None:
        if any(file.exists() for file in _model_files(where)) and not overwrite:
            raise FileExistsError(f"{where} already holds a model; choose another directory or pass overwrite=True")
        with replaced_directory(where) as partial:
            files.write(partial, source)
            keep_files(where, partial, without=[file.name for file in _model_files(where)])

    first_writes(write, files.source())


class ModelFiles(NamedTuple):
    """The files of a model's directory, yet to be written."""

    write: Callable[[Path, tensor_file.Pieces], None]  # into an empty directory, from the pieces of `source`
    source: Callable[[], tensor_file.Pieces]  # collective, see `tensor_file.pieces`


def plan_files(
    config: ModelConfig,
    params: PyTree,
    tokenizer: Any = None,
    adapter: PyTree = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> ModelFiles:
    """What `save` writes with these arguments. Raises ValueError as it does."""
    adapter = adapter or {}
    raw = families.config_to_hf(config)
    merged = jax.eval_shape(lambda params, adapter: merge(params, adapter, config), params, adapter)
    check_params(config, merged)
    if tokenizer is not None:
        check_vocabulary(config, tokenizer)
    dtypes = jax.tree.map(lambda array: jnp.dtype(dtype or array.dtype), merged)
    files = _split_into_files(config, params, adapter, dtypes, max_shard_bytes)

    def write(where: Path, source: tensor_file.Pieces) -> None:
        _write_texts(where, config, raw, tokenizer)
        _write_weights(where, files, source)

    return ModelFiles(write, lambda: tensor_file.pieces(entry for entries in files.values() for entry in entries))


def _model_files(where: Path) -> list[Path]:
    """What makes a directory a model, config.json first."""
    return [where / "config.json", where / INDEX, *where.glob("model*.safetensors")]


def read_config(where: Path, dtype: Dtype = "float32") -> ModelConfig:
    """config.json, and the stop tokens of generation_config.json where it names some (they win, as in transformers).

    Raises what `load` raises; the message names the file.
    """
    file, generation = where / "config.json", where / GENERATION
    try:
        config = families.config_from_hf(read_json(file), dtype)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not generation.is_file():
        return config
    try:
        ids = fields.token_ids(read_json(generation), "eos_token_id")
    except ValueError as error:
        raise ValueError(f"{generation}: {error}") from error
    return dataclasses.replace(config, eos_token_ids=ids or config.eos_token_ids)


def weight_files(where: Path) -> list[Path]:
    """The safetensors files of a directory: the single one, or those that its index names."""
    if (where / SINGLE).is_file():
        return [where / SINGLE]
    index = where / INDEX
    if not index.is_file():
        pickles = sorted(f.name for f in where.glob("*.bin"))
        hint = f" ({pickles[0]} is a pickle, which is not read: convert it to safetensors)" if pickles else ""
        raise FileNotFoundError(f"{where} has neither {SINGLE} nor {INDEX}{hint}")
    try:
        weight_map = read_json(index).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is not an object with entries")
    shards, present = [], set(os.listdir(where))  # a name may be too long to ask for
    for file in sorted({str(f) for f in weight_map.values()}):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map names {file!r}, which is not a safetensors file beside it")
        if file not in present or not (where / file).is_file():
            raise FileNotFoundError(f"{where / file} is missing ({INDEX} names it)")
        shards.append(where / file)
    return shards


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(file, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{file} is not a readable safetensors file ({error}); copy or download it again") from error
    with handle:
        yield handle


def _read_tensor(file: Path, handle: Any, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
    """A tensor, or that part of it alone."""
    kind = handle.get_slice(name).get_dtype()
    if kind not in FLOATS:
        raise ValueError(f"tensor {name} in {file.name} is {kind}; supported: {', '.join(FLOATS)}")
    return handle.get_tensor(name) if part is None else handle.get_slice(name)[part]


def _check_repeated(
    config: ModelConfig, head: Callable[[tuple[slice, ...]], np.ndarray], embedding: jax.Array, where: Path
) -> None:
    """A tied model's file may repeat the embedding as lm_head.weight, but may not hold another matrix."""
    for shard in embedding.addressable_shards:
        part = tuple(slice(*s.indices(size)[:2]) for s, size in zip(shard.index, embedding.shape, strict=True))
        if shard.replica_id == 0 and not np.array_equal(head(part).astype(embedding.dtype), np.asarray(shard.data)):
            first = names.stored_tensors(config)[0].name
            raise ValueError(
                f"{where}: {names.unembedding_name(config)} differs from {first}, but config.json has "
                "tie_word_embeddings=true; set it to false if the model is not tied"
            )


def _split_into_files(
    config: ModelConfig, params: PyTree, adapter: PyTree, dtypes: PyTree, max_bytes: int
) -> dict[str, list[tensor_file.Entry]]:
    """{name of a file: what is in it}, each with at most `max_bytes`."""

    def read(stored: Stored, layer: int) -> tensor_file.Pieces:
        parts = [merge_one(params, adapter, t.key, layer).astype(leaf(dtypes, t.key)) for t in stored.parts]
        return pieces(stored.join(config, parts))

    files: list[list[tensor_file.Entry]] = [[]]
    used = 0
    for stored in names.stored_tensors(config):
        dtype, shape = leaf(dtypes, stored.parts[0].key), stored.shape(config)
        for layer in range(config.num_layers if stored.stacked else 1):
            read_layer = functools.partial(read, stored, layer)
            entry = tensor_file.Entry(stored.name.format(layer), dtype, shape, read_layer)
            if files[-1] and used + entry.nbytes > max_bytes:
                files.append([])
                used = 0
            files[-1].append(entry)
            used += entry.nbytes
    shards = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    return dict(zip(shards if len(files) > 1 else [SINGLE], map(tensor_file.in_order, files), strict=True))


def _write_texts(where: Path, config: ModelConfig, raw: dict[str, Any], tokenizer: Any) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    if tokenizer is not None:
        save_tokenizer(where, tokenizer)
        raw["pad_token_id"] = tokenizer.pad_token_id
    write_generation(where, config, tokenizer)
    write_json(where / "config.json", raw)


def read_generation(where: Path) -> dict[str, Any]:
    """What generation_config.json says; {} where there is none. Raises ValueError that names the file."""
    file = where / GENERATION
    return read_json(file) if file.is_file() else {}


def write_generation(where: Path, config: ModelConfig, tokenizer: Any, kept: Mapping[str, Any] | None = None) -> None:
    """Write generation_config.json: `kept`, that of the base, whole, with the tokens of this model and tokenizer."""
    own = {"bos_token_id": config.bos_token_id, "eos_token_id": families.eos_field(config)}
    own |= {} if tokenizer is None else {"pad_token_id": tokenizer.pad_token_id}
    write_json(where / GENERATION, dict(kept or {}) | {name: value for name, value in own.items() if value is not None})


def _write_weights(where: Path, files: dict[str, list[tensor_file.Entry]], source: tensor_file.Pieces) -> None:
    for file, entries in files.items():
        tensor_file.write(where / file, entries, source, {"format": "pt"})
    if len(files) > 1:
        total = sum(entry.nbytes for entries in files.values() for entry in entries)
        weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
        write_json(where / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
