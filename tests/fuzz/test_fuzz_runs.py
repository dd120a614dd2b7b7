"""What a run leaves behind, damaged at random: artifacts, checkpoint directories, config.yaml, metrics.jsonl."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.models.files import artifacts
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.runs import trained
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from tests import finished_run
from tests.checkpoints import read_arrays
from tests.finished_run import LORA, MODEL, policy
from tests.fuzz.inputs import damaged, mutated, outcome, to_json
from tests.models.tiny import equal

STATE = {
    "w": jnp.arange(3000, dtype=jnp.float32).reshape(50, 60),
    "key": jax.random.key(3),
    "step": jnp.int32(2),
    "half": jnp.ones((7,), jnp.bfloat16),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run.make(tmp_path_factory.mktemp("runs"), steps=(2,), final=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "good"
    with store.open_manager(path) as manager:
        store.save(manager, 2, STATE, {"config": "x", "facts": {"seed": 1}})
    return path


def fresh(good: Path) -> Path:
    path = good.with_name("damaged")
    shutil.rmtree(path, ignore_errors=True)
    return Path(shutil.copytree(good, path))


def hit(data: st.DataObject, path: Path) -> None:
    """Damages one to three files below `path`: deletes, truncates, empties, flips, replaces by a directory."""
    for _ in range(data.draw(st.integers(1, 3))):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        if not files:
            return
        file = data.draw(st.sampled_from(files))
        content = file.read_bytes()
        how = data.draw(st.sampled_from(["delete", "truncate", "flip", "damage", "folder"]))
        if how in ("delete", "folder"):
            file.unlink()
            if how == "folder":
                file.mkdir()
        elif how == "truncate":
            file.write_bytes(content[: data.draw(st.integers(0, max(len(content) - 1, 0)))])
        elif how == "flip" and content:
            at = data.draw(st.integers(0, len(content) - 1))
            file.write_bytes(content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :])
        else:
            file.write_bytes(data.draw(damaged(content)))


def same(state: dict) -> bool:
    bits = lambda tree: jax.tree.map(lambda x: jax.random.key_data(x) if x is tree["key"] else x, tree)
    return equal(bits(state), bits(STATE))


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_checkpoint_is_noticed_or_whole(saved: Path, data: st.DataObject) -> None:
    """Bitwise what was saved, or an error that names it: never other numbers."""
    path = fresh(saved)
    hit(data, path)
    found = outcome(lambda: store.restore(path, STATE), str(path))
    if not isinstance(found, Exception):
        assert found[1] == 2 and same(found[0])
    arrays = outcome(lambda: read_arrays(path, ["w"]), str(path))
    if not isinstance(arrays, Exception):
        assert equal(jnp.asarray(arrays["w"]), STATE["w"])
    meta = outcome(lambda: store.read_meta(path), str(path))
    assert isinstance(meta, Exception) or meta == {"config": "x", "facts": {"seed": 1}}


@settings(max_examples=80)
@given(data=st.data())
def test_descriptions_of_artifacts(run: Path, data: st.DataObject) -> None:
    path = fresh(run / EXPORT / "policy")
    file = path / artifacts.DESCRIPTION
    content = to_json(data.draw(mutated(json.loads(file.read_text()))))
    file.write_bytes(data.draw(st.sampled_from([content, data.draw(damaged(content))])))

    def read() -> artifacts.Artifact:
        found = artifacts.load(path, "policy")
        artifacts.check_base(found, fingerprint_of(run.parent / "model"), MODEL)
        return found

    found = outcome(read, str(path))
    if not isinstance(found, Exception):  # then only free facts, or the scale of LoRA, have changed
        assert jax.tree.leaves(found.adapter)[0].shape == jax.tree.leaves(policy(LORA, 3))[0].shape


@pytest.fixture
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.usefixtures("_quiet")
def test_a_damaged_run(run: Path, data: st.DataObject) -> None:
    """`trained.find` gives the policy of one of the updates, or an error that names a file of the run."""
    path = fresh(run)
    if data.draw(st.booleans()):
        shutil.rmtree(path / EXPORT)
    part = data.draw(st.sampled_from([rundir.CONFIG, rundir.METRICS, rundir.CHECKPOINTS, "."]))
    if (path / part).is_file():
        (path / part).write_bytes(data.draw(damaged((path / part).read_bytes())))
    else:
        hit(data, path / part)
    found = outcome(lambda: trained.find(path), str(path), str(run.parent / "model"))
    if not isinstance(found, Exception):
        assert equal(jax.tree.leaves(found.adapter), jax.tree.leaves(policy(LORA, found.step or 3)))
