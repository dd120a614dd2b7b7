"""metrics: files survive a crash, the writers write what they were given."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ppo_jax.data.jsonl import append_jsonl, read_jsonl, truncate_jsonl
from ppo_jax.runs.output import writers as metrics
from ppo_jax.runs.output.tensorboard import tensorboard_writer
from tests.disk import small_disk


def test_jsonl_is_strict_json_with_null_for_nan(tmp_path: Path):
    write = metrics.jsonl_writer(tmp_path / "metrics.jsonl")
    write(3, "ppo", {"reward": float("nan"), "kl": np.float32(0.5), "ratio": float("inf")})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record["time"] > 1.7e9
    del record["time"]
    assert record == {"step": 3, "phase": "ppo", "reward": None, "kl": 0.5, "ratio": "Infinity"}


def test_jsonl_is_on_disk_when_write_returns(tmp_path: Path):
    write = metrics.jsonl_writer(tmp_path / "m.jsonl")
    for step in range(3):
        write(step, "ppo", {"reward": step})
        assert [r["step"] for r in read_jsonl(tmp_path / "m.jsonl")] == list(range(step + 1))


def test_value_named_as_a_column_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="'time'"):
        metrics.jsonl_writer(tmp_path / "m.jsonl")(0, "ppo", {"time": 1.0})


@pytest.mark.parametrize("torn", [b'{"step": 2, "pha', b'{"step": 2, "text": "\xc3', b"12"])
def test_torn_last_line_is_tolerated_and_does_not_spoil_the_next(tmp_path: Path, torn: bytes):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "phase": "ppo"}\n' + torn)
    assert [r["step"] for r in read_jsonl(path)] == [1]
    metrics.jsonl_writer(path)(2, "ppo", {})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]


def test_whole_last_line_without_newline_is_kept(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "phase": "ppo"}')
    metrics.jsonl_writer(path)(2, "ppo", {})
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]


def test_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 3"):
        read_jsonl(path)
    with pytest.raises(ValueError, match="line 3"):
        truncate_jsonl(path, 1)
    assert path.read_text().count("\n") == 4  # nothing was lost


def test_truncate_drops_later_steps_of_the_named_phases_only(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    write = metrics.jsonl_writer(path)
    for phase, steps in (("reward", (100, 300)), ("ppo", (1, 2, 3)), ("eval", (0, 3))):
        for step in steps:
            write(step, phase, {"x": 1.0})
    path.write_bytes(path.read_bytes() + b'{"step": 4, "ph')
    before = path.read_bytes().splitlines()
    assert truncate_jsonl(path, 2, phases=("ppo", "eval")) == 2
    left = [(r["phase"], r["step"]) for r in read_jsonl(path)]
    assert left == [("reward", 100), ("reward", 300), ("ppo", 1), ("ppo", 2), ("eval", 0)]
    assert set(path.read_bytes().splitlines()) <= set(before)  # kept lines byte for byte
    assert truncate_jsonl(path, 2) == 2  # without phases, all
    assert truncate_jsonl(tmp_path / "missing.jsonl", 2) == 0


def test_combine_calls_all_in_order_and_nothing_is_fine():
    calls = []
    writers = [lambda *a, n=n: calls.append((n, *a)) for n in "ab"]
    metrics.combine(writers)(1, "ppo", {"x": 2.0})
    assert calls == [("a", 1, "ppo", {"x": 2.0}), ("b", 1, "ppo", {"x": 2.0})]
    metrics.combine([])(1, "ppo", {"x": 2.0})


def events(folder: Path) -> list:
    """Reads TFRecords by their layout: length u64, its CRC u32, payload, its CRC u32."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_tensorboard_events_are_readable_and_a_resume_purges(tmp_path: Path):
    code = """if True:
        import math, sys
        from ppo_jax.runs.output.tensorboard import tensorboard_writer
        first = tensorboard_writer(sys.argv[1])
        first(1, "ppo", {"reward": 0.5, "kl": math.nan})
        first(2, "ppo", {"reward": 0.25})
        first(9, "reward", {"loss": 0.75})
        again = tensorboard_writer(sys.argv[1])  # as a resumed process would do update 2 again
        again(2, "ppo", {"reward": 0.125})
    """  # a process of its own: nothing may be lost when it ends
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path / "ppo") for v in e.summary.value]
    assert scalars == [(1, "reward", 0.5), (2, "reward", 0.25), (2, "reward", 0.125)]  # NaN: nothing to draw
    starts = [e.step for e in events(tmp_path / "ppo") if e.HasField("session_log")]
    assert starts[-1] == 2  # TensorBoard hides what came before from step 2 on
    assert [v.simple_value for e in events(tmp_path / "reward") for v in e.summary.value] == [0.75]


def test_missing_tensorboard_is_one_notice_and_the_run_goes_on(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    notices = []
    write = tensorboard_writer(tmp_path, notify=notices.append)
    write(1, "ppo", {"reward": 1.0})
    write(2, "ppo", {"reward": 1.0})
    assert len(notices) == 1 and "pip install 'tensorboardX<3,>=2.6'" in notices[0]
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_again_is_recorded_once(tmp_path: Path):
    """A reward model that is trained anew by the next process; other phases stay."""
    path = tmp_path / "m.jsonl"
    first = metrics.jsonl_writer(path)
    for phase, steps in (("reward", (0, 1, 2)), ("ppo", (1,))):
        for step in steps:
            first(step, phase, {"x": 1.0})
    again = metrics.jsonl_writer(path)
    again(0, "reward", {"x": 2.0})
    again(1, "reward", {"x": 2.0})
    again(1, "reward", {"x": 3.0})  # within one process nothing is dropped
    assert [(r["phase"], r["step"], r["x"]) for r in read_jsonl(path)] == [
        ("ppo", 1, 1.0), ("reward", 0, 2.0), ("reward", 1, 2.0), ("reward", 1, 3.0),
    ]  # fmt: skip


def test_a_writer_that_fails_for_a_while_loses_nothing(tmp_path: Path):
    folder = tmp_path / "run"
    said: list[str] = []
    write = metrics.resilient(metrics.jsonl_writer(folder / "m.jsonl"), said.append, "m.jsonl")
    for step in (1, 2):
        write(step, "ppo", {"x": float(step)})  # there is no such directory
    assert len(said) == 1 and said[0].startswith("m.jsonl cannot be written") and str(folder) in said[0]
    folder.mkdir()
    write()
    assert [r["step"] for r in read_jsonl(folder / "m.jsonl")] == [1, 2]
    assert len(said) == 2 and "written again" in said[1]
    write(3, "ppo", {"x": 3.0})
    assert [r["step"] for r in read_jsonl(folder / "m.jsonl")] == [1, 2, 3] and len(said) == 2
    with pytest.raises(ValueError, match="columns of their own"):  # a mistake is no fault of the disk
        write(4, "ppo", {"time": 0.0})


def test_a_full_disk_leaves_no_half_line(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    append_jsonl(path, [{"step": 1}])
    with small_disk(60), pytest.raises(OSError, match="File too large"):
        append_jsonl(path, [{"step": 2, "text": "x" * 100}])
    assert path.read_text() == '{"step": 1}\n'


def test_tensorboard_on_a_full_disk_raises_here_and_goes_on_later(tmp_path: Path):
    write = tensorboard_writer(tmp_path)
    write(1, "ppo", {"reward": 1.0})
    with small_disk(50), pytest.raises(OSError):
        for step in range(2, 2000):  # more than a buffer holds
            write(step, "ppo", {"reward": float(step)})
    write(3, "ppo", {"reward": 3.0})  # in a file of its own
    newest = max((tmp_path / "ppo").iterdir(), key=lambda file: file.name.rsplit(".", 1)[1])
    assert newest.stat().st_size and len(list((tmp_path / "ppo").iterdir())) == 2
