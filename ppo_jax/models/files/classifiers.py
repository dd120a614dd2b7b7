"""Hugging Face sequence classifiers with one label, in and out: `LlamaForSequenceClassification` and its siblings.

Such a model is a trunk without unembedding and `score.weight` [1, D]: the score is score.weight . h at the last token
that is not padding. The format has no bias. What our head adds to every score is kept beside it, in config.json:

    score of ours = logit of transformers + ppo_jax_bias          (absent: 0)

A gain is multiplied into score.weight. A constant changes no comparison of texts, and `transformers` ignores it.
"""

import copy
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ppo_jax.data.disk import is_out_of_memory, replaced_directory
from ppo_jax.data.documents import ArtifactMeta, find_mistake
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import families, foreign, hf, names, tensor_file, value_heads, weights
from ppo_jax.models.files.hub import read_json, resolve
from ppo_jax.parallel import processes
from ppo_jax.types import PyTree

CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
# GPT-2's class has a name of its own, and Gemma 3's is of its text model.
_OWN = {"gpt2": "GPT2ForSequenceClassification", "gemma3_text": "Gemma3TextForSequenceClassification"}
ARCHITECTURES = {
    name: _OWN.get(name, family.architecture.replace(CAUSAL, CLASSIFIER))
    for name, family in families.FAMILIES.items()
    if family.classifies
}
BIAS, META = "ppo_jax_bias", "ppo_jax_meta"  # our fields of config.json
_BASE, _SCORE = "model-base.safetensors", "model-score.safetensors"


class SequenceClassifier(NamedTuple):
    """A reward model of its own."""

    config: ModelConfig  # tie_embeddings is True: there is no unembedding
    params: PyTree
    head: PyTree  # parameters of a RewardHead; the gain is 1
    meta: dict[str, Any]  # what the trainer said of it, {} in a directory of somebody else
    ours: bool = True  # whether ppo_jax wrote it
    pad_id: int | None = None  # by which `transformers` finds the last token of a text


def is_sequence_classifier(path: str | Path) -> bool:
    """Whether `path` is a directory whose config.json names an architecture `...ForSequenceClassification`."""
    try:
        classes = read_json(Path(path) / "config.json").get("architectures")
    except (OSError, ValueError):
        return False
    return isinstance(classes, list) and any(str(name).endswith(CLASSIFIER) for name in classes)


def load(path: str | Path, dtype: families.Dtype = "float32", mesh: Mesh | None = None) -> SequenceClassifier:
    """Reads a Hugging Face sequence-classification directory (or hub name) with one label.

    With `mesh` the trunk lies on it, read shard by shard as by `models.hf.load`; the head is small, and the caller's.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: another architecture, more than one label, no `score.weight`, or what `models.hf.load` refuses. The
        message names file and field.
    """
    where = resolve(path)
    file = where / "config.json"
    if what := foreign.describe_directory(where):
        raise ValueError(what)
    theirs = value_heads.has_value_head(where)  # of LLaMA-Factory, on a language model
    try:
        raw = read_json(file)
        if not theirs:
            _check_kind(raw)
        config = families.config_from_hf(raw, dtype)
        bias = _bias(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    config = dataclasses.replace(config, tie_embeddings=True)
    source = _find_tensors(hf.weight_files(where))
    source.pop(names.unembedding_name(config), None)  # a leftover of the language model that it was trained from
    head_file = source.pop("score.weight", None)
    if theirs:
        head = value_heads.load_head(where, config.hidden_size)
    elif head_file is None:
        raise ValueError(
            f"{where}: tensor score.weight is missing, so this model has no score{_seen(source)}; a language model "
            "becomes a reward model by `ppo-jax reward`"
        )
    else:
        head = _read_head(head_file, config.hidden_size, bias)
    shapes = {name: _shape(shard, name) for name, shard in source.items() if not names.is_buffer(name)}
    try:
        params = weights.gather(
            config,
            shapes,
            lambda name: _read(source[name], name),
            mesh=mesh,
            read_part=lambda name, part: _read(source[name], name, part),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    meta = raw.get(META)
    if isinstance(meta, dict) and (wrong := find_mistake(ArtifactMeta, meta)):
        raise ValueError(f"{where}: {META}.{wrong}")
    pad = raw.get("pad_token_id")
    pad_id = pad if isinstance(pad, int) else None
    return SequenceClassifier(config, params, head, meta if isinstance(meta, dict) else {}, META in raw, pad_id)


def _read_head(file: Path, width: int, bias: float) -> PyTree:
    """Read score.weight as the parameters of a RewardHead."""
    score = _read(file, "score.weight")
    if score.shape != (1, width):
        raise ValueError(f"{file}: score.weight has shape {score.shape}, a reward model has (1, {width})")
    kernel = jnp.asarray(score.astype(np.float32).T)
    return {"reward": {"kernel": kernel}, "gain": jnp.ones(()), "bias": jnp.asarray(bias, jnp.float32)}


def save(
    path: str | Path,
    config: ModelConfig,
    params: PyTree,
    head: PyTree,
    tokenizer: Any,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    adapter: PyTree = None,
) -> Path:
    """Writes a directory that `transformers.AutoModelForSequenceClassification` loads, whole or not at all.

    Of several processes, all of which have to call it, the first one writes.

    Args:
      config, params: of the trunk; an unembedding is left out.
      head: parameters of a RewardHead; its gain goes into score.weight, its bias to `ppo_jax_bias` of config.json.
      tokenizer: saved beside the model. Without a pad token it gets its EOS as one, since transformers needs one to
        score a batch, and finds the last token by it: a text must not end with the pad token.
      meta: any JSON object, kept in config.json.
      overwrite: replace a sequence classifier that is there; anything else is never replaced.
      adapter: merged into the parameters; None: there is none.

    Raises:
      FileExistsError: `path` is there already.
      ValueError: parameters and configuration do not fit, or the tokenizer has neither pad nor EOS token.
    """
    path = Path(path)
    _check_family(config)
    processes.first_writes(lambda _: _check_target(path, overwrite))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a pad nor an EOS token; set tokenizer.pad_token")
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    config = dataclasses.replace(config, tie_embeddings=True)
    params, adapter = (
        {name: value for name, value in tree.items() if name != "unembedding"} for tree in (params, adapter or {})
    )
    kernel = np.asarray(head["reward"]["kernel"] * head["gain"], np.float32)
    fields = {
        "architectures": [ARCHITECTURES[config.family]],
        "num_labels": 1,
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "problem_type": "regression",
        "pad_token_id": tokenizer.pad_token_id,
        BIAS: float(head["bias"]),
        META: dict(meta or {}),
    }
    files = hf.plan_files(config, params, tokenizer, adapter)

    def write(source: tensor_file.Pieces) -> None:
        with replaced_directory(path) as partial:
            files.write(partial, source)
            _make_classifier(partial, kernel, fields)

    processes.first_writes(write, files.source())
    return path


def _check_family(config: ModelConfig) -> None:
    if config.family not in ARCHITECTURES:
        raise ValueError(
            f"transformers has no sequence classifier for {config.family} models; keep the reward model as the "
            "directory of its run"
        )


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not (overwrite and is_sequence_classifier(path)):
        advice = " or pass overwrite=True" if is_sequence_classifier(path) else ""
        raise FileExistsError(f"{path} already exists; choose another directory{advice}")


def _make_classifier(where: Path, kernel: np.ndarray, fields: dict[str, Any]) -> None:
    """Makes a classifier of a saved language model."""
    (where / "generation_config.json").unlink(missing_ok=True)  # it generates nothing
    _add_score(where, kernel)
    raw = json.loads((where / "config.json").read_text(encoding="utf-8")) | fields
    text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
    (where / "config.json").write_text(text, encoding="utf-8")


def _check_kind(raw: Mapping[str, Any]) -> None:
    classes = raw.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in ARCHITECTURES.values():
        raise ValueError(f"architectures={classes!r} is not supported; supported: {', '.join(ARCHITECTURES.values())}")
    expected = ARCHITECTURES.get(str(raw.get("model_type")))
    if classes[0] != expected:
        raise ValueError(f"architectures={classes!r} contradicts model_type={raw.get('model_type')!r}")
    labelled = raw.get("id2label")
    labels = raw.get("num_labels", len(labelled) if isinstance(labelled, dict) else 2)  # transformers' default is 2
    if labels != 1:
        raise ValueError(f"num_labels={labels!r} is not supported: a reward model has 1 label, the score")


def _bias(raw: Mapping[str, Any]) -> float:
    value = raw.get(BIAS, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{BIAS}={value!r} is not a finite number")
    return float(value)


def _find_tensors(files: list[Path]) -> dict[str, Path]:
    """{tensor name: the file that holds it}."""
    files_by_name: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as handle:
                files_by_name |= dict.fromkeys(handle.keys(), file)
        except (SafetensorError, OSError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"{file} is not a readable safetensors file ({error}); copy or download it again"
            ) from error
    return files_by_name


def _seen(present: Mapping[str, Path]) -> str:
    """What stands there in place of score.weight, where that can be told."""
    other = next((name for name in present if name.endswith(".score.weight")), None)
    return f" (the file has it as {other})" if other else foreign.describe_value_head(present)


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, framework="numpy") as handle:
        return tuple(handle.get_slice(name).get_shape())


def _read(file: Path, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
    """A tensor, or that part of it alone."""
    with safe_open(file, framework="numpy") as handle:
        kind = handle.get_slice(name).get_dtype()
        if kind not in hf.FLOATS:
            raise ValueError(f"tensor {name} in {file.name} is {kind}; supported: {', '.join(hf.FLOATS)}")
        return handle.get_tensor(name) if part is None else handle.get_slice(name)[part]


def _add_score(where: Path, kernel: np.ndarray) -> None:
    """Adds score.weight to a saved model, as one more file under its index."""
    index = where / hf.INDEX
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
    else:
        os.rename(where / hf.SINGLE, where / _BASE)
        content = {
            "metadata": {"total_size": (where / _BASE).stat().st_size},
            "weight_map": dict.fromkeys(_find_tensors([where / _BASE]), _BASE),
        }
    save_file({"score.weight": np.ascontiguousarray(kernel.T)}, where / _SCORE, metadata={"format": "pt"})
    shutil.copymode(where / "config.json", where / _SCORE)
    content["weight_map"]["score.weight"] = _SCORE
    content["metadata"]["total_size"] += kernel.nbytes
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
