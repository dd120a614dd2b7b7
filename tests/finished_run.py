"""A run directory as `ppo-jax ppo` leaves it, made without training: a tiny random model and noisy adapters."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.cli.ppo import PPOSettings
from ppo_jax.data.jsonl import append_jsonl
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import config, rundir
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.state import init_state, key_stream
from ppo_jax.types import PyTree
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import random_params
from tests.small import SMALL

MODEL = dataclasses.replace(SMALL, intermediate_size=32, num_layers=3)
LORA = AdapterConfig(kind="lora", layers=2, rank=4, alpha=10.0)


def noisy(tree: PyTree, seed: int) -> PyTree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), tree)


def make(root: Path, adapter: AdapterConfig = LORA, steps: tuple[int, ...] = (2, 3), final: int | None = 3) -> Path:
    """`root`/model and `root`/run with a checkpoint at each of `steps` and, from update `final`, export/policy."""
    if not (root / "model").exists():
        hf.save(root / "model", MODEL, random_params(MODEL), make_tokenizer())
    params, run = random_params(MODEL), root / "run"
    (run / EXPORT).mkdir(parents=True)
    base, fingerprint = str(root / "model"), fingerprint_of(root / "model")
    settings = PPOSettings(
        model=base, prompts=Path("prompts.jsonl"), reward=("rm",), run_dir=run, policy=adapter, seed=7
    )
    text = config.to_yaml(settings)
    (run / rundir.CONFIG).write_text(text)
    append_jsonl(run / rundir.METRICS, [{"step": s, "phase": "eval", "time": 0, "reward": s / 8} for s in (0, *steps)])
    fresh = init_adapter(key_stream(7, "adapter"), params, MODEL, adapter)
    meta: dict[str, Any] = {"config": text, "facts": {"base": {"name": base, "fingerprint": fingerprint}}, "best": {}}
    if steps:
        with store.open_manager(run / rundir.CHECKPOINTS, keep=None) as manager:
            for step in steps:
                state = init_state(key_stream(7, "ppo"), policy(adapter, step), MODEL, make_optimizer(), 0.1)
                store.save(manager, step, dataclasses.replace(state, step=jnp.int32(step)), meta)
                store.wait(manager)
    if final is not None:
        artifacts.save(
            run / EXPORT / "policy",
            "policy",
            policy(adapter, final),
            {},
            artifacts.Base(base, fingerprint, MODEL),
            {"updates": final, "evaluation": {"reward": final / 8, "kl": 1.25}},
        )
    assert jax.tree.structure(fresh) == jax.tree.structure(policy(adapter, 0))
    return run


def policy(adapter: AdapterConfig, step: int) -> PyTree:
    """What the policy of update `step` is in such a run."""
    fresh = init_adapter(key_stream(7, "adapter"), random_params(MODEL), MODEL, adapter)
    return noisy(fresh, step)
