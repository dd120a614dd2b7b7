"""After a power cut at any moment of a write there is the old file or the new one, whole; so for directories."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from ppo_jax.data import disk
from ppo_jax.data.jsonl import append_jsonl, truncate_jsonl
from ppo_jax.models.adapters import init_lora
from ppo_jax.models.files import artifacts, hf
from ppo_jax.runs.checkpoints import resuming, store
from ppo_jax.runs.output import rundir
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import CONFIG, random_params
from tests.power import Machine, Node, everything, files


def artifact(path: Path, seed: int) -> None:
    adapter = init_lora(jax.random.key(seed), CONFIG, rank=2, alpha=2.0)
    artifacts.save(path, "policy", adapter, {}, artifacts.Base("base", "f" * 64, CONFIG), overwrite=True)


def model(path: Path, seed: int) -> None:
    hf.save(path, CONFIG, random_params(CONFIG, seed), make_tokenizer(), overwrite=True)


def text(path: Path, seed: int) -> None:
    disk.replace_file(path, b"%d" % seed * 5000)


def records(path: Path, seed: int) -> None:
    """Seed 1 makes them, seed 2 cuts them as a resumed run does."""
    if seed == 1:
        append_jsonl(path, [{"step": step, "phase": "ppo"} for step in range(9)])
    else:
        truncate_jsonl(path, 5)


@pytest.mark.parametrize("exchanges", [True, False], ids=["", "without exchange"])
@pytest.mark.parametrize("save", [text, records, artifact, model], ids=lambda save: save.__name__)
def test_the_old_one_or_the_new_one(
    save: Callable[[Path, int], None], exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, reference = tmp_path / "world" / "it", tmp_path / "reference" / "it"
    for place in (target, reference):
        place.parent.mkdir()
        save(place, 1)
    old = everything(target)
    save(reference, 2)
    new = everything(reference)
    assert old != new
    if not exchanges:
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    seen: list[Node | None] = []

    def look(left: Node, where: str) -> None:
        assert isinstance(left, dict)
        found = left.get("it")
        if found is None and not exchanges and isinstance(old, dict):  # between two renames: beside it, whole
            found = next(node for name, node in left.items() if node in (old, new))
        assert found in (old, new), where
        seen.append(found)

    with Machine(tmp_path / "world", look, monkeypatch) as machine:
        save(target, 2)
    assert machine.moments > 5 and seen[0] == old and seen[-2:] == [new] * 2  # what it said it did is done
    assert everything(tmp_path / "world") == {"it": new}


def test_a_directory_is_there_with_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Node] = []
    with Machine(tmp_path, lambda left, where: ends.append(left), monkeypatch):
        disk.make_directory(tmp_path / "a" / "b" / "c")
    assert ends[-2:] == [{"a": {"b": {"c": {}}}}] * 2


def test_a_damaged_checkpoint_that_was_set_aside_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / rundir.CHECKPOINTS / "4").mkdir(parents=True)
    (tmp_path / rundir.CHECKPOINTS / "4" / "a").write_bytes(b"arrays")
    ends: list[Node] = []
    with Machine(tmp_path, lambda left, where: ends.append(left), monkeypatch):
        resuming.set_aside(tmp_path, 4)
    assert ends[-2:] == [{rundir.CHECKPOINTS: {}, rundir.DAMAGED: {"4": {"a": b"arrays"}}}] * 2


def test_a_checkpoint_has_its_name_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax writes in threads, so not at every call: at the rename, and when the save is said to be done."""
    rundir.open_run(tmp_path / "run")
    machine = Machine(tmp_path, lambda left, where: None, monkeypatch)
    real, renamed = os.rename, []

    def rename(source: str, target: str, **more: object) -> None:
        if os.path.basename(target) == "3":
            safe = machine._tree(os.stat(source).st_ino, lambda inode: machine.safe_names.get(inode, {}))
            renamed.append((dict(files(safe)), dict(files(everything(Path(source))))))
        real(source, target, **more)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    state = {"w": jax.random.normal(jax.random.key(0), (50, 50)), "key": jax.random.key(1)}
    with store.open_manager(tmp_path / "run" / "checkpoints") as manager:
        store.save(manager, 3, state, {"note": "n"})
        store.wait(manager)
        ((safe, all_of_it),) = renamed
        for name in ("/commit_success.txt", "/_CHECKPOINT_METADATA"):  # Orbax's, written last; nobody needs them
            safe.pop(name, None)
            all_of_it.pop(name)
        assert safe == all_of_it and len(safe) > 4
        top = machine._tree(os.stat(tmp_path).st_ino, lambda inode: machine.safe_names.get(inode, {}))
        assert isinstance(top, dict)
        assert dict(files(top["run"]["checkpoints"]["3"])).items() >= safe.items()


def test_two_that_replace_a_file_at_once_both_succeed(tmp_path: Path) -> None:
    """As the slices of a sweep replace its tables; what a killed process began is gone."""
    path, dead = tmp_path / "table", f".table.partial-0123abcd.{2**22 + 1}.{socket.gethostname()}"
    (tmp_path / dead).write_bytes(b"half")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: [disk.replace_file(path, b"%d" % seed * 5000) for _ in range(50)], range(4)))
    assert path.read_bytes() in {b"%d" % seed * 5000 for seed in range(4)} and os.listdir(tmp_path) == ["table"]
