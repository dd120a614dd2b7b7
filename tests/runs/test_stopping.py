"""Runs that stop or change on the way: in the first evaluation, by an explosion, with another best metric, and what of
a run may not change."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.soak_report import compare
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.rewards.base import Reward
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.checkpoints.resuming import IncompatibleRun, differences
from ppo_jax.runs.facts import run_facts
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.ppo import run_ppo
from ppo_jax.runs.setup import Result
from ppo_jax.train.loop import Exploded, Interrupted
from ppo_jax.types import Frozen, Policy, Rollout, Scores
from tests.checkpoints import read_arrays
from tests.runs.test_ppo import MODEL, SETUP, WordReward, length_judge


def run(folder: Path, said: list[str] | None = None, **changes: Any) -> Result:
    directory = rundir.open_run(folder, "auto")
    setup = SETUP._replace(**({"reward": Reward(host=WordReward())} | changes))
    with progress("test", main_process=False) as screen:
        if said is not None:
            screen.message = said.append  # type: ignore[method-assign, assignment]
        return run_ppo(directory, setup, screen, "auto")


def low_tokens(frozen: Frozen, rollout: Rollout, prefix: Any, depth: int) -> Scores:
    """A reward on the device: tokens with small ids are good."""
    length = rollout.response_mask.shape[1]
    good = (rollout.tokens[:, -length:] < 20) & rollout.response_mask
    reward = jnp.sum(good, axis=1).astype(jnp.float32)
    return Scores(reward, jnp.ones(len(reward), bool), {})


def test_asked_to_stop_in_the_first_evaluation_it_is_made_again(tmp_path: Path):
    """With a reward on the device nothing else asks before the first update; the evaluation must not be lost."""
    said: list[str] = []
    calls = []

    def judge(rollout: Rollout, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        calls.append(len(prompts))
        if len(calls) == 1:  # in the first of two pieces
            os.kill(os.getpid(), signal.SIGTERM)
            while not said:
                time.sleep(0.01)
        return length_judge(rollout, prompts, responses)

    loop = dataclasses.replace(SETUP.loop, updates=2, batch_size=4, eval_every=0)
    changes: dict[str, Any] = {"reward": Reward(low_tokens), "loop": loop}
    with pytest.raises(Interrupted, match="SIGTERM in the first evaluation; update 0 is saved"):
        run(tmp_path / "hurt", said, judges={"words": judge}, **changes)
    assert calls == [4] and store.all_steps(tmp_path / "hurt" / rundir.CHECKPOINTS) == [0]
    hurt = run(tmp_path / "hurt", judges={"words": judge}, **changes)
    quiet = run(tmp_path / "quiet", judges={"words": length_judge}, **changes)
    assert calls == [4, 4, 2, 4, 2]
    compare(tmp_path / "hurt", tmp_path / "quiet")
    assert hurt.before == quiet.before


def test_the_way_back_from_an_explosion(tmp_path: Path):
    """What the message says can be done, and helps."""
    checkpoints = tmp_path / rundir.CHECKPOINTS
    loop = dataclasses.replace(SETUP.loop, updates=3, eval_every=0, checkpoint_every=1, keep=2, schedule="constant")
    run(tmp_path, loop=loop)
    tight = dataclasses.replace(loop, updates=8, max_kl=1e-3)
    for _ in range(2):  # resumed into it, it is the same again
        with pytest.raises(Exploded, match="update 4: the KL of the policy after update 3") as error:
            run(tmp_path, loop=tight)
        assert store.all_steps(checkpoints) == [2, 3]  # update 4 pushed nothing out
    assert f"To go back to update 2: move {checkpoints / '3'} to another place" in str(error.value)
    shutil.move(checkpoints / "3", tmp_path / "moved")
    said: list[str] = []
    run(tmp_path, said, loop=dataclasses.replace(loop, updates=4), hyper=SETUP.hyper._replace(kl_coef=1.0))
    assert "resumed at update 2" in said and store.all_steps(checkpoints) == [3, 4]


def test_another_best_metric_starts_anew_and_a_damaged_best_checkpoint_ends_nothing(tmp_path: Path):
    marks = iter([0.0, 5.0, 1.0, 2.0])

    def judge(rollout: Rollout, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        return np.full(len(prompts), next(marks))

    said: list[str] = []
    judges = {"marks": judge, "few": lambda rollout, prompts, responses: np.full(len(prompts), -7.0)}
    loop = dataclasses.replace(SETUP.loop, updates=2, eval_every=1, checkpoint_every=0, keep=1, best_metric="marks")
    run(tmp_path, loop=loop, judges=judges)
    checkpoints = tmp_path / rundir.CHECKPOINTS
    assert store.all_steps(checkpoints) == [1, 2]  # the best is update 1
    assert (tmp_path / EXPORT / "best").is_dir()
    shutil.rmtree(tmp_path / EXPORT)
    for file in (checkpoints / "1" / "arrays").rglob("d/*"):
        file.write_bytes(b"")
    run(tmp_path, said, loop=loop, judges=judges)  # it is finished; only its policies are written again
    assert any("best policy, of update 1, is not exported" in text for text in said), said
    assert [path.name for path in (tmp_path / EXPORT).iterdir()] == ["policy"]
    (checkpoints / "1").rename(tmp_path / "1")  # nor is it there, as where the disk was full
    said.clear()
    run(tmp_path, said, loop=loop, judges=judges)
    assert any("best policy, of update 1, is not exported" in text and "no step 1" in text for text in said), said
    (tmp_path / "1").rename(checkpoints / "1")

    run(tmp_path, said, loop=dataclasses.replace(loop, updates=3, best_metric="few"), judges=judges)
    assert any("chosen by marks, from here on by few" in text for text in said)
    best = store.read_meta(checkpoints)["best"]
    assert best == {"step": 2, "metric": "few", "value": -7.0}  # worse than the 5 marks, which no longer count
    assert float(read_arrays(checkpoints, ["best"])["best"]) == -7.0


def test_another_scale_of_the_same_lora_is_another_run(tmp_path: Path):
    loop = dataclasses.replace(SETUP.loop, updates=1, eval_every=0)
    run(tmp_path, loop=loop)
    config = AdapterConfig(layers=1, rank=2, alpha=999)
    louder = init_adapter(jax.random.key(0), MODEL.params, MODEL.config, config)
    with pytest.raises(IncompatibleRun, match=r"lora_scales\.policy\.adapter\.lora\.q: .* now"):
        run(tmp_path, loop=dataclasses.replace(loop, updates=2), adapter=louder)


@pytest.mark.parametrize("what", ["compute.dtype", "prompt_texts", "pretrain", "lora_scales.reward"])
def test_what_arrays_do_not_tell_is_compared(what: str):
    reward = Reward(low_tokens, params={"lora": SETUP.adapter["lora"]})
    before, policy = SETUP._replace(reward=reward), Policy(SETUP.adapter, {})
    after = before
    if what == "compute.dtype":
        config = dataclasses.replace(MODEL.config, dtype="bfloat16")
        after = before._replace(model=MODEL._replace(config=config))
    elif what == "prompt_texts":
        metadata = [*before.prompts.metadata[:-1], before.prompts.metadata[-1] | {"answer": 42}]
        after = before._replace(prompts=before.prompts._replace(metadata=metadata))
    elif what == "pretrain":
        before, after = before._replace(pretrain=[[1, 2], [3]]), before._replace(pretrain=[[1, 2], [4]])
    else:
        scaled = {name: lora.replace(scale=9.0) for name, lora in SETUP.adapter["lora"].items()}
        after = before._replace(reward=Reward(low_tokens, params={"lora": scaled}))
    old, new = (json.loads(json.dumps(run_facts(setup, policy))) for setup in (before, after))
    serious, harmless = differences(old, new)
    assert serious and all(line.startswith(what) for line in serious) and not harmless
