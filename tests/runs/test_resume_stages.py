"""Fine-tuning, preferences and reward models that are killed, asked to stop, or meet numbers that are not finite: what
is left is what an undisturbed run leaves, bit for bit."""

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.soak_report import timeless
from ppo_jax.data import EncodedPairs, EncodedSFT
from ppo_jax.data.encode import EncodedRatings
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.files import artifacts
from ppo_jax.models.files.artifacts import BEST, EXPORT
from ppo_jax.runs import dpo, offline, reward, sft
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.checkpoints.resuming import IncompatibleRun
from ppo_jax.runs.dpo import Pairs
from ppo_jax.runs.facts import offline_facts
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.train.dpo import DPOConfig
from ppo_jax.train.loop import Interrupted, OfflineLoop, Stopped
from ppo_jax.train.reward import RewardConfig
from ppo_jax.train.sft import SFTConfig
from tests.checkpoints import read_arrays
from tests.data.tokenizer import EOS
from tests.small import small_model

STEPS = 7
LOOP = OfflineLoop(eval_every=3, checkpoint_every=2)


class Killed(Exception):
    """The process ends here."""


def texts(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(2, 32, rng.integers(3, 9)).tolist(), EOS] for _ in range(count)]


def demonstrations(count: int, seed: int) -> EncodedSFT:
    return EncodedSFT(texts(count, seed), [1 + i % 3 for i in range(count)], list(range(count)), 0)


def pairs(count: int, seed: int) -> EncodedPairs:
    starts = [(2, 2)] * count
    return EncodedPairs(texts(count, seed), texts(count, seed + 50), [0.0] * count, list(range(count)), 0, starts)


def preferences(count: int, seed: int) -> Pairs:
    return Pairs(pairs(count, seed), np.full((count, 2), 2, np.int32))


def ratings(count: int, seed: int) -> EncodedRatings:
    return EncodedRatings(texts(count, seed), [float(i % 5) for i in range(count)], 0)


@functools.cache
def setups() -> dict[str, tuple[Callable, OfflineSetup]]:
    """10 rows in batches of 4: an epoch ends inside every third batch, and the order is another in the next one."""
    model = small_model()
    lora, options = AdapterConfig(rank=2), {"steps": STEPS, "batch_size": 4, "accumulate": 2, "learning_rate": 1e-2}
    heads = {"lora_layers": 1, "rank": 2, "head_steps": 10, "learning_rate": 1e-2}
    ranked = RewardConfig(batch_size=8, epochs=3, **heads)
    policy = lambda data, options: OfflineSetup(model, data(10, 0), data(5, 1), options, 3, lora, LOOP)
    scorer = lambda data, rows, metric: OfflineSetup(
        model, data(rows, 0), data(6, 1), ranked, 3, loop=dataclasses.replace(LOOP, best_metric=metric)
    )
    return {
        "sft": (sft.run_sft, policy(demonstrations, SFTConfig(**options))),
        "dpo": (dpo.run_dpo, policy(preferences, DPOConfig(**options))),
        "pairs": (reward.run_reward, scorer(pairs, 10, "accuracy")),
        "ratings": (reward.run_reward, scorer(ratings, 18, "-calibration_error")),
    }


def run(stage: str, folder: Path, said: list[str] | None = None, **changes: Any) -> Any:
    function, setup = setups()[stage]
    directory = rundir.open_run(folder, "auto")
    with progress("test", main_process=False) as screen:
        if said is not None:
            screen.message = said.append  # type: ignore[method-assign, assignment]
        return function(directory, setup._replace(**changes), screen, "auto")


def leavings(folder: Path) -> dict[str, Any]:
    """All that counts of a run."""
    checkpoints = folder / rundir.CHECKPOINTS
    files = sorted(path for path in (folder / EXPORT).rglob("*") if path.is_file())
    return {
        "records": [timeless(record) for record in read_jsonl(folder / rundir.METRICS)],
        "state": store.read_manifest(checkpoints),
        "best": store.read_meta(checkpoints)["best"],
        "export": {str(path.relative_to(folder)): path.read_bytes() for path in files},
    }


@functools.cache
def quiet(stage: str, folder: Path) -> dict[str, Any]:
    run(stage, folder)
    return leavings(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quiet")


def die(*_: object, **__: object) -> Any:
    raise Killed


def update_that(act: Callable[[int, Any], Any]) -> Callable[..., Any]:
    """`make_update` whose updates call `act` with their number and state first."""
    real = offline.make_update

    def make(*arguments: Any) -> Callable[[Any, int], Any]:
        update = real(*arguments)

        def acted(state: Any, number: int) -> Any:
            act(number, state)
            return update(state, number)

        return acted

    return make


def die_at(step: int) -> Callable[[int, Any], None]:
    def act(number: int, state: Any) -> None:
        if number == step:
            raise Killed

    return act


LONG = [pytest.param(stage, marks=pytest.mark.long) for stage in ("dpo", "pairs", "ratings")]  # the same loop and files


@pytest.mark.parametrize("stage", ["sft", *LONG])
def test_killed_before_a_checkpoint_between_two_and_in_the_export(
    stage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quiet(stage, folder / stage)
    for step in (1, 3):  # nothing is saved; update 2 is, and the evaluation of update 3 is not
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(offline, "make_update", update_that(die_at(step)))
            run(stage, tmp_path)
    module = reward if stage in ("pairs", "ratings") else offline
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "save_role", die)
        run(stage, tmp_path)
    said: list[str] = []
    run(stage, tmp_path, said)
    assert any(text.startswith("resumed at update") for text in said)
    assert leavings(tmp_path) == expected
    run(stage, tmp_path)  # it is finished: the same again, and nothing is recorded twice
    assert leavings(tmp_path) == expected


@pytest.mark.parametrize("stage", ["ratings", LONG[0]])
def test_asked_to_stop_in_a_step_and_in_an_evaluation(
    stage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quiet(stage, folder / stage)

    def ask(said: list[str], number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        while not any(number.name in text for text in said):
            time.sleep(0.01)

    said: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="SIGTERM after update 2; update 2 is saved"):
        ask_at = lambda number, state: ask(said, signal.SIGTERM) if number == 1 else None
        patch.setattr(offline, "make_update", update_that(ask_at))
        run(stage, tmp_path, said)
    said.clear()
    real, calls = offline.until_stopped, []

    def asked(batches: Any, stopping: Callable[[], bool]) -> Iterator[Any]:
        calls.append(1)
        ask(said, signal.SIGINT)
        yield from real(batches, stopping)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="SIGINT after update 3; update 3 is saved"):
        patch.setattr(offline, "until_stopped", asked)
        run(stage, tmp_path, said)
    assert calls and "resumed at update 2" in said
    run(stage, tmp_path)  # the evaluation of update 3 is made now
    assert leavings(tmp_path) == expected


def test_steps_that_are_not_finite_change_nothing_and_many_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sft.bind_sft_step

    def broken(base: Any, *arguments: Any) -> Callable[..., Any]:
        """From step 4 on the base has a weight that is no number."""
        whole = real(base, *arguments)
        bad = real(base | {"final_norm": base["final_norm"].at[0].set(jnp.nan)}, *arguments)
        return lambda params, opt_state, rows, rate: (whole if rate > 0.005 else bad)(params, opt_state, rows, rate)

    loop = dataclasses.replace(LOOP, checkpoint_every=0, max_nonfinite=2, eval_every=0)
    monkeypatch.setattr(sft, "bind_sft_step", broken)
    with pytest.raises(Stopped, match=r"update 6: the last 2 optimizer steps were skipped.*update 6 is saved"):
        run("sft", tmp_path, loop=loop)
    records = [record for record in read_jsonl(tmp_path / rundir.METRICS) if "grad_norm" in record]
    assert [record["nonfinite_updates"] for record in records] == [0, 0, 0, 0, 1, 1]
    assert records[-1]["loss"] is None and records[-3]["loss"] > 0
    arrays = read_arrays(tmp_path / rundir.CHECKPOINTS, ["params.lora.q.a", "step", "nonfinite", "opt_state.count"])
    assert np.isfinite(arrays["params.lora.q.a"]).all()
    assert (arrays["step"], arrays["nonfinite"], arrays["opt_state.count"]) == (6, 2, 4)
    monkeypatch.setattr(sft, "bind_sft_step", real)
    run("sft", tmp_path, loop=loop)  # mended, it goes on
    assert int(read_arrays(tmp_path / rundir.CHECKPOINTS, ["nonfinite"])["nonfinite"]) == 0


@pytest.mark.parametrize("stage", ["sft", "pairs"])
def test_the_best_measurement_chooses_a_checkpoint_and_an_export(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best at update 2, whose checkpoint is neither due nor among the newest; killed after that, it is still known."""
    marks = {0: 0.0, 2: 5.0, 4: 1.0, 6: 2.0, 7: 3.0, 8: 0.0, 9: 0.0}
    changes = {"loop": OfflineLoop(eval_every=2, checkpoint_every=0, keep=1, best_metric="mark")}
    measure = offline.train_offline

    def marked(directory: Path, setup: OfflineSetup, work: offline.Work, *rest: Any) -> offline.Trained:
        return measure(
            directory, setup, work._replace(measure=lambda done, params, pass_on: {"mark": marks[done]}), *rest
        )

    for module in (sft, dpo, reward):
        monkeypatch.setattr(module, "train_offline", marked)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(offline, "make_update", update_that(die_at(5)))
        run(stage, tmp_path, **changes)
    checkpoints = tmp_path / rundir.CHECKPOINTS
    assert store.all_steps(checkpoints) == [2]
    run(stage, tmp_path, **changes)
    steps = store.all_steps(checkpoints)
    assert steps[0] == 2 and len(steps) == 2
    assert store.read_meta(checkpoints)["best"] == {"step": 2, "metric": "mark", "value": 5.0}
    found = artifacts.load(tmp_path / EXPORT / BEST)
    assert found.meta["steps"] == 2 and found.meta["chosen_by"] == "mark"
    name = "params.adapter.lora.q.b" if stage in ("pairs", "ratings") else "params.lora.q.b"
    np.testing.assert_array_equal(found.adapter["lora"]["q"].b, read_arrays(checkpoints, [name], 2)[name])


def test_other_data_or_another_seed_is_another_run_and_a_rate_is_not(folder: Path) -> None:
    quiet("sft", folder / "sft")
    with pytest.raises(IncompatibleRun, match="seed: 3 in the checkpoint, 4 now"):
        run("sft", folder / "sft", seed=4)
    said: list[str] = []
    run("sft", folder / "sft", said, options=dataclasses.replace(setups()["sft"][1].options, learning_rate=2e-2))
    assert any("hyper.learning_rate: 0.01 in the checkpoint, 0.02 now" in text for text in said)


@pytest.mark.parametrize("stage", ["sft", "dpo", "pairs", "ratings"])
def test_every_part_of_the_data_is_in_the_facts(stage: str) -> None:
    """One token, one rating, one start of a response: another run."""
    _, setup = setups()[stage]
    found = [offline_facts(setup, stage, {})["train"]]
    leaves, tree = jax.tree.flatten(setup.train)
    for place in np.random.default_rng(0).choice(len(leaves) - 1, 12, replace=False):
        changed = [leaf + 1 if i == place else leaf for i, leaf in enumerate(leaves)]
        found.append(offline_facts(setup._replace(train=jax.tree.unflatten(tree, changed)), stage, {})["train"])
    assert len(set(found)) == 13


def test_fewer_steps_than_were_done_are_refused(folder: Path) -> None:
    quiet("sft", folder / "sft")
    options = dataclasses.replace(setups()["sft"][1].options, steps=3)
    with pytest.raises(ValueError, match=r"at update 7, beyond --sft.steps 3: give at least 7"):
        run("sft", folder / "sft", options=options)


def test_a_head_alone_is_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no steps, and so no checkpoints."""
    alone = {"options": RewardConfig(batch_size=8, lora_layers=0, head_steps=10)}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(reward, "save_role", die)
        run("pairs", tmp_path / "killed", **alone)
    for name in ("killed", "quiet"):
        run("pairs", tmp_path / name, **alone)
    killed, whole = (
        [timeless(record) for record in read_jsonl(tmp_path / name / rundir.METRICS)] for name in ("killed", "quiet")
    )
    assert killed == whole and {record["step"] for record in whole} == {0}
    left, right = (artifacts.load(tmp_path / name / EXPORT / "reward") for name in ("killed", "quiet"))
    jax.tree.map(np.testing.assert_array_equal, left.head, right.head)
