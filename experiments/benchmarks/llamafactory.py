"""One PPO file of LLaMA-Factory as a command of its own program and as one of ours, in turns.

    python -m experiments.benchmarks.llamafactory

SmolLM2-135M with LoRA 16 on all maps, a full reward model of the same size (its head drawn at random: what it says does
not matter here), 128 prompts of real text, 32 an update in micro-batches of 8, answers of up to 24 tokens, 4 epochs, 4
updates. Their program is installed into an environment of its own, once. The folder of `--run-dir` has the file, so
that both can be run by hand. A command's seconds are those of everything: imports, loading, compiling, our evaluations
before and after, saving; our first one finds no program cached, the later ones do. Seconds of an update are those
between the first record of a run and its last.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import save_file

from experiments import movie_reviews
from experiments.benchmarks.side_by_side import TORCH, Peer, install
from ppo_jax.cli.parse import parse
from ppo_jax.data import assets
from ppo_jax.data.assets import cache_dir
from ppo_jax.models.files import hf
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.runs.output.plain_yaml import write_yaml

NEEDED = "transformers==4.51.3 accelerate==1.7.0 datasets==3.6.0 peft==0.15.2 tyro<0.9 omegaconf fire scipy einops"
NEEDED += " sentencepiece tiktoken protobuf pydantic"
PEER = Peer("llamafactory", (), (TORCH, ("--no-deps", "llamafactory==0.9.3", "trl==0.9.6"), tuple(NEEDED.split())))
WORDS = 12  # of a sentence make a prompt: 15 tokens, at most some 25
FILE: dict[str, Any] = {
    "stage": "ppo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_target": "all",
    "reward_model_type": "full",
    "dataset": "prompts",
    "template": "empty",
    "cutoff_len": 64,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "ppo_buffer_size": 1,
    "ppo_epochs": 4,
    "max_new_tokens": 24,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "learning_rate": 1.0e-5,
    "max_steps": 4,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 500,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
}


@dataclasses.dataclass(frozen=True)
class Commands:
    """What is measured."""

    environments: Path = cache_dir() / "peers"
    """Their program is installed here."""
    repeats: int = 2
    """So many commands of each program are run."""
    run_dir: Path = Path("runs/benchmarks/llamafactory")
    """Model, prompts, the file and both runs go into this directory."""


def main(args: list[str] | None = None) -> None:
    settings = parse(Commands, args, prog="experiments.benchmarks.llamafactory")
    where = settings.run_dir.resolve()
    file = prepare(where, load_model(assets.smollm2()))
    out = {"theirs": where / "theirs", "ours": where / "ours"}
    ours = [sys.executable, "-m", "ppo_jax.cli.main", "llamafactory", str(file), "--set", f"output_dir={out['ours']}"]
    program = install(settings.environments / PEER.module, PEER).with_name("llamafactory-cli")
    commands = {"theirs": [str(program), "train", str(file)], "ours": ours}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as programs:
        for repeat in range(settings.repeats):
            for name, command in commands.items():
                figures = run(command, where / f"{name}-{repeat}.log", programs)
                update = update_seconds(out[name] / ("trainer_log.jsonl" if name == "theirs" else "metrics.jsonl"))
                found[name].append(figures | {"update_s": update})
                print(name, json.dumps(found[name][-1]), file=sys.stderr)
    (where / "figures.json").write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "commands": found}, indent=1))
    for name, rows in found.items():
        print(f"| {name} | " + " | ".join(", ".join(f"{row[key]:.1f}" for row in rows) for key in rows[0]) + " |")


def prepare(where: Path, model: Model) -> Path:
    """Writes the model, the reward model, the prompts and the file, once; the path of the file."""
    file = where / "ppo.yaml"
    if not file.is_file():
        where.mkdir(parents=True, exist_ok=True)
        for folder in ("model", "reward"):
            hf.save(where / folder, model.config, model.params, model.tokenizer)
        head = np.random.default_rng(0).normal(0, 0.02, (1, model.config.hidden_size)).astype(np.float32)
        head_file = {"v_head.summary.weight": head, "v_head.summary.bias": np.zeros(1, np.float32)}
        save_file(head_file, where / "reward" / "value_head.safetensors")
        texts = [review.text.split() for review in movie_reviews.load()]
        rows = [" ".join(words[:WORDS]) for words in texts if len(words) > WORDS][:128]
        (where / "prompts.json").write_text(
            json.dumps([{"instruction": text, "input": "", "output": "."} for text in rows])
        )
        (where / "dataset_info.json").write_text(json.dumps({"prompts": {"file_name": "prompts.json"}}))
        paths = {"model_name_or_path": "model", "reward_model": "reward", "dataset_dir": "", "output_dir": "theirs"}
        contents = {name: str(where / folder) for name, folder in paths.items()} | FILE
        file.write_text(write_yaml(contents))
    return file


def run(command: list[str], log: Path, programs: str) -> dict[str, float]:
    """Runs a command to its end; its seconds by the clock and of the processors, and its most memory."""
    kept = {"DISABLE_VERSION_CHECK": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    kept |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": programs}
    began, before, most = time.perf_counter(), os.times(), 0
    with open(log, "w") as stream:
        process = psutil.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | kept)
        while process.poll() is None:
            most = max(most, resident(process))
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}; see {log}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": time.perf_counter() - began, "cpu_s": used, "peak_mib": most / 2**20}


def resident(process: psutil.Process) -> int:
    """Bytes in memory of a process and of those that it started."""
    try:
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def update_seconds(log: Path) -> float:
    """Mean seconds of the updates behind the first, from a run's records."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if "elapsed_time" in lines[0]:  # theirs: hours, minutes and whole seconds, put behind those of an earlier run
        times = [seconds_of(line["elapsed_time"]) for line in lines if "loss" in line]
        times = times[max(i for i, time in enumerate(times) if i == 0 or time < times[i - 1]) :]
    else:
        times = [line["time"] for line in lines if line["phase"] == "ppo"]
    return (times[-1] - times[0]) / (len(times) - 1)


def seconds_of(text: str) -> int:
    """Seconds of a time such as "1:02:03"."""
    hours, minutes, seconds = map(int, text.split(":"))
    return (60 * hours + minutes) * 60 + seconds


if __name__ == "__main__":
    main()
