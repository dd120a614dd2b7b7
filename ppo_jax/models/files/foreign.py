"""Files of other programs that are not read: named for what they are, with what makes them readable."""

from collections.abc import Collection
from pathlib import Path

# What wrappers put before every name of a tensor.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "base_model.model.": "peft",
    "pretrained_model.": "TRL's models with a value head",
}
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")  # of LLaMA-Factory's reward models, which are read


def has_value_head(where: Path) -> bool:
    """Whether LLaMA-Factory left the value head of a reward model here."""
    return any((where / name).is_file() for name in VALUE_HEADS)


def describe_directory(where: Path) -> str:
    """Say what a directory holds that is no model of `transformers` by itself; "" where nothing is known."""
    head = next((name for name in VALUE_HEADS if (where / name).is_file()), None)
    adapter = (where / "adapter_config.json").is_file() and not (where / "config.json").is_file()
    if head and adapter:
        return (
            f"{where} is a reward model of LLaMA-Factory, a PEFT adapter with a value head ({head}): it is read by "
            "`--reward` of `ppo-jax ppo`, on the base that it was trained on"
        )
    if adapter:
        return (
            f"{where} is an adapter of the peft library (adapter_config.json), which is not read. Merge it into its "
            "base, in Python by `merge_and_unload()` of the loaded PeftModel, save that, and give its directory"
        )
    return ""


def describe_names(wanted: str, present: Collection[str]) -> str:
    """Say under which names a file holds its tensors, where `wanted` is not among them; "" for an empty file."""
    for other in present:
        if other != wanted and other.endswith(wanted):
            prefix = other.removesuffix(wanted)
            by = f", as {WRAPPERS[prefix]} writes it" if prefix in WRAPPERS else ""
            return f": the file has it as {other}{by}. Save the model itself, or take {prefix!r} off the names"
    some = ", ".join(sorted(present)[:3]) + (", ..." if len(present) > 3 else "")
    return f"; the file has {some}" if some else ""


def describe_value_head(present: Collection[str]) -> str:
    """Name a value head among the tensors of a language model; "" where there is none."""
    found = next((name for name in sorted(present) if name.startswith("v_head.") or ".v_head." in name), None)
    return f" ({found} is of a value head of TRL or LLaMA-Factory, which is not read)" if found else ""
