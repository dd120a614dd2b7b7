"""The programs of a PPO iteration, compiled for devices that are not there, and what they would need.

Run as a process of its own (`python -m ppo_jax.cli.plan.programs PROGRAM < settings.yaml`): libtpu and the number of
CPU devices are chosen once per process. Nothing is ever run and no array is made: arguments are shapes with shardings.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ppo_jax.cli.parse import Brief
from ppo_jax.cli.plan.chips import GIB, topology
from ppo_jax.cli.plan.count import count
from ppo_jax.cli.plan.known import known_config
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.config import ModelConfig, ModelOptions
from ppo_jax.models.files import hf
from ppo_jax.models.heads import RewardHead
from ppo_jax.models.layout import check_model, init_params
from ppo_jax.models.placement import shardings
from ppo_jax.models.quantised import quantise_params
from ppo_jax.parallel import sharding
from ppo_jax.parallel.members import batch_sharding, member_shardings, over_members
from ppo_jax.parallel.mesh import MeshConfig, check_rows, make_mesh
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.runs.output import config as configuration
from ppo_jax.train.experience import score_rollout, share_prefix
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, PPOConfig
from ppo_jax.train.population import abstract_members, collect_members, learn_members, make_members
from ppo_jax.train.ppo import collect, make_host_iteration, make_iteration
from ppo_jax.train.state import init_state
from ppo_jax.types import Frozen, Hyper, Prompts, PyTree, Rollout, Scores

Program = Literal["rollout", "scoring", "update", "iteration"]


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """Compile PPO for a TPU slice (or CPUs) without having it: memory, work and what binds, per program and device."""

    model: str
    """The model is a known size (llama-3-8b, qwen2.5-7b, smollm2-135m) or a Hugging Face directory, without weights."""
    topology: str
    """The devices are v5e:8x8, v5p:4x4x4, v6e:2x4 (TPUs need the extra `tpu`) or cpu:8, for example."""
    mesh: MeshConfig = MeshConfig()
    """These options cut the work; their product must be the number of devices."""
    batch: int = 64
    """An iteration of one run has this many prompts, over all devices."""
    members: int = 1
    """This many runs train at once over one base, as in `ppo-jax sweep`; figures are of all of them."""
    prompt_length: int = 512
    """A prompt has this many slots, in tokens."""
    response_length: int = 512
    """A response may have at most this many tokens."""
    policy: AdapterConfig = AdapterConfig()
    """These options say what is trained: lora, top_k or full."""
    reward: AdapterConfig = AdapterConfig()
    """The reward model is an adapter like the policy's on the same base, with a head."""
    compute: ModelOptions = ModelOptions(dtype="bfloat16", remat="full")
    """These options say how the model is run."""
    ppo: PPOConfig = PPOConfig()
    """These choices of the algorithm are those of training; sampling.response_length is --response-length."""
    programs: tuple[Program, ...] = ("rollout", "scoring", "update")
    """These programs are compiled; `iteration` is all of them in one."""
    search: bool = False
    """Try rematerialisation and smaller micro-batches until an update fits."""
    memory: float = 0.0
    """This many GiB per device count as fitting; 0 means the chip's HBM."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        for name in ("batch", "members", "prompt_length", "response_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.programs:
            raise ValueError("programs is empty: name at least one of rollout, scoring, update, iteration")
        if self.memory < 0:
            raise ValueError(f"memory={self.memory} GiB must be 0 (the chip's) or positive")

    @property
    def static(self) -> PPOConfig:
        """The algorithm's choices with the length of responses in place."""
        sampling = dataclasses.replace(self.ppo.sampling, response_length=self.response_length)
        return dataclasses.replace(self.ppo, sampling=sampling)


BRIEF = Brief(
    (
        "ppo-jax plan --model llama-3-8b --topology v5p:4x4x4 --mesh.data 4 --mesh.fsdp 16",
        "ppo-jax plan --model smollm2-135m --topology cpu:1 --batch 16 --memory 8 --search",
    ),
    {
        PlanSettings: (
            *("model", "topology", "mesh", "batch", "members", "prompt_length", "response_length", "policy"),
            *("compute", "ppo", "programs", "search", "memory", "json"),
        ),
        AdapterConfig: ("kind", "layers", "rank"),
        ModelOptions: ("dtype", "quantise", "remat"),
        PPOConfig: ("num_minibatches", "accumulate", "group_size"),
    },
)


def model_config(settings: PlanSettings) -> ModelConfig:
    """Read the model's shapes, run as the settings say.

    Raises ValueError for a model that is not known, or whose config.json cannot be read; the message names the file.
    """
    where = Path(settings.model).expanduser()
    config = hf.read_config(where) if (where / "config.json").is_file() else known_config(settings.model)
    options = settings.compute
    if options.attention == "auto":  # of the planned platform, not of the one that plans
        chip = topology(settings.topology).chip
        parts = settings.mesh.tensor
        fits = config.head_dim % 64 == 0 and config.num_kv_heads % parts == 0 and config.attention_cap is None
        fits &= config.window is None or config.window >= settings.prompt_length + settings.response_length
        options = dataclasses.replace(options, attention="splash" if chip and fits else "xla")
    return options.of(config)


def check(settings: PlanSettings) -> ModelConfig:
    """Check everything that can be refused before a compiler is started; raise ValueError."""
    where, config = topology(settings.topology), model_config(settings)
    devices = where.devices
    if settings.search and not (where.chip or settings.memory):
        raise ValueError(
            f"--search looks for what fits, and --topology {settings.topology} does not say how much that is; give "
            "--memory GIB per device too"
        )
    if settings.mesh.size != devices:
        raise ValueError(
            f"--topology {settings.topology} has {devices} devices, but --mesh.data {settings.mesh.data} x --mesh.fsdp "
            f"{settings.mesh.fsdp} x --mesh.tensor {settings.mesh.tensor} makes {settings.mesh.size}"
        )
    check_model(config, settings.mesh)
    settings.static.check_batch(settings.batch)
    what = "a micro-batch (batch x ppo.group_size / ppo.num_minibatches / ppo.accumulate)"
    check_rows(micro_rows(settings), settings.mesh, what)
    room = settings.prompt_length + settings.response_length
    if room > config.max_positions:
        raise ValueError(f"prompt and response take {room} positions; {settings.model} has {config.max_positions}")
    return config


def micro_rows(settings: PlanSettings) -> int:
    """Count the responses that one gradient is taken of at once."""
    return settings.batch * settings.ppo.group_size // (settings.ppo.num_minibatches * settings.ppo.accumulate)


# -- abstract arguments ----------------------------------------------------------------------------------------------


def target_devices(name: str) -> list[Any]:
    """List devices to compile for; for a TPU they cannot run anything."""
    if topology(name).chip is None:
        return jax.devices("cpu")[: topology(name).devices]
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except RuntimeError as error:
        raise ValueError(f"topology {name!r} is not one that libtpu builds: {str(error).splitlines()[0]}") from error


def arguments(settings: PlanSettings, config: ModelConfig, mesh: jax.sharding.Mesh) -> dict[str, PyTree]:
    """Make shapes with shardings of all that the programs take: state, frozen, prompts, rollout, scores."""
    key, ppo = jax.random.key(0), settings.static
    optimizer = make_optimizer(ppo.optimizer)

    def trained(base: PyTree) -> tuple[PyTree, PyTree]:
        adapter = init_adapter(key, base, config, settings.policy)
        like = settings.reward if ppo.critic.init == "reward" else ppo.critic.adapter  # as runs start one
        critic = init_adapter(key, base, config, like) if ppo.critic.own else None
        role = RewardRole(
            init_adapter(key, base, config, settings.reward),
            RewardHead().init(key, jnp.zeros((1, config.hidden_size)))["params"],
        )
        return init_state(key, adapter, config, optimizer, 0.05, critic=critic, ema=ppo.ema_decay > 0), role

    base = jax.eval_shape(lambda: quantise_params(config, init_params(key, config)))
    state, role = jax.eval_shape(trained, base)
    frozen = Frozen(base, role)
    rows, slots = settings.batch, settings.prompt_length
    prompts = jax.eval_shape(
        lambda: Prompts(jnp.zeros((rows, slots), jnp.int32), jnp.ones((rows, slots), bool), jnp.arange(rows))
    )
    algorithm = Algorithm(config, ppo, optimizer)
    rollout = jax.eval_shape(lambda s, f, p: collect(algorithm, s, f, p, Hyper()), state, frozen, prompts)
    responses = rollout.terminated.shape
    scores = jax.eval_shape(lambda: Scores(jnp.zeros(responses), jnp.ones(responses, bool), {}))
    placed = {name: (tree, shardings(tree, mesh)) for name, tree in (("state", state), ("frozen", frozen))}
    batches = {"prompts": prompts, "rollout": rollout, "scores": scores}
    placed |= {name: (tree, sharding.row_shardings(tree, mesh)) for name, tree in batches.items()}
    found = {name: sharding.abstract(tree, of) for name, (tree, of) in placed.items()}
    return found if settings.members == 1 else found | _of_members(found, settings.members, mesh)


def _of_members(of_one: dict[str, PyTree], members: int, mesh: jax.sharding.Mesh) -> dict[str, PyTree]:
    """Make the shapes of a population: all but the base get a leading axis of members."""
    lies = {"state": member_shardings(jax.tree.map(lambda x: x.sharding, of_one["state"]), members)}
    for name in ("prompts", "rollout", "scores"):
        lies[name] = jax.tree.map(lambda x: batch_sharding(members, x.shape, mesh), of_one[name])
    return {name: sharding.abstract(abstract_members(of_one[name], members), of) for name, of in lies.items()}


def program(
    name: Program, settings: PlanSettings, config: ModelConfig, inputs: dict[str, PyTree]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Choose the jitted function that training runs, and its arguments."""
    if settings.members > 1:
        return _population_program(name, settings, config, inputs)
    ppo, hyper = settings.static, Hyper()
    optimizer = make_optimizer(ppo.optimizer)
    reward = adapter_reward(config, ppo.sampling.stop_ids)
    first, second = make_host_iteration(config, ppo, optimizer)
    state, frozen = inputs["state"], inputs["frozen"]
    if name == "rollout":
        return first, (state, frozen, inputs["prompts"], hyper)
    if name == "update":
        return second, (state, frozen, inputs["rollout"], inputs["scores"], hyper)
    if name == "iteration":
        return make_iteration(config, ppo, optimizer, reward), (state, frozen, inputs["prompts"], hyper)

    def scoring(state: Any, frozen: Frozen, rollout: Rollout) -> Scores:
        collected = share_prefix(Algorithm(config, ppo, optimizer), state.policy, frozen, rollout)
        return score_rollout(reward, frozen, collected)

    return jax.jit(scoring), (state, frozen, inputs["rollout"])


def _population_program(
    name: Program, settings: PlanSettings, config: ModelConfig, inputs: dict[str, PyTree]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Choose the function that a sweep runs for all members at once, and its arguments."""
    ppo, members = settings.static, settings.members
    algorithm = Algorithm(config, ppo, make_optimizer(ppo.optimizer))
    reward = adapter_reward(config, ppo.sampling.stop_ids)
    scalar: Any = jax.ShapeDtypeStruct((members,), jnp.float32)
    hypers, active = Hyper(*[scalar] * len(Hyper._fields)), jax.ShapeDtypeStruct((members,), bool)
    state, frozen = inputs["state"], inputs["frozen"]
    if name == "rollout":
        return jax.jit(functools.partial(collect_members, algorithm)), (state, frozen, inputs["prompts"], hypers)
    if name == "update":
        learn = jax.jit(functools.partial(learn_members, algorithm), donate_argnums=0)
        return learn, (state, frozen, inputs["rollout"], inputs["scores"], hypers, active)
    if name == "iteration":
        return make_members(algorithm._replace(reward=reward)), (state, frozen, inputs["prompts"], hypers, active)

    def scoring(state: Any, frozen: Frozen, rollout: Rollout) -> Scores:
        return score_rollout(reward, frozen, share_prefix(algorithm, state.policy, frozen, rollout))

    return jax.jit(over_members(scoring, members, shared=(1,))), (state, frozen, inputs["rollout"])


def held_bytes(inputs: dict[str, PyTree]) -> dict[str, int]:
    """Count the bytes per device of what stays between programs."""

    def size(tree: PyTree) -> int:
        leaves = [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
        bits = (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize for x in leaves)
        return sum(n * math.prod(x.sharding.shard_shape(x.shape)) for n, x in zip(bits, leaves, strict=True)) // 8

    state, frozen = inputs["state"], inputs["frozen"]
    sizes = {
        "base": size(frozen.base),
        "reward": size(frozen.reward),
        "policy": size(state.policy._replace(critic=None)),
        "optimizer": size(state.opt_state),
    }
    if state.policy.critic is not None:
        sizes["critic"] = size(state.policy.critic)
    return sizes if state.ema is None else sizes | {"average": size(state.ema)}


# -- compile and measure ---------------------------------------------------------------------------------------------


def measure(name: Program, settings: PlanSettings) -> dict[str, Any]:
    """Compile one program and report its memory and work, all numbers per device.

    Bytes: `arguments` (what must lie in memory before it starts), `temporary`, `peak`. A program that the compiler
    refuses for lack of memory, or that is not given to it because weights and optimizer state alone are too large, has
    `compiled` false, the claim as `peak`, and None for the rest.
    """
    config = check(settings)
    mesh = make_mesh(settings.mesh, target_devices(settings.topology))
    inputs = arguments(settings, config, mesh)
    function, args = program(name, settings, config, inputs)
    report: dict[str, Any] = {"program": name, "held": held_bytes(inputs), "attention": config.attention}
    nothing = dict.fromkeys(("arguments", "temporary", "flops", "traffic", "collectives", "unknown_loops"))
    chip, stays = topology(settings.topology).chip, sum(report["held"].values())
    if chip and stays > chip.memory:
        return report | nothing | {"peak": stays, "compiled": False}
    with jax.set_mesh(mesh) if chip or mesh.size > 1 else contextlib.nullcontext():  # one CPU: as `use_mesh`
        try:
            compiled = function.lower(*args).compile()  # type: ignore[attr-defined]
        except jax.errors.JaxRuntimeError as error:
            if (claim := claimed_bytes(str(error))) is None:
                raise
            return report | nothing | {"peak": claim, "compiled": False}
    memory = compiled.memory_analysis()
    cost = count(compiled.as_text())
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return report | {
        "compiled": True,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": peak + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        "flops": cost.flops,
        "traffic": cost.bytes,
        "collectives": dict(cost.collectives),
        "unknown_loops": cost.unknown_loops,
    }


def claimed_bytes(message: str) -> int | None:
    """Read the bytes that a program wanted from libtpu's two ways to say that it has not got them; None elsewhere."""
    for pattern in (r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", r"\(([\d.]+)([KMGT])\) exceeds available HBM"):
        if match := re.search(pattern, message):
            return int(float(match[1]) * GIB * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[match[2]])
    return None


def main() -> None:
    """Read settings from standard input, write one line of JSON to standard output."""
    settings = configuration.from_yaml(PlanSettings, sys.stdin.read())
    try:
        result: dict[str, Any] = measure(sys.argv[1], settings)  # type: ignore[arg-type]
    except ValueError as error:
        result = {"error": str(error)}
    print(json.dumps(result), flush=True)
    sys.stdout.flush()
    os._exit(0)  # libtpu's threads do not always end


if __name__ == "__main__":
    main()
