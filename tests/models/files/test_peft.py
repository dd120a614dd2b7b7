"""The adapter in peft's format computes what ours does, with the peft library on a transformers model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from ppo_jax.models.adapters import Lora, init_full, init_lora, init_top_k, unembedding
from ppo_jax.models.files import hf, peft
from ppo_jax.models.transformer import apply
from ppo_jax.types import PyTree
from tests.models.tiny import CONFIG, random_params

PARAMS = random_params(CONFIG)


def noisy(tree: PyTree) -> PyTree:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), tree)


def lora(rank: int = 2, alpha: float = 6.0, **more: object) -> PyTree:
    return noisy(init_lora(jax.random.key(0), CONFIG, rank, alpha, **more))


MIXED = lora(targets=("q", "down")) | {}
MIXED = {"lora": {**MIXED["lora"], "up": Lora(*(noisy(jnp.zeros(s)) for s in ((3, 32, 5), (3, 5, 48))), scale=0.7)}}
ADAPTERS = {
    "all_layers": lora(),
    "top_layer": lora(first_layer=2),
    "some_linears": lora(3, 1.0, targets=("v", "down"), first_layer=1),
    "mixed_ranks_and_scales": MIXED,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    hf.save(path, CONFIG, PARAMS)
    return path


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_computes_the_same_logits(name: str, base: Path, tmp_path: Path) -> None:
    adapter = ADAPTERS[name]
    peft.save(tmp_path, adapter, CONFIG, str(base))
    tokens = np.arange(12).reshape(2, 6)
    positions = jnp.tile(jnp.arange(6), (2, 1))
    hidden = apply(PARAMS, adapter, CONFIG, jnp.asarray(tokens), positions)
    ours = np.asarray(hidden @ unembedding(PARAMS, adapter).T)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        without = plain(torch.from_numpy(tokens)).logits.numpy()
        theirs = PeftModel.from_pretrained(plain, tmp_path)(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
    assert np.abs(ours - without).max() > 0.1


def test_the_files_by_hand(base: Path, tmp_path: Path) -> None:
    """scale 3 = alpha 6 / rank 2; A and B are our a and b transposed; layers 1 and 2 of 3."""
    adapter = lora(targets=("q", "down"), first_layer=1)
    peft.save(tmp_path, adapter, CONFIG, "some/base")
    said = json.loads((tmp_path / peft.CONFIG).read_text())
    assert (said["r"], said["lora_alpha"], said["layers_to_transform"]) == (2, 6.0, [1, 2])
    assert said["target_modules"] == ["down_proj", "q_proj"] and said["base_model_name_or_path"] == "some/base"
    found = load_file(tmp_path / peft.ARRAYS)
    q = "base_model.model.model.layers.2.self_attn.q_proj"
    np.testing.assert_array_equal(found[f"{q}.lora_A.weight"], np.asarray(adapter["lora"]["q"].a[1]).T)
    np.testing.assert_array_equal(found[f"{q}.lora_B.weight"], np.asarray(adapter["lora"]["q"].b[1]).T)
    assert len(found) == 8 and not any(".layers.0." in name for name in found)
    assert (tmp_path / peft.ARRAYS).stat().st_mode == (tmp_path / peft.CONFIG).stat().st_mode


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (init_top_k(PARAMS, CONFIG, 1), "this adapter replaces layers as a whole; choose the merged format"),
        (init_full(PARAMS), "replaces embedding, final_norm, layers as a whole"),
        (lora() | {"final_norm": PARAMS["final_norm"]}, "replaces final_norm as a whole"),
        ({}, "this adapter is empty"),
    ],
)
def test_what_the_format_cannot_say(adapter: PyTree, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "x", adapter, CONFIG, "b")
    assert not list(tmp_path.rglob("adapter*"))
