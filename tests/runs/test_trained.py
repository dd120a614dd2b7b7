"""Which policy of a run is taken, and that it is that one."""

import shutil
from pathlib import Path

import jax
import pytest

from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.models.placement import shardings
from ppo_jax.models.pretrained import load_model
from ppo_jax.parallel.mesh import MeshConfig, make_mesh
from ppo_jax.runs import trained
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.output import rundir
from tests import finished_run
from tests.finished_run import LORA, MODEL, policy
from tests.models.tiny import equal, random_params

TOP_K = AdapterConfig(kind="top_k", layers=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run.make(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_the_final_policy(whole: Path) -> None:
    found = trained.find(whole)
    assert (found.step, found.source) == (3, "export/policy") and found.evaluation == {"reward": 0.375, "kl": 1.25}
    assert equal(found.adapter, policy(LORA, 3)) and found.adapter["lora"]["q"].scale == 2.5
    assert found.settings["seed"] == 7 and found.model.config == MODEL


def test_a_step_is_the_checkpoint_of_that_update(whole: Path) -> None:
    """LoRA's scale is not in a checkpoint: it comes from the configuration, alpha 10 / rank 4."""
    found = trained.find(whole, step=2)
    assert (found.step, found.source, found.evaluation) == (2, "checkpoints/2", {"reward": 0.25})
    assert jax.tree.structure(found.adapter) == jax.tree.structure(policy(LORA, 2))
    assert equal(found.adapter, policy(LORA, 2)) and found.adapter["lora"]["q"].scale == 2.5
    assert trained.find(whole, step=3).source == "export/policy"


@pytest.mark.parametrize("adapter", [TOP_K, AdapterConfig(kind="full")], ids=["top_k", "full"])
def test_other_adapters_come_back_from_a_checkpoint(adapter: AdapterConfig, tmp_path: Path) -> None:
    run = finished_run.make(tmp_path, adapter, steps=(2,), final=None)
    assert equal(trained.find(run).adapter, policy(adapter, 2))


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("adapter", [LORA, TOP_K, AdapterConfig(kind="full")], ids=["lora", "top_k", "full"])
def test_on_a_mesh_base_and_policy_are_read_onto_their_shards(
    adapter: AdapterConfig, step: int, tmp_path: Path
) -> None:
    """Update 2 from the checkpoint, with no more of it than the policy, update 3 from export/policy."""
    run = finished_run.make(tmp_path, adapter, steps=(2,))
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = trained.find(run, step=step)
    assert equal(found.adapter, policy(adapter, step))
    for tree in (found.adapter, found.model.params):
        assert jax.tree.map(lambda x: x.sharding, tree) == shardings(tree, mesh)


def test_a_run_that_went_on_after_its_export(tmp_path: Path) -> None:
    found = trained.find(finished_run.make(tmp_path, steps=(3, 5), final=3))
    assert found.source == "checkpoints/5" and equal(found.adapter, policy(LORA, 5))


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run: Path) -> None:
    shutil.rmtree(run / EXPORT / "policy")
    for file in (run / rundir.CHECKPOINTS / "3" / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 3000:
            file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged checkpoint: .*/3"):
        found = trained.find(run)
    assert found.source == "checkpoints/2"
    shutil.rmtree(run / rundir.CHECKPOINTS / "2" / "arrays")
    with (
        pytest.warns(UserWarning),
        pytest.raises(store.CheckpointError, match="no checkpoint can be read:\n .*/3"),
    ):
        trained.find(run)


def test_the_base_is_read_once_for_all_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, loaded, real = finished_run.make(tmp_path, steps=(2, 3, 4), final=None), [], load_model
    for step in ("3", "4"):
        shutil.rmtree(run / rundir.CHECKPOINTS / step / "arrays")
    monkeypatch.setattr(trained, "load_model", lambda *args: loaded.append(args) or real(*args))
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        found = trained.find(run)
    assert found.source == "checkpoints/2" and loaded == [(str(tmp_path / "model"), None, None)]


def test_an_artifact_alone(whole: Path) -> None:
    path = whole / EXPORT / "policy"
    assert equal(trained.find(path).adapter, policy(LORA, 3)) and trained.find(path).settings == {}
    with pytest.raises(ValueError, match="--step 3 has nothing to choose from"):
        trained.find(path, step=3)


def test_what_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such run directory"):
        trained.find(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no policy of --step 9; its checkpoints: 2, 3"):
        trained.find(run, step=9)
    hf.save(tmp_path / "m", MODEL, random_params(MODEL))
    with pytest.raises(FileNotFoundError, match="artifact.json is missing; it is a model, so give it as --model"):
        trained.find(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        trained.find(run, model="./nowhere")
    text = (run / rundir.CONFIG).read_text()
    (run / rundir.CONFIG).write_text(text + "\nseed: 8\n")
    with pytest.raises(ValueError, match="config.yaml, line .*: seed: given twice"):
        trained.find(run)


@pytest.mark.parametrize("step", [2, 3])
def test_another_base_is_refused(step: int, run: Path, tmp_path: Path) -> None:
    """From a checkpoint and from an artifact alike."""
    source = trained.find(run).model
    hf.save(tmp_path / "other", MODEL, random_params(MODEL, seed=5), source.tokenizer)
    with pytest.raises(ValueError, match="trained on other weights: those of .*model"):
        trained.find(run, step=step, model=str(tmp_path / "other"))


def test_a_base_that_has_gone_is_named(tmp_path: Path) -> None:
    run = finished_run.make(tmp_path)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="give --model if it has moved"):
        trained.find(run)
    assert trained.find(run, model=str(tmp_path / "moved")).step == 3
    assert artifacts.load(run / "export" / "policy").base == str(tmp_path / "model")
