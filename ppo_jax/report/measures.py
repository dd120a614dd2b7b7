"""What the numbers of a run are called wherever the report shows them, in what unit, and how they are written."""

from typing import NamedTuple

from ppo_jax.report.templates import real_minus
from ppo_jax.runs.output.series import Labels


class Measure(NamedTuple):
    label: str
    unit: str
    form: str = "{:.2f}"
    factor: float = 1

    def write(self, value: float, sign: bool = False) -> str:
        """The value in this unit; with `sign` a change, whose zero has none."""
        plain = real_minus(self.form.format(value * self.factor))
        nothing = plain == real_minus(self.form.format(0.0))
        return real_minus(self.form.replace("{:", "{:+").format(value * self.factor)) if sign and not nothing else plain


# Those of an evaluation, in the order of the table.
MEASURES = {
    "reward": Measure("Reward", "reward-model score"),
    "kl": Measure("KL from the reference", "nats per response"),
    "kl_per_token": Measure("KL from the reference", "nats per token", "{:.3f}"),
    "entropy": Measure("Entropy", "nats per token"),
    "response_length": Measure("Response length", "tokens", "{:.1f}"),
    "eos_rate": Measure("Responses that end by themselves", "% with EOS", "{:.1f}", 100),
}
# Those of the stages that train on fixed data, as held-out values.
HELD_OUT_MEASURES = {
    "loss": Measure("Loss", "nats", "{:.3f}"),
    "perplexity": Measure("Perplexity", "per token"),
    "accuracy": Measure("Pairs in the right order", "%", "{:.1f}", 100),
    "best_accuracy": Measure("Best of a choice on top", "%", "{:.1f}", 100),
    "margin": Measure("Lead of the better response", "score", "{:.3f}"),
    "calibration_error": Measure("Calibration error", "%", "{:.1f}", 100),
}


def measure_of(name: str, labels: Labels) -> Measure:
    """The measure of that name; what is none of ours is a judge's score or a part of the reward."""
    if name in MEASURES:
        return MEASURES[name]
    if name.startswith("reward/"):
        return Measure(f"Reward: {name.removeprefix('reward/')}", "part of the score", "{:.3f}")
    label = labels.get(name, name)
    return Measure(label[:1].upper() + label[1:], "score", "{:.3f}")
