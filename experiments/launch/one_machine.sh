#!/usr/bin/env bash
# PPO, or another COMMAND (sft, reward, dpo), in several processes on one machine, joined over 127.0.0.1: a rehearsal of
# a cluster, and how its tests run.
#
#   PROCESSES=2 experiments/launch/one_machine.sh --model DIR --prompts FILE --reward DIR --run-dir runs/two \
#       --mesh.data 2
#   COMMAND=sft experiments/launch/one_machine.sh --model DIR --data FILE --run-dir runs/sft --mesh.fsdp 2
#
# One machine with several GPUs needs none of this: one process sees them all, so `ppo-jax ppo --mesh.fsdp 8` is enough.
# On CPUs DEVICES is how many devices each process pretends to have; the mesh's product is PROCESSES x DEVICES.
set -euo pipefail
COMMAND=${COMMAND:-ppo} PROCESSES=${PROCESSES:-2} DEVICES=${DEVICES:-1} PORT=${PORT:-12321}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$DEVICES # CPU collectives go through gloo

children=()
# Ends the processes that this script has started, and no others.
trap 'kill "${children[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < PROCESSES; i++)); do
    # Elsewhere than on Slurm and Cloud TPU every process is told three things; the coordinator is process 0's machine.
    # Two processes on two machines: the same command on each, with that machine's number.
    ppo-jax "$COMMAND" "$@" --distributed.coordinator "127.0.0.1:$PORT" \
        --distributed.processes "$PROCESSES" --distributed.process "$i" &
    children+=($!)
done
# The first that fails fails the script (and ends the rest); else it waits for all.
for ((i = 0; i < PROCESSES; i++)); do wait -n; done
