"""Write what LLaMA-Factory's own loader makes of data sets: token rows and labels, and the names of its arguments.

It runs in an environment of its own, where LLaMA-Factory 0.9.3 is installed (docs/llamafactory.md says how):

    python make_llamafactory_rows.py arguments ARGUMENTS.json
    python make_llamafactory_rows.py rows TOKENIZER FOLDER OUT.json [--digest] [--datasets NAME ...]

`rows` goes through every data set of FOLDER/dataset_info.json, stage, template and length. With --digest a row is its
sha256 alone, for large files.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import tempfile
from typing import Any

os.environ["DISABLE_VERSION_CHECK"] = "1"
STAGES = {False: ("sft", "ppo"), True: ("rm",)}
NOW = (2026, 11, 28)  # the day that templates write


def list_arguments() -> dict[str, dict[str, Any]]:
    """Read {group: {name: default}} off its dataclasses."""
    from llamafactory import hparams

    groups = ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments")
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        found[group] = {}
        for field in dataclasses.fields(getattr(hparams, group)):
            if field.init:
                made = field.default_factory
                default = made() if made is not dataclasses.MISSING else field.default
                found[group][field.name] = getattr(default, "value", default)
    return found


def fix_date() -> None:
    import datetime

    from llamafactory.data import tool_utils

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Fixed":
            return cls(*NOW)

    tool_utils.datetime = Fixed


def read_rows(tokenizer: str, folder: str, name: str, stage: str, more: dict[str, Any]) -> list[dict[str, Any]]:
    """Load one data set as a run of LLaMA-Factory would."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    with tempfile.TemporaryDirectory() as out:
        given = dict(
            stage=stage, do_train=True, model_name_or_path=tokenizer, dataset=name, dataset_dir=folder,
            output_dir=out, overwrite_cache=True, report_to="none", use_cpu=True, finetuning_type="lora",
        )  # fmt: skip
        if stage == "ppo":
            given["reward_model"] = "none"
        model_args, data_args, training_args, _, _ = get_train_args(given | more)
        loaded = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
        found = get_dataset(template, model_args, data_args, training_args, stage=stage, **loaded)
        ends = ("input_ids",) if stage == "ppo" else ("input_ids", "labels")
        keep = [key for key in found["train_dataset"].column_names if key.endswith(ends)]
        return [{key: row[key] for key in keep} for row in found["train_dataset"]]


def digest(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def make(options: argparse.Namespace) -> list[dict[str, Any]]:
    fix_date()
    with open(f"{options.folder}/dataset_info.json") as file:
        info = json.load(file)
    found = []
    for name in options.datasets or info:
        for stage in STAGES[bool(info[name].get("ranking"))]:
            for template in options.templates:
                for length in options.lengths:
                    cases: list[dict[str, Any]] = [{}]
                    cases += [{"mask_history": True}] if stage == "sft" else []
                    for case in cases:
                        more = {"template": template, "cutoff_len": length} | case
                        if template == "tokenizer":
                            del more["template"]
                        rows = read_rows(options.tokenizer, options.folder, name, stage, more)
                        kept = [digest(row) for row in rows] if options.digest else rows
                        found.append({"dataset": name, "stage": stage, "arguments": more, "rows": kept})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("arguments").add_argument("out")
    rows = commands.add_parser("rows")
    for positional in ("tokenizer", "folder", "out"):
        rows.add_argument(positional)
    rows.add_argument("--digest", action="store_true")
    rows.add_argument("--datasets", nargs="*")
    rows.add_argument("--templates", nargs="*", default=["llama3", "qwen", "qwen3", "mistral", "gemma", "empty"])
    rows.add_argument("--lengths", nargs="*", type=int, default=[2048, 48])
    chosen = parser.parse_args()
    result: Any = list_arguments() if chosen.command == "arguments" else make(chosen)
    with open(chosen.out, "w") as file:
        json.dump(result, file, separators=(",", ":") if chosen.command == "rows" else None, sort_keys=True)
        file.write("\n")
