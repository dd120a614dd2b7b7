"""What `ppo-jax sft` and `ppo` do: files -> records -> token rows -> a stage -> a run directory.

Everything that a user may have got wrong is looked at before the run directory is touched, so that a mistake beside
`--overwrite` deletes nothing.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ppo_jax import config, distributed, report, rundir, sharding
from ppo_jax.data import (
    TooLong,
    encode_sft,
    read_prompts,
    read_sft,
)
from ppo_jax.display import Screen, progress
from ppo_jax.generate import check_room, prompt_set, with_stops
from ppo_jax.models.adapters import init_adapter
from ppo_jax.processes import created, is_first
from ppo_jax.reward_choice import choose_reward
from ppo_jax.runs import Model, Setup, environment, load_model, run_ppo
from ppo_jax.settings import PPOSettings, RunSettings, SFTSettings
from ppo_jax.stages import MODEL, run_sft, write_model
from ppo_jax.train.offline import OfflineConfig
from ppo_jax.train.state import key_stream

T = TypeVar("T")


@contextlib.contextmanager
def on_mesh(settings: RunSettings, rows: int, what: str) -> Iterator[None]:
    """Joins the other processes, if there are any; inside the block everything runs on the mesh of the settings.

    Args:
      rows: how many the devices work on at once.
      what: says so in the message, with the options that decide it.

    Raises ValueError when the rows do not spread evenly over the devices that cut the batch.
    """
    sharding.check_rows(rows, settings.mesh, what)
    distributed.start(settings.distributed)
    with distributed.use_mesh(settings.mesh):
        yield


def micro_batch(option: str, config: OfflineConfig) -> tuple[int, str]:
    """The arguments of `on_mesh` for a configuration under `--option`."""
    what = f"a micro-batch (--{option}.batch-size {config.batch_size} / --{option}.accumulate {config.accumulate})"
    return config.micro_batch, what


def sft(settings: SFTSettings) -> None:
    """`ppo-jax sft`."""
    with on_mesh(settings, *micro_batch("sft", settings.sft)):
        _sft(settings)


def _sft(settings: SFTSettings) -> None:
    model = load_model(settings.model, settings.compute)
    records = set_apart(read_sft(settings.data), settings.held_out, settings.seed)
    train, held_out = (encode_sft(part, model.tokenizer, settings.max_length, settings.too_long) for part in records)
    check_room(model, [*train.rows, *held_out.rows])
    if settings.sft.batch_size > len(train.rows):
        raise ValueError(too_few("--sft.batch-size", settings.sft.batch_size, len(train.rows), settings.data))
    directory = distributed.run_directory(settings.run_dir, lambda: open_directory(settings))
    with progress("ppo-jax sft", is_first()) as screen:
        say_long(screen, train.too_long + held_out.too_long, settings.max_length, settings.too_long)
        result = run_sft(directory, model, settings.adapter, train, held_out, settings.sft, settings.seed, screen)
        screen.message(
            f"held-out perplexity {result.before['perplexity']:.2f} -> {result.after['perplexity']:.2f}; "
            f"the model is at {result.path}"
        )


def ppo(settings: PPOSettings) -> None:
    """`ppo-jax ppo`."""
    distributed.start(settings.distributed)
    settings.ppo.check_batch(settings.loop.batch_size)
    distributed.check_rows(settings.mesh, settings.loop.batch_size, settings.ppo)
    with distributed.use_mesh(settings.mesh):
        _ppo(settings)


def _ppo(settings: PPOSettings) -> None:
    model = load_model(settings.model, settings.compute)
    sampling = with_stops(settings.ppo.sampling, model)
    chosen = choose_reward(settings.reward, settings.scoring, model, sampling.stop_ids)
    records = set_apart(read_prompts(settings.prompts), settings.held_out, settings.seed)
    (prompts, long), (held_out, long_too) = (
        prompt_set(part, model, settings.max_prompt, settings.too_long) for part in records
    )
    check_room(model, [*prompts.rows, *held_out.rows], sampling.response_length, "--ppo.sampling.response-length")
    if settings.loop.batch_size > len(prompts.rows):
        raise ValueError(too_few("--loop.batch-size", settings.loop.batch_size, len(prompts.rows), settings.prompts))
    key = key_stream(settings.seed, "adapter")
    setup = Setup(
        model=model,
        adapter=created(lambda k, base: init_adapter(k, base, model.config, settings.policy), key, model.params),
        prompts=prompts,
        held_out=held_out,
        ppo=dataclasses.replace(settings.ppo, sampling=sampling),
        hyper=settings.hyper,
        loop=settings.loop,
        seed=settings.seed,
        pretrain=_pretraining(settings, model),
        device_reward=chosen.device,
        reward_params=chosen.params,
        host_reward=chosen.host,
        failures=chosen.failures,
        config=_repeatable(settings),
        reward_name=chosen.name,
    )
    directory = distributed.run_directory(settings.run_dir, lambda: open_directory(settings))
    with progress("ppo-jax ppo", is_first()) as screen:
        say_long(screen, long + long_too, settings.max_prompt, settings.too_long)
        for notice in chosen.notices:
            screen.message(notice)
        result = run_ppo(directory, setup, screen, settings.resume)
        exported = directory / rundir.EXPORT / MODEL
        write_model(exported, model, result.policy.adapter)
        facts = environment()
        summary: report.Summary = {
            "title": f"PPO on {settings.prompts.name}",
            "task": f"Base and reference: {settings.model}. Reward: {', '.join(settings.reward)}.",
            "before": result.before,
            "after": result.after,
            "prompts": len(held_out.rows),
            "seed": settings.seed,
            "date": date.today().isoformat(),
            "versions": facts["versions"],
            "machine": facts["machine"],
        }
        if "accuracy" in chosen.meta:
            summary |= {"reward_accuracy": chosen.meta["accuracy"], "reward_accuracy_note": "held-out pairs"}
        page = report.write(directory, summary)
        screen.message(f"the model is at {exported}; report: {page}")


def _pretraining(settings: PPOSettings, model: Model) -> list[list[int]]:
    """Token rows of PPO-ptx, no longer than prompt and response together."""
    if (settings.pretrain is None) != (settings.hyper.ptx_coef == 0):
        raise ValueError("PPO-ptx needs both --pretrain FILE and a positive --hyper.ptx-coef")
    if settings.pretrain is None:
        return []
    longest = settings.max_prompt + settings.ppo.sampling.response_length
    encoded = encode_sft(read_sft(settings.pretrain), model.tokenizer, longest, settings.too_long)
    return [list(row) for row in encoded.rows]


def set_apart(records: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """(training, held-out) records: `count` random ones are held out, at most a fifth; none left: both are all."""
    if count < 0:
        raise ValueError(f"--held-out {count} must not be negative")
    count = min(count, len(records) // 5)
    if not count:
        return list(records), list(records)
    chosen = set(np.random.default_rng(seed).permutation(len(records))[:count].tolist())
    return [r for i, r in enumerate(records) if i not in chosen], [r for i, r in enumerate(records) if i in chosen]


def too_few(option: str, batch_size: int, rows: int, path: Path) -> str:
    """What is said of a batch that has more rows than there are."""
    return f"{option} {batch_size}, but {path} leaves only {rows} to train on; lower it or give more data"


def open_directory(settings: Any) -> Path:
    """The run directory, with the settings that repeat the run in it."""
    directory = rundir.open_run(settings.run_dir, getattr(settings, "resume", "no"), settings.overwrite)
    if not (directory / rundir.CONFIG).exists():  # a resumed run's is replaced when its checkpoint has been read
        (directory / rundir.CONFIG).write_text(_repeatable(settings), encoding="utf-8")
    return directory


def _repeatable(settings: Any) -> str:
    """As YAML. Passed back with --config it must neither delete nor continue anything by itself."""
    off: dict[str, Any] = {"overwrite": False} | ({"resume": "no"} if hasattr(settings, "resume") else {})
    if hasattr(settings, "distributed"):  # where a process ran is not part of what it did
        off["distributed"] = distributed.DistributedConfig()
    return config.to_yaml(dataclasses.replace(settings, **off))


def say_long(screen: Screen, count: int, limit: int, too_long: TooLong) -> None:
    """Says how many texts were too long and what was done with them."""
    if count:
        done = "dropped" if too_long == "drop" else "truncated from the left"
        screen.message(f"{count} texts were longer than {limit} tokens and were {done}")
