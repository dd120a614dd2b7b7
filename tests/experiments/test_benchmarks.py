"""What the benchmarks make of their measurements, by hand; the workers themselves are rehearsed with --tiny."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import growth
from experiments.benchmarks.llamafactory import update_seconds
from experiments.benchmarks.side_by_side import PEERS, install, summary, table
from experiments.benchmarks.update_profile import Span, read_kinds, share_out
from experiments.benchmarks.workloads import WORKLOADS, Clock, Shape, Workload, find_workload
from ppo_jax.ops.logprobs import entropy


def test_operations_of_an_update_are_those_counted_by_hand() -> None:
    """One layer of width 2, one head of 2, MLP 3, vocabulary 5; one row of 1 + 1 tokens, one epoch."""
    shape = Shape(vocabulary=5, width=2, layers=1, heads=1, kv_heads=1, mlp=3)
    weights = 4 * 2 * 2 + 3 * 2 * 3  # q k v o, gate up down
    assert shape.products == weights
    trunk, scores, table = 2 * 2 * weights, 2 * (2 * 2 * 2 * 2), 2 * 2 * 5  # 2 tokens; q k' and w v; 1 response token
    work = Workload(shape, batch=1, prompt=1, response=1, epochs=1)
    assert work.update_flops() == (trunk + scores + table) + 3 * (trunk + scores + table)
    lora = Workload(shape, batch=1, prompt=1, response=1, epochs=1, adapter="lora")
    assert lora.update_flops() == (trunk + scores + table) + 2 * (trunk + table) + 3 * scores
    shape = dataclasses.replace(shape, layers=2)  # the upper one is trained, and that of the reward is another
    top = Workload(shape, batch=1, prompt=1, response=1, epochs=1, adapter="lora", layers=1, reward="lora")
    assert top.update_flops() == (2 * trunk + 2 * scores + table) + (trunk + scores) + 2 * (trunk + table) + 3 * scores


def test_every_workload_has_a_rehearsal_and_every_peer_does_some_of_them() -> None:
    for name, work in WORKLOADS.items():
        tiny = find_workload(f"tiny:{name}")
        assert tiny.tokens < work.tokens / 10 and tiny.batch % tiny.micro_batches == 0
        assert (tiny.adapter, tiny.own_critic, tiny.reward) == (work.adapter, work.own_critic, work.reward)
    assert {name for peer in PEERS.values() for name in peer.workloads} <= WORKLOADS.keys()


def test_a_clock_adds_up_by_phase_and_returns_what_the_work_returns() -> None:
    clock = Clock()
    clock.begin()
    assert clock.time("a", divmod, 7, 2) == (3, 1) and clock.time("a", sorted, [2, 1], reverse=True) == [2, 1]
    assert list(clock.iterations[0]) == ["a"] and all(seconds >= 0 for seconds in clock.iterations[0]["a"])


def test_figures_are_medians_over_all_processes_without_their_first_iterations() -> None:
    def record(*updates: float, **more: float) -> dict:
        return {"iterations": [{"generate": [1, 2], "update": [u, 2 * u]} for u in updates], "peak_mib": 100} | more

    row = summary("T", [record(90, 3, 5), record(70, 4, 40, decode_ms=7.0, decode_floor_ms=5.0, product_gflops=100.0)])
    assert row["wall"]["update"] == 4.5 and row["cpu"]["update"] == 9 and row["wall"]["whole"] == 5.5
    assert row["wall"]["first"] == [91, 71] and row["wall"]["spread"] == [4, 41] and row["peak_mib"] == [100, 100]
    assert row["update_gflops"] == WORKLOADS["T"].update_flops() / 4.5 / 1e9
    slower = summary("T", [record(9, 9), record(9, 9)])
    lines = list(table([{"workload": "T", "trainer": "ours"} | row, {"workload": "T", "trainer": "peer"} | slower]))
    assert len({line.count("|") for line in lines}) == 1
    assert "7.0 (5.0)" in lines[2] and "91.0 / 71.0 | 100 / 100" in lines[2] and f"| {20 / 11:.2f} |" in lines[3]


def test_an_environment_is_installed_once(tmp_path, monkeypatch) -> None:
    commands: list[list] = []
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    tmp_path.joinpath("bin").mkdir()
    for _ in range(2):
        install(tmp_path, PEERS["TRL 0.11.4"])
    assert len(commands) == 3 and commands[1][-1] == "torch==2.13.0" and "trl==0.11.4" in commands[2]
    assert json.loads(tmp_path.joinpath("installed.json").read_text())[0] == ["torch==2.13.0"]


def test_growth_is_the_slope_of_logs_beside_that_of_the_operations() -> None:
    """Seconds 1, 8, 64 at sizes 1, 2, 4 grow with the third power; operations 10, 20, 40 with the first."""
    points = [growth.Point(size, size**3, 2 * size**3, 9.0, 10 * size) for size in (1, 2, 4)]
    assert growth.slope([1, 2, 4], [1, 8, 64]) == pytest.approx(3)
    lines = list(growth.table({"batch": points}, 20.0))
    assert len({line.count("|") for line in lines}) == 1
    assert "| 3.00 | 1.00 |" in lines[2] and "(50%)" in lines[2] and "9, 9, 9" in lines[2]


def test_operations_of_an_iteration_are_those_counted_by_hand() -> None:
    """The update's, and for one row of 1 + 1 tokens two passes more (rollout and score), of which one has logits."""
    shape = Shape(vocabulary=5, width=2, layers=1, heads=1, kv_heads=1, mlp=3)
    work = Workload(shape, batch=1, prompt=1, response=1, epochs=1, rank=7)
    weights, scores, table = shape.products, 2 * 2 * 2, 2 * 2 * 5
    assert growth.iteration_flops(work) == work.update_flops() + 2 * 2 * 2 * (weights + scores) + table
    lora = dataclasses.replace(work, adapter="lora")
    ends = 4 * (2 + 2) + 3 * (2 + 3)  # in + out of q k v o, gate up down: 4 passes of 2 tokens at rank 7
    assert growth.iteration_flops(lora) - growth.iteration_flops(work) == (
        lora.update_flops() - work.update_flops() + 4 * 2 * 2 * 7 * ends
    )


@pytest.mark.parametrize("axis", growth.SIZES)
def test_each_axis_changes_one_number(axis: growth.Axis) -> None:
    size = growth.SIZES[axis][0] + 1
    work, base = growth.workload(axis, size), growth.workload("batch", WORKLOADS["T"].batch)
    differ = {name for name, value in vars(work).items() if value != getattr(base, name)}
    differ |= {name for name, value in vars(work.shape).items() if value != getattr(base.shape, name)}
    assert differ - {"shape", "adapter"} == ({axis} if axis != "members" else set())


def test_a_profile_shares_the_clock_among_the_innermost_operations() -> None:
    """Thread a: a loop from 0 to 10 with `x` in 1 to 5. Thread b: `y` in 3 to 9. 3 to 5 is shared, 0 and 9 nobody's."""
    spans = [Span("a", "while.1", 0, 10), Span("a", "x", 1, 5), Span("b", "y", 3, 9)]
    assert share_out(spans) == {"nothing": 2, "x": 3, "y": 5}


def test_a_profile_knows_products_and_the_function_that_an_operation_is_of() -> None:
    def work(x: jax.Array) -> jax.Array:
        return entropy(x @ x.T)

    text = jax.jit(work).lower(jnp.ones((64, 64))).compile().as_text()
    kinds = read_kinds(text)
    assert "products" in kinds.values() and any(kind.startswith("ops/logprobs.py: ") for kind in kinds.values())


def test_seconds_of_an_update_leave_the_first_out(tmp_path) -> None:
    theirs, ours = tmp_path / "trainer_log.jsonl", tmp_path / "metrics.jsonl"
    lines = [{"loss": 1, "elapsed_time": time} for time in ("0:00:58", "0:01:08", "1:00:18")]
    theirs.write_text("\n".join(map(json.dumps, [*lines, {"elapsed_time": "2:00:00"}])))
    assert update_seconds(theirs) == (3618 - 58) / 2
    again = [{"loss": 1, "elapsed_time": time} for time in ("0:00:20", "0:00:21", "0:00:32")]
    theirs.write_text("\n".join(map(json.dumps, [*lines, {"elapsed_time": "2:00:00"}, *again])))
    assert update_seconds(theirs) == 6
    records = [{"phase": "ppo", "time": at} for at in (9.0, 10.0, 14.0)]
    ours.write_text("\n".join(map(json.dumps, [*records, {"phase": "eval", "time": 99.0}])))
    assert update_seconds(ours) == 2.5
