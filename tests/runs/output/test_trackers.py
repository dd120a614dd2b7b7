"""Trackers: what each is sent, under which id; a run that goes on has one page, with nothing missing or twice.

Weights & Biases, MLflow and Trackio are the real ones, without a network; `make dev` installs none of them, so that CI
runs what is said of all trackers with one that is made here.
"""

import json
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ppo_jax.runs.output import rundir, trackers
from ppo_jax.runs.output.config import from_yaml, read_mapping
from ppo_jax.runs.output.recording import run_files
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.output.trackers import tracker_writer
from ppo_jax.runs.output.writers import combine
from ppo_jax.train.loop import LoopConfig, OfflineLoop

CONFIG = {"model": "m", "hyper": {"kl_coef": 0.1}, "loop": {"log": ["wandb"]}}


class Place:
    """Stands for a tracker where the rules of all are tested: it keeps what it is sent, and fails when told to."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, Mapping[str, float]]] = []
        self.fails = False

    def open(self, page: trackers.Page) -> tuple[str, trackers.Send]:
        number = page.id or page.new_id

        def send(step: int, values: Mapping[str, float], samples: trackers.Samples) -> None:
            if self.fails:
                raise ConnectionError("no answer from https://me:hunter2@h.intern/api?key=hunter2")
            self.rows.append((number, step, values))

        return number, send


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place()
    monkeypatch.setitem(trackers.OPEN, "mlflow", made.open)
    return made


def values_of(place: Place) -> list[tuple[int, str, float]]:
    return [(step, name, value) for _, step, values in place.rows for name, value in values.items()]


# -- the rules of all --------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_sends_nothing_twice_and_nothing_is_missing(tmp_path: Path, place: Place) -> None:
    first = tracker_writer("mlflow", "p", tmp_path, {})
    for step in (1, 2, 3):
        first(step, "sft", {"loss": step, "kl": float("nan")})
    first(2, "eval", {"reward": 0.5})
    again = tracker_writer("mlflow", "p", tmp_path, {})  # from the checkpoint of step 1
    for step in (2, 3, 4):
        again(step, "sft", {"loss": step})
    again(3, "sft", {"heldout_loss": 9.0})  # what the first was stopped before
    again(2, "eval", {"reward": 0.5})
    assert values_of(place) == [
        *((1, "sft/loss", 1), (2, "sft/loss", 2), (3, "sft/loss", 3), (2, "eval/reward", 0.5)),
        *((4, "sft/loss", 4), (3, "sft/heldout_loss", 9)),
    ]
    assert len({number for number, *_ in place.rows}) == 1


def test_within_one_process_a_step_may_have_two_records(tmp_path: Path, place: Place) -> None:
    write = tracker_writer("mlflow", "p", tmp_path, {})
    write(1, "reward", {"loss": 1.0})
    write(1, "reward", {"heldout_loss": 2.0})
    assert values_of(place) == [(1, "reward/loss", 1), (1, "reward/heldout_loss", 2)]


def test_a_tracker_that_comes_later_gets_what_was_before(tmp_path: Path, place: Place) -> None:
    with progress("x", False) as screen:
        for write in run_files(tmp_path, screen, LoopConfig(log=())):
            write(1, "ppo", {"reward": 1.0, "kl": float("nan"), "ratio_max": float("inf")})
        write = combine(run_files(tmp_path, screen, LoopConfig(log=("mlflow",)), in_order=("ppo",)))
        write(2, "ppo", {"reward": 2.0})
    assert values_of(place) == [(1, "ppo/reward", 1), (1, "ppo/ratio_max", float("inf")), (2, "ppo/reward", 2)]
    assert not (tmp_path / rundir.TENSORBOARD).exists()


def test_what_could_not_be_sent_is_sent_later_and_no_address_is_told(tmp_path: Path, place: Place, capsys) -> None:
    with progress("x", True, log=tmp_path / "log.txt") as screen:
        files = run_files(tmp_path, screen, LoopConfig(log=("mlflow",)))
        place.fails = True
        assert [write(1, "ppo", {"reward": 1.0}) for write in files] == [0, 1]
        place.fails = False
        assert [write(2, "ppo", {"reward": 2.0}) for write in files] == [0, 0]
    assert values_of(place) == [(1, "ppo/reward", 1), (2, "ppo/reward", 2)]
    said = (tmp_path / "log.txt").read_text() + "".join(capsys.readouterr())
    assert "MLflow cannot be written: no answer" in said and "MLflow is written again" in said
    assert "hunter2" not in said and "intern" not in said


def test_two_runs_of_one_name_have_two_ids_and_each_keeps_its_own(tmp_path: Path, place: Place) -> None:
    for folder in ("a/ppo", "b/ppo", "a/ppo"):
        directory = tmp_path / folder
        directory.mkdir(parents=True, exist_ok=True)
        tracker_writer("mlflow", "p", directory, {})(len(place.rows), "ppo", {"reward": 0.0})
    (one, two, again) = (number for number, *_ in place.rows)
    assert one != two and again == one and one.startswith("ppo-")


def test_an_id_of_earlier_code_goes_on_and_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there was trackers.json the id at Weights & Biases was in run.json, and all was sent there."""
    made = Place()
    monkeypatch.setitem(trackers.OPEN, "wandb", made.open)
    rundir.add_facts(tmp_path, wandb="ppo-1234")
    (tmp_path / rundir.METRICS).write_text('{"step": 1, "phase": "ppo", "time": 1.0, "reward": 0.5}\n')
    with progress("x", False) as screen:
        write = combine(run_files(tmp_path, screen, LoopConfig(log=("wandb",)), in_order=("ppo",)))
        write(2, "ppo", {"reward": 2.0})
    assert made.rows == [("ppo-1234", 2, {"ppo/reward": 2.0})]


@pytest.mark.parametrize("cls", [LoopConfig, OfflineLoop])
def test_settings_of_earlier_code_are_read(cls: Any) -> None:
    assert from_yaml(cls, "wandb: ''") == from_yaml(cls, "wandb: off") == cls()
    assert from_yaml(cls, "wandb: films") == cls(log=("tensorboard", "wandb"), project="films")


def test_a_name_that_is_no_tracker_is_refused() -> None:
    with pytest.raises(ValueError, match="log.*expected one of tensorboard, wandb, mlflow, trackio, got 'mlfow'"):
        from_yaml(LoopConfig, "log: [mlfow]")
    with pytest.raises(ValueError, match="log=wandb, wandb must be of .*, each once"):
        LoopConfig(log=("wandb", "wandb"))
    with pytest.raises(ValueError, match="project is empty"):
        LoopConfig(project="")


@pytest.mark.parametrize("name", trackers.OPEN)
def test_a_missing_package_is_named_with_what_installs_it(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} was asked for but is not installed: pip install '{name}"):
        tracker_writer(name, "project", tmp_path, {})


def test_a_damaged_list_of_pages_is_one_message(tmp_path: Path) -> None:
    (tmp_path / rundir.TRACKERS).write_text('{"wandb": {"id": "a", "sent": {"ppo/kl": "2"}}}')
    with pytest.raises(ValueError, match=r"trackers.json: wandb.sent.ppo/kl is '2', which should be a whole number"):
        tracker_writer("wandb", "project", tmp_path, {})


def test_settings_are_flat() -> None:
    nested = {"model": "m", "hyper": {"kl_coef": 0.1}, "ppo": {"kl": {"place": "loss"}, "sampling": {"stop_ids": [1]}}}
    assert trackers.flatten_config(nested) == {
        "model": "m", "hyper.kl_coef": 0.1, "ppo.kl.place": "loss", "ppo.sampling.stop_ids": [1],
    }  # fmt: skip


# -- the real ones -----------------------------------------------------------------------------------------------------


@pytest.fixture
def secret_host(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(socket, "gethostname", lambda: "nightingale-host")
    monkeypatch.setattr(sys, "argv", ["ppo-jax", "ppo", "--reward", "http://nightingale-host/?key=hunter2"])
    return "nightingale"


def write_two_lives(name: str, run_dir: Path, end: Callable[[], object] = lambda: None) -> None:
    """Write updates 1 to 3, as a process that was stopped after 2 and one that went on from 1."""
    run_dir.mkdir(parents=True)
    rundir.write_samples(run_dir, 2, ["the film"], [" is"], {"reward": [0.5]})
    for steps in ((1, 2), (2, 3)):
        write = tracker_writer(name, "films", run_dir, CONFIG)
        for step in steps:
            write(step, "ppo", {"reward": step / 2, "kl": float("nan")})
        write(2, "eval", {"reward": 0.5})
        end()


def holders(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret_host: str) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def end() -> None:
        run = wandb.setup().most_recent_active_run
        seen.append((run.id, dict(run.config), dict(run.summary)))
        run.finish()

    write_two_lives("wandb", tmp_path / "ppo", end)
    (one, config, first), (two, _, second) = seen
    assert one == two == rundir.read_trackers(tmp_path / "ppo")["wandb"]["id"]
    assert config["hyper.kl_coef"] == 0.1 and config["model"] == "m"
    assert (first["ppo/reward"], first["ppo/step"], first["eval/reward"]) == (1.0, 2, 0.5)
    assert (second["ppo/reward"], second["ppo/step"]) == (1.5, 3) and "eval/reward" not in second
    (table,) = tmp_path.glob("ppo/wandb/offline-run-*/files/media/table/samples*.json")
    assert json.loads(table.read_text()) == {
        "columns": ["step", "prompt", "response", "reward"], "data": [[2, "the film", " is", 0.5]],
    }  # fmt: skip
    assert holders(tmp_path, "ppo/reward") and not holders(tmp_path, secret_host) and not holders(tmp_path, "hunter2")


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret_host: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write_two_lives("mlflow", tmp_path / "ppo")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("films").experiment_id])
    history = client.get_metric_history(run.info.run_id, "ppo/reward")
    assert [(one.step, one.value) for one in history] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert [one.step for one in client.get_metric_history(run.info.run_id, "eval/reward")] == [2]
    assert run.data.params["hyper.kl_coef"] == "0.1" and run.info.run_name == "ppo"
    samples = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/samples/2.json")
    assert samples["columns"] == ["step", "prompt", "response", "reward"] and len(samples["data"]) == 1
    tracker_writer("mlflow", "films", tmp_path / "ppo", CONFIG | {"hyper": {"kl_coef": 0.2}})  # a param stays
    assert read_mapping(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config.yaml"))["hyper.kl_coef"] == 0.2
    assert not holders(tmp_path, secret_host) and not holders(tmp_path, "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/another.db")
    with pytest.raises(ValueError, match="MLflow cannot be used: .*not found"):
        tracker_writer("mlflow", "films", tmp_path / "ppo", CONFIG)


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret_host: str) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    storage = trackio.SQLiteStorage
    runs: list[Any] = []
    init = trackio.init
    monkeypatch.setattr(trackio, "init", lambda *a, **k: runs.append(init(*a, **k)) or runs[-1])
    write_two_lives("trackio", tmp_path / "ppo", lambda: runs[-1].finish())
    (number,) = {run.name for run in runs}
    assert number == rundir.read_trackers(tmp_path / "ppo")["trackio"]["id"]
    logs = storage.get_logs("films", number)
    assert [(log["step"], log["ppo/reward"]) for log in logs if "ppo/reward" in log] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    (evaluation,) = (log for log in logs if "eval/reward" in log)
    assert evaluation["samples"]["_value"] == [{"step": 2, "prompt": "the film", "response": " is", "reward": 0.5}]
    assert storage.get_run_config("films", number)["hyper.kl_coef"] == 0.1
    assert not holders(tmp_path, secret_host) and not holders(tmp_path, "hunter2")
