"""Writes trl_classic.json: what TRL 0.11.4, the last version with the classic PPOTrainer, computes for a fixed batch.

It needs an environment of its own, since that TRL wants transformers 4:

    python3 -m venv trl-classic
    trl-classic/bin/pip install torch==2.13.0 trl==0.11.4 "transformers<4.47" rich
    trl-classic/bin/python tests/parity/make_trl_classic.py

(made with torch 2.13.0, transformers 4.46.3, python 3.11). The trainer's own methods are called, unbound, on a record
that holds the two fields they read: its config and its KL controller. Everything is float64; inputs are rounded to
4 digits so that they are the same numbers in float32.
"""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
import trl
from trl.trainer.ppo_trainer import PPOTrainer
from trl.trainer.utils import AdaptiveKLController, FixedKLController

B, T, V = 5, 6, 4
LENGTHS = [6, 6, 3, 1, 4]
KL_COEF, CLIP, VALUE_CLIP, VF_COEF = 0.15, 0.2, 0.1, 0.5
PAIRS = [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)]  # gamma, lambda


def inputs() -> dict[str, np.ndarray]:
    """A ragged batch after one optimizer step: some ratios and some values are outside the clip ranges."""
    rng = np.random.default_rng(0)
    normal = lambda mean, std, *shape: np.round(rng.normal(mean, std, shape), 4)
    old = normal(-1.5, 0.5, B, T)
    values = normal(0, 0.6, B, T)
    return {
        "scores": normal(0.3, 1.0, B),
        "old_logprobs": old,
        "ref_logprobs": np.round(old + normal(0, 0.4, B, T), 4),
        "logprobs": np.round(old + normal(0, 0.25, B, T), 4),
        "values": values,
        "new_values": np.round(values + normal(0, 0.2, B, T), 4),
        "logits": normal(0, 1, B, T, V),
        "ref_logits": normal(0, 1, B, T, V),
    }


MASKS = {
    "whole": np.ones((B, T), int),  # no padding anywhere
    "ragged": (np.arange(T) < np.array(LENGTHS)[:, None]).astype(int),
}


def trainer(**config: object) -> SimpleNamespace:
    """What the methods read of a PPOTrainer."""
    fields = {
        "kl_penalty": "kl", "gamma": 1.0, "lam": 0.95, "whiten_rewards": False, "cliprange": CLIP,
        "cliprange_value": VALUE_CLIP, "vf_coef": VF_COEF, "ratio_threshold": 10.0,
    }  # fmt: skip
    made = SimpleNamespace(config=SimpleNamespace(**fields | config), kl_ctl=FixedKLController(KL_COEF))
    made._kl_penalty = lambda logprob, ref_logprob: PPOTrainer._kl_penalty(made, logprob, ref_logprob)
    return made


def numbers(x: object) -> object:
    """Nested lists of Python numbers, short enough to read."""
    if isinstance(x, dict):
        return {key: numbers(value) for key, value in x.items()}
    if isinstance(x, list) and x and isinstance(x[0], dict):
        return [numbers(value) for value in x]
    if isinstance(x, bool | str):
        return x
    return np.round(np.asarray(x, np.float64), 12).tolist()


def one_mask(data: dict[str, torch.Tensor], mask: torch.Tensor) -> dict:
    rewards, _, kl = PPOTrainer.compute_rewards(
        trainer(), data["scores"], data["old_logprobs"], data["ref_logprobs"], mask
    )
    result: dict = {"rewards": rewards, "kl": kl, "advantages": [], "losses": []}
    for whiten in (False, True):
        for gamma, lam in PAIRS:
            with_gae = trainer(gamma=gamma, lam=lam, whiten_rewards=whiten)
            values, advantages, returns = PPOTrainer.compute_advantages(with_gae, data["values"], rewards, mask)
            result["advantages"].append(
                {"whiten_rewards": whiten, "gamma": gamma, "lam": lam, "advantages": advantages, "returns": returns}
            )
            policy, value, stats = PPOTrainer.loss(
                with_gae, data["old_logprobs"], values, data["logits"], data["new_values"] * mask, data["logprobs"],
                mask, advantages, returns,
            )  # fmt: skip
            result["losses"].append({"policy": policy, "value_times_coef": value} | scalars(stats))
    return result


def scalars(stats: dict) -> dict:
    return {name: x for name, x in stats.items() if name not in ("policy/advantages", "policy/ratio")}


def controllers() -> dict:
    """A run of observed KLs: far above the target, near it, below it; batches of different sizes."""
    observed, episodes = [20.0, 9.0, 6.6, 6.0, 5.1, 0.5, -1.0, 30.0], [64, 64, 128, 32, 64, 256, 64, 512]
    adaptive, fixed = AdaptiveKLController(0.2, 6.0, 1000), FixedKLController(0.2)
    coefficients = []
    for kl, count in zip(observed, episodes, strict=True):
        adaptive.update(kl, count)
        fixed.update(kl, count)
        coefficients.append(float(adaptive.value))
    return {
        "start": 0.2, "target": 6.0, "horizon": 1000, "observed": observed, "episodes": episodes,
        "adaptive": coefficients, "fixed": fixed.value,
    }  # fmt: skip


def main() -> None:
    """Computes everything and writes the file beside this one."""
    arrays = inputs()
    data = {name: torch.tensor(x, dtype=torch.float64) for name, x in arrays.items()}
    penalties = {
        kind: PPOTrainer._kl_penalty(trainer(kl_penalty=kind), data["old_logprobs"], data["ref_logprobs"])
        for kind in ("kl", "abs", "mse")
    }
    logs = [torch.log_softmax(data[name], dim=-1) for name in ("logits", "ref_logits")]
    penalties["full"] = PPOTrainer._kl_penalty(trainer(kl_penalty="full"), *logs)

    skipped = trainer(ratio_threshold=0.5)  # the mean ratio is above
    zeros = torch.zeros(B, T, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy, value, _ = PPOTrainer.loss(
            skipped, data["old_logprobs"], data["values"], data["logits"], data["new_values"], data["logprobs"],
            torch.tensor(MASKS["whole"]), data["values"], zeros,
        )  # fmt: skip

    result = {
        "made_with": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "settings": {"kl_coef": KL_COEF, "clip": CLIP, "value_clip": VALUE_CLIP, "vf_coef": VF_COEF},
        "inputs": arrays,
        "masks": MASKS,
        "penalties": penalties,
        "batches": {name: one_mask(data, torch.tensor(mask)) for name, mask in MASKS.items()},
        "skipped": {"threshold": 0.5, "policy": policy, "value_times_coef": value},
        "controllers": controllers(),
    }
    path = Path(__file__).with_name("trl_classic.json")
    path.write_text(json.dumps(numbers(result)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
