"""Training that goes on with an adapter of the peft library: `--start`, its references, and what comes out."""

import json
import math
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppo_jax.cli import main as cli
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.models.adapters import init_lora
from ppo_jax.models.files import artifacts, peft
from ppo_jax.runs.output import rundir
from tests.small import SMALL, write_stage_files

FEW = "--max-length 16 --held-out 8"
PPO = (
    "ppo --model model --start adapter --reward rewards.py:score --prompts prompts.txt --held-out 4 --seed 1 "
    "--loop.updates 1 --loop.batch-size 4 --loop.checkpoint-every 1 --ppo.sampling.response-length 3 --ppo.epochs 1 "
    "--ppo.num-minibatches 1 --hyper.learning-rate 1e-2"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with data, and an adapter on its top layer whose scale, 2.5, is nobody's default."""
    folder = tmp_path_factory.mktemp("start")
    write_stage_files(folder)
    fresh = init_lora(jax.random.key(0), SMALL, 2, 5.0, ("q", "down"), first_layer=1)
    rng = np.random.default_rng(0)
    peft.save(
        folder / "adapter", jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), fresh), SMALL, ""
    )
    (folder / "prompts.txt").write_text("".join(f"{a}{b}\n" for a in "abcd" for b in "abcde"))
    (folder / "rewards.py").write_text(
        "def score(prompts, responses, metadata):\n    return [float(len(text)) for text in responses]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


def run(args: str) -> None:
    assert cli.main(shlex.split(args)) == 0


def mistake(args: str, capsys: pytest.CaptureFixture) -> str:
    assert cli.main(shlex.split(args)) == cli.MISTAKE
    return capsys.readouterr().err


def first(folder: str, name: str) -> float:
    return next(line[name] for line in read_jsonl(Path(folder) / rundir.METRICS) if name in line)


def check_export(args: str, to: str) -> None:
    """The same adapter again, in peft's format: as large, as strong, and trained."""
    run(f"export {args} --to {to} --format peft")
    before, after = (json.loads((Path(where) / peft.CONFIG).read_text()) for where in ("adapter", to))
    assert after == before | {"base_model_name_or_path": "model"}
    old, new = (load_file(Path(where) / peft.ARRAYS) for where in ("adapter", to))
    assert {name: array.shape for name, array in old.items()} == {name: array.shape for name, array in new.items()}
    moved = max(float(np.abs(new[name] - old[name]).max()) for name in old)
    assert 0 < moved < 0.2


def dpo(folder: str, start: str, reference: str, more: str = "") -> str:
    return (
        f"dpo --model model --pairs pairs.jsonl --start {start} --dpo.reference {reference} --run-dir {folder} {FEW} "
        f"--dpo.steps 2 --dpo.batch-size 8 --dpo.learning-rate 1e-2 {more}"
    )


def test_dpo_goes_on_with_an_adapter_that_is_its_reference(capsys: pytest.CaptureFixture) -> None:
    """A policy that is its reference has a loss of log 2 and no margin; another adapter is another run."""
    run(dpo("dpo", "adapter", "start"))
    assert abs(first("dpo", "heldout_loss") - math.log(2)) < 1e-6 and abs(first("dpo", "heldout_margin")) < 1e-5
    check_export("dpo", "dpo-peft")
    other = Path("other")
    other.mkdir()
    (other / peft.CONFIG).write_text((Path("adapter") / peft.CONFIG).read_text())
    arrays = {name: array + 1 for name, array in load_file(Path("adapter") / peft.ARRAYS).items()}
    save_file(arrays, other / peft.ARRAYS, {"format": "pt"})
    assert "start: 4 arrays" in mistake(dpo("dpo", "other", "start", "--resume --dpo.epochs 2"), capsys)


@pytest.mark.long
def test_dpo_goes_on_with_an_adapter_and_measures_from_the_base() -> None:
    run(dpo("dpo-base", "adapter", "base"))
    assert abs(first("dpo-base", "heldout_margin")) > 1e-2
    check_export("dpo-base", "dpo-base-peft")


def test_ppo_goes_on_with_an_adapter_and_measures_from_it() -> None:
    """Before training the KL is 0; a checkpoint's policy has the adapter's own scale."""
    run(f"{PPO} --ppo.kl.reference start --run-dir ppo")
    assert abs(first("ppo", "kl")) < 1e-5
    check_export("ppo --step 1", "ppo-peft")


@pytest.mark.long
def test_ppo_that_goes_on_with_an_adapter_is_resumed_and_may_measure_from_the_base() -> None:
    run(f"{PPO} --run-dir ppo-base")
    assert abs(first("ppo-base", "kl")) > 1e-2
    run(f"{PPO} --loop.updates 2 --resume yes --run-dir ppo-base")
    lines = read_jsonl(Path("ppo-base") / rundir.METRICS)
    assert [line["step"] for line in lines if line["phase"] == "ppo"] == [1, 2]


@pytest.mark.long
def test_sft_goes_on_with_an_adapter() -> None:
    run(f"sft --model model --data sft.jsonl --start adapter --run-dir sft {FEW} --sft.steps 2 --sft.batch-size 8")
    check_export("sft", "sft-peft")


def test_a_reward_model_goes_on_with_an_adapter() -> None:
    """Its head is fitted on what the adapter makes of the texts; with no epochs that is all."""
    run(
        f"reward --model model --ratings ratings.jsonl --start adapter --run-dir rm {FEW} --reward.epochs 0 "
        "--reward.batch-size 8"
    )
    found = artifacts.load("rm/export/reward", "reward")
    peft.save(Path("rm-peft"), found.adapter, SMALL, "")
    assert (Path("rm-peft") / peft.ARRAYS).read_bytes() == (Path("adapter") / peft.ARRAYS).read_bytes()
    assert {name: (pair.a.shape, pair.scale) for name, pair in found.adapter["lora"].items()} == {
        "q": ((1, 16, 2), 2.5), "down": ((1, 24, 2), 2.5),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("dpo --pairs pairs.jsonl --start model", "is no adapter of the peft library"),
        ("dpo --pairs pairs.jsonl --start adapter --adapter.rank 4", "--start says itself what is trained"),
        ("dpo --pairs pairs.jsonl --dpo.reference start", "--dpo.reference start needs --start"),
        (f"{PPO.replace('--start adapter', '')} --ppo.kl.reference start", "--ppo.kl.reference start needs --start"),
        ("reward --pairs pairs.jsonl --start adapter --reward.depth 1", "--start says itself what is trained"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_before_anything_is_written(
    args: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    assert said in mistake(f"{args} --model model --run-dir never", capsys)
    assert not Path("never").exists()
