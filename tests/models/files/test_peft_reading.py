"""Adapters that the peft library has written, read: the model that they make, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from ppo_jax.models.files import hf, peft, peft_reading
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.models.files.tokenizer import load_tokenizer
from ppo_jax.models.transformer import apply, logits
from ppo_jax.types import PyTree
from tests.data.tokenizer import make_tokenizer
from tests.models.families import torch_model
from tests.models.test_parity import error, torch_logits

TOKENS = np.random.default_rng(0).integers(3, 67, (2, 9))
FOUR = ["q_proj", "v_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict]] = {
    "plain": ("qwen3", {"target_modules": FOUR}),
    "rslora": ("qwen3", {"target_modules": FOUR, "use_rslora": True}),
    "dora": ("qwen3", {"target_modules": FOUR, "use_dora": True}),
    "dora on fused maps": ("phi3", {"target_modules": ["qkv_proj", "down_proj"], "use_dora": True}),
    "patterns": (
        "qwen3",
        {"target_modules": FOUR, "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 2},
         "alpha_pattern": {"v_proj": 1.0, r"layers\.2\.self_attn\.q_proj": 9.0}},
    ),
    "some layers": ("qwen3", {"target_modules": r".*layers\.(0|2)\.self_attn\.q_proj"}),
    "fused": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    where = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        if not (where / family).is_dir():
            torch_model(family).save_pretrained(where / family)
            make_tokenizer().save_pretrained(where / family)
        return where / family

    return base


def adapter_on(base: Path, where: Path, **settings: object) -> torch.nn.Module:
    """A random adapter, saved by peft."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**({"r": 3, "lora_alpha": 4.0, "task_type": "CAUSAL_LM"} | settings)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0.0, 0.2)
    adapted.save_pretrained(where)
    return adapted.eval()


@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_is_what_peft_computes(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    family, settings = CASES[name]
    base = bases(family)
    theirs = torch_logits(adapter_on(base, tmp_path, **settings), TOKENS)
    config, params = hf.load(tmp_path)
    positions = jnp.tile(jnp.arange(TOKENS.shape[1]), (2, 1))
    found = np.asarray(logits(params, {}, config, apply(params, {}, config, jnp.asarray(TOKENS), positions)))
    assert error(found, theirs) < 1e-4
    assert config == hf.load(base)[0]


GONE_ON_WITH: dict[str, tuple[dict, dict[str, int], float]] = {  # settings -> rank of each map, scale
    "plain": ({"target_modules": FOUR}, {"q": 3, "v": 3, "up": 3, "down": 3}, 4 / 3),
    "rslora": ({"target_modules": FOUR[:1], "use_rslora": True}, {"q": 3}, 4 / 3**0.5),
    "top layers": (
        {"target_modules": FOUR[:2], "layers_to_transform": [1, 2], "layers_pattern": "layers",
         "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 8.0}}, {"q": 3, "v": 6}, 4 / 3),
    "some layers": ({"target_modules": r".*layers\.(0|2)\.self_attn\.q_proj"}, {"q": 3}, 4 / 3),
    "dora, rslora, top layers": (
        {"target_modules": FOUR[:2], "layers_to_transform": [1, 2], "layers_pattern": "layers", "use_dora": True,
         "use_rslora": True}, {"q": 3, "v": 3}, 4 / 3**0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", GONE_ON_WITH)
def test_an_adapter_is_gone_on_with_as_it_is_and_goes_back(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same logits beside the base, before training; its own rank and scale; and peft reads what is written."""
    settings, ranks, scale = GONE_ON_WITH[name]
    base = bases("qwen3")
    theirs = torch_logits(adapter_on(base, tmp_path / "theirs", **settings), TOKENS)
    config, params = hf.load(base)
    lora = peft_reading.read_trained(config, tmp_path / "theirs")["lora"]
    assert {name: pair.a.shape[-1] for name, pair in lora.items()} == ranks
    assert all(pair.scale == pytest.approx(scale) for pair in lora.values())
    assert {pair.a.shape[0] for pair in lora.values()} == {2 if "top layers" in name else 3}
    positions = jnp.tile(jnp.arange(TOKENS.shape[1]), (2, 1))
    hidden = apply(params, {"lora": lora}, config, jnp.asarray(TOKENS), positions)
    assert error(np.asarray(logits(params, {"lora": lora}, config, hidden)), theirs) < 1e-5

    peft.save(tmp_path / "ours", {"lora": lora}, config, str(base))
    again = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    assert error(torch_logits(again.eval(), TOKENS), theirs) < 1e-5
    before, after = (load_file(tmp_path / who / peft.ARRAYS) for who in ("theirs", "ours"))
    for tensor, array in before.items():
        np.testing.assert_array_equal(after[tensor], array, err_msg=tensor)


def test_gradients_of_dora_are_those_of_peft(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base, positions = bases("qwen3"), jnp.tile(jnp.arange(TOKENS.shape[1]), (2, 1))
    model = adapter_on(base, tmp_path, target_modules=FOUR, use_dora=True)
    torch.sin(model(torch.from_numpy(TOKENS)).logits).mean().backward()
    theirs = {name.replace(".default", ""): p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    config, params = hf.load(base)

    def mean(adapter: PyTree) -> jax.Array:
        hidden = apply(params, adapter, config, jnp.asarray(TOKENS), positions)
        return jnp.sin(logits(params, adapter, config, hidden)).mean()

    grads = jax.jit(jax.grad(mean))(peft_reading.read_trained(config, tmp_path))
    peft.save(tmp_path / "gradients", grads, config, "base")
    ours = load_file(tmp_path / "gradients" / peft.ARRAYS)
    assert len(ours) == len(theirs) == 3 * len(FOUR) * config.num_layers
    for name, slope in ours.items():
        expected = theirs[name + (".weight" if name.endswith("vector") else "")]
        assert np.linalg.norm(slope - expected) < 1e-4 * np.linalg.norm(expected), name


def test_dora_beside_its_base_may_be_on_fused_maps(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """A reward adapter of somebody else; and it goes back, as one update of each module."""
    base = bases("gpt2")
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "layers_to_transform": [1, 2]}
    theirs = torch_logits(adapter_on(base, tmp_path, use_dora=True, **settings), TOKENS)
    config, params = hf.load(base)
    adapter, positions = peft_reading.read_lora(config, tmp_path), jnp.tile(jnp.arange(TOKENS.shape[1]), (2, 1))
    assert {name: lora.magnitude.shape[0] for name, lora in adapter["lora"].items()} == {"q": 2, "k": 2, "v": 2}
    hidden = apply(params, adapter, config, jnp.asarray(TOKENS), positions)
    assert error(np.asarray(logits(params, adapter, config, hidden)), theirs) < 1e-5
    peft.save(tmp_path / "ours", adapter, config, str(base))
    again = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    assert error(torch_logits(again.eval(), TOKENS), theirs) < 1e-5
    with pytest.raises(ValueError, match="use_dora of all maps and of whole modules, and k has no magnitudes; choose"):
        peft.save(tmp_path / "part", {"lora": {"q": adapter["lora"]["q"]}}, config, str(base))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "qwen3",
            {"target_modules": r".*layers\.(0|2)\.self_attn\.q_proj", "use_dora": True},
            r"use_dora=True, and q has no update in layers \[1\]: DoRA is had of one range.* Give it as --model",
        ),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "c_attn holds q, k, v, an update each here"),
        (
            "qwen3",
            {"target_modules": FOUR, "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}},
            "rank or scale of q differs by layer",
        ),
    ],
)
def test_what_cannot_be_gone_on_with_says_what_to_do(
    family: str, settings: dict, message: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter_on(bases(family), tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        peft_reading.read_trained(hf.load(bases(family))[0], tmp_path)


def test_the_adapter_has_a_fingerprint_and_a_tokenizer(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("qwen3")
    for name in ("one", "other"):
        adapter_on(base, tmp_path / name, target_modules=FOUR, lora_alpha=4.0 if name == "one" else 5.0)
    prints = {fingerprint_of(where) for where in (base, tmp_path / "one", tmp_path / "other")}
    assert len(prints) == 3
    assert load_tokenizer(tmp_path / "one").get_vocab() == load_tokenizer(base).get_vocab()


@pytest.fixture
def adapter(bases: Callable[[str], Path], tmp_path: Path) -> Path:
    adapter_on(bases("qwen3"), tmp_path, target_modules=FOUR)
    return tmp_path


def test_a_base_beside_the_adapter_is_found(bases: Callable[[str], Path], adapter: Path) -> None:
    edit(adapter, base_model_name_or_path="qwen3")
    with pytest.raises(FileNotFoundError, match="qwen3"):
        hf.load(adapter)
    (adapter.parent / "qwen3").symlink_to(bases("qwen3"))
    assert hf.load(adapter)[0].family == "qwen3"


def edit(where: Path, **fields: object) -> None:
    file = where / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported. Merge .*merge_and_unload"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"use_dora": True}, "use_dora=True contradicts the magnitudes"),
        ({"r": 4}, "has rank 3, but adapter_config.json says 4"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern has a key that is no regular expression"),
        ({"lora_alpha": "x"}, "lora_alpha='x' is not a positive number"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path=None does not name the base"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict, message: str, adapter: Path) -> None:
    edit(adapter, **fields)
    with pytest.raises(ValueError, match=message):
        hf.load(adapter)


def test_tensors_without_a_place_are_named(bases: Callable[[str], Path], adapter: Path) -> None:
    arrays = load_file(adapter / peft.ARRAYS)
    save_file(arrays | {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}, adapter / peft.ARRAYS)
    with pytest.raises(ValueError, match="1 tensors have no place in a qwen3 model: base_model.model.lm_head.weight"):
        hf.load(adapter)
    narrow = {name: array[..., :-1] if "lora_A" in name else array for name, array in arrays.items()}
    save_file(narrow, adapter / peft.ARRAYS)
    with pytest.raises(ValueError, match="Is this its base"):
        hf.load(adapter)
    (adapter / peft.ARRAYS).write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        hf.load(adapter)
    (adapter / peft.ARRAYS).unlink()
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is missing .adapter_model.bin is a pickle"):
        hf.load(adapter)
