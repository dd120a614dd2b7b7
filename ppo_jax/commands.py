"""What `ppo-jax sft`, `reward`, `ppo` and `generate` do: files -> records -> token rows -> a stage -> a run directory.

Everything that a user may have got wrong is looked at before the run directory is touched, so that a mistake beside
`--overwrite` deletes nothing.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import artifacts, config, report, rundir
from ppo_jax.data import (
    PromptRecord,
    TooLong,
    encode_pairs,
    encode_prompts,
    encode_sft,
    left_pad,
    read_pairs,
    read_prompts,
    read_sft,
    render,
)
from ppo_jax.display import Screen, progress
from ppo_jax.models.adapters import init_adapter
from ppo_jax.models.heads import ValueHead
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rollout import Sampling, generate
from ppo_jax.runs import Model, PromptSet, Setup, decode_responses, environment, load_model, run_ppo
from ppo_jax.settings import GenerateSettings, PPOSettings, RewardSettings, SFTSettings
from ppo_jax.stages import MODEL, POLICY, REWARD, export_model, run_reward, run_sft
from ppo_jax.train.state import key_stream
from ppo_jax.types import Policy, Prompts

T = TypeVar("T")


def sft(settings: SFTSettings) -> None:
    """`ppo-jax sft`."""
    model = load_model(settings.model)
    records = set_apart(read_sft(settings.data), settings.held_out, settings.seed)
    train, held_out = (encode_sft(part, model.tokenizer, settings.max_length, settings.too_long) for part in records)
    _check_room(model, [*train.rows, *held_out.rows])
    if settings.sft.batch_size > len(train.rows):
        raise ValueError(_too_few("--sft.batch-size", settings.sft.batch_size, len(train.rows), settings.data))
    directory = _open(settings)
    with progress("ppo-jax sft") as screen:
        _say_long(screen, train.too_long + held_out.too_long, settings.max_length, settings.too_long)
        result = run_sft(directory, model, settings.adapter, train, held_out, settings.sft, settings.seed, screen)
        screen.message(
            f"held-out perplexity {result.before['perplexity']:.2f} -> {result.after['perplexity']:.2f}; "
            f"the model is at {result.model.name}"
        )


def reward(settings: RewardSettings) -> None:
    """`ppo-jax reward`."""
    model = load_model(settings.model)
    settings.reward.trunk(model.config)  # raises before the directory is touched
    records = set_apart(read_pairs(settings.pairs), settings.held_out, settings.seed)
    # No EOS: the reward reads the text of a response, whether it ended by itself or was cut (rewards.adapter).
    train, held_out = (
        encode_pairs(part, model.tokenizer, settings.max_length, settings.too_long, eos=False) for part in records
    )
    _check_room(model, [*train.chosen, *train.rejected, *held_out.chosen, *held_out.rejected])
    if settings.reward.batch_size > 2 * len(train.chosen):
        raise ValueError(
            _too_few("--reward.batch-size", settings.reward.batch_size, 2 * len(train.chosen), settings.pairs)
        )
    directory = _open(settings)
    with progress("ppo-jax reward") as screen:
        _say_long(screen, train.too_long + held_out.too_long, settings.max_length, settings.too_long)
        result = run_reward(directory, model, settings.reward, train, held_out, settings.seed, screen)
        screen.message(
            f"{100 * result.accuracy:.1f} % of {len(held_out.chosen)} held-out pairs in the right order; "
            f"the reward model is at {directory / rundir.EXPORT / REWARD}"
        )


def ppo(settings: PPOSettings) -> None:
    """`ppo-jax ppo`."""
    settings.ppo.check_batch(settings.loop.batch_size)
    model = load_model(settings.model)
    sampling = _sampling(settings.ppo.sampling, model)
    found = artifacts.load(_artifact(settings.reward, REWARD), "reward")
    artifacts.check_base(found, model.fingerprint, model.config)
    records = set_apart(read_prompts(settings.prompts), settings.held_out, settings.seed)
    (prompts, long), (held_out, long_too) = (
        prompt_set(part, model, settings.max_prompt, settings.too_long) for part in records
    )
    _check_room(model, [*prompts.rows, *held_out.rows], sampling.response_length)
    if settings.loop.batch_size > len(prompts.rows):
        raise ValueError(_too_few("--loop.batch-size", settings.loop.batch_size, len(prompts.rows), settings.prompts))
    key = key_stream(settings.seed, "adapter")
    setup = Setup(
        model=model,
        adapter=init_adapter(key, model.params, model.config, settings.policy),
        prompts=prompts,
        held_out=held_out,
        ppo=dataclasses.replace(settings.ppo, sampling=sampling),
        hyper=settings.hyper,
        loop=settings.loop,
        seed=settings.seed,
        device_reward=adapter_reward(found.trunk(model.config), sampling.stop_ids),
        reward_params=RewardRole(found.adapter, found.head),
    )
    directory = _open(settings)
    with progress("ppo-jax ppo") as screen:
        _say_long(screen, long + long_too, settings.max_prompt, settings.too_long)
        result = run_ppo(directory, setup, screen, settings.resume)
        exported = export_model(directory / rundir.EXPORT / MODEL, model, result.policy.adapter)
        facts = environment()
        summary: report.Summary = {
            "title": f"PPO on {settings.prompts.name}",
            "task": f"Base and reference: {settings.model}. Reward model: {settings.reward}.",
            "before": result.before,
            "after": result.after,
            "prompts": len(held_out.rows),
            "seed": settings.seed,
            "date": date.today().isoformat(),
            "versions": facts["versions"],
            "machine": facts["machine"],
        }
        if "accuracy" in found.meta:
            summary |= {"reward_accuracy": found.meta["accuracy"], "reward_accuracy_note": "held-out pairs"}
        page = report.write(directory, summary)
        screen.message(f"the model is at {exported.name}; report: {page}")


def generate_responses(settings: GenerateSettings) -> None:
    """`ppo-jax generate`."""
    if settings.temperature < 0:
        raise ValueError(f"--temperature {settings.temperature} must not be negative")
    if settings.batch_size < 1:
        raise ValueError(f"--batch-size {settings.batch_size} must be at least 1")
    if not (settings.prompt or settings.prompts):
        raise ValueError("nothing to answer: give --prompt TEXT or --prompts FILE")
    if settings.output and settings.output.exists():
        raise FileExistsError(f"{settings.output} already exists; choose another --output")
    model, policy = _policy(settings)
    sampling = _sampling(settings.sampling, model)
    texts = [[{"role": "user", "content": text}] if settings.chat else text for text in settings.prompt]
    records = [PromptRecord(text, {}, f"--prompt {number}") for number, text in enumerate(texts, start=1)]
    records += read_prompts(settings.prompts) if settings.prompts else []
    prompts, _ = prompt_set(records, model, settings.max_prompt, settings.too_long)
    _check_room(model, prompts.rows, sampling.response_length)
    lines = []
    for response in responses(model, policy, prompts, sampling, settings):
        if settings.output:
            lines.append(json.dumps(response._asdict(), ensure_ascii=False) + "\n")
        else:
            print(f"{response.prompt}\n>>> {response.response}\n", flush=True)
    if settings.output:
        settings.output.write_text("".join(lines), encoding="utf-8")
        print(f"{len(lines)} responses are in {settings.output}")


class Response(NamedTuple):
    """One answer."""

    prompt: str
    response: str
    finished: bool  # ended by itself; False: cut by length


def responses(
    model: Model, policy: Policy, prompts: PromptSet, sampling: Sampling, settings: GenerateSettings
) -> Iterator[Response]:
    """Samples one response per prompt, `settings.batch_size` at a time; one program serves all batches."""
    run = jax.jit(partial(generate, config=model.config, sampling=sampling))
    key, count = key_stream(settings.seed, "generate"), len(prompts.rows)
    size = min(settings.batch_size, count)
    tokens, mask = left_pad(prompts.rows, max(map(len, prompts.rows)), model.pad_id)
    for number, start in enumerate(range(0, count, size)):
        index = np.minimum(np.arange(start, start + size), count - 1)  # the last batch is filled up
        batch = Prompts(*map(jnp.asarray, (tokens[index], mask[index], index)))
        batch_key = jax.random.fold_in(key, number)
        rollout = run(model.params, policy, prompts=batch, key=batch_key, temperature=settings.temperature)
        texts, finished = decode_responses(model, sampling, rollout), np.asarray(rollout.terminated)
        for row in range(min(size, count - start)):
            yield Response(prompts.texts[start + row], texts[row], bool(finished[row]))


def prompt_set(
    records: Sequence[PromptRecord], model: Model, max_length: int, too_long: TooLong
) -> tuple[PromptSet, int]:
    """Prompts as token rows and as the text that was tokenised; and how many were too long."""
    where = [record.where for record in records]
    encoded = encode_prompts([record.prompt for record in records], model.tokenizer, max_length, too_long, where)
    kept = [records[i] for i in encoded.kept]
    texts = [render(record.prompt, model.tokenizer, record.where) for record in kept]
    return PromptSet(encoded.rows, texts, [record.metadata for record in kept]), encoded.too_long


def set_apart(records: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """(training, held-out) records: `count` random ones are held out, at most a fifth; none left: both are all."""
    if count < 0:
        raise ValueError(f"--held-out {count} must not be negative")
    count = min(count, len(records) // 5)
    if not count:
        return list(records), list(records)
    chosen = set(np.random.default_rng(seed).permutation(len(records))[:count].tolist())
    return [r for i, r in enumerate(records) if i not in chosen], [r for i, r in enumerate(records) if i in chosen]


def _policy(settings: GenerateSettings) -> tuple[Model, Policy]:
    """The model and the role that answers."""
    if settings.policy is None:
        if settings.model is None:
            raise ValueError("nobody to answer: give --model, --policy, or both")
        return (model := load_model(settings.model)), Policy({}, _no_values(model))
    found = artifacts.load(_artifact(settings.policy, POLICY), "policy")
    try:
        model = load_model(settings.model or found.base)
    except FileNotFoundError as error:
        if settings.model:
            raise
        raise FileNotFoundError(f"{error} (the base that {found.path} names; give --model if it has moved)") from error
    artifacts.check_base(found, model.fingerprint, model.config)
    return model, Policy(found.adapter, found.head or _no_values(model))


def _no_values(model: Model) -> Any:
    return ValueHead().init(jax.random.key(0), jnp.zeros((1, model.config.hidden_size)))["params"]


def _artifact(path: Path, name: str) -> Path:
    """The artifact at `path`, or in the run directory `path`."""
    path = path.expanduser()
    inside = path / rundir.EXPORT / name
    return inside if inside.is_dir() and not (path / artifacts.DESCRIPTION).is_file() else path


def _sampling(sampling: Sampling, model: Model) -> Sampling:
    return dataclasses.replace(sampling, stop_ids=sampling.stop_ids or model.stop_ids, pad_id=model.pad_id)


def _check_room(model: Model, rows: Sequence[Sequence[int]], response: int = 0) -> None:
    longest, room = max(map(len, rows)), model.config.max_positions
    if longest + response > room:
        more = f" and {response} of response" if response else ""
        raise ValueError(
            f"the longest text has {longest} tokens; these{more} do not fit into the {room} positions of {model.name}. "
            f'Lower the limit to {room - response} and choose --too-long "truncate_left" or "drop"'
        )


def _too_few(option: str, batch_size: int, rows: int, path: Path) -> str:
    return f"{option} {batch_size}, but {path} leaves only {rows} to train on; lower it or give more data"


def _open(settings: Any) -> Path:
    """The run directory, with the settings that repeat the run in it."""
    directory = rundir.open_run(settings.run_dir, getattr(settings, "resume", False), settings.overwrite)
    # Passed back with --config it must neither delete nor continue anything by itself.
    off = {name: False for name in ("resume", "overwrite") if hasattr(settings, name)}
    text = config.to_yaml(dataclasses.replace(settings, **off))
    (directory / rundir.CONFIG).write_text(text, encoding="utf-8")
    return directory


def _say_long(screen: Screen, count: int, limit: int, too_long: TooLong) -> None:
    if count:
        done = "dropped" if too_long == "drop" else "truncated from the left"
        screen.message(f"{count} texts were longer than {limit} tokens and were {done}")
