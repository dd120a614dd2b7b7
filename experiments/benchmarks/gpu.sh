#!/usr/bin/env bash
# Measures ppo_jax on one GPU in under eight minutes, without a network:
#
#     experiments/benchmarks/gpu.sh wheels          on a machine with a package index: fills experiments/benchmarks/wheels
#     OUT=folder experiments/benchmarks/gpu.sh      on the GPU: folder/gpu.jsonl and a log for each part
#     experiments/benchmarks/gpu.sh tiny            rehearses on a CPU
#
# The machine brings jax with its GPU plugin, flax, optax, chex and numpy; the rest travels as wheels of pure Python.
# Each part has its own limit, so one that hangs or fails leaves the others their time.
set -uo pipefail
cd "$(dirname "$0")/../.."
here=experiments/benchmarks
wheels=$here/wheels
lacking="jaxtyping wadler-lindig rich markdown-it-py mdurl pygments tyro docstring-parser typeguard filelock"

if [[ ${1:-} == wheels ]]; then
    exec "${PYTHON:-python3}" -m pip download --quiet --no-deps --dest "$wheels" $lacking
fi
out=${OUT:-runs/benchmarks/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
if [[ -d $wheels ]]; then # a wheel is a zip file: unpacked, it comes before what the machine has
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$unpacked"; done
    export PYTHONPATH=$PWD:$unpacked
else
    export PYTHONPATH=$PWD
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92

failed=0
longer=1
[[ ${1:-} == tiny ]] && longer=20 # a rehearsal may run on a machine with other work
for part in agree:60 decode:130 update:150 iteration:90 population:45; do
    name=${part%:*}
    timeout $((longer * ${part#*:})) "$python" -m experiments.benchmarks.gpu "$name" "$@" 2>"$out/$name.log" | tee -a "$out/gpu.jsonl"
    code=${PIPESTATUS[0]}
    if ((code)); then
        echo "{\"part\": \"$name\", \"failed\": $code}" | tee -a "$out/gpu.jsonl"
        failed=1
    fi
done
exit $failed
