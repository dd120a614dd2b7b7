"""rundir: no run is ever lost by a slip, and what is in the way is named."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import filelock
import pytest

from ppo_jax.data import locks
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.output import rundir, writers


def make_run(path: Path) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text("seed: 0\n")
    (path / "metrics.jsonl").write_text('{"step": 1, "phase": "ppo"}\n')
    (path / "checkpoints" / "1").mkdir(parents=True)
    (path / "notes.txt").write_text("mine")
    return path


def contents(path: Path) -> dict[str, bytes]:
    """All files but those of the lock."""
    files = (p for p in path.rglob("*") if p.is_file() and p.name not in (locks.LOCK, locks.HOLDER))
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def test_new_nested_directory_is_made(tmp_path: Path):
    run = rundir.open_run(tmp_path / "a" / "b")
    assert run.is_dir() and contents(run) == {} and not rundir.holds_run(run)


def test_directory_with_a_run_is_refused_and_untouched(tmp_path: Path):
    run = make_run(tmp_path / "run")
    before = contents(run)
    with pytest.raises(ValueError, match=r"already holds a run .*config\.yaml.*--resume.*--overwrite"):
        rundir.open_run(run)
    assert contents(run) == before


def test_resume_keeps_everything_and_starts_where_there_is_none(tmp_path: Path):
    run = make_run(tmp_path / "run")
    before = contents(run)
    for resume in (True, "yes", "auto"):
        assert rundir.open_run(run, resume=resume) == run
        assert contents(run) == before
    assert rundir.open_run(tmp_path / "fresh", resume="auto").is_dir()
    with pytest.raises(ValueError, match=r"mistyped holds no run to go on with: --resume auto starts one"):
        rundir.open_run(tmp_path / "mistyped", resume="yes")
    assert not (tmp_path / "mistyped").exists()


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path: Path):
    run = make_run(tmp_path / "run")
    rundir.open_run(run, overwrite=True)
    assert contents(run) == {"notes.txt": b"mine"} and not (run / "checkpoints").exists()


@pytest.mark.parametrize("options", [{"resume": "auto"}, {"resume": "yes"}, {"overwrite": True}])
def test_a_directory_that_another_process_is_in_is_not_touched(options: dict, tmp_path: Path):
    """Here the other one is played by another lock of this process."""
    run = make_run(tmp_path / "run")
    lock = filelock.FileLock(run / locks.LOCK)
    before = contents(run)
    with lock, pytest.raises(ValueError, match="run is in use by another process: wait for it, stop it, or"):
        rundir.open_run(run, **options)
    assert contents(run) == before
    assert rundir.open_run(run, **options) == run


def test_what_is_refused_is_not_held(tmp_path: Path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        rundir.open_run(run)
    assert not (run / locks.LOCK).exists()


@pytest.mark.parametrize("name", ["lr=[0.1]", "a*", "why?", "back\\slash", "in[side]/run"])
def test_a_name_that_checkpoints_cannot_be_read_below_is_refused_before_anything_is_made(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="checkpoints cannot be kept below a directory with .* name it without"):
        rundir.open_run(tmp_path / name, "auto")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_follows_no_link_out_of_the_run(tmp_path: Path):
    run = make_run(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("precious")
    (run / "export").symlink_to(elsewhere)
    rundir.open_run(run, overwrite=True)
    assert (elsewhere / "weights").read_text() == "precious" and not (run / "export").exists()


def test_overwrite_does_not_delete_what_may_not_be_a_run(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model").write_text("somebody else's")
    with pytest.raises(ValueError, match="nothing was deleted"):
        rundir.open_run(tmp_path, overwrite=True)
    assert (tmp_path / "checkpoints" / "model").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path):
    with pytest.raises(ValueError, match="exclude"):
        rundir.open_run(tmp_path, resume=True, overwrite=True)


def test_a_file_in_the_way_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write the run directory .*file"):
        rundir.open_run(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot write the run directory .*file"):
        rundir.open_run(tmp_path / "file" / "below")


def test_directory_without_write_permission():
    # root may write anywhere, so the question is asked in a process that has become another user
    code = """if True:
        import os, sys
        from ppo_jax.runs.output import rundir
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            rundir.open_run(sys.argv[1])
        except ValueError as error:
            print(error)
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert "cannot write the run directory" in done.stdout and "Permission denied" in done.stdout, done.stderr


def test_samples_are_appended_with_index_and_scores(tmp_path: Path):
    rundir.write_samples(tmp_path, 0, ["a", "b"], ["x", 'y\n"z" \ud800'], {"reward": [1.0, float("nan")]})
    rundir.write_samples(tmp_path, 5, ["a", "b"], ["é", "v"], {"reward": [2, 3], "vader": [0.5, -0.5]})
    records = read_jsonl(tmp_path / "samples.jsonl")
    assert [(r["step"], r["index"], r["prompt"]) for r in records] == [
        (0, 0, "a"),
        (0, 1, "b"),
        (5, 0, "a"),
        (5, 1, "b"),
    ]
    assert records[1]["response"] == 'y\n"z" ?' and records[1]["scores"] == {
        "reward": None
    }  # a lone surrogate is no text
    assert records[2]["response"] == "é" and records[3]["scores"] == {"reward": 3.0, "vader": -0.5}


def test_samples_of_unequal_length_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="2 prompts but 1 of 'reward'"):
        rundir.write_samples(tmp_path, 0, ["a", "b"], ["x", "y"], {"reward": [1.0]})
    assert not (tmp_path / "samples.jsonl").exists()


def test_truncate_run_takes_metrics_and_samples_back(tmp_path: Path):
    write = writers.jsonl_writer(tmp_path / "metrics.jsonl")
    for phase, step in (("reward", 50), ("ppo", 1), ("ppo", 2), ("eval", 2)):
        write(step, phase, {})
    for step in (0, 2):
        rundir.write_samples(tmp_path, step, ["a"], ["x"], {})
    rundir.truncate_run(tmp_path, 1)
    assert [(r["phase"], r["step"]) for r in read_jsonl(tmp_path / "metrics.jsonl")] == [
        ("reward", 50),
        ("ppo", 1),
    ]
    assert [r["step"] for r in read_jsonl(tmp_path / "samples.jsonl")] == [0]


def test_an_evaluation_is_kept_whole_and_its_first_prompts_as_samples(tmp_path: Path):
    columns = {"reward": [1.0, float("nan"), 3.0], "tokens": [4, 5, 6]}
    for step in (0, 2):
        rundir.write_evaluation(tmp_path, step, ["a", "b"], ["x", "y"], columns, ["reward"])
    whole, samples = (read_jsonl(tmp_path / name) for name in (rundir.EVALUATIONS, rundir.SAMPLES))
    assert whole[0] == {"step": 0, "columns": {"reward": [1.0, None, 3.0], "tokens": [4, 5, 6]}}
    assert [(s["step"], s["prompt"], s["scores"]) for s in samples[:2]] == [
        (0, "a", {"reward": 1.0}), (0, "b", {"reward": None}),
    ]  # fmt: skip
    rundir.truncate_run(tmp_path, 1)  # as a run that goes on from update 1
    assert [r["step"] for name in (rundir.EVALUATIONS, rundir.SAMPLES) for r in read_jsonl(tmp_path / name)] == [0] * 3


def test_what_can_be_written_of_an_evaluation_is_not_written_twice(tmp_path: Path):
    """The disk is full between the two files; what is tried again is the one that failed."""
    kept = [writers.resilient(write, lambda text: None, "it") for write in (rundir.write_samples, rundir.write_scores)]
    (tmp_path / rundir.EVALUATIONS).mkdir()
    how = {"put_samples": kept[0], "put_scores": kept[1]}
    rundir.write_evaluation(tmp_path, 0, ["a"], ["x"], {"reward": [1.0, 2.0]}, ["reward"], **how)
    (tmp_path / rundir.EVALUATIONS).rmdir()
    assert [again() for again in kept] == [0, 0]
    assert [len(read_jsonl(tmp_path / name)) for name in (rundir.EVALUATIONS, rundir.SAMPLES)] == [1, 1]


def test_facts_are_added_to_those_that_are_there(tmp_path: Path):
    assert rundir.read_facts(tmp_path) == {}
    session = {"command": "ppo-jax ppo", "commit": None}
    rundir.add_facts(tmp_path, sessions=[session], held_out=4)
    rundir.add_facts(tmp_path, held_out=5, reward_accuracy=float("nan"))
    assert rundir.read_facts(tmp_path) == {"sessions": [session], "held_out": 5, "reward_accuracy": None}


def test_a_readme_of_somebody_else_stays(tmp_path: Path):
    rundir.write_readme(tmp_path)
    ours = (tmp_path / rundir.README).read_text()
    assert all(name in ours for name in ("export/policy", "export/best", "export/model", rundir.REPORT, rundir.LOG))
    rundir.write_readme(tmp_path)
    assert (tmp_path / rundir.README).read_text() == ours
    (tmp_path / rundir.README).write_text("mine")
    rundir.write_readme(tmp_path)
    assert (tmp_path / rundir.README).read_text() == "mine"


def test_summary_round_trip(tmp_path: Path):
    assert rundir.read_summary(tmp_path) == {}
    rundir.write_summary(tmp_path, {"before": {"reward": float("nan")}, "versions": {"jax": "0.10"}, "run": tmp_path})
    assert rundir.read_summary(tmp_path)["before"] == {"reward": None}
    assert json.loads((tmp_path / "summary.json").read_text())["run"] == str(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]  # no temporary file is left
