"""The arguments of LLaMA-Factory -> the settings of a command of ours, as a nested mapping of what differs."""

import math
from typing import NamedTuple

from ppo_jax.cli.llamafactory.reading import STAGES, Arguments
from ppo_jax.cli.llamafactory.shared import (
    Mapping,
    count_rows,
    translate_adapter,
    translate_batch,
    translate_data,
    translate_loop,
    translate_norm,
    translate_optimizer,
    translate_run,
    translate_start,
    translate_warmup,
)

_EVERY_LAYER = 10_000  # of a reward model: more than there are


class Translation(NamedTuple):
    """A command with its settings."""

    command: str
    settings: Mapping


def translate(arguments: Arguments, devices: int, resume: str) -> Translation:
    """Translate a training file.

    Args:
      devices: how many it was written for; they share the work.
      resume: what our setting of that name is, where the file does not say.

    Raises ValueError for a value that cannot be had; FileNotFoundError where rows are counted and a file is missing.
    """
    stage = str(arguments.get("stage"))
    settings = translate_run(arguments, stage, devices, resume) | translate_data(arguments, stage)
    make = {"sft": _sft, "dpo": _dpo, "rm": _rm, "ppo": _ppo}[stage]
    make(arguments, settings, devices)
    settings |= translate_start(arguments)
    if "start" in settings:  # the adapter says itself what is trained
        for group in ("adapter", "policy"):
            settings.pop(group, None)
        for name in ("kind", "rank", "alpha", "dora", "lora_layers") if stage == "rm" else ():
            settings["reward"].pop(name, None)
    return Translation(STAGES[stage], settings)


# -- stages on fixed data --------------------------------------------------------------------------------------------


def _offline(arguments: Arguments, settings: Mapping, devices: int) -> tuple[Mapping, Mapping]:
    """Translate (how it is trained, when what happens)."""
    size, pieces = translate_batch(arguments, devices)
    translate_optimizer(arguments, others=False)
    limit = arguments.count("max_steps")

    def epoch() -> int:
        return math.ceil(count_rows(arguments, settings) / size)

    def steps() -> int:
        return limit if limit > 0 else math.ceil(arguments.number("num_train_epochs") * epoch())

    trained = {
        "epochs": float(arguments.number("num_train_epochs")),
        "batch_size": size,
        "accumulate": pieces,
        "learning_rate": float(arguments.number("learning_rate")),
        "max_grad_norm": translate_norm(arguments),
    } | ({"steps": limit} if limit > 0 else {})
    return trained, translate_loop(arguments, epoch, steps) | {"warmup": translate_warmup(arguments)}


def _sft(arguments: Arguments, settings: Mapping, devices: int) -> None:
    settings["max_length"] = arguments.count("cutoff_len", 2)
    settings["turns"] = "last" if arguments.flag("mask_history") else "together"
    settings["adapter"] = translate_adapter(arguments)
    settings["sft"], settings["loop"] = _offline(arguments, settings, devices)


def _dpo(arguments: Arguments, settings: Mapping, devices: int) -> None:
    arguments.choose("pref_loss", "sigmoid")
    settings["max_length"] = arguments.count("cutoff_len", 2)
    settings["adapter"] = translate_adapter(arguments)
    trained, settings["loop"] = _offline(arguments, settings, devices)
    smoothing = arguments.number("dpo_label_smoothing", 0)
    settings["dpo"] = trained | {"beta": float(arguments.number("pref_beta")), "label_smoothing": float(smoothing)}


def _rm(arguments: Arguments, settings: Mapping, devices: int) -> None:
    adapter = translate_adapter(arguments)
    if adapter["kind"] == "top_k" or "targets" in adapter:
        name = "finetuning_type" if adapter["kind"] == "top_k" else "lora_target"
        raise arguments.wrong(name, "is not had of reward models: lora on all linear maps, or full")
    settings["max_length"] = arguments.count("cutoff_len", 2)
    trained, settings["loop"] = _offline(arguments, settings, devices)
    del trained["accumulate"]  # a batch is compared as a whole
    if "steps" in trained:
        raise arguments.wrong("max_steps", "is not had of reward models: say num_train_epochs")
    epochs = trained["epochs"]
    if epochs != int(epochs):
        raise arguments.wrong("num_train_epochs", "must be a whole number for reward models")
    trained |= {"epochs": int(epochs), "batch_size": 2 * trained["batch_size"]}
    # The head starts at random and is trained with the rest; scores are left as they come out.
    settings["reward"] = trained | adapter | {"head_steps": 0, "normalise": False}
    if adapter["kind"] == "lora":
        settings["reward"]["lora_layers"] = _EVERY_LAYER
    settings["loop"].setdefault("best_metric", "accuracy")


# -- ppo -------------------------------------------------------------------------------------------------------------


def _ppo(arguments: Arguments, settings: Mapping, devices: int) -> None:
    size, pieces = translate_batch(arguments, devices)
    buffer = arguments.count("ppo_buffer_size", 1)
    settings["max_prompt"] = arguments.count("cutoff_len", 2)
    settings["policy"] = translate_adapter(arguments)
    settings["reward"], settings["scoring"] = _reward(arguments)
    settings["ppo"] = {
        "sampling": _sampling(arguments),
        "epochs": arguments.count("ppo_epochs", 1),
        "num_minibatches": buffer,
        "accumulate": pieces,
        "kl": {"control": "adaptive"},
        "score": {
            "normalise": "shift" if arguments.flag("ppo_score_norm") else "off",
            "whiten_rewards": "scale" if arguments.flag("ppo_whiten_rewards") else "off",
        },
        "optimizer": translate_optimizer(arguments),
    }
    settings["hyper"] = {
        "learning_rate": float(arguments.number("learning_rate")),
        "temperature": float(arguments.number("temperature")),
        "max_grad_norm": translate_norm(arguments),
        "kl_coef": 0.2,
        "kl_target": float(arguments.number("ppo_target")),
        "kl_horizon": 10_000.0,
        "gamma": 1.0,
        "lam": 0.95,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "vf_coef": 0.1,
        "value_clip": 0.2,
        "ratio_threshold": 10.0,
    }
    batch = size * buffer
    limit = arguments.count("max_steps")
    epoch = count_rows(arguments, settings) // batch  # the last rows of an epoch are left out
    updates = limit if limit > 0 else math.ceil(arguments.number("num_train_epochs") * epoch)
    if updates < 1:
        raise ValueError(
            f"{arguments.source}: a batch has {batch} prompts (per_device_train_batch_size, times "
            "gradient_accumulation_steps and ppo_buffer_size), and the data sets have fewer"
        )
    loop = translate_loop(arguments, lambda: epoch, lambda: updates, best=False)
    warmup = translate_warmup(arguments)
    warmup = min(math.ceil(warmup * updates), updates - 1) if warmup < 1 else int(warmup)
    settings["loop"] = loop | {"updates": updates, "batch_size": batch, "warmup": warmup}


def _sampling(arguments: Arguments) -> Mapping:
    return {
        "response_length": arguments.count("max_new_tokens", 1),
        "top_p": float(arguments.number("top_p")),
        "top_k": arguments.count("top_k", 0),
        "repetition_penalty": float(arguments.number("repetition_penalty")),
    }


def _reward(arguments: Arguments) -> tuple[list[str], Mapping]:
    """Translate the reward model, and how it is called."""
    source = arguments.get("reward_model")
    if source is None:
        raise ValueError(f"{arguments.source}: reward_model is missing: a directory, or the URL of a service")
    kind = arguments.choose("reward_model_type", "lora", "full", "api")
    if kind == "api":
        if not str(source).startswith("http"):
            raise arguments.wrong("reward_model", "must be a URL where reward_model_type is api")
        return [str(source)], {"api": {"protocol": "llamafactory"}, "special_tokens": "keep"}
    if kind == "lora" and str(arguments.get("finetuning_type")) != "lora":
        raise arguments.wrong("reward_model_type", "needs finetuning_type lora")
    return [str(source)], {"at": "sampled"}
