"""A model is loaded onto a mesh shard by shard: the same numbers, laid out by the table, never whole on the host."""

import dataclasses
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from ppo_jax.models import layout
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import hf, weights
from ppo_jax.models.placement import create, shardings
from ppo_jax.parallel.mesh import MeshConfig, make_mesh
from tests.models.tiny import random_params

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    attention_bias=True,
    family="qwen2",
    tie_embeddings=False,
)
MESHES = [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_the_parameters_are_those_of_one_device(tmp_path: Path, config: MeshConfig, dtype: str) -> None:
    model = dataclasses.replace(CONFIG, dtype=dtype)
    hf.save(tmp_path, model, random_params(model))
    mesh = make_mesh(config)
    _, expected = hf.load(tmp_path, dtype)
    _, found = hf.load(tmp_path, dtype, mesh)
    wanted = shardings(expected, mesh)
    for one, other, place in zip(*map(jax.tree.leaves, (expected, found, wanted)), strict=True):
        assert other.sharding == place and other.dtype == one.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_tied_model_that_repeats_its_embedding_is_compared_by_shard(tmp_path: Path) -> None:
    untied, tied = CONFIG, dataclasses.replace(CONFIG, tie_embeddings=True)
    params = random_params(untied)
    for name, head in (("same", params["embedding"]), ("other", params["embedding"].at[63, 31].add(1.0))):
        hf.save(tmp_path / name, untied, params | {"unembedding": head})
        file = tmp_path / name / "config.json"
        file.write_text(file.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    mesh = make_mesh(MESHES[1])
    config, loaded = hf.load(tmp_path / "same", mesh=mesh)
    assert dataclasses.replace(config, eos_token_ids=(), max_positions=tied.max_positions).tie_embeddings
    assert "unembedding" not in loaded
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        hf.load(tmp_path / "other", mesh=mesh)


def test_a_model_that_the_mesh_does_not_divide_is_refused_before_reading(tmp_path: Path) -> None:
    hf.save(tmp_path, CONFIG, random_params(CONFIG))
    message = r"model.safetensors: --mesh.tensor 4 does not divide num_kv_heads=2 of the model; use 2"
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path, mesh=make_mesh(MeshConfig(data=2, tensor=4)))


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_every_number_is_read_once_and_a_shard_at_a_time(config: MeshConfig) -> None:
    shapes = {
        e.hf_name.format(i): e.hf_shape(CONFIG)
        for e in layout.tensors(CONFIG)
        for i in range(CONFIG.num_layers if e.stacked else 1)
    }
    tensors = {name: np.random.default_rng(0).normal(size=shape) for name, shape in shapes.items()}
    reads: dict[str, int] = dict.fromkeys(shapes, 0)

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        found = tensors[name][index]
        cut = config.fsdp * config.tensor if found.ndim == 2 else 1
        assert found.size <= tensors[name].size / cut
        reads[name] += found.size
        return found

    def whole(name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read whole")

    weights.gather(CONFIG, shapes, whole, mesh=make_mesh(config), read_part=part)
    assert reads == {name: array.size for name, array in tensors.items()}


def test_host_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    """A file of 10 MB on 8 devices: the host holds a shard of the largest array at a time, with a margin."""
    model = dataclasses.replace(
        CONFIG, vocab_size=2048, hidden_size=256, intermediate_size=512, num_heads=8, head_dim=32
    )
    hf.save(tmp_path, model, random_params(model))
    size = (tmp_path / hf.SINGLE).stat().st_size
    shard = model.vocab_size * model.hidden_size * 4 / 8  # of the embedding
    assert size > 35 * shard
    peaks = {}
    for name, mesh in (("mesh", make_mesh(MESHES[0])), ("one device", None)):
        hf.load(tmp_path, mesh=mesh)  # what jax compiles and keeps is not measured
        tracemalloc.start()
        hf.load(tmp_path, mesh=mesh)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks["mesh"] < 4 * shard + 200_000  # the shard, what is read of one layer, and Python's own objects
    assert peaks["one device"] > 2 * peaks["mesh"]  # the measure sees what is allocated


def test_random_parameters_are_born_on_their_shards() -> None:
    """Under jit with output shardings; no device holds more than its part of the matrices."""
    from ppo_jax.models.layout import init_params

    mesh = make_mesh(MESHES[1])
    made = create(lambda key: init_params(key, CONFIG), mesh, jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding, made) == shardings(made, mesh)
    assert made["layers"]["q"].addressable_shards[0].data.shape == (3, 16, 16)
    expected = jax.jit(lambda key: init_params(key, CONFIG))(jax.random.key(0))
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
