"""What stands near the top of the report: the settings that matter, who ran it when and where, the files it left."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.plain_yaml import ConfigError, read_yaml
from ppo_jax.runs.output.screen import clock_time
from ppo_jax.runs.output.series import EVALUATED, Records, finite, series

FILES = {
    rundir.METRICS: "a line per update",
    rundir.SAMPLES: "responses",
    rundir.EVALUATIONS: "scores of every held-out prompt",
    rundir.CONFIG: "all settings",
    rundir.LOG: "what was said",
    rundir.RUN: "commands and facts",
    rundir.PLOTS: "the curves as SVG",
    rundir.CHECKPOINTS: "to go on from",
    "export/model": "the trained model",
    "export/policy": "its adapter",
    "export/best": "the adapter of the best evaluation",
    "export/reward": "the reward model",
}
Rows = list[tuple[str, str]]


def read_settings(run_dir: Path) -> tuple[str | None, dict[str, Any]]:
    """config.yaml as text (None: there is none) and as plain data ({}: it cannot be read)."""
    path = run_dir / rundir.CONFIG
    if not path.exists():
        return None, {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        data, _ = read_yaml(text, rundir.CONFIG)
    except ConfigError:
        data = None
    return text, data if isinstance(data, dict) else {}


def at(settings: Any, *path: str) -> Any:
    """The value at a path of nested settings; None where there is none."""
    for name in path:
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings


def planned_updates(settings: Mapping[str, Any]) -> int | None:
    """How many updates a PPO run was to make."""
    updates = at(settings, "loop", "updates")
    return updates if isinstance(updates, int) else None


def key_settings(settings: Mapping[str, Any], facts: Mapping[str, Any], records: Records, phase: str) -> Rows:
    """The settings that decide most, of PPO or of a stage on fixed data; what is unknown is left out."""
    base = facts.get("base")
    if isinstance(base, str) and Path(base).is_absolute():  # the demo's lies in the cache
        base = Path(base).name
    rows = {"Base model": at(settings, "model") or base}
    rows |= _ppo_settings(settings, facts, records) if phase == "ppo" else _offline_settings(settings, phase)
    rows["Seed"] = at(settings, "seed")
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def _ppo_settings(settings: Mapping[str, Any], facts: Mapping[str, Any], records: Records) -> dict[str, Any]:
    given = at(settings, "scorer") or at(settings, "reward")
    done, planned = series(records, "ppo", "kl")[0], planned_updates(settings)
    loop, group = at(settings, "loop"), at(settings, "ppo", "group_size") or 1
    batch, rate = at(loop, "batch_size"), at(settings, "hyper", "learning_rate")
    beta, kl = at(settings, "hyper", "kl_coef"), at(settings, "ppo", "kl")
    warmup = f", after {at(loop, 'warmup')} updates of warm-up" if at(loop, "warmup") else ""
    each = f" × {group} responses each" if group > 1 else ""
    length, temperature = at(settings, "ppo", "sampling", "response_length"), at(settings, "hyper", "temperature")
    tokens = sum(
        (finite(r, "tokens_per_second") or 0.0) * (finite(r, "seconds") or 0.0) for r in records if r["phase"] == "ppo"
    )
    return {
        "Reward": ", ".join(map(str, given)) if isinstance(given, list) else None,
        "Updates": (f"{max(done, default=0)} of {planned}" if planned else max(done, default=None)),
        "Batch": batch and f"{batch} prompts{each}",
        "Learning rate": _number(rate, f", {at(loop, 'schedule') or 'constant'}{warmup}"),
        "KL coefficient": _number(beta, f", {at(kl, 'control') or 'fixed'}, in the {at(kl, 'place') or 'reward'}"),
        "Trained": _adapter(at(settings, "policy"), at(settings, "start")),
        "Responses": length and f"at most {length} tokens, at temperature {temperature}",
        "Response tokens seen": f"{tokens:,.0f}" if tokens else None,
        "Held-out prompts": facts.get("held_out") if facts.get("measured_on") == EVALUATED else None,
        "Training prompts": facts.get("prompts"),
    }


def _offline_settings(settings: Mapping[str, Any], phase: str) -> dict[str, Any]:
    own = at(settings, phase)
    rate = at(own, "learning_rate")
    data = next((at(settings, name) for name in ("data", "pairs", "ratings", "choices") if at(settings, name)), None)
    reward = {"kind": at(own, "kind"), "rank": at(own, "rank"), "layers": at(own, "lora_layers")}
    return {
        "Data": data if isinstance(data, str) else None,
        "Epochs": _number(at(own, "epochs")),
        "Batch": at(own, "batch_size"),
        "Learning rate": _number(rate),
        "Beta": at(own, "beta"),
        "Trained": _adapter(reward if phase == "reward" else at(settings, "adapter"), at(settings, "start")),
    }


def _number(value: Any, more: str = "") -> str | None:
    return f"{value:.3g}{more}" if isinstance(value, int | float) else None


def _adapter(settings: Any, start: Any) -> str | None:
    if start:
        return f"the LoRA adapter {Path(str(start)).name}, further"
    kind, layers = at(settings, "kind"), at(settings, "layers")
    if kind is None:
        return None
    where = f"at most the top {layers} layers" if layers else "all layers"
    if kind == "lora":
        return f"LoRA of rank {at(settings, 'rank')} on {where}"
    return "all parameters" if kind == "full" else f"{where} ({kind})"


def provenance(facts: Mapping[str, Any], summary: Mapping[str, Any], records: Records) -> Rows:
    """Command, commit, start, duration, machine: of the last session, with the number of those before it."""
    sessions: Sequence[Mapping[str, Any]] = facts.get("sessions") or []
    last: Mapping[str, Any] = sessions[-1] if sessions else {}
    started = sessions[0].get("started") if sessions else summary.get("date")
    again = f", the first of {len(sessions)} starts" if len(sessions) > 1 else ""
    seconds = duration(sessions, records)
    rows = {
        "Command": last.get("command"),
        "Commit": last.get("commit"),
        "Started": started and f"{str(started).replace('T', ' ')}{again}",
        "Duration": seconds and f"{clock_time(seconds)} (m:ss)",
        "Machine": last.get("machine") or summary.get("machine"),
    }
    return [(name, str(value)) for name, value in rows.items() if value]


def duration(sessions: Sequence[Mapping[str, Any]], records: Records) -> float:
    """Seconds from each start to the last record before the next one; without sessions, from first to last record."""
    times = sorted(t for r in records if (t := finite(r, "time")) is not None)
    starts = [datetime.fromisoformat(s["started"]).timestamp() for s in sessions if s.get("started")]
    if not times:
        return 0.0
    total = 0.0
    for start, end in zip(starts or times[:1], [*starts[1:], float("inf")], strict=False):
        within = [t for t in times if start <= t < end]
        total += within[-1] - start if within else 0.0
    return total


def links(run_dir: Path) -> list[tuple[str, str]]:
    """(path, what it holds) of what the run left beside the report."""
    return [(name, what) for name, what in FILES.items() if (run_dir / name).exists()]


def environment_rows(facts: Mapping[str, Any], summary: Mapping[str, Any], records: Records) -> Rows:
    """Versions, the time of each phase, and how fast PPO was."""
    last: Mapping[str, Any] = (facts.get("sessions") or [{}])[-1]
    rows = [(key, str(summary[key])) for key in ("date", "machine", "seed") if key in summary]
    versions = summary.get("versions") or last.get("versions") or {}
    rows += [(f"{name} version", str(version)) for name, version in versions.items()]
    seconds = summary.get("seconds", {})
    times = {**seconds, "in all": sum(seconds.values())} if len(seconds) > 1 else seconds
    rows += [(f"wall time, {phase}", f"{clock_time(value)} (m:ss)") for phase, value in times.items()]
    _, rates = series(records, "ppo", "tokens_per_second")
    if rates:
        rows.append(("PPO throughput, median", f"{sorted(rates)[len(rates) // 2]:,.0f} tokens/s"))
    return rows
