"""The table of a model's arrays: complete, consistent, and the only place where one is told."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ppo_jax.models import layout
from ppo_jax.models.adapters import LINEARS
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import hf
from ppo_jax.models.files.families import config_to_hf
from ppo_jax.models.layout import LENGTHS, NORMAL, TENSORS, Tensor, check_params, init_params, linear_shapes, tensors
from ppo_jax.models.transformer import apply, logits
from ppo_jax.parallel.sharding import RULES
from ppo_jax.types import PyTree
from tests.models.tiny import CONFIG, equal, random_params

# The arrays of Llama and its nearest kin; those of other families: tests/models/test_every_family.py.
FLAGS = ("tie_embeddings", "attention_bias", "output_bias", "mlp_bias")
# Every array, and every length its own: V 67, D 32, F 48, L 3, 4 heads and 2 of keys, H 10.
EVERYTHING = dataclasses.replace(CONFIG, **dict.fromkeys(FLAGS, True) | {"tie_embeddings": False, "head_dim": 10})
SHAPES = {
    "embedding": (67, 32),
    "layers.attention_norm": (3, 32),
    "layers.q": (3, 32, 40),
    "layers.q_bias": (3, 40),
    "layers.k": (3, 32, 20),
    "layers.k_bias": (3, 20),
    "layers.v": (3, 32, 20),
    "layers.v_bias": (3, 20),
    "layers.o": (3, 40, 32),
    "layers.o_bias": (3, 32),
    "layers.gate": (3, 32, 48),
    "layers.gate_bias": (3, 48),
    "layers.up": (3, 32, 48),
    "layers.up_bias": (3, 48),
    "layers.down": (3, 48, 32),
    "layers.down_bias": (3, 32),
    "layers.mlp_norm": (3, 32),
    "final_norm": (32,),
    "unembedding": (67, 32),
}
OF_FLAG = {
    "attention_bias": {"layers.q_bias", "layers.k_bias", "layers.v_bias"},
    "output_bias": {"layers.o_bias"},
    "mlp_bias": {"layers.gate_bias", "layers.up_bias", "layers.down_bias"},
}


def flat(params: PyTree) -> dict[str, jax.Array]:
    """{"layers.q": array}, by jax's own walk."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): array
        for path, array in jax.tree_util.tree_leaves_with_path(params)
    }


def test_rows_are_consistent() -> None:
    for column in (lambda t: t.key, lambda t: t.name, lambda t: t.hf_name):
        assert max(Counter(map(column, TENSORS)).values()) == 1  # a sharding goes by the name alone
    for tensor in TENSORS:
        assert tensor.stacked == tensor.key.startswith("layers.") == ("{}" in tensor.hf_name)
        assert set(tensor.axes) <= LENGTHS.keys() & RULES.keys()
        assert "layers" not in tensor.axes[1:]
        assert "embed" not in tensor.axes or len(tensor.hf_shape(CONFIG)) == 2  # vectors are small: never cut by fsdp
        assert tensor.transposed <= (len(tensor.hf_shape(CONFIG)) == 2)
    assert all(isinstance(getattr(CONFIG, name), int) for names in LENGTHS.values() for name in names)


@pytest.mark.parametrize(
    "choice", list(itertools.product((False, True), repeat=4)), ids=lambda c: "".join("-+"[x] for x in c)
)
def test_parameters_are_those_of_the_table(choice: tuple[bool, ...]) -> None:
    """For every choice of flags: keys, ranks and shapes; none is missing and none too many."""
    flags = dict(zip(FLAGS, choice, strict=True))
    config = dataclasses.replace(EVERYTHING, **flags)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    absent = set().union(*(keys for flag, keys in OF_FLAG.items() if not flags[flag]))
    absent |= {"unembedding"} if flags["tie_embeddings"] else set()
    shapes = {key: array.shape for key, array in flat(params).items()}
    assert shapes == {key: shape for key, shape in SHAPES.items() if key not in absent}
    assert {t.key: t.shape(config) for t in tensors(config)} == shapes
    assert all(len(t.axes) == len(shapes[t.key]) for t in tensors(config))
    check_params(config, params)


@pytest.mark.parametrize("change", [
    {"tie_embeddings": True},
    {"tie_embeddings": False},
    {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    {"attention_bias": True, "family": "qwen2"},
    {"family": "mistral"},
], ids=str)  # fmt: skip
def test_names_and_shapes_are_those_of_transformers(change: dict) -> None:
    config = dataclasses.replace(CONFIG, head_dim=10, **change)
    raw = config_to_hf(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    theirs = {name: tuple(array.shape) for name, array in model.state_dict().items()}
    if config.tie_embeddings:
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    ours = {
        tensor.hf_name.format(layer): tensor.hf_shape(config)
        for tensor in tensors(config)
        for layer in range(config.num_layers if tensor.stacked else 1)
    }
    assert ours == theirs


def test_the_trunk_reads_every_array() -> None:
    """A derivative by each array, and by each of its layers, is not 0."""
    params = random_params(EVERYTHING)

    def loss(params: PyTree) -> jax.Array:
        hidden = apply(params, {}, EVERYTHING, jnp.arange(12).reshape(2, 6), jnp.arange(12).reshape(2, 6) % 6)
        return jnp.mean(jnp.sin(logits(params, {}, EVERYTHING, hidden)))

    gradients = flat(jax.jit(jax.grad(loss))(params))
    assert gradients.keys() == SHAPES.keys()
    for tensor in tensors(EVERYTHING):
        parts = gradients[tensor.key] if tensor.stacked else gradients[tensor.key][None]
        # A bias on the keys moves every score of a query alike: softmax takes it out but for the rotations.
        assert all(float(jnp.abs(part).max()) > 1e-8 for part in parts), tensor.key


def test_linear_maps_are_seven_and_carry_lora() -> None:
    assert LINEARS == ("q", "k", "v", "o", "gate", "up", "down")
    assert linear_shapes(EVERYTHING) == {name: SHAPES[f"layers.{name}"][1:] for name in LINEARS}


def test_initial_parameters() -> None:
    params = flat(jax.jit(init_params, static_argnums=1)(jax.random.key(0), EVERYTHING))
    for key, array in params.items():
        if "norm" in key or "bias" in key:
            np.testing.assert_array_equal(array, 1 if "norm" in key else 0)
        else:  # at least 1,920 draws each
            assert array.std() == pytest.approx(0.02, rel=0.1) and abs(array.mean()) < 0.002
    alike = [params["layers.gate"][0], params["layers.gate"][1], params["layers.up"][0]]
    alike += [params["embedding"], params["unembedding"]]
    for one, other in itertools.pairwise(alike):
        assert one.shape != other.shape or np.corrcoef(np.ravel(one), np.ravel(other))[0, 1] < 0.1
    other = flat(jax.jit(init_params, static_argnums=1)(jax.random.key(1), EVERYTHING))
    assert np.abs(other["layers.q"] - params["layers.q"]).max() > 0.02


def numbers_of_seed(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """What a seed has always given: keys split in three, the third in seven, in this order."""
    embedding, unembedding, layers = jax.random.split(jax.random.key(seed), 3)
    keys = {"embedding": embedding, "unembedding": unembedding}
    keys |= zip((f"layers.{name}" for name in LINEARS), jax.random.split(layers, 7), strict=True)
    return {key: 0.02 * jax.random.normal(k, SHAPES[key], config.dtype) for key, k in keys.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_keeps_its_numbers(dtype: str) -> None:
    config = dataclasses.replace(EVERYTHING, dtype=dtype)
    found = flat(init_params(jax.random.key(3), config))
    assert equal({key: found[key] for key in SHAPES if found[key].std() > 0}, numbers_of_seed(config, 3))
    tied = flat(init_params(jax.random.key(3), dataclasses.replace(config, tie_embeddings=True)))
    assert equal(tied, {key: array for key, array in found.items() if key != "unembedding"})


def test_parameters_that_do_not_fit_are_named() -> None:
    params = random_params(CONFIG)
    with pytest.raises(ValueError, match=r"unembedding is missing; the configuration needs it with shape \(67, 32\)"):
        check_params(dataclasses.replace(CONFIG, tie_embeddings=False), params)
    with pytest.raises(ValueError, match=r"layers.q has shape \(3, 32, 32\), expected \(3, 32, 64\)"):
        check_params(dataclasses.replace(CONFIG, head_dim=16), params)
    with pytest.raises(ValueError, match="'lora'"):
        check_params(CONFIG, params | {"lora": params["final_norm"]})


def test_a_new_array_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn, checked, saved and loaded, where its condition holds; what a seed gave before stays."""
    row = Tensor(
        "positions", ("norm", "embed"), NORMAL, "model.positions.weight", exists=lambda config: config.norm_eps == 0.5
    )
    before, with_row = init_params(jax.random.key(0), CONFIG), dataclasses.replace(CONFIG, norm_eps=0.5)
    monkeypatch.setattr(layout, "TENSORS", (row, *TENSORS))
    assert equal(init_params(jax.random.key(0), CONFIG), before)
    params = init_params(jax.random.key(0), with_row)
    assert params["positions"].shape == (32, 32) and np.asarray(params["positions"]).std() > 0.01
    assert equal({name: array for name, array in params.items() if name != "positions"}, before)
    with pytest.raises(ValueError, match="parameter positions is missing"):
        check_params(with_row, before)
    hf.save(tmp_path, with_row, params)
    config, loaded = hf.load(tmp_path)
    assert config == with_row and equal(loaded, params)
