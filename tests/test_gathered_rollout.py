"""`Sampling.gather_weights`: the same responses, and what fsdp has cut travels once per rollout, not once per token."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest

from ppo_jax.cli.plan.count import count
from ppo_jax.parallel.mesh import MeshConfig
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.ppo import make_host_iteration
from ppo_jax.types import Rollout
from tests.parallel.test_sharding import (
    CONFIG,
    HYPER,
    KINDS,
    MIXED,
    B,
    T,
    assert_equal_up_to_rounding,
    mesh_of,
    placed,
    problem,
)


def collected(kind: str, config: MeshConfig, gather: bool) -> tuple[Rollout, Any]:
    """A rollout, and its compiled program."""
    mesh, (_, model, ppo) = mesh_of(config), KINDS[kind]
    state, frozen, prompts = placed(problem(kind), mesh)
    sampling = dataclasses.replace(ppo.sampling, gather_weights=gather)
    collect, _ = make_host_iteration(model, dataclasses.replace(ppo, sampling=sampling), make_optimizer())
    with jax.set_mesh(mesh):
        program = collect.lower(state, frozen, prompts, HYPER).compile()  # type: ignore[attr-defined]
        return program(state, frozen, prompts, HYPER), program


def gathered_bytes(program: Any) -> float:
    """That one device receives in all-gathers."""
    return count(program.as_text()).collectives["all-gather"]


@pytest.mark.parametrize(("kind", "config"), [("lora", MeshConfig(fsdp=8)), ("full", MIXED)], ids=str)
def test_the_same_responses_for_weights_that_travel_once(kind: str, config: MeshConfig) -> None:
    (cut, slow), (whole, fast) = (collected(kind, config, gather) for gather in (False, True))
    np.testing.assert_array_equal(whole.tokens, cut.tokens)
    assert_equal_up_to_rounding(whole, cut)
    # What a device lacks of the seven matrices of a layer, in bytes, in a copy of the policy's or the base's layers.
    matrices = 4 * CONFIG.hidden_size**2 + 3 * CONFIG.hidden_size * CONFIG.intermediate_size
    layers = 4 * CONFIG.num_layers * matrices / config.tensor * (1 - 1 / config.fsdp)
    assert gathered_bytes(slow) > (T - 1) * layers  # for each token that is fed back
    assert layers <= gathered_bytes(fast) < 3 * layers  # the embeddings and LoRA too
    rows = B // (config.data * config.fsdp)
    assert whole.tokens.sharding.shard_shape(whole.tokens.shape)[0] == rows  # rows stay where they were
    held = [program.memory_analysis().temp_size_in_bytes for program in (slow, fast)]
    assert held[1] - held[0] > layers / 2  # which is what it costs


def test_one_device_has_nothing_to_gather() -> None:
    cut, whole = (without_origin(collected("lora", MeshConfig(), gather)[1].as_text()) for gather in (False, True))
    assert cut == whole


def without_origin(text: str) -> str:
    """The instructions of a program, without the lines of code that they come from."""
    return re.sub(r", metadata=\{[^}]*\}", "", "\n".join(line for line in text.splitlines() if " = " in line))
