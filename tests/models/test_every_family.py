"""Every family, and every flag that it can turn, against transformers (torch, float32): results and files."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from ppo_jax.cli.plan import programs
from ppo_jax.models.adapters import LINEARS, AdapterConfig, init_lora, init_top_k, merge
from ppo_jax.models.cache import init_cache
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import classifiers, hf, peft
from ppo_jax.models.files.families import FAMILIES as TABLE
from ppo_jax.models.files.names import stored_tensors
from ppo_jax.models.layout import leaf, linear_shapes
from ppo_jax.models.placement import shardings
from ppo_jax.models.transformer import apply, logits, positions_from_mask
from ppo_jax.parallel.mesh import MeshConfig, make_mesh
from ppo_jax.rewards.model import FullReward, full_scores
from ppo_jax.rollout import Sampling, generate
from ppo_jax.train.options import PPOConfig
from ppo_jax.types import Policy, Prompts, PyTree
from tests.data.tokenizer import make_tokenizer
from tests.models.families import CASES, FAMILIES, torch_model
from tests.models.test_parity import error, torch_logits
from tests.models.tiny import equal
from tests.train.toy import noisy

PROMPT, NEW = 12, 8
# Rows longer than any window (5); the second one is left-padded.
MASK = np.arange(PROMPT + NEW)[None] >= np.array([[0], [7]])
TOKENS = np.where(MASK, np.random.default_rng(0).integers(3, 67, MASK.shape), 66)
POSITIONS = positions_from_mask(jnp.asarray(MASK))
MORE = [name for name in CASES if name not in FAMILIES]
EVERY = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]
# To trace an update takes a second: the three that share least.
PLANNED = [
    pytest.param(name, marks=() if name in ("gemma3", "gpt2", "gpt_neox") else pytest.mark.long) for name in CASES
]
compute = jax.jit(
    lambda params, adapter, config, tokens, positions: logits(
        params, adapter, config, apply(params, adapter, config, tokens, positions)
    ),
    static_argnums=2,
)
step = jax.jit(apply, static_argnums=2)


class Case(NamedTuple):
    config: ModelConfig
    params: PyTree
    model: Any  # of transformers
    path: Path  # as transformers has saved it


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def make(name: str) -> Case:
        path, model = tmp_path_factory.mktemp("family") / name, torch_model(name)
        model.save_pretrained(path)
        return Case(*hf.load(path), model, path)

    return make


def alone(model: Any) -> list[np.ndarray]:
    """The logits of each row without its padding."""
    return [torch_logits(model, TOKENS[i : i + 1, MASK[i]])[0] for i in range(2)]


def ours(params: PyTree, adapter: PyTree, config: ModelConfig) -> list[np.ndarray]:
    found = np.asarray(compute(params, adapter, config, jnp.asarray(TOKENS), POSITIONS))
    return [found[i][MASK[i]] for i in range(2)]


def worst(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(error(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_files(name: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    """Left padding included; our directory is the same model to transformers, bit by bit, and to us."""
    config, params, model, _ = case(name)
    theirs = alone(model)
    assert worst(ours(params, {}, config), theirs) < 1e-4
    hf.save(tmp_path, config, params)
    again, same = hf.load(tmp_path)
    assert again == config and equal(same, params)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for one, other in zip(alone(read), theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", EVERY)
def test_greedy_text_and_decoding_with_a_cache(name: str, case: Callable[[str], Case]) -> None:
    """The rollout (layers apart) draws what transformers generates from the same files; the stacked cache agrees."""
    config, params, model, _ = case(name)
    config = dataclasses.replace(config, eos_token_ids=())
    tokens, mask = jnp.asarray(TOKENS[:, :PROMPT], jnp.int32), jnp.asarray(MASK[:, :PROMPT])
    prompts, sampling = Prompts(tokens, mask, jnp.arange(2)), Sampling(response_length=NEW, stop_ids=(), pad_id=0)
    head = {"value": {"kernel": jnp.zeros((config.hidden_size, 1)), "bias": jnp.zeros(1)}}
    draw = jax.jit(generate, static_argnums=(2, 5))
    model.generation_config.eos_token_id = None  # an argument of None would mean what stands here
    found = draw(params, Policy({}, head), config, prompts, jax.random.key(0), sampling, 0.0)
    for i in range(2):
        row = torch.tensor(TOKENS[i : i + 1, :PROMPT][:, MASK[i, :PROMPT]])
        theirs = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=NEW)
        assert found.tokens[i, PROMPT:].tolist() == theirs[0, row.shape[1] :].tolist()

    hidden, cache = step(params, {}, config, tokens, POSITIONS[:, :PROMPT], cache=init_cache(config, 2, PROMPT + NEW))
    pieces = [hidden]
    for t in range(PROMPT, PROMPT + NEW):
        token = jnp.asarray(TOKENS[:, t : t + 1], jnp.int32)
        hidden, cache = step(params, {}, config, token, POSITIONS[:, t : t + 1], cache=cache)
        pieces.append(hidden)
    stepwise = np.asarray(logits(params, {}, config, jnp.concatenate(pieces, axis=1)))
    assert worst([stepwise[i][MASK[i]] for i in range(2)], alone(model)) < 1e-4


@pytest.mark.parametrize("name", EVERY)
def test_gradients(name: str, case: Callable[[str], Case]) -> None:
    """Of the mean of sin(logits) by every array, joined as the file holds it."""
    config, params, model, _ = case(name)
    positions = jnp.tile(jnp.arange(PROMPT + NEW), (2, 1))

    @jax.jit
    def grad(params: PyTree) -> PyTree:
        return jax.grad(lambda p: jnp.mean(jnp.sin(compute(p, {}, config, jnp.asarray(TOKENS), positions))))(params)

    found = grad(params)
    model.zero_grad()
    torch.sin(model(torch.tensor(TOKENS)).logits).mean().backward()
    theirs = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    if config.family == "gpt_neox":  # transformers 5 renames it when it reads and writes
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    model.zero_grad()
    checked = 0
    for one in stored_tensors(config):
        for layer in range(config.num_layers if one.stacked else 1):
            parts = [leaf(found, part.key) for part in one.parts]
            joined = np.asarray(one.join(config, [part[layer] if one.stacked else part for part in parts]))
            expected = theirs[one.name.format(layer)]
            size = max(np.linalg.norm(expected), 1e-4)  # a bias of the keys has next to none
            assert np.linalg.norm(joined - expected) < 1e-3 * size, one.name.format(layer)
            checked += 1
    assert checked == len(theirs)


def lora_of(config: ModelConfig, first_layer: int = 1) -> PyTree:
    return noisy(init_lora(jax.random.key(1), config, 2, 3.0, first_layer=first_layer), scale=0.2)


@pytest.mark.parametrize("name", EVERY)
def test_adapters_merge_and_go_to_peft_and_come_back(name: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    config, params, _, path = case(name)
    adapter = lora_of(config)
    assert set(adapter["lora"]) == set(linear_shapes(config)) == set(LINEARS) - (set() if config.gated else {"gate"})
    expected = ours(params, adapter, config)
    assert worst(expected, ours(params, {}, config)) > 1e-2
    assert worst(ours(merge(params, adapter, config), {}, config), expected) < 1e-4

    peft.save(tmp_path, adapter, config, str(path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    assert worst(alone(PeftModel.from_pretrained(theirs, tmp_path).eval()), expected) < 1e-4
    again, merged = hf.load(tmp_path)
    assert again == config and worst(ours(merged, {}, config), expected) < 1e-4

    top = init_top_k(params, config, 1)
    assert worst(ours(params, top, config), ours(params, {}, config)) < 1e-6
    changed = {"layers": jax.tree.map(lambda x: 1.1 * x, top["layers"])}
    assert worst(ours(merge(params, changed, config), {}, config), ours(params, changed, config)) < 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_sequence_classifiers(name: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    config, params, _, _ = case(name)
    head = {"reward": {"kernel": jnp.linspace(-1, 1, 32)[:, None]}, "gain": jnp.ones(()), "bias": jnp.zeros(())}
    if not TABLE[config.family].classifies:
        with pytest.raises(ValueError, match=f"no sequence classifier for {config.family} models"):
            classifiers.save(tmp_path / "x", config, params, head, make_tokenizer())
        return
    tokens, mask = TOKENS[:1, :9], np.ones((1, 9), bool)
    model = torch_model(name, transformers.AutoModelForSequenceClassification, num_labels=1)
    model.save_pretrained(tmp_path / "theirs")
    classifiers.save(tmp_path / "ours", config, params, head, make_tokenizer())
    for where, there in (("theirs", model), ("ours", None)):
        found = classifiers.load(tmp_path / where)
        there = there or transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / where, attn_implementation="eager"
        )
        with torch.no_grad():
            expected = there.float().eval()(torch.tensor(tokens)).logits[0, 0].item()
        scores = full_scores(FullReward(found.params, found.head), found.config, jnp.asarray(tokens), jnp.asarray(mask))
        assert float(scores[0]) == pytest.approx(expected, rel=1e-4, abs=1e-5), where


@pytest.mark.parametrize("name", EVERY)
def test_eight_devices(name: str, case: Callable[[str], Case]) -> None:
    """Read onto a mesh of all three axes, the model is cut over them and computes the same."""
    config, params, _, path = case(name)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    _, placed = hf.load(path, mesh=mesh)
    assert equal(jax.tree.map(np.asarray, placed), jax.tree.map(np.asarray, params))
    specs = {key: x.spec for key, x in shardings(placed, mesh)["layers"].items()}
    assert all(placed["layers"][key].sharding.spec == spec for key, spec in specs.items())
    assert all("tensor" in specs[key] and "fsdp" in specs[key] for key in linear_shapes(config))
    with jax.set_mesh(mesh):
        found = np.asarray(compute(placed, {}, config, jnp.asarray(TOKENS), POSITIONS))
    assert worst([found[i][MASK[i]] for i in range(2)], ours(params, {}, config)) < 1e-5


@pytest.mark.parametrize("name", PLANNED)
def test_the_planner_lowers_its_programs(name: str, case: Callable[[str], Case]) -> None:
    """From config.json alone, for a mesh: an update, and what weights and optimizer hold on a device."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    adapter, ppo = AdapterConfig(layers=2, rank=2), PPOConfig(num_minibatches=1)
    settings = programs.PlanSettings(
        str(case(name).path), "cpu:8", mesh, batch=4, prompt_length=8, response_length=8, policy=adapter, ppo=ppo
    )
    config = programs.check(settings)
    inputs = programs.arguments(settings, config, make_mesh(mesh, jax.devices()[:8]))
    held = programs.held_bytes(inputs)
    whole = sum(x.size for x in jax.tree.leaves(case(name).params)) * 2  # bfloat16
    assert whole / 8 <= held["base"] < whole / 2
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:8])):
        function, arguments = programs.program("update", settings, config, inputs)
        assert "stablehlo.dot_general" in function.lower(*arguments).as_text()
