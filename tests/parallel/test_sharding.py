"""One step, any mesh: the same tokens, losses, gradients and iteration on eight devices as on one."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ppo_jax.models.adapters import AdapterConfig, init_adapter, init_lora
from ppo_jax.models.cache import init_cache
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.layout import check_model
from ppo_jax.models.placement import constrain_params, create, create_on_mesh, shardings
from ppo_jax.models.pretrained import Model
from ppo_jax.models.transformer import apply
from ppo_jax.parallel import sharding
from ppo_jax.parallel.mesh import MeshConfig, check_rows, make_mesh
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rewards.base import Reward
from ppo_jax.rollout import Sampling
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.runs.setup import Setup
from ppo_jax.runs.start import make_fresh_state
from ppo_jax.train.loop import LoopConfig
from ppo_jax.train.objective import Counts, ppo_loss
from ppo_jax.train.optimizer import accumulate, make_optimizer
from ppo_jax.train.options import Algorithm, CriticConfig, PPOConfig
from ppo_jax.train.ppo import make_host_iteration, make_iteration
from ppo_jax.train.state import TrainState, init_state
from ppo_jax.types import Frozen, Hyper, Minibatch, Policy, Prompts, PyTree
from tests.models.tiny import random_params
from tests.train.toy import noisy

CONFIG = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    tie_embeddings=False,
)
ONE = MeshConfig()
MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
MESHES = [MeshConfig(data=8), MeshConfig(fsdp=8), MeshConfig(data=2, tensor=4), MIXED]  # of the loss and its gradient
B, P, T = 32, 5, 6
STOPS = (2,)
PPO = PPOConfig(
    sampling=Sampling(response_length=T, stop_ids=STOPS), epochs=2, num_minibatches=2, accumulate=2, logprob_chunk=16
)
HYPER = Hyper(learning_rate=1e-4, temperature=0.9, vf_coef=0.5, entropy_coef=0.01)
ADAPTERS = {"full": AdapterConfig("full"), "top-k": AdapterConfig("top_k", layers=1), "lora": AdapterConfig(layers=2)}


class Case(NamedTuple):
    """What is trained, in which model, how."""

    adapter: AdapterConfig
    model: ModelConfig = CONFIG
    ppo: PPOConfig = PPO


OWN = CriticConfig(own=True, adapter=AdapterConfig("top_k", layers=2))
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
KINDS = {name: Case(adapter) for name, adapter in ADAPTERS.items()} | {
    "lora, own critic": Case(ADAPTERS["lora"], CONFIG, dataclasses.replace(PPO, critic=OWN)),
    "top-k, tied": Case(ADAPTERS["top-k"], TIED),
    "dora": Case(AdapterConfig(layers=2, dora=True)),
    "tied": Case(ADAPTERS["full"], TIED),
}


def mesh_of(config: MeshConfig) -> Mesh:
    return make_mesh(config, jax.devices()[: config.size])


def problem(kind: str) -> tuple[TrainState, Frozen, Prompts]:
    """On the host's default device: a policy, a critic and a reward that have left the base."""
    case = KINDS[kind]
    base = random_params(case.model)
    adapter = init_adapter(jax.random.key(1), base, case.model, case.adapter)
    own = case.ppo.critic.own
    critic = init_adapter(jax.random.key(5), base, case.model, case.ppo.critic.adapter) if own else None
    state = init_state(jax.random.key(2), adapter, case.model, make_optimizer(), 0.05, critic=critic)
    state = state.replace(policy=jax.tree.map(lambda x: x, noisy(state.policy, scale=0.05)))
    head = RewardHead().init(jax.random.key(3), jnp.zeros((1, CONFIG.hidden_size)))["params"]
    role = RewardRole(noisy(init_lora(jax.random.key(4), CONFIG, 2, 4.0, first_layer=2)), head)
    rng = np.random.default_rng(0)
    mask = np.arange(P) >= P - rng.integers(1, P + 1, (B, 1))
    tokens = rng.integers(0, CONFIG.vocab_size, (B, P))
    return state, Frozen(base, role), Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.arange(B))


def placed(problem: tuple[TrainState, Frozen, Prompts], mesh: Mesh) -> tuple[TrainState, Frozen, Prompts]:
    state, frozen, prompts = problem
    return (
        sharding.place(state, shardings(state, mesh)),
        sharding.place(frozen, shardings(frozen, mesh)),
        sharding.place(prompts, sharding.row_shardings(prompts, mesh)),
    )


@functools.cache
def iterate(kind: str, config: MeshConfig) -> dict[str, Any]:
    """The state after one iteration, metrics, shardings before and after, the program; the rollout of "full"."""
    mesh, (_, model, ppo) = mesh_of(config), KINDS[kind]
    state, frozen, prompts = placed(problem(kind), mesh)
    before = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        iteration = make_iteration(model, ppo, make_optimizer(), adapter_reward(model, STOPS))
        program = iteration.lower(state, frozen, prompts, HYPER).compile()
        rollout = None
        if kind == "full":
            rollout = make_host_iteration(model, ppo, make_optimizer())[0](state, frozen, prompts, HYPER)
        state, metrics = program(state, frozen, prompts, HYPER)
    after = jax.tree.map(lambda x: x.sharding, state)
    return dict(rollout=rollout, state=state, metrics=metrics, before=before, after=after, program=program, mesh=mesh)


def assert_equal_up_to_rounding(found: PyTree, expected: PyTree, rtol: float = 1e-5) -> None:
    """Per array, |found - expected| <= rtol |expected| in the Euclidean norm.

    The bias of a head is one number, a sum in which much cancels: it is measured by the head, its kernel included.
    """
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if np.array_equal(one, other):
            continue
        name = jax.tree_util.keystr(path)
        kernel = leaves[name.replace("['bias']", "['kernel']")] if name.endswith("['bias']") else 0.0
        error = np.linalg.norm(other - one) / np.hypot(np.linalg.norm(one), np.linalg.norm(kernel))
        assert error <= rtol, f"{name}: {error:.1e}"


CASES: list = [("full", MIXED)]
CASES += [
    pytest.param(kind, mesh, marks=pytest.mark.long)
    for kind, mesh in [("full", mesh) for mesh in MESHES[:-1]]
    + [(kind, MIXED) for kind in ("lora, own critic", "top-k", "top-k, tied", "lora", "dora", "tied")]
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=str)
def test_every_mesh_gives_what_one_device_gives(kind: str, config: MeshConfig) -> None:
    expected, found = iterate(kind, ONE), iterate(kind, config)
    if kind == "full":
        np.testing.assert_array_equal(found["rollout"].tokens, expected["rollout"].tokens)
        np.testing.assert_array_equal(found["rollout"].response_mask, expected["rollout"].response_mask)
        assert_equal_up_to_rounding(found["rollout"], expected["rollout"])
    # Adam's first moment is the mean of the gradients; the parameters have made four steps.
    assert_equal_up_to_rounding(found["state"].opt_state, expected["state"].opt_state)
    assert_equal_up_to_rounding(found["state"].policy, expected["state"].policy)
    names = {"policy_loss", "value_loss", "entropy", "grad_norm", "kl", "reward", "ratio", "response_length"}
    assert names <= set(found["metrics"])
    for name in names:
        total, other = (np.float64(run["metrics"][name][0]) for run in (expected, found))
        count = np.float64(expected["metrics"][name][1])
        assert found["metrics"][name][1] == count
        # The policy loss is the small rest of advantages of size 1, which cancel: relative to those.
        size = max(abs(total), count) if name == "policy_loss" else abs(total)
        assert size > 0 and abs(other - total) <= 1e-5 * size, name


@functools.cache
def gradient(config: MeshConfig) -> tuple[jax.Array, Policy]:
    """Loss and its gradient on rows of one device's rollout, in two micro-batches, full tuning."""
    mesh, rollout = mesh_of(config), jax.tree.map(np.asarray, iterate("full", ONE)["rollout"])
    rng = np.random.default_rng(1)
    advantages, values, returns = rng.normal(size=(3, *rollout.response_mask.shape)).astype(np.float32)
    behaviour = rollout.logprobs + 0.1 * advantages  # ratios that differ from 1, some of them clipped
    rows = Minibatch(rollout.tokens, rollout.mask, None, rollout.response_mask, behaviour, values, advantages, returns)
    state, frozen, _ = placed(problem("full"), mesh)
    counts = Counts(jnp.float32(rollout.response_mask.sum()))
    algorithm = Algorithm(CONFIG, PPO, make_optimizer(PPO.optimizer))

    def loss(policy: Policy, rows: Minibatch) -> tuple[Policy, dict]:
        return jax.grad(ppo_loss, has_aux=True)(policy, algorithm, frozen, rows, counts, HYPER)

    with jax.set_mesh(mesh):
        rows = sharding.place(rows, sharding.row_shardings(rows, mesh))
        grads, metrics = jax.jit(lambda policy, rows: accumulate(loss, policy, rows, 2))(state.policy, rows)
    return metrics["loss"][0] / metrics["loss"][1], grads


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_loss_and_gradient_are_those_of_one_device(config: MeshConfig) -> None:
    (loss, grads), (other, others) = gradient(ONE), gradient(config)
    assert abs(loss) > 0.1
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    assert_equal_up_to_rounding((other, others), (loss, grads))
    q = others.adapter["layers"]["q"].sharding
    assert {axis for axis in ("fsdp", "tensor") if getattr(config, axis) > 1} <= set(q.spec)  # as the parameter lies


@pytest.mark.parametrize(("kind", "config"), CASES, ids=str)
def test_shardings_do_not_drift(kind: str, config: MeshConfig) -> None:
    """What comes out lies as what went in, and as the table says, so nothing is moved or compiled a second time."""
    run = iterate(kind, config)
    assert jax.tree.leaves(run["after"]) == jax.tree.leaves(run["before"])
    assert jax.tree.leaves(run["after"]) == jax.tree.leaves(shardings(run["state"], run["mesh"]))
    if config.fsdp > 1 and kind == "full":
        adam = run["after"].opt_state.policy if hasattr(run["after"].opt_state, "policy") else run["after"].opt_state
        q = [s.spec for p, s in jax.tree_util.tree_leaves_with_path(adam) if jax.tree_util.keystr(p).endswith("['q']")]
        assert len(q) == 2 and all("fsdp" in spec for spec in q)  # both moments of Adam


def gathered(text: str) -> dict[str, int]:
    """{shape: elements} of every all-gather in a compiled program."""
    found = {}
    for results in re.findall(r"= ([^=]*?) all-gather(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]+)\]", results):
            found[shape] = int(np.prod([int(n) for n in shape.split(",")]))
    return found


@pytest.mark.parametrize(("kind", "config"), CASES, ids=str)
def test_nothing_is_gathered_whole(kind: str, config: MeshConfig) -> None:
    """No all-gather is larger than one layer's largest matrix, nor than the table of tokens: no logits of [B,T,V],
    no activations of all rows, no stack of layers."""
    text = iterate(kind, config)["program"].as_text()
    shapes = gathered(text)
    matrix = CONFIG.hidden_size * max(CONFIG.intermediate_size, CONFIG.vocab_size)
    assert B // 4 * T * CONFIG.vocab_size > matrix and CONFIG.num_layers * matrix > matrix  # what would be caught
    if config.fsdp > 1:
        assert shapes  # parameters are gathered, layer by layer
    assert not {shape for shape, size in shapes.items() if size > matrix}
    assert not re.search(rf"f32\[{B},{T},{CONFIG.vocab_size}\]|f32\[{B // 4},{T},{CONFIG.vocab_size}\]", text)


def test_the_check_above_sees_a_gather_of_all_layers() -> None:
    mesh = mesh_of(MeshConfig(fsdp=8))
    base = random_params(CONFIG)
    base = sharding.place(base, shardings(base, mesh))
    with jax.set_mesh(mesh):
        text = jax.jit(lambda p: jax.lax.with_sharding_constraint(p, PartitionSpec())).lower(base).compile().as_text()
    assert gathered(text)["3,32,64"] == 3 * 32 * 64


def test_memory_of_a_device_falls_with_the_mesh() -> None:
    """Parameters lie in four parts (fsdp x tensor), rows in four (data x fsdp)."""
    one, eight = (iterate("full", config)["program"].memory_analysis() for config in (ONE, MIXED))
    assert eight.argument_size_in_bytes < one.argument_size_in_bytes / 3.5  # norms, heads and counters stay whole
    assert eight.temp_size_in_bytes < one.temp_size_in_bytes / 2


def test_the_cache_is_born_sharded() -> None:
    mesh = mesh_of(MIXED)
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: init_cache(CONFIG, 8, 16))()
    assert cache.keys.sharding.spec == PartitionSpec(None, ("data", "fsdp"), "tensor")
    assert cache.values.sharding == cache.keys.sharding
    assert cache.positions.sharding.spec == PartitionSpec(("data", "fsdp"))


def test_a_state_is_created_on_its_shards() -> None:
    """Adapter and state from base and key under jit, with the numbers of one device."""
    base = random_params(CONFIG)

    def make(key: jax.Array, base: PyTree) -> TrainState:
        adapter = init_adapter(key, base, CONFIG, ADAPTERS["full"])
        return init_state(key, adapter, CONFIG, make_optimizer(), 0.05)

    mesh = mesh_of(MIXED)
    made = create(make, mesh, jax.random.key(0), sharding.place(base, shardings(base, mesh)))
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, made)) == jax.tree.leaves(shardings(made, mesh))
    assert_equal_up_to_rounding(made, make(jax.random.key(0), base), rtol=0)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_run_starts_on_its_shards(kind: str) -> None:
    """Adapter, own critic and Adam's moments, before anything is moved; with the numbers of one device."""

    def start(base: PyTree) -> TrainState:
        make = lambda key, base: init_adapter(key, base, CONFIG, ADAPTERS[kind])  # noqa: E731
        none, own = PromptSet((), (), ()), CriticConfig(own=True, adapter=ADAPTERS[kind])
        adapter = create_on_mesh(make, jax.random.key(0), base)
        ppo = PPOConfig(critic=own, ema_decay=0.9)
        setup = Setup(
            Model("", CONFIG, base, None, ""),
            adapter,
            none,
            none,
            ppo,
            HYPER,
            LoopConfig(),
            0,
            Reward(adapter_reward(CONFIG, ())),
        )
        return make_fresh_state(setup, make_optimizer())

    base, mesh = random_params(CONFIG), mesh_of(MIXED)
    with jax.set_mesh(mesh):
        state = start(sharding.place(base, shardings(base, mesh)))
    wanted = shardings(state, mesh)
    for (path, leaf), to in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(wanted), strict=True):
        if to.spec != PartitionSpec():
            assert leaf.sharding.is_equivalent_to(to, leaf.ndim), jax.tree_util.keystr(path)
    assert sum(to.spec != PartitionSpec() for to in jax.tree.leaves(wanted)) > 40
    assert_equal_up_to_rounding(state, start(base), rtol=0)


def test_the_table_by_hand() -> None:
    mesh = mesh_of(MIXED)
    dora = AdapterConfig(rank=2, dora=True)
    shapes = jax.eval_shape(lambda: init_adapter(jax.random.key(0), random_params(CONFIG), CONFIG, dora))
    specs = jax.tree.map(lambda s: s.spec, shardings({"params": random_params(CONFIG), **shapes}, mesh))
    p, lora = PartitionSpec, specs["lora"]
    assert specs["params"]["embedding"] == p("tensor", "fsdp")
    assert specs["params"]["layers"]["o"] == p(None, "tensor", "fsdp")
    assert specs["params"]["layers"]["mlp_norm"] == specs["params"]["final_norm"] == p()
    assert (lora["q"].a, lora["q"].b) == (p(None, "fsdp"), p(None, None, "tensor"))
    assert (lora["down"].a, lora["down"].b) == (p(None, "tensor"), p(None, None, "fsdp"))
    assert (lora["q"].magnitude, lora["down"].magnitude) == (p(None, "tensor"), p(None, "fsdp"))
    policy = Policy({"layers": {"q": jnp.zeros((1, 32, 32))}}, {"value": {"kernel": jnp.zeros((32, 1))}})
    assert [s.spec for s in jax.tree.leaves(shardings(policy, mesh))] == [p(None, "fsdp", "tensor"), p()]


def test_dora_on_eight_devices_is_dora_on_one() -> None:
    base, dora = random_params(CONFIG), AdapterConfig(rank=2, targets=("q", "down"), dora=True)
    adapter = noisy(init_adapter(jax.random.key(0), base, CONFIG, dora), scale=0.2)
    tokens = jnp.arange(64).reshape(8, 8)
    run = jax.jit(lambda base, adapter: apply(base, adapter, CONFIG, tokens, jnp.tile(jnp.arange(8), (8, 1))))
    expected, mesh = run(base, adapter), mesh_of(MIXED)
    with jax.set_mesh(mesh):
        found = run(*(sharding.place(tree, shardings(tree, mesh)) for tree in (base, adapter)))
    assert_equal_up_to_rounding(found, expected)


def test_there_is_a_rule_for_every_axis_of_an_activation() -> None:
    assert {a for axes in sharding.ACTIVATIONS.values() for a in axes} <= set(sharding.RULES)


@pytest.mark.parametrize(
    ("mesh", "change", "message"),
    [
        (MeshConfig(tensor=4), {"num_kv_heads": 2}, r"--mesh.tensor 4 does not divide num_kv_heads=2.*use 2"),
        (MeshConfig(tensor=2), {"vocab_size": 67}, r"--mesh.tensor 2 does not divide vocab_size=67"),
        (MeshConfig(fsdp=5), {}, r"--mesh.fsdp 5 does not divide hidden_size=32 of the model; use 4"),
    ],
)
def test_a_mesh_that_does_not_fit_the_model_is_refused(mesh: MeshConfig, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(dataclasses.replace(CONFIG, **change), mesh)
    check_model(CONFIG, MIXED)


def test_a_mesh_that_does_not_fit_the_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data=2 x fsdp=2 x tensor=1 needs 4 devices, but there are 8; --mesh.data 4"):
        make_mesh(MeshConfig(data=2, fsdp=2))
    with pytest.raises(ValueError, match=r"mesh.fsdp=0 must be at least 1"):
        MeshConfig(fsdp=0)
    with pytest.raises(ValueError, match=r"a micro-batch has 6 rows, which mesh.data x mesh.fsdp = 4"):
        check_rows(6, MIXED, "a micro-batch")
    assert make_mesh(MeshConfig()).size == 1  # the default takes one of the eight
    assert make_mesh(MIXED).shape == {"data": 2, "fsdp": 2, "tensor": 2}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a machine that is not here."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "chip"


def test_several_slices_are_joined_by_the_outer_axis() -> None:
    """4 slices of 2: data spans them, and the tensor axis never leaves a slice."""
    chips = [Chip(i, i // 2) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=4, tensor=2), chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert (slices == slices[:, :, :1]).all()
    assert sorted(slices[:, 0, 0]) == [0, 1, 2, 3]
    inside = np.vectorize(lambda chip: chip.slice_index)(make_mesh(MeshConfig(fsdp=4, tensor=2), chips).devices)
    assert sorted(inside[0, :, 0]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"4 slices.*mesh.tensor cannot span slices"):
        make_mesh(MeshConfig(tensor=8), chips)


def test_without_a_mesh_nothing_is_constrained() -> None:
    x = jnp.zeros((2, 3, 4))
    assert sharding.constrain(x, "residual") is x
    assert sharding.constrain_rows({"x": x})["x"] is x
    assert constrain_params({"q": x})["q"] is x
