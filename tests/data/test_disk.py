"""A directory that cannot be put in its place leaves the older one there: exports, artifacts and classifiers."""

import errno
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ppo_jax.cli import main as cli
from ppo_jax.data import disk
from ppo_jax.data.disk import replaced_directory, swap
from ppo_jax.models.adapters import init_lora
from ppo_jax.models.files import artifacts, classifiers, hf
from ppo_jax.models.heads import RewardHead
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import CONFIG, random_params


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def artifact(path: Path, seed: int) -> None:
    adapter = init_lora(jax.random.key(seed), CONFIG, rank=2, alpha=2.0)
    artifacts.save(path, "policy", adapter, {}, artifacts.Base("base", "f" * 64, CONFIG), overwrite=True)


def classifier(path: Path, seed: int) -> None:
    head = RewardHead().init(jax.random.key(seed), jnp.zeros((1, CONFIG.hidden_size)))["params"]
    params = random_params(CONFIG, seed)
    classifiers.save(path, CONFIG, params, head, make_tokenizer(), overwrite=True)


def export(path: Path, seed: int) -> None:
    model = path.parent / f"base-{seed}"
    if not model.exists():
        hf.save(model, CONFIG, random_params(CONFIG, seed), make_tokenizer())
    if cli.main(["export", "--model", str(model), "--to", str(path), "--overwrite"]):
        raise OSError("the command failed")


def model(path: Path, seed: int) -> None:
    hf.save(path, CONFIG, random_params(CONFIG, seed), make_tokenizer(), overwrite=True)


@pytest.mark.parametrize("exchanges", [True, False], ids=["", "without exchange"])
@pytest.mark.parametrize("save", [artifact, classifier, export, model])
def test_what_is_there_stays_where_the_new_one_cannot_be_put(
    save: Callable[[Path, int], None], exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "it"
    save(target, 1)
    before, real = content(target), os.replace

    def full(source: Path, to: Path) -> None:
        if Path(to) == target and ".partial-" in Path(source).name:
            raise OSError(errno.EIO, "injected", str(to))
        real(source, to)

    def refuse(one: Path, other: Path) -> bool:
        if exchanges and other == target:
            raise OSError(errno.EIO, "injected", str(other))
        return False

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(disk, "exchange", refuse)
    with pytest.raises(OSError):
        save(target, 2)
    assert content(target) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    monkeypatch.undo()
    save(target, 2)
    assert content(target) != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_model_that_is_replaced_keeps_what_else_lies_beside_it(tmp_path: Path) -> None:
    model(tmp_path / "m", 1)
    (tmp_path / "m" / "README.md").write_text("mine")
    (tmp_path / "m" / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "m" / "notes" / "deep" / "a").write_text("mine too")
    (tmp_path / "m" / "model-00001-of-00002.safetensors").write_text("a shard of the old one")
    model(tmp_path / "m", 2)
    model(tmp_path / "fresh", 2)
    mine = {"README.md": b"mine", "notes/deep/a": b"mine too"}
    assert content(tmp_path / "m") == content(tmp_path / "fresh") | mine


def test_a_link_stays_a_link_to_what_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with replaced_directory(tmp_path / "link") as partial:
        (partial / "a").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "a").read_text() == "new"


def test_an_interruption_between_the_two_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    real, calls = os.replace, []

    def interrupted(source: Path, to: Path) -> None:
        calls.append(to)
        real(source, to)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    with pytest.raises(KeyboardInterrupt):
        swap(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    swap(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_began_goes_and_what_lives_stays(tmp_path: Path) -> None:
    host, begun = socket.gethostname(), ".it.partial-0a1b2c3d"
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {f"{begun}.{dead.pid}.{host}": False, f"{begun}.{os.getpid()}.{host}": True, f"{begun}.{dead.pid}.x": True}
    names |= {f".itself.partial-1.{dead.pid}.{host}": True, begun: True}
    for name in names:
        (tmp_path / name).mkdir()
    with replaced_directory(tmp_path / "it"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"it", *(name for name, stays in names.items() if stays)}


def test_what_is_gone_cannot_be_put_in_place(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(FileNotFoundError):
        swap(tmp_path / "gone", tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
