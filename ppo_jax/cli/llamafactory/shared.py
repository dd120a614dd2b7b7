"""What the settings of all stages share of the arguments of LLaMA-Factory, and the data."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from ppo_jax.cli.llamafactory.reading import Arguments
from ppo_jax.data.forms import Stage
from ppo_jax.data.llamafactory.registry import FILE
from ppo_jax.data.options import AUTO, DatasetOptions
from ppo_jax.data.reading import read_records
from ppo_jax.models.adapters import LINEARS
from ppo_jax.train.loop import Tracker

Mapping = dict[str, Any]
_NEVER = 1e30  # a norm of the gradient that is never reached
_DATA: dict[str, tuple[str, Stage]] = {
    "sft": ("data", "demonstrations"),
    "rm": ("pairs", "preference pairs"),
    "dpo": ("pairs", "preference pairs"),
    "ppo": ("prompts", "prompts"),
}
_LINEARS = {f"{name}_proj": name for name in LINEARS}


def translate_run(arguments: Arguments, stage: str, devices: int, resume: str) -> Mapping:
    if arguments.get("model_name_or_path") is None:
        raise ValueError(f"{arguments.source}: model_name_or_path is missing")
    half = arguments.flag("bf16") or arguments.flag("pure_bf16")
    spare = not arguments.flag("disable_gradient_checkpointing")
    overwrite = arguments.flag("overwrite_output_dir")
    again = arguments.get("resume_from_checkpoint")
    if again is not None and str(again).lower() not in ("true", "false", "yes", "no"):
        raise arguments.wrong("resume_from_checkpoint", "must be true or false: the newest of output_dir counts")
    goes_on = again is not None and arguments.flag("resume_from_checkpoint")
    return {
        "model": str(arguments.get("model_name_or_path")),
        "run_dir": str(arguments.get("output_dir") or f"saves/{stage}"),
        "seed": arguments.count("seed", 0),
        "overwrite": overwrite and not goes_on,
        "resume": "yes" if goes_on else "no" if overwrite else resume,
        "too_long": "share",
        "compute": {"dtype": "bfloat16" if half else "float32", "remat": "full" if spare else "none"}
        | _quantised(arguments),
    } | ({"mesh": {"data": devices}} if devices > 1 else {})


def _quantised(arguments: Arguments) -> Mapping:
    """Translate the bits of the base, where there are any."""
    if arguments.get("quantization_bit") is None:
        return {}
    arguments.choose("quantization_method", "bnb")
    if str(arguments.get("finetuning_type")) == "full":
        raise arguments.wrong("quantization_bit", "needs finetuning_type lora or freeze")
    return {"quantise": f"int{arguments.choose('quantization_bit', '4', '8')}"}


def translate_data(arguments: Arguments, stage: str) -> Mapping:
    names = [f"{arguments.get('dataset_dir')}/{FILE}:{name}" for name in arguments.names("dataset")]
    if not names:
        raise ValueError(f"{arguments.source}: dataset is missing: name one of {arguments.get('dataset_dir')}/{FILE}")
    template: Mapping = {"name": str(arguments.get("template") or AUTO)}
    if (system := arguments.get("default_system")) is not None:
        template["system"] = str(system)
    if arguments.get("tool_format") is not None:
        template["tools"] = arguments.choose("tool_format", "default", "llama3", "mistral", "qwen")
    if arguments.get("enable_thinking") is not True:
        thinking = arguments.get("enable_thinking")
        template["thinking"] = None if thinking is None else arguments.flag("enable_thinking")
    dataset: Mapping = {"template": template}
    if len(names) > 1:
        dataset["more"] = names[1:]
    if arguments.get("max_samples") is not None:
        dataset["max_samples"] = arguments.count("max_samples", 1)
    if arguments.choose("mix_strategy", "concat", "interleave_under", "interleave_over") != "concat" and len(names) > 1:
        shares = arguments.names("interleave_probs") or ["1"] * len(names)
        dataset["weights"] = [float(share) for share in shares]
    elif arguments.get("interleave_probs") is not None:
        raise arguments.wrong("interleave_probs", "is for several data sets that are interleaved (mix_strategy)")
    held_out, apart = 0, arguments.names("eval_dataset")
    size = arguments.number("val_size", 0)
    if apart:
        if len(apart) > 1 or size:
            raise arguments.wrong("eval_dataset", "must be one data set, without val_size")
        dataset["held_out_file"] = f"{arguments.get('dataset_dir')}/{FILE}:{apart[0]}"
    elif 0 < size < 1:
        dataset["held_out_fraction"] = size
    else:
        held_out = arguments.count("val_size")
    return {_DATA[stage][0]: names[0], "dataset": dataset, "held_out": held_out}


def count_rows(arguments: Arguments, settings: Mapping) -> int:
    """Count the rows that are trained on: those of the data sets, less what is held out."""
    field, stage = _DATA[str(arguments.get("stage"))]
    dataset = settings["dataset"]
    options = DatasetOptions(max_samples=dataset.get("max_samples"))
    rows = sum(
        len(read_records(stage, Path(name), options).records) for name in (settings[field], *dataset.get("more", ()))
    )
    apart = round(dataset.get("held_out_fraction", 0) * rows) or min(settings["held_out"], rows // 5)
    return rows - apart


def translate_batch(arguments: Arguments, devices: int) -> tuple[int, int]:
    """Compute (rows of an optimizer step, its micro-batches)."""
    pieces = arguments.count("gradient_accumulation_steps", 1)
    return arguments.count("per_device_train_batch_size", 1) * pieces * devices, pieces


def translate_adapter(arguments: Arguments) -> Mapping:
    kind = arguments.choose("finetuning_type", "lora", "freeze", "full")
    if kind == "full":
        return {"kind": "full"}
    if kind == "freeze":
        layers = arguments.count("freeze_trainable_layers")
        if layers < 1:
            raise arguments.wrong("freeze_trainable_layers", "counts from the bottom; here layers count from the top")
        return {"kind": "top_k", "layers": layers}
    rank = arguments.count("lora_rank", 1)
    alpha = arguments.number("lora_alpha") if arguments.get("lora_alpha") else 2 * rank
    if arguments.flag("use_rslora"):
        alpha *= math.sqrt(rank)
    found: Mapping = {"kind": "lora", "rank": rank, "alpha": float(alpha)}
    if arguments.flag("use_dora"):
        found["dora"] = True
    targets = arguments.names("lora_target")
    if targets != ["all"]:
        unknown = [name for name in targets if name not in _LINEARS]
        if unknown:
            raise arguments.wrong("lora_target", f"must be all, or of {', '.join(_LINEARS)} (not {unknown[0]})")
        found["targets"] = [_LINEARS[name] for name in targets]
    return found


def translate_start(arguments: Arguments) -> Mapping:
    """Translate an adapter that there is already: gone on with, or merged under a new one."""
    names = arguments.names("adapter_name_or_path")
    if len(names) > 1 or names and str(arguments.get("finetuning_type")) != "lora":
        raise arguments.wrong("adapter_name_or_path", "must be one adapter, with finetuning_type lora")
    if not names:
        return {}
    return {"model": names[0]} if arguments.flag("create_new_adapter") else {"start": names[0]}


def translate_optimizer(arguments: Arguments, others: bool = True) -> Mapping:
    """Translate Adam's own numbers; of stages on fixed data only the default ones are had."""
    arguments.choose("optim", "adamw_torch", "adamw_torch_fused", "adamw_hf", "OptimizerNames.ADAMW_TORCH")
    names = {"weight_decay": "weight_decay", "adam_beta1": "b1", "adam_beta2": "b2", "adam_epsilon": "eps"}
    found = {}
    for name, ours in names.items():
        value = arguments.number(name, 0)
        if value != arguments._replace(given={}).number(name):
            if not others:
                raise arguments.wrong(name, "is refused: only ppo has a choice there")
            found[ours] = float(value)
    return found


def translate_norm(arguments: Arguments) -> float:
    return float(arguments.number("max_grad_norm", 0)) or _NEVER


def _schedule(arguments: Arguments) -> str:
    allowed = ("linear", "cosine", "constant", "constant_with_warmup")
    return arguments.choose("lr_scheduler_type", *allowed).removesuffix("_with_warmup")


def translate_warmup(arguments: Arguments) -> float:
    steps, share = arguments.count("warmup_steps", 0), arguments.number("warmup_ratio", 0)
    if share >= 1:
        raise arguments.wrong("warmup_ratio", "must be below 1")
    return float(steps or share)


def _every(arguments: Arguments, what: str, epoch: Callable[[], int], steps: Callable[[], int]) -> int:
    """Translate when something happens (`save`, `eval`): every so many steps; 0: only at the end."""
    match arguments.choose(f"{what}_strategy", "no", "steps", "epoch"):
        case "no":
            return 0
        case "epoch":
            return epoch()
    name = f"{what}_steps" if arguments.get(f"{what}_steps") is not None else "logging_steps"
    every = arguments.number(name, 0)
    return math.ceil(every * steps()) if every < 1 else int(every)


def translate_loop(
    arguments: Arguments, epoch: Callable[[], int], steps: Callable[[], int], best: bool = True
) -> Mapping:
    saved = _every(arguments, "save", epoch, steps)
    loop: Mapping = {
        "schedule": _schedule(arguments),
        "eval_every": _every(arguments, "eval", epoch, steps),
        "checkpoint_every": saved,
    }
    if arguments.get("save_total_limit") is not None:
        loop["keep"] = arguments.count("save_total_limit", 1)
    else:
        loop["keep_every"] = saved
    metric = str(arguments.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if best and metric not in ("loss", "accuracy", "rewards/accuracies"):
        raise arguments.wrong("metric_for_best_model", "is not measured here; allowed: loss, accuracy")
    if best and (arguments.get("metric_for_best_model") or arguments.flag("load_best_model_at_end")):
        loop["best_metric"] = "-loss" if metric == "loss" else "accuracy"
    trackers = [name for name in arguments.names("report_to") if name not in ("none", "all", "tensorboard")]
    if set(trackers) - set(get_args(Tracker)):
        raise arguments.wrong("report_to", f"is not had here; allowed: none, {', '.join(get_args(Tracker))}")
    if trackers:
        loop |= {"log": ["tensorboard", *dict.fromkeys(trackers)], "project": "huggingface"}
    return loop
