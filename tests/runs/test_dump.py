"""Numbers that stop being numbers: training stops in good order, the parameters stay finite, the batch can be read."""

import contextlib
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.soak_report import compare
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.rewards.base import Reward
from ppo_jax.runs import ppo as runs
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.setup import Result
from ppo_jax.train.loop import Stopped
from ppo_jax.train.ppo import make_host_iteration
from ppo_jax.types import Frozen
from tests.checkpoints import read_arrays
from tests.disk import small_disk
from tests.runs.test_ppo import SETUP, WordReward

UPDATES = dataclasses.replace(SETUP.loop, updates=9, eval_every=0, checkpoint_every=2)
PPO = dataclasses.replace(SETUP.ppo, epochs=2)  # 4 optimizer steps per update


def poisoned(make: Any, first: int, last: int) -> Any:
    """make_host_iteration whose base has a weight that is NaN in the iterations first .. last - 1."""

    @functools.wraps(make)
    def made(*given: Any) -> Any:
        collect, learn = make(*given)

        def bad(state: Any, frozen: Frozen, *rest: Any) -> Any:
            if first <= int(state.step) < last:
                base = frozen.base | {"final_norm": frozen.base["final_norm"].at[3].set(jnp.nan)}
                frozen = frozen._replace(base=base)
            return learn(state, frozen, *rest)

        return collect, bad

    return made


def run(folder: Path, **changes: Any) -> Result:
    directory = rundir.open_run(folder, "auto")
    setup = SETUP._replace(ppo=PPO, loop=UPDATES)._replace(**changes)
    with progress("test", main_process=False) as screen:
        return runs.run_ppo(directory, setup, screen, "auto")


def test_a_weight_that_turns_nan_stops_with_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "make_host_iteration", poisoned(make_host_iteration, 3, 99))
        with pytest.raises(Stopped, match=r"update 5: the last 8 optimizer steps.*update 5 is saved") as error:
            run(tmp_path, loop=dataclasses.replace(UPDATES, max_nonfinite=8))
    skipped = [r["nonfinite_updates"] for r in read_jsonl(tmp_path / rundir.METRICS) if r["phase"] == "ppo"]
    assert skipped == [0, 0, 0, 1, 1]  # the fraction of optimizer steps
    assert store.latest_step(tmp_path / rundir.CHECKPOINTS) == 5
    names = list(store.read_manifest(tmp_path / rundir.CHECKPOINTS))
    policy = [name for name in names if name.startswith(("policy.", "opt_state."))]
    held = read_arrays(tmp_path / rundir.CHECKPOINTS, policy)
    assert len(held) > 4 and all(np.isfinite(array).all() for array in held.values())
    path = Path(re.search(r"The batch is in (\S+)\.npz and \.jsonl", str(error.value))[1])  # type: ignore[index]
    assert path == tmp_path / rundir.FAULTS / "update-5"
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        wanted = {"tokens", "prompt_mask", "response_mask", "logprobs", "ref_logprobs", "values", "reward", "valid"}
        assert wanted <= set(arrays.files)
        assert arrays["tokens"].shape[0] == UPDATES.batch_size and arrays["response_mask"].any()
        rows = read_jsonl(path.with_suffix(".jsonl"))
        assert [row["reward"] for row in rows] == arrays["reward"].tolist()
    assert all(row["prompt"] in SETUP.prompts.texts and isinstance(row["response"], str) for row in rows)
    # Mended, the run goes on from there.
    result = run(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.policy))
    later = [r["nonfinite_updates"] for r in read_jsonl(tmp_path / rundir.METRICS) if r["phase"] == "ppo"]
    assert later == [0, 0, 0, 1, 1, 0, 0, 0, 0]


@pytest.mark.long
def test_a_weight_that_is_nan_for_two_updates_costs_those_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "make_host_iteration", poisoned(make_host_iteration, 2, 4))
    result = run(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.policy))
    found = [r["nonfinite_updates"] for r in read_jsonl(tmp_path / rundir.METRICS) if r["phase"] == "ppo"]
    assert found == [0, 0, 1, 1, 0, 0, 0, 0, 0]


class Infinite(WordReward):
    """From its fifth batch on every second score is infinite, and said to be valid."""

    def __call__(self, prompts: Any, responses: Any, metadata: Any) -> Any:
        scores = super().__call__(prompts, responses, metadata)
        if self.calls["ppo"] > 4:
            scores.reward[::2] = np.inf
        return scores


def test_a_reward_that_turns_infinite_never_reaches_the_parameters(tmp_path: Path):
    result = run(tmp_path, reward=Reward(host=Infinite()), loop=dataclasses.replace(UPDATES, max_failed=1.0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.policy))
    ppo = [r for r in read_jsonl(tmp_path / rundir.METRICS) if r["phase"] == "ppo"]
    assert [r["invalid_scores"] for r in ppo] == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert all(r["nonfinite_updates"] == 0 and np.isfinite(r["reward"]) for r in ppo)


def test_the_disk_fills_up_under_a_run(tmp_path: Path):
    """Training goes on, what failed is said at once, and afterwards nothing is missing."""
    said: list[str] = []
    quiet = run(tmp_path / "quiet")
    with contextlib.ExitStack() as stack:

        class Fills(WordReward):
            def __call__(self, *arguments: Any) -> Any:
                if self.calls["ppo"] == 3:
                    stack.enter_context(small_disk(300))
                if self.calls["ppo"] == 6:
                    stack.close()
                return super().__call__(*arguments)

        directory = rundir.open_run(tmp_path / "full", "auto")
        with progress("test", main_process=False) as screen:
            screen.message = said.append  # type: ignore[method-assign, assignment]
            setup = SETUP._replace(ppo=PPO, loop=UPDATES, reward=Reward(host=Fills()))
            hurt = runs.run_ppo(directory, setup, screen, "auto")
    assert any(text.startswith("metrics.jsonl cannot be written") for text in said)
    assert any("could not be saved" in text and "tried again" in text for text in said)
    assert any("metrics.jsonl is written again" in text for text in said)
    compare(tmp_path / "full", tmp_path / "quiet")
    assert quiet.after == hurt.after
