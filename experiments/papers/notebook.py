"""What the papers' notebooks share: where records come from, what stands at the top, how a verdict is printed.

FULL=1 runs the study again through `python -m experiments.papers.NAME` (into runs/papers, where a stopped run goes on);
SMOKE=1 runs a toy of it in this process, into a temporary folder; else the saved records are read.
"""

import importlib
import io
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from experiments.papers.records import RESULTS, Record, read_records, run_study

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars in text will do
ROOT = RESULTS.parent.parent.parent
SMOKE, FULL = (os.environ.get(name, "") not in ("", "0") for name in ("SMOKE", "FULL"))
# Told apart without colour.
STYLES: Sequence[dict[str, Any]] = [
    {"marker": marker, "linestyle": line, "color": color}
    for marker, line, color in zip(
        "osD^vPX",
        ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))],
        ["#1b4f72", "#a93226", "#1e8449", "#7d3c98", "#b9770e", "#34495e", "#000000"],
        strict=True,
    )
]


def obtain_records(name: str) -> list[Record]:
    """The records of a study, and a line for each kind of hardware, commit and day they come from."""
    if SMOKE:
        study = importlib.import_module(f"experiments.papers.{name}").STUDY
        path = run_study(study, ["--smoke", "--to", tempfile.mkdtemp()])
    elif FULL:
        folder = ROOT / "runs" / "papers"
        subprocess.run([sys.executable, "-m", f"experiments.papers.{name}", "--to", str(folder)], cwd=ROOT, check=True)
        path = folder / f"{name}.jsonl"
    else:
        path = RESULTS / f"{name}.jsonl"
    records = read_records(path)
    describe_records(records)
    return records


def describe_records(records: Sequence[Record]) -> None:
    """Print hardware, minutes, dates and commits."""
    if not records:
        print("No records yet: FULL=1 runs the study.")
        return
    machines = Counter(f"{r['machine']['cores']} cores, {r['machine']['architecture']}" for r in records)
    wall, work = (sum(record[key] for record in records) for key in ("minutes", "processor_minutes"))
    loads = [record["machine"]["load"] for record in records]
    print(f"{len(records)} records of {', '.join(sorted({r['date'] for r in records}))}; {', '.join(machines)}")
    print(f"{wall:.1f} minutes by the clock, {work:.1f} of one core; load average {min(loads):.0f} to {max(loads):.0f}")
    commits = sorted({str(record["commit"]) for record in records})
    print(f"code: {', '.join(name.replace(name[12:40], '') for name in commits)}")


def select(records: Sequence[Record], **setting: Any) -> list[Record]:
    """Those whose setting has these values."""
    return [r for r in records if all(r["setting"].get(key) == value for key, value in setting.items())]


def print_verdict(claims: Sequence[tuple[str, bool, str]]) -> None:
    """Each (claim, whether it held, the numbers), and how many held."""
    for claim, held, numbers in claims:
        print(f"{'HELD  ' if held else 'FAILED'}  {claim}: {numbers}")
    print(f"{sum(held for _, held, _ in claims)} of {len(claims)} held.{' (a toy: means nothing)' if SMOKE else ''}")


def draw_band(axes: Any, x: Any, curves: Any, label: str, number: int) -> None:
    """The mean of the curves [seeds, points], and a band of one standard deviation, no lower than the lowest seed."""
    y, style = np.asarray(curves, float), STYLES[number % len(STYLES)]
    mean, spread = y.mean(0), y.std(0, ddof=1) if len(y) > 1 else np.zeros(y.shape[1])
    axes.plot(x, mean, label=label, markevery=max(len(mean) // 8, 1), markersize=5, linewidth=1.4, **style)
    lowest = np.maximum(mean - spread, y.min(0))  # on a logarithmic axis a band must not reach 0
    axes.fill_between(x, lowest, mean + spread, color=style["color"], alpha=0.15, linewidth=0)


def keep_picture(figure: Any, name: str) -> None:
    """The picture of docs/papers.md, in few colours; only of real records."""
    if not SMOKE:
        file = io.BytesIO()
        figure.savefig(file, dpi=70)
        with Image.open(file) as image:
            image.convert("RGB").quantize(160).save(ROOT / "docs" / "papers" / f"{name}.png", optimize=True)


def mean_and_spread(values: Any) -> str:
    """Mean ± standard deviation over seeds."""
    y = np.asarray(values, float)
    return f"{y.mean():.3g} ± {y.std(ddof=1) if len(y) > 1 else 0:.2g}"
