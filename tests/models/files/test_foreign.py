"""What other programs wrote is named for what it is, with what to do, instead of a missing file or tensor."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppo_jax.models.files import classifiers, hf, hub, peft
from ppo_jax.rewards.loading import find_reward
from tests.data.tokenizer import make_tokenizer
from tests.models.files.test_peft import lora
from tests.models.tiny import CONFIG, random_params


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models")
    hf.save(where / "lm", CONFIG, random_params(CONFIG), make_tokenizer())
    head = {"reward": {"kernel": jnp.ones((CONFIG.hidden_size, 1))}, "gain": jnp.ones(()), "bias": jnp.zeros(())}
    classifiers.save(where / "scorer", CONFIG, random_params(CONFIG), head, make_tokenizer())
    return where


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rename(file: Path, prefix: str, **more: np.ndarray) -> None:
    save_file({prefix + name: array for name, array in load_file(file).items()} | more, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("prefix", "writer"),
    [("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel"), ("policy.", "the file has it as")],
)
def test_wrapped_weights_say_which_names_the_file_has(prefix: str, writer: str, saved: Path, tmp_path: Path) -> None:
    where = copied(saved / "lm", tmp_path / "m")
    rename(where / hf.SINGLE, prefix)
    with pytest.raises(ValueError, match=rf"embed_tokens.weight .* is missing.*{prefix}model.embed_tokens") as error:
        hf.load(where)
    assert writer in str(error.value) and f"take {prefix!r} off" in str(error.value)
    where = copied(saved / "scorer", tmp_path / "s")
    for file in where.glob("*.safetensors"):
        rename(file, prefix)
    with pytest.raises(ValueError, match=rf"score.weight is missing.*the file has it as {prefix}score.weight"):
        classifiers.load(where)


def test_a_file_of_another_model_shows_its_names(saved: Path, tmp_path: Path) -> None:
    where = copied(saved / "lm", tmp_path / "m")
    save_file({"wte.weight": np.zeros((2, 2), np.float32)}, where / hf.SINGLE)
    with pytest.raises(ValueError, match="is missing; the file has wte.weight"):
        hf.load(where)


def test_a_value_head_among_the_weights_is_named(saved: Path, tmp_path: Path) -> None:
    where = copied(saved / "lm", tmp_path / "m")
    rename(where / hf.SINGLE, "", **{"v_head.summary.weight": np.zeros((1, CONFIG.hidden_size), np.float32)})
    with pytest.raises(ValueError, match="no place in the model: v_head.summary.weight .*value head of TRL"):
        hf.load(where)


def test_llama_factorys_reward_models_are_named(saved: Path, tmp_path: Path) -> None:
    """A full one is a language model with value_head.safetensors beside it; a LoRA one lies beside an adapter.

    Both are read as rewards (test_value_heads.py); as bases the first is the model that it is, and the second none.
    """
    where = copied(saved / "lm", tmp_path / "full")
    save_file({"v_head.summary.weight": np.zeros((1, 4), np.float32)}, where / "value_head.safetensors")
    with pytest.raises(ValueError, match="value_head.safetensors: tensor v_head.summary.bias is missing"):
        classifiers.load(where)
    assert hf.load(where)[0] == CONFIG, "as a base it is the language model that it is"
    peft.save(tmp_path / "lora", lora(2), CONFIG, "base")
    (tmp_path / "lora" / "value_head.bin").write_bytes(b"")
    assert find_reward(tmp_path / "lora") == tmp_path / "lora"
    with pytest.raises(FileNotFoundError, match=r"LLaMA-Factory, a PEFT adapter with a value head .value_head.bin"):
        hf.load(tmp_path / "lora")


def test_a_peft_adapter_is_no_reward_model(tmp_path: Path) -> None:
    peft.save(tmp_path, lora(2), CONFIG, "base")
    with pytest.raises(FileNotFoundError, match="adapter of the peft library .*merge_and_unload"):
        find_reward(tmp_path)


def test_a_path_in_a_directory_that_is_here_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/sfft", "./a/b", "../b", "~/none", "a/b/c", "model"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            hub.resolve(path)
    with pytest.raises(FileNotFoundError, match="the directory runs does, so the Hugging Face hub is not asked"):
        find_reward("runs/sfft")
    assert asked == []
    assert hub.resolve("other/model") == tmp_path and asked == ["other/model"]
