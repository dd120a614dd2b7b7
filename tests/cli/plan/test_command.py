"""The planner: what it refuses, the search, and PPO of a tiny model planned for eight CPUs (and a TPU with libtpu)."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ppo_jax.cli import main as cli
from ppo_jax.cli.plan.chips import CHIPS, GIB, bound, topology
from ppo_jax.cli.plan.command import PlanError, Report, compile_program, make_plan, show, shrink
from ppo_jax.cli.plan.programs import (
    PlanSettings,
    Program,
    arguments,
    check,
    claimed_bytes,
    held_bytes,
    measure,
    model_config,
)
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.config import ModelConfig, ModelOptions
from ppo_jax.models.files.families import config_to_hf
from ppo_jax.parallel.mesh import MeshConfig, make_mesh
from ppo_jax.runs.output import config
from ppo_jax.train.optimizer import OptimizerConfig
from ppo_jax.train.options import CriticConfig, PPOConfig

TINY = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
)
ONE = PPOConfig(epochs=1, num_minibatches=1, logprob_chunk=64)
FULL = AdapterConfig("full")
HAVE_LIBTPU = bool(importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH"))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A directory with a config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(TINY)), encoding="utf-8")
    return str(tmp_path)


def settings(model: str = "llama-3-8b", topology: str = "v5e:2x4", **changes: Any) -> PlanSettings:
    changes = {"mesh": MeshConfig(fsdp=8), **changes}
    return PlanSettings(model, topology, **changes)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v9:2x2"}, "'v9' is unknown; known: v5e, v5p, v6e and cpu, as in v5e:8x8"),
        ({"topology": "v5e"}, "sizes are missing or malformed; write it as in"),
        ({"topology": "v5e:2xx4"}, "sizes are missing or malformed"),
        ({"topology": "v5p:4x4"}, "v5p needs three sides, as in 4x4x4, not 2"),
        ({"topology": "cpu:2x4"}, "cpu needs one number, not 2"),
        ({"model": "llama-3-9b"}, r"neither a directory with a config.json nor a known size; did you mean llama-3-"),
        ({"mesh": MeshConfig(fsdp=4)}, "v5e:2x4 has 8 devices, but --mesh.data 1 x --mesh.fsdp 4 .* makes 4"),
        (
            {"mesh": MeshConfig(tensor=16), "topology": "v5e:4x4"},
            "--mesh.tensor 16 does not divide num_kv_heads=8 of the model; use 8",
        ),
        ({"batch": 30}, "batch_size=30 .*does not divide into num_minibatches=4"),
        ({"batch": 16}, "a micro-batch .* has 4 rows, which mesh.data x mesh.fsdp = 8 does not divide"),
        ({"response_length": 8192}, "prompt and response take 8704 positions; llama-3-8b has 8192"),
        ({"topology": "cpu:8", "search": True}, "--topology cpu:8 does not say how much that is; give --memory GIB"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_compiles(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(settings(**changes))


def test_a_search_on_cpus_knows_what_fits_when_it_is_told() -> None:
    check(settings(topology="cpu:8", search=True, memory=4.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "not a JSON object but list"),
        (b"{", "not JSON"),
        (b'{"model_type": "llama"}', "num_attention_heads is missing"),
        (b'{"model_type": "\xff"}', "not JSON .*utf-8"),
    ],
)
def test_a_damaged_directory_is_named(content: bytes, message: str, tiny: str, capsys: pytest.CaptureFixture) -> None:
    """Also at the command line, which has no traceback for it."""
    (Path(tiny) / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tiny}/config.json: .*({message})"):
        model_config(settings(tiny))
    assert cli.main(["plan", "--model", tiny, "--topology", "cpu:1"]) == cli.MISTAKE
    said = capsys.readouterr().err
    assert "config.json: " in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch": 0}, "batch=0"), ({"programs": ()}, "name at least one"), ({"memory": -1.0}, "memory=-1.0 GiB")],
)
def test_settings_outside_their_range_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_several_responses_to_a_prompt_are_rows_too() -> None:
    """16 prompts of 2 responses in 4 minibatches: 8 rows for 8 devices."""
    check(settings(batch=16, ppo=PPOConfig(group_size=2)))
    with pytest.raises(ValueError, match=r"a micro-batch .* has 4 rows"):
        check(settings(batch=16, ppo=PPOConfig(group_size=2, accumulate=2)))


def test_what_stays_is_what_a_run_holds(tiny: str) -> None:
    """Optimizer, critic and average as the options say, on 8 devices; nothing is compiled."""

    def held_with(ppo: PPOConfig, policy: AdapterConfig = FULL) -> dict[str, int]:
        given = settings(tiny, "cpu:8", policy=policy, ppo=ppo, compute=ModelOptions("float32"))
        mesh = make_mesh(given.mesh)
        return held_bytes(arguments(given, check(given), mesh))

    plain = held_with(PPOConfig())
    assert list(plain) == ["base", "reward", "policy", "optimizer"]
    assert plain["optimizer"] == pytest.approx(2 * plain["policy"], rel=0.01)  # both moments of Adam
    small = held_with(PPOConfig(optimizer=OptimizerConfig("adafactor")))
    assert small["optimizer"] < plain["optimizer"] / 5 and small["policy"] == plain["policy"]
    average = held_with(PPOConfig(ema_decay=0.99))
    assert average == plain | {"average": plain["policy"]}
    critic = held_with(PPOConfig(critic=CriticConfig(own=True, adapter=FULL)), AdapterConfig())
    assert critic["critic"] > critic["policy"] > 0 and critic["optimizer"] > 2 * critic["critic"]
    assert critic["critic"] == pytest.approx(plain["policy"], rel=0.01)
    assert PlanSettings("x", "cpu:1").ppo == PPOConfig()  # what training takes when nothing is said


@pytest.mark.parametrize(("kind", "bits", "blocks"), [("int8", 8, 1), ("int4", 4, 4)])
def test_a_quantised_base_is_counted_in_its_bits(tiny: str, kind: Any, bits: int, blocks: int) -> None:
    """Two layers of four maps of 128 x 128, two of 128 x 256 and one back; scales in float32 by output and block."""
    options = ModelOptions(quantise=kind)
    given = settings(tiny, "cpu:1", mesh=MeshConfig(), batch=4, compute=options, ppo=ONE)
    mesh = make_mesh(MeshConfig())
    wide, narrow = 3 * 128 * 256, 4 * 128 * 128
    scales = blocks * (4 * 128 + 2 * 256 + 128) + (4 * 128 if kind == "int4" else 0)  # down has 256 inputs
    rest = 512 * 128 + 128 + 2 * 2 * 128  # embedding and norms
    assert held_bytes(arguments(given, check(given), mesh))["base"] == (
        2 * (wide + narrow) * bits // 8 + 2 * 4 * scales + 4 * rest
    )


def test_the_kernel_is_that_of_the_planned_platform() -> None:
    assert model_config(settings()).attention == "splash"  # although this process has a CPU
    assert model_config(settings(topology="cpu:8")).attention == "xla"
    assert model_config(settings(compute=ModelOptions(attention="xla"))).attention == "xla"


def test_settings_go_through_yaml_to_the_compiling_process() -> None:
    given = settings(policy=AdapterConfig("full"), programs=("iteration",), search=True)
    assert config.from_yaml(PlanSettings, config.to_yaml(given)) == given


# -- chips and bounds ------------------------------------------------------------------------------------------------


def test_the_chip_table_is_in_the_right_units() -> None:
    """A unit off by 8 or 1000 shows in the ratios that make TPUs TPUs."""
    for chip in CHIPS.values():
        assert 10 * GIB < chip.memory < 200 * GIB
        assert 100e12 < chip.flops < 1e15 and 0.5e12 < chip.bandwidth < 4e12
        assert 150 < chip.flops / chip.bandwidth < 700  # FLOPs per byte at the ridge
        assert 3 < chip.bandwidth / chip.links < 6  # memory is several times as fast as the links
    assert topology("v5p:4x4x4").devices == 64 and topology("v5e:16x16").devices == 256
    assert topology("cpu:3") == ("cpu:3", 3, None)


def test_the_bound_is_the_slowest_resource() -> None:
    chip = CHIPS["v5e"]
    assert bound(chip, 197e12, 0, {}) == (1.0, "compute")
    assert bound(chip, 197e12, 2 * 819e9, {"all-gather": 100e9}) == (2.0, "memory bandwidth")
    assert bound(chip, 197e12, 819e9, {"all-gather": 400e9, "all-reduce": 200e9}) == (3.0, "chip links")
    assert bound(None, 1e12, 1e9, {}) == (0.0, "unknown")


def test_both_ways_in_which_libtpu_runs_out_of_memory_are_read() -> None:
    total = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 29.50G of 15.75G hbm. Exceeded by 13.75G."
    temporaries = "the total memory required for HLO temporaries (512.00M) exceeds available HBM (15.75G)."
    assert claimed_bytes(total) == 29.5 * GIB and claimed_bytes(temporaries) == GIB / 2
    assert claimed_bytes("INTERNAL: something else") is None


# -- search and advice, on a made-up cost of memory ------------------------------------------------------------------


def made_up(name: Program, s: PlanSettings) -> Report:
    """Activations: 32 GiB at remat none, a half at dots, a quarter at full; divided by the micro-batches."""
    activations = 32 * GIB / {"none": 1, "dots": 2, "full": 4}[s.compute.remat] / s.ppo.accumulate
    if name != "update":
        activations = GIB
    held = {"base": 2 * GIB, "reward": 0, "policy": 0, "optimizer": 0}
    work = {"flops": 1e12, "traffic": 1e9, "collectives": {"all-gather": 2**20}}
    sizes = {"arguments": 2 * GIB, "temporary": int(activations), "peak": int(2 * GIB + activations)}
    return {"program": name, "compiled": True, "held": held, **work, **sizes}


def shown(found: Report) -> str:
    console = Console(record=True, width=120)
    show(found, console)
    return console.export_text()


def test_the_search_rematerialises_first_and_then_halves_micro_batches() -> None:
    start = settings(batch=128, compute=ModelOptions("bfloat16", "none"), search=True, memory=5.0)
    said: list[str] = []
    found = make_plan(start, made_up, said.append)
    tried = [(t["remat"], t["accumulate"], t["peak"] / GIB) for t in found["tried"]]
    assert tried == [("none", 1, 34), ("dots", 1, 18), ("full", 1, 10), ("full", 2, 6)]
    assert found["choices"] == {"remat": "full", "accumulate": 4} and found["fits"] is True
    assert "update does not fit; compiling it with --compute.remat dots --ppo.accumulate 1 ..." in said


def test_the_search_ends_where_micro_batches_no_longer_divide_over_the_mesh() -> None:
    found = make_plan(settings(batch=64, search=True, memory=4.0), made_up, lambda text: None)
    assert [t["accumulate"] for t in found["tried"]] == [1] and found["fits"] is False  # the last one is in the report
    assert found["programs"][-1]["choices"] == {"remat": "full", "accumulate": 2}
    text = shown(found)
    assert "search: 1 did not fit; update with --compute.remat full --ppo.accumulate 2 does not fit either" in text
    assert shrink(settings(batch=32)) is None
    grouped = PPOConfig(group_size=2)  # 64 responses: micro-batches of 8 remain
    assert shrink(settings(batch=32, ppo=grouped)) is not None and shrink(settings(batch=16, ppo=grouped)) is None


def test_the_search_is_judged_by_what_it_searched() -> None:
    """A rollout that does not fit says nothing of the update that was found to fit."""

    def heavy_rollout(name: Program, s: PlanSettings) -> Report:
        return made_up(name, s) | ({"peak": 9 * GIB} if name == "rollout" else {})

    start = settings(batch=128, compute=ModelOptions("bfloat16", "dots"), search=True, memory=8.0)
    found = make_plan(dataclasses.replace(start, memory=10.5), made_up, lambda text: None)
    assert "search: 1 did not fit; update with --compute.remat full --ppo.accumulate 1 fits" in shown(found)
    found = make_plan(start, heavy_rollout, lambda text: None)
    assert found["fits"] is False and [p["fits"] for p in found["programs"]] == [False, True, True]
    assert "search: 2 did not fit; update with --compute.remat full --ppo.accumulate 2 fits" in shown(found)
    assert [p["choices"]["remat"] for p in found["programs"]] == ["dots", "dots", "full"]


def test_nothing_is_searched_where_what_stays_is_too_large() -> None:
    compiled: list[str] = []

    def counted(name: Program, s: PlanSettings) -> Report:
        compiled.append(name)
        return made_up(name, s)

    found = make_plan(settings(batch=128, search=True, memory=1.5), counted, lambda text: None)
    assert compiled == ["rollout", "scoring", "update"] and found["tried"] == [] and found["fits"] is False


def test_without_search_a_misfit_brings_advice() -> None:
    start = settings(batch=128, compute=ModelOptions("float32", "dots"), memory=5.0, ppo=PPOConfig())
    report = next(r for r in make_plan(start, made_up, lambda text: None)["programs"] if not r["fits"])
    text = "\n".join(report["advice"])
    for part in ("--compute.dtype bfloat16", "--compute.remat full --ppo.accumulate 1", "--ppo.logprob-chunk 4096"):
        assert part in text
    assert "a smaller --batch than 128" in text and "the base takes 2.00 GiB per device" in text


def test_weights_that_never_fit_are_said_so() -> None:
    full = settings(batch=128, memory=1.0, policy=AdapterConfig("full"))

    def heavy(name: Program, s: PlanSettings) -> Report:
        return made_up(name, s) | {"held": {"base": 2 * GIB, "reward": 0, "policy": 4 * GIB, "optimizer": 8 * GIB}}

    advice = make_plan(full, heavy, lambda text: None)["programs"][0]["advice"]
    assert advice[0].startswith("what stays in memory is too large by itself (base 2.00 GiB")
    assert advice[0].endswith("more devices") and "--mesh.fsdp" not in advice[0]  # there are no copies to give up
    assert advice[1].startswith("--policy.kind lora") and len(advice) == 2
    copies = dataclasses.replace(full, mesh=MeshConfig(data=4, fsdp=2))
    advice = make_plan(copies, heavy, lambda text: None)["programs"][0]["advice"]
    assert advice[0].endswith("more devices, or a larger --mesh.fsdp instead of --mesh.data 4")


def test_the_table_says_compiled_and_names_the_misfit() -> None:
    found = make_plan(settings(batch=128, memory=8.0), made_up, lambda text: None)
    console = Console(record=True, width=80)
    show(found, console)
    text = console.export_text()
    assert "llama-3-8b on v5e:2x4 (8 devices, 8.00 GiB of memory each; fsdp 8)" in text
    assert "per device, compiled, not run" in text and "are those for responses of full length; times are low" in text
    assert "update does not fit (10.00 GiB of 8.00 GiB). What helps:" in text and "scoring does not" not in text
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]] for line in text.splitlines()
            if line.startswith("│")}  # fmt: skip
    assert rows["peak"] == ["3.00 GiB", "3.00 GiB", "10.00 GiB"] and rows["fits"] == ["yes", "yes", "NO"]
    assert rows["takes at least"] == ["0.00508 s"] * 3 and rows["bound by"] == ["compute"] * 3
    assert rows["all-gather"] == ["1.00 MiB"] * 3


# -- the real compilers ----------------------------------------------------------------------------------------------

SMALL = ["--batch", "16", "--prompt-length", "8", "--response-length", "8", "--ppo.num-minibatches", "2"]
PROGRAM_KEYS = {
    "program", "held", "attention", "compiled", "arguments", "temporary", "peak", "flops", "traffic", "collectives",
    "unknown_loops", "fits", "seconds", "binds", "choices", "advice",
}  # fmt: skip


def test_ppo_of_a_tiny_model_is_planned_for_eight_cpus(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    assert cli.main(["plan", "--model", tiny, "--topology", "cpu:8", *mesh, *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["how"] == "compiled, not run" and found["devices"] == 8 and found["memory"] is None
    assert found["fits"] is None and found["choices"] == {"remat": "full", "accumulate": 1}
    programs = {report["program"]: report for report in found["programs"]}
    assert list(programs) == ["rollout", "scoring", "update"]
    for report in programs.values():
        assert set(report) == PROGRAM_KEYS and report["compiled"] and report["fits"] is None
        assert 0 < report["arguments"] < report["peak"] and report["unknown_loops"] == 0
    # 2 layers of 2 * (4 * 128^2 + 3 * 128 * 256) FLOPs per token without attention and vocabulary, over 8 devices.
    token = 2 * 2 * (4 * 128**2 + 3 * 128 * 256)
    sequences = 16 * (8 + 8) * token / 8
    assert programs["scoring"]["flops"] == pytest.approx(sequences, rel=0.35)
    assert sequences < programs["rollout"]["flops"] < 3 * sequences
    # Four epochs, each forward, again and backward: at least 4 * 3 times the forward pass.
    assert 4 * 3 * sequences < programs["update"]["flops"] < 4 * 8 * sequences
    assert programs["update"]["collectives"]["all-reduce"] > 0


def test_a_plan_for_one_cpu_knows_that_the_rollout_holds_the_layers_twice(tiny: str) -> None:
    """As a run on one CPU compiles it. Otherwise one layer at a time is copied: 1.15 layers of temporaries in all."""
    layer = 4 * (4 * 128**2 + 3 * 128 * 256)
    one = settings(tiny, "cpu:1", batch=4, prompt_length=4, response_length=4, mesh=MeshConfig(), policy=FULL)
    one = dataclasses.replace(one, compute=ModelOptions("float32"))
    assert measure("rollout", one)["temporary"] > 2 * layer


def test_a_platform_that_is_not_there_is_named_and_another_compiled(tiny: str) -> None:
    """For a TPU where libtpu is installed; elsewhere the command says what to install."""
    tpu = settings(
        tiny, "v5e:2x4", batch=8, prompt_length=64, response_length=64, ppo=ONE, mesh=MeshConfig(fsdp=4, tensor=2)
    )
    if not HAVE_LIBTPU:
        with pytest.raises(ValueError, match=r"needs libtpu: pip install 'jax\[tpu\].*--topology cpu:8"):
            compile_program("scoring", tpu)
        tpu = dataclasses.replace(tpu, topology="cpu:8")
    report = make_plan(dataclasses.replace(tpu, programs=("scoring",)), compile_program, lambda text: None)
    (scoring,) = report["programs"]
    assert scoring["attention"] == ("splash" if HAVE_LIBTPU else "xla")
    assert scoring["flops"] > 8 * 128 * 4 * (4 * 128**2 + 3 * 128 * 256) / 8 and scoring["unknown_loops"] == 0
    if HAVE_LIBTPU:
        assert scoring["fits"] and scoring["seconds"] > 0 and scoring["binds"] in ("compute", "memory bandwidth")


def test_a_compiler_that_fails_is_reported_with_its_last_words(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    with pytest.raises(PlanError, match="compiling scoring for cpu:8 ended with -?[0-9]+\n(?s:.*)no_such_flag"):
        compile_program("scoring", settings(tiny, "cpu:8", batch=8, ppo=ONE))


def temporary(vocabulary: int, rows: int, length: int, chunk: int, directory: Path) -> int:
    """Temporary bytes of the update on one CPU: two layers of width 128, `length` slots each of prompt and response."""
    described = config_to_hf(dataclasses.replace(TINY, vocab_size=vocabulary))
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")
    given = PlanSettings(
        str(directory),
        "cpu:1",
        batch=rows,
        prompt_length=length,
        response_length=length,
        policy=AdapterConfig(rank=1, targets=("q",)),
        compute=ModelOptions("float32", "full"),
        ppo=dataclasses.replace(ONE, logprob_chunk=chunk),
    )
    return measure("update", given)["temporary"]


def test_memory_is_linear_in_the_batch(tmp_path: Path) -> None:
    once, twice, thrice = (temporary(512, rows, 64, 64, tmp_path) for rows in (8, 16, 24))
    assert thrice - twice == pytest.approx(twice - once, rel=0.1) and twice > 1.8 * once


def test_the_chunk_takes_the_vocabulary_out_of_the_peak(tmp_path: Path) -> None:
    """[b, T, V] logits in float32 are 67 MB; without the chunk there are several such arrays."""
    logits = 4 * 8 * 64 * 32768
    assert temporary(32768, 8, 64, 0, tmp_path) > 2 * logits > 3 * temporary(32768, 8, 64, 64, tmp_path)
