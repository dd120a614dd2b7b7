"""Going on: the newest whole checkpoint, what may differ and what may not, and what becomes of damage."""

import errno
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.checkpoints import resuming, store
from ppo_jax.runs.output import rundir, writers

FACTS = {
    "base": {"name": "a", "fingerprint": "0"},
    "seed": 3,
    "batch_size": 8,
    "ppo": {"epochs": 4, "accumulate": 1},
    "hyper": {"learning_rate": 1e-3},
    "loop": {"updates": 10},
}


def state(step: int) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(step), (40, 10)), "step": jnp.int32(step)}


def run_with(directory: Path, *steps: int) -> Path:
    with store.open_manager(directory / rundir.CHECKPOINTS, keep=None) as manager:
        for step in steps:
            store.save(manager, step, state(step), {"facts": FACTS, "best": {"step": 2}})
    return directory


def restore(directory: Path, facts: dict = FACTS) -> tuple[resuming.Restored | None, list[str]]:
    said: list[str] = []
    return resuming.restore(directory, state(0), facts, said.append), said


def arrays_file(directory: Path, step: int) -> Path:
    """The file that holds the numbers of `w`."""
    files = (directory / rundir.CHECKPOINTS / str(step) / "arrays").rglob("*")
    return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(bytes(data))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_newest_comes_back_with_what_was_saved_beside_it(tmp_path: Path):
    found, said = restore(run_with(tmp_path, 2, 4))
    assert found is not None and found.step == 4 and found.meta["best"] == {"step": 2} and said == []
    np.testing.assert_array_equal(found.state["w"], state(4)["w"])
    assert restore(tmp_path / "nothing")[0] is None


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_is_named_skipped_and_moved_never_deleted(tmp_path: Path, damage):
    run_with(tmp_path, 2, 4, 6)
    damage(arrays_file(tmp_path, 6))
    damage(tmp_path / rundir.CHECKPOINTS / "4" / "meta" / "metadata")
    before = {step: files_of(tmp_path / rundir.CHECKPOINTS / str(step)) for step in (4, 6)}
    found, said = restore(tmp_path)
    assert found is not None and found.step == 2
    np.testing.assert_array_equal(found.state["w"], state(2)["w"])
    for step in (6, 4):
        place = tmp_path / rundir.CHECKPOINTS / str(step)
        assert any(text.startswith(f"damaged checkpoint: {place}: ") for text in said)
        moved = f"update {step} was moved to {tmp_path / rundir.DAMAGED / str(step)}; going on from update 2"
        assert any(moved in text for text in said)
        assert files_of(tmp_path / rundir.DAMAGED / str(step)) == before[step]
    assert store.all_steps(tmp_path / rundir.CHECKPOINTS) == [2]
    run_with(tmp_path, 4)  # its place is free again
    damage(arrays_file(tmp_path, 4))
    assert restore(tmp_path)[0].step == 2  # type: ignore[union-attr]
    assert {path.name for path in (tmp_path / rundir.DAMAGED).iterdir()} == {"4", "4-2", "6"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nothing_starts_anew_where_all_are_damaged(tmp_path: Path):
    run_with(tmp_path, 2, 4)
    for step in (2, 4):
        cut(arrays_file(tmp_path, step))
    with pytest.raises(store.CheckpointError, match="no checkpoint can be read") as error:
        restore(tmp_path)
    assert str(tmp_path / rundir.CHECKPOINTS / "2") in str(error.value) and "--overwrite" in str(error.value)
    assert store.all_steps(tmp_path / rundir.CHECKPOINTS) == [2, 4]  # as they were


def test_another_run_is_refused_with_every_difference(tmp_path: Path):
    run_with(tmp_path, 2, 4)
    now = FACTS | {
        "seed": 4,
        "batch_size": 16,
        "ppo": {"epochs": 2, "accumulate": 2, "sampling": {"gather_weights": True}},
        "loop": {"updates": 50},
    }
    now |= {"base": {"name": "b", "fingerprint": "1"}}
    with pytest.raises(resuming.IncompatibleRun) as error:
        restore(tmp_path, now)
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "base.fingerprint: 0 in the checkpoint, 1 now",
        "batch_size: 8 in the checkpoint, 16 now",
        "ppo.epochs: 4 in the checkpoint, 2 now",
        "seed: 3 in the checkpoint, 4 now",
    ]


def test_compatible_changes_are_said_and_go_through(tmp_path: Path):
    run_with(tmp_path, 2)
    now = FACTS | {"hyper": {"learning_rate": 5e-4}, "loop": {"updates": 50, "keep": 2}}
    found, said = restore(tmp_path, now)
    assert found is not None and said == [
        "resumed with changes:\n  hyper.learning_rate: 0.001 in the checkpoint, 0.0005 now\n"
        "  loop.keep: nothing in the checkpoint, 2 now\n  loop.updates: 10 in the checkpoint, 50 now"
    ]


@pytest.mark.parametrize("control", ["fixed", "adaptive", "linear"])
def test_a_coefficient_that_is_changed_in_vain_is_told_of(control: str) -> None:
    before = {"ppo": {"kl": {"control": control}}, "hyper": {"kl_coef": 0.1}}
    serious, (line,) = resuming.differences(before, before | {"hyper": {"kl_coef": 0.2}})
    assert serious == [] and line.startswith("hyper.kl_coef: 0.1 in the checkpoint, 0.2 now")
    assert ("no effect: the coefficient adapts, and goes on from the checkpoint's" in line) == (control == "adaptive")


VALUES = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3)
TREES = st.recursive(VALUES, lambda inner: st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3))


@given(st.dictionaries(st.sampled_from(["hyper", "loop", "ppo", "seed"]), TREES, max_size=4))
def test_equal_facts_do_not_differ(facts):
    assert resuming.differences(facts, facts) == ([], [])


def test_records_after_the_checkpoint_go_and_half_an_evaluation_too(tmp_path: Path):
    write = writers.jsonl_writer(tmp_path / rundir.METRICS)
    for step in (1, 2, 3):
        write(step, "ppo", {"x": 1.0})
    write(0, "eval", {"x": 1.0})
    for step in (0, 2, 3):
        rundir.write_evaluation(tmp_path, step, ["p"], ["r"], {"reward": [1.0]}, ["reward"])
    resuming.drop_later_records(tmp_path, 2)  # killed in the evaluation at 2: samples are there, the record is not
    assert [(r["phase"], r["step"]) for r in read_jsonl(tmp_path / rundir.METRICS)] == [
        ("ppo", 1), ("ppo", 2), ("eval", 0),
    ]  # fmt: skip
    for name in (rundir.SAMPLES, rundir.EVALUATIONS):
        assert [r["step"] for r in read_jsonl(tmp_path / name)] == [0]


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "no"), OSError(errno.EIO, "Input/output error")])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_with(tmp_path, 2, 4)

    def fails(*_: object, **__: object) -> None:
        raise ValueError("cannot open") from error  # as Orbax passes it on

    monkeypatch.setattr(store.ocp.PyTreeCheckpointHandler, "restore", fails)
    with pytest.raises(store.CheckpointError, match="4: cannot be read now") as raised:
        restore(tmp_path)
    assert not isinstance(raised.value, store.DamagedCheckpoint)
    assert store.all_steps(tmp_path / rundir.CHECKPOINTS) == [2, 4]


def test_a_choice_that_came_later_is_no_difference_where_it_is_made_as_before() -> None:
    """Checkpoints of earlier code do not name it; any other value than the default is another run."""
    now = {"ppo": {"epochs": 4, "kl": {"per": "token", "place": "reward"}}}
    before = {"ppo": {"epochs": 4, "kl": {"place": "reward"}}}
    assert resuming.differences(before, now) == ([], [])
    now["ppo"]["kl"]["per"] = "response"
    assert resuming.differences(before, now) == (["ppo.kl.per: nothing in the checkpoint, response now"], [])


def test_a_choice_of_dpo_that_an_older_run_did_not_have_is_made_as_it_did() -> None:
    before = {"stage": "dpo", "dpo": {"beta": 0.1}}
    choices = {name: {"stage": "dpo", "dpo": {"beta": 0.1, "reference": name}} for name in ("base", "start")}
    assert resuming.differences(before, choices["base"]) == ([], [])
    assert resuming.differences(before, choices["start"])[0] == ["dpo.reference: nothing in the checkpoint, start now"]
