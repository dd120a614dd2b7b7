"""Write the scores that LLaMA-Factory's own reward model gives token rows, with its value head at their last tokens.

    python make_llamafactory_scores.py BASE REWARD ROWS.json OUT.json

runs where LLaMA-Factory 0.9.3 is installed. REWARD is an adapter with a value head on BASE, or a model of its own.
"""

import json
import os
import sys

os.environ["DISABLE_VERSION_CHECK"] = "1"


def main(base: str, reward: str, rows_file: str, out: str) -> None:
    import torch
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_model, load_tokenizer

    given = {"model_name_or_path": base, "template": "empty", "infer_dtype": "float32"}
    if os.path.isfile(f"{reward}/adapter_config.json"):
        given["adapter_name_or_path"] = reward
    else:
        given["model_name_or_path"] = reward
    model_args, _, finetuning_args, _ = get_infer_args(given)
    model_args.device_map = {"": torch.device("cpu")}
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    model = load_model(tokenizer, model_args, finetuning_args, is_trainable=False, add_valuehead=True).eval()
    with open(rows_file) as file:
        rows = json.load(file)
    with torch.no_grad():
        scores = [float(model(torch.tensor([row]), return_dict=True, use_cache=False)[-1][0, -1]) for row in rows]
    with open(out, "w") as file:
        json.dump({"rows": rows, "scores": scores}, file)
        file.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
