"""Sequence classifiers: the scores of transformers from its own directories, and ours read by transformers."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import classifiers, hf, hub
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.layout import init_params
from ppo_jax.rewards.model import FullReward, full_scores
from tests.data.tokenizer import EOS, make_tokenizer
from tests.models.tiny import random_params
from tests.train.toy import noisy

PAD = 0
SHAPES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForSequenceClassification, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForSequenceClassification, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForSequenceClassification, {"sliding_window": None}),
}
CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_embeddings=False,
    eos_token_ids=(EOS,),
)
ROWS = ([5, 9, 11], [7], [3, 4, 5, 6, 8, 10], [12, 2, 13, 14])
score = jax.jit(full_scores, static_argnums=(1, 4))


def padded(side: str = "right", slots: int = 6) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = np.full((len(ROWS), slots), PAD, np.int32), np.zeros((len(ROWS), slots), bool)
    for i, row in enumerate(ROWS):
        at = slice(slots - len(row), slots) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, True
    return tokens, mask


def theirs(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long())
    return out.logits[:, 0].numpy()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory of each family, as transformers writes it."""
    found = {}
    for name, (config_class, model_class, more) in CLASSES.items():
        torch.manual_seed(0)
        config = config_class(**SHAPES, **more, num_labels=1, pad_token_id=PAD, tie_word_embeddings=False)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
        found[name] = tmp_path_factory.mktemp("hf") / name
        model.save_pretrained(found[name])
    return found


@pytest.mark.parametrize("family", CLASSES)
def test_a_directory_of_transformers_gives_its_scores(family: str, directories: dict[str, Path]) -> None:
    found = classifiers.load(directories[family])
    model = CLASSES[family][1].from_pretrained(directories[family]).eval()
    arrays = FullReward(found.params, found.head)
    expected = theirs(model, *padded())
    assert np.ptp(expected) > 0.1
    for side in ("right", "left"):
        np.testing.assert_allclose(score(arrays, found.config, *padded(side)), expected, rtol=1e-4, atol=1e-5)
    assert found.meta == {} and classifiers.is_sequence_classifier(directories[family])


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, FullReward]:
    """A saved model of ours with gain and bias, and an unembedding that has no place there."""
    params = random_params(CONFIG)
    head = noisy(RewardHead().init(jax.random.key(0), jnp.zeros((1, CONFIG.hidden_size)))["params"], 1, 0.5)
    classifiers.save(tmp_path / "rm", CONFIG, params, head, make_tokenizer(), {"accuracy": 0.75})
    return tmp_path / "rm", FullReward(params, head)


def test_transformers_reproduces_our_scores(ours: tuple[Path, FullReward]) -> None:
    """To 1e-5, with padding on the right; the bias is a constant that it does not add."""
    path, arrays = ours
    assert arrays.head["gain"] != 1 and arrays.head["bias"] != 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id == EOS
    tokens, mask = padded()
    expected = score(arrays, dataclasses.replace(CONFIG, tie_embeddings=False), tokens, mask)
    found = theirs(model, np.where(mask, tokens, EOS), mask) + model.config.ppo_jax_bias
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_was_saved_is_what_is_loaded(ours: tuple[Path, FullReward]) -> None:
    path, arrays = ours
    found = classifiers.load(path)
    assert found.meta == {"accuracy": 0.75} and "unembedding" not in found.params
    for side in ("right", "left"):
        again = score(FullReward(found.params, found.head), found.config, *padded(side))
        np.testing.assert_allclose(again, score(arrays, CONFIG, *padded()), rtol=1e-5, atol=1e-5)


def test_a_model_in_several_files_is_read_by_both(
    ours: tuple[Path, FullReward], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, arrays = ours
    monkeypatch.setattr(hf, "plan_files", functools.partial(hf.plan_files, max_shard_bytes=4000))
    classifiers.save(path, CONFIG, arrays.params, arrays.head, make_tokenizer(), overwrite=True)
    assert len(list(path.glob("*.safetensors"))) > 3
    found = classifiers.load(path)
    np.testing.assert_array_equal(found.params["layers"]["q"], arrays.params["layers"]["q"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    kernel = arrays.head["reward"]["kernel"] * arrays.head["gain"]
    np.testing.assert_allclose(model.score.weight.detach().numpy().T, kernel, rtol=1e-6)


def test_nothing_else_is_overwritten(ours: tuple[Path, FullReward], tmp_path: Path) -> None:
    path, arrays = ours
    with pytest.raises(FileExistsError, match="overwrite=True"):
        classifiers.save(path, CONFIG, arrays.params, arrays.head, make_tokenizer())
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError, match="already exists; choose another directory$"):
        classifiers.save(tmp_path / "other", CONFIG, arrays.params, arrays.head, make_tokenizer(), overwrite=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"rm", "other"}


def edited(path: Path, **fields: object) -> None:
    file = path / "config.json"
    raw = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 2}, "num_labels=2 is not supported: a reward model has 1 label"),
        ({"num_labels": None, "id2label": {"0": "a", "1": "b", "2": "c"}}, "num_labels=3"),
        ({"num_labels": None, "id2label": None}, "num_labels=2"),
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures=\['LlamaForCausalLM'\] is not supported"),
        ({"architectures": ["BloomForSequenceClassification"]}, "supported: LlamaForSequenceClassification"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "contradicts model_type='llama'"),
        ({"architectures": None}, "architectures=None is not supported"),
        ({"ppo_jax_bias": "x"}, "ppo_jax_bias='x' is not a finite number"),
        ({"hidden_size": 32}, r"score.weight has shape \(1, 16\), a reward model has \(1, 32\)"),
    ],
)
def test_other_models_are_refused(fields: dict, message: str, ours: tuple[Path, FullReward]) -> None:
    edited(ours[0], **fields)
    with pytest.raises(ValueError, match=message):
        classifiers.load(ours[0])


def test_a_missing_score_is_named(directories: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(directories["llama"], tmp_path / "rm")
    file = tmp_path / "rm" / "model.safetensors"
    arrays = load_file(file)
    save_file({name: array for name, array in arrays.items() if name != "score.weight"}, file)
    with pytest.raises(ValueError, match="tensor score.weight is missing"):
        classifiers.load(tmp_path / "rm")
    save_file(arrays | {"lm_head.weight": np.zeros((32, 16), np.float32)}, file)
    classifiers.load(tmp_path / "rm")  # a leftover that changes nothing
    save_file({name: array for name, array in arrays.items() if name != "model.norm.weight"}, file)
    with pytest.raises(ValueError, match=r"model.norm.weight \(16,\) is missing"):
        classifiers.load(tmp_path / "rm")
    (tmp_path / "rm" / "config.json").write_text("[1")
    with pytest.raises(ValueError, match="config.json"):
        classifiers.load(tmp_path / "rm")
    assert not classifiers.is_sequence_classifier(tmp_path / "rm")
    (tmp_path / "rm" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        classifiers.load(tmp_path / "rm")


def test_a_description_that_is_too_large_is_not_read(
    ours: tuple[Path, FullReward], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (ours[0] / "config.json").stat().st_size
    monkeypatch.setattr(hub, "LARGEST_JSON", size - 1)
    with pytest.raises(ValueError, match=f"config.json: {size} bytes; at most {size - 1} are read"):
        classifiers.load(ours[0])
    assert not classifiers.is_sequence_classifier(ours[0])
    monkeypatch.setattr(hub, "LARGEST_JSON", size)
    assert classifiers.is_sequence_classifier(ours[0])


def test_fresh_parameters_fit_a_family_with_biases(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, family="qwen2", attention_bias=True, tie_embeddings=True)
    params = init_params(jax.random.key(0), config)
    head = RewardHead().init(jax.random.key(1), jnp.zeros((1, 16)))["params"]
    classifiers.save(tmp_path / "rm", config, params, head, make_tokenizer())
    assert classifiers.load(tmp_path / "rm").config.family == "qwen2"
