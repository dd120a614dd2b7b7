"""A decoding step beside the products that it cannot do without, at several numbers of rows.

python -m experiments.benchmarks.decode S 1 8 32 64
python -m experiments.benchmarks.decode S 1 8 --cpu      seconds of the processors, on a machine that others use
"""

import sys
import time

from experiments.benchmarks import ours
from experiments.benchmarks.workloads import find_workload


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--cpu"]
    clock, named = (time.process_time, "cpu") if "--cpu" in sys.argv else (time.perf_counter, "wall")
    work = find_workload(words[0])
    print(f"| rows | step, ms ({named}) | products, ms | ratio |\n|---|---|---|---|")
    for rows in map(int, words[1:]):
        step, floor = ours.decode_step(work, rows, tries=3, clock=clock)
        print(f"| {rows} | {1e3 * step:.1f} | {1e3 * floor:.1f} | {step / floor:.2f} |", flush=True)


if __name__ == "__main__":
    main()
