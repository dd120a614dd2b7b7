"""One reward model in all its forms: LoRA on the policy's base, merged on its own, tokenised again; and its memory."""

import dataclasses
import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer

from ppo_jax.models.adapters import init_lora
from ppo_jax.models.config import ModelConfig, ModelOptions
from ppo_jax.models.files import artifacts, classifiers, hf
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.parallel.mesh import MeshConfig, make_mesh
from ppo_jax.rewards import loading
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.rewards.base import Reward
from ppo_jax.rewards.loading import export_reward, find_reward, load_reward, load_scorer
from ppo_jax.rewards.model import FullReward, model_reward
from ppo_jax.rewards.scores import as_scores
from ppo_jax.types import Frozen, Rollout
from tests.data.tokenizer import CHARACTERS, EOS, ids, make_tokenizer
from tests.models.tiny import random_params
from tests.train.toy import noisy

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=48,
    tie_embeddings=False,
    eos_token_ids=(EOS,),
)
TEXTS = [("the film is", " good"), ("a", "b"), ("no", " it is a much longer text: bad"), ("x.", ""), ("", "only this")]
PROMPTS, RESPONSES = map(list, zip(*TEXTS, strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a LoRA reward artifact on its lowest two layers, with gain and bias."""
    path = tmp_path_factory.mktemp("world")
    hf.save(path / "base", CONFIG, random_params(CONFIG), make_tokenizer())
    trunk = dataclasses.replace(CONFIG, num_layers=2)
    adapter = noisy(init_lora(jax.random.key(0), trunk, 2, 4.0, ("q", "down"), 1), 1, 0.3)
    head = noisy(RewardHead().init(jax.random.key(1), jnp.zeros((1, 16)))["params"], 2, 0.5)
    artifacts.save(
        path / "run" / "export" / "reward",
        "reward",
        adapter,
        head,
        artifacts.Base(path / "base", fingerprint_of(path / "base"), CONFIG),
        {"accuracy": 0.9},
        layers=2,
    )
    export_reward(path / "run", path / "merged")
    return path


@pytest.fixture(scope="module")
def policy(world: Path) -> Model:
    return load_model(world / "base")


def rollout(slots: int = 64) -> Rollout:
    """TEXTS as a rollout whose responses ended by EOS."""
    half = slots // 2
    tokens, mask = np.full((len(TEXTS), 2 * half), EOS, np.int32), np.zeros((len(TEXTS), 2 * half), bool)
    for i, (prompt, response) in enumerate(TEXTS):
        before, after = ids(prompt), [*ids(response), EOS]
        both = slice(half - len(before), half + len(after))
        tokens[i, both], mask[i, both] = before + after, True
    zeros = jnp.zeros((len(TEXTS), half))
    masks = jnp.asarray(mask[:, :half]), jnp.asarray(mask[:, half:])
    return Rollout(jnp.asarray(tokens), *masks, zeros, zeros, zeros, jnp.ones(len(TEXTS), bool), jnp.arange(len(TEXTS)))


def run(found: Reward, policy: Model) -> np.ndarray:
    if found.host is not None:
        scores = as_scores(found.host(PROMPTS, RESPONSES, [{}] * len(TEXTS)), len(TEXTS))
    else:
        assert found.device is not None
        reward = jax.jit(partial(found.device, prefix=None, prefix_layers=0))
        scores = reward(Frozen(policy.params, found.params), rollout())
    assert np.asarray(scores.valid).all()
    return np.asarray(scores.reward)


def test_lora_merged_and_plain_scores_are_equal(world: Path, policy: Model) -> None:
    """Switched in on the policy's base; merged into a model of its own; both as functions of text; padded anyhow."""
    lora, full = load_reward(world / "run", policy), load_reward(world / "merged", policy, micro_batch=2)
    assert isinstance(lora.params, RewardRole) and isinstance(full.params, FullReward)
    assert lora.host is full.host is None and lora.notices == full.notices == ()
    assert lora.metadata == full.metadata == {"accuracy": 0.9}
    expected = run(lora, policy)
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(run(full, policy), expected, rtol=1e-5, atol=1e-5)
    for path in ("run", "merged"):
        scorer = load_scorer(world / path, batch_sizes=(1, 4))
        np.testing.assert_allclose(scorer.score(PROMPTS, RESPONSES), expected, rtol=1e-5, atol=1e-5)
        whole = [prompt + response for prompt, response in TEXTS]
        np.testing.assert_allclose(scorer.score_rows(scorer.encode_texts(whole)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_on_a_mesh_a_model_of_its_own_lies_as_the_base_does(
    world: Path, policy: Model, dtype: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read shard by shard, in the compute dtype, in micro-batches that fill the devices; same scores on every side."""
    expected = run(load_reward(world / "run", policy), policy)
    read, sizes = classifiers._read, []
    real, batches = model_reward, []
    monkeypatch.setattr(
        classifiers, "_read", lambda *given: sizes.append((given[1], (found := read(*given)).size)) or found
    )
    monkeypatch.setattr(loading, "model_reward", lambda *given: batches.append(given[2]) or real(*given))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        ours = load_model(world / "base", ModelOptions(dtype))
        full = load_reward(world / "merged", ours, micro_batch=3)
        assert batches == [8]
        q = full.params.params["layers"]["q"]
        assert q.dtype == dtype and q.sharding == ours.params["layers"]["q"].sharding
        assert {size for name, size in sizes if "q_proj" in name} == {16 * 16 // 4}  # of one layer, by a quarter
        np.testing.assert_allclose(run(full, ours), expected, rtol=tolerance, atol=tolerance)
        scorer = load_scorer(world / "merged")
        np.testing.assert_allclose(scorer.score(PROMPTS, RESPONSES), expected, rtol=1e-5, atol=1e-5)


def test_transformers_scores_the_export_as_we_do(world: Path, policy: Model) -> None:
    """Text to score on their side alone: their tokenizer, their padding, their model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world / "merged").eval()
    batch = tokenizer([p + r for p, r in TEXTS], padding=True, padding_side="right", return_tensors="pt")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    found = logits.detach().numpy() + model.config.ppo_jax_bias
    np.testing.assert_allclose(found, run(load_reward(world / "run", policy), policy), rtol=1e-5, atol=1e-5)


def test_another_tokenizer_means_text_and_says_so_once(world: Path, policy: Model, tmp_path: Path) -> None:
    """The same function of the text under another numbering of the characters: rows of the embedding permuted."""
    model = classifiers.load(world / "merged")
    order = np.r_[0, 1, 2 + np.random.default_rng(0).permutation(len(CHARACTERS))]  # new id of old id
    raw = json.loads(make_tokenizer().backend_tokenizer.to_str())
    raw["model"]["vocab"] = {token: int(order[i]) for token, i in raw["model"]["vocab"].items()}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), bos_token="<s>", eos_token="</s>"
    )
    embedding = model.params["embedding"].at[order].set(model.params["embedding"][: len(order)])
    classifiers.save(tmp_path / "rm", model.config, model.params | {"embedding": embedding}, model.head, theirs)
    found = load_reward(tmp_path / "rm", policy, micro_batch=2)
    assert found.device is None and found.params is None
    assert "another tokenizer" in found.notices[0] and "tokenised again" in found.notices[0]
    expected = run(load_reward(world / "run", policy), policy)
    np.testing.assert_allclose(run(found, policy), expected, rtol=1e-4, atol=1e-5)
    wrong = load_scorer(tmp_path / "rm").score_rows([ids(p + r) for p, r in TEXTS])  # the policy's ids mean nothing
    assert np.abs(wrong - expected).max() > 0.1


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def size(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_a_lora_reward_costs_its_adapter_and_head_alone(world: Path, policy: Model) -> None:
    """Also while it scores: what is left on the device is the adapter, the head and the scores."""
    run(load_reward(world / "run", policy), policy)  # constants of tracing are made once
    before = live_bytes()
    found = load_reward(world / "run", policy)
    cost = live_bytes() - before
    assert cost == size(found.params) == size((found.params.adapter, found.params.head))
    assert cost < size(policy.params) / 4
    run(found, policy)
    assert live_bytes() - before == cost
    del found
    assert live_bytes() == before
    full = load_reward(world / "merged", policy)  # the other kind does cost a model
    assert live_bytes() - before == size(full.params) > 0.5 * size(policy.params)


def test_long_texts_keep_bos_and_their_end(world: Path) -> None:
    scorer = load_scorer(world / "merged", max_length=10)
    assert scorer.encode(["abcdefgh"], ["ijkl"]) == [ids("cdefghijkl")]
    assert scorer.encode_texts(["abcdefghijkl", ""], max_length=3) == [ids("jkl"), []]
    with_bos = scorer._replace(bos=[0])
    assert with_bos.encode(["<s>abcdefgh", "<s>", ""], ["ijkl", "", ""]) == [[0, *ids("defghijkl")], [], []]
    assert with_bos.encode_texts(["ab"], max_length=1) == [[0, *ids("b")]]
    # A service is given texts that spell their end; they are read as in training, without it.
    assert scorer.encode(["a", "a"], ["b</s>", "</s>"]) == [ids("ab"), ids("a")]
    assert scorer.encode_texts(["ab</s></s>", "</s>"]) == [ids("ab"), []]
    with pytest.raises(ValueError, match="max_length=49 must be from 2 to the model's 48"):
        load_scorer(world / "merged", max_length=49)


def test_what_is_no_reward_model_is_named(world: Path, policy: Model, tmp_path: Path) -> None:
    assert find_reward(world / "run") == world / "run" / "export" / "reward"
    with pytest.raises(FileNotFoundError, match="holds no reward model"):
        load_reward(tmp_path, policy)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_reward(tmp_path / "nowhere", policy)
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        load_reward(world / "base", policy)
    with pytest.raises(ValueError, match="trained on other weights"):
        load_reward(world / "run", policy._replace(fingerprint="0" * 64))
    with pytest.raises(ValueError, match="has no base"):
        load_scorer(world / "merged", base="x")
    with pytest.raises(ValueError, match="directory already"):
        export_reward(world / "merged", tmp_path / "out")
