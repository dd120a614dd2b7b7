"""Checkpoints of a run under way: a full disk, a directory that is gone or in the way, and what is said of it."""

import dataclasses
import errno
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.checkpoints.saving import leave, saver
from ppo_jax.train.loop import Interrupted, LoopConfig, Stopped
from tests.disk import small_disk

LOOP = LoopConfig(updates=100, keep=2)
BIG = {"x": jax.random.normal(jax.random.key(0), (200_000,))}


def open_saver(directory: Path, said: list[str], last: int | None = None):
    return saver(directory, LOOP, {"note": "n"}, said.append, last)


def restored(directory: Path) -> int:
    """The newest step; raises unless it can be read."""
    state, step = store.restore(directory, {"x": jnp.zeros((200_000,))})
    np.testing.assert_array_equal(state["x"], BIG["x"])
    return step


def test_saves_when_due_and_knows_what_is_on_disk(tmp_path: Path):
    said: list[str] = []
    with open_saver(tmp_path, said) as keep:
        assert keep.settle() is None
        for step in (1, 2, 3, 4):
            keep(step, BIG, step % 2 == 0)
        assert keep.settle() == 4
        keep(4, BIG, True)  # it is there already
    assert store.all_steps(tmp_path) == [2, 4] and said == []
    assert store.read_meta(tmp_path) == {"note": "n"}


def test_a_full_disk_is_said_at_once_tried_again_and_harms_nothing(tmp_path: Path):
    said: list[str] = []
    with open_saver(tmp_path, said) as keep:
        keep(2, BIG, True)
        assert keep.settle() == 2
        with small_disk(10_000):
            keep(4, BIG, True)
            assert keep.settle() == 2
            assert len(said) == 1 and "could not be saved" in said[0]
            assert "the last good one is of update 2" in said[0] and "tried again at update 5" in said[0]
            keep(5, BIG, False)
            keep.settle()
            assert len(said) == 2 and "tried again at update 7" in said[1]  # patience grows
            keep(6, BIG, False)
            assert len(said) == 2
        assert restored(tmp_path) == 2
        keep(7, BIG, False)  # not due, but owed
        assert keep.settle() == 7 and len(said) == 2
    assert restored(tmp_path) == 7


def test_an_error_in_the_background_surfaces_at_the_next_step(tmp_path: Path):
    said: list[str] = []
    with open_saver(tmp_path, said) as keep, small_disk(10_000):
        keep(1, BIG, True)
        for step in range(2, 1000):  # nothing is due, so nothing waits for the save
            if said:
                break
            keep(step, BIG, False)
            time.sleep(0.02)
        assert said and "could not be saved" in said[0]


def test_a_directory_removed_while_running_is_made_again(tmp_path: Path):
    said: list[str] = []
    run = tmp_path / "run"
    with open_saver(run / "checkpoints", said) as keep:
        keep(1, BIG, True)
        keep.settle()
        shutil.rmtree(run)
        for step in range(2, 20):
            keep(step, BIG, True)
            keep.settle()
        assert keep.good is not None and keep.good > 1
    assert restored(run / "checkpoints") > 1


def test_a_file_in_the_way_does_not_end_the_run(tmp_path: Path):
    said: list[str] = []
    (tmp_path / "checkpoints").write_text("")
    with open_saver(tmp_path / "checkpoints", said) as keep:
        keep(1, BIG, True)
        assert keep.settle() is None and "there is none yet" in said[0]
        with pytest.raises(store.CheckpointSaveError, match="checkpoints"):
            keep.insist(2, BIG)  # but it does not end as if all were well
        (tmp_path / "checkpoints").unlink()
        keep.insist(2, BIG)
    assert restored(tmp_path / "checkpoints") == 2


def test_an_old_one_that_cannot_be_deleted_makes_no_new_one_unsaved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where somebody has it open on NFS. It is deleted after the new one is whole, and in the same thread."""
    delete = shutil.rmtree

    def refuse(path: str | Path, ignore_errors: bool = False, **more: Any) -> None:
        if Path(path).name != "2":
            delete(path, ignore_errors, **more)
        elif not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    said: list[str] = []
    with saver(tmp_path, dataclasses.replace(LOOP, keep=1), {}, said.append, None) as keep:
        keep(2, BIG, True)
        keep(4, BIG, True)
        assert keep.settle() == 4
        assert len(said) == 1 and "update 4 is saved, but an older checkpoint could not be deleted: [Errno" in said[0]
        keep(5, BIG, True)
        assert keep.settle() == 5 and store.all_steps(tmp_path) == [2, 5]  # the others are deleted all the same
        keep(6, BIG, False)
        keep.insist(6, BIG)  # nor does it harm the last one
        with pytest.raises(Interrupted, match="stopped; update 6 is saved"):
            leave(Interrupted("stopped"), keep, (6, BIG))
        with pytest.raises(Interrupted, match="stopped; update 7 is saved"):
            leave(Interrupted("stopped"), keep, (7, BIG))
    assert restored(tmp_path) == 7


def test_a_stop_request_is_only_done_when_the_state_is_on_disk(tmp_path: Path):
    """Exit status 75 promises that --resume loses nothing."""
    said: list[str] = []
    with open_saver(tmp_path, said) as keep:
        keep(2, BIG, True)
        assert keep.settle() == 2
        with small_disk(10_000):
            keep(4, BIG, True)
            with pytest.raises(Stopped, match="not saved: .*--resume goes on from update 2") as error:
                leave(Interrupted("stopped by SIGTERM after update 4"), keep, (4, BIG))
        assert not isinstance(error.value, Interrupted)
        keep(5, BIG, False)
        with small_disk(10_000):
            keep(6, BIG, True)
            keep.settle()
        with pytest.raises(Interrupted, match="after update 6; update 6 is saved. Go on with --resume"):
            leave(Interrupted("stopped by SIGTERM after update 6"), keep, (6, BIG))  # tried once more
    assert restored(tmp_path) == 6
