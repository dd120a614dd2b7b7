#!/usr/bin/env bash
# PPO on a Cloud TPU pod slice: the same command on every host, started from your own machine.
#
#   TPU=my-slice ZONE=us-east5-a RUN=/mnt/shared/runs/first experiments/launch/tpu_pod.sh [OPTIONS OF ppo-jax ppo]
#
# Needed on every host of the slice: this repository in ~/ppo_jax with `pip install -e '.[tpu]'`, and a disk that all of
# them see (Filestore, GCS FUSE) for the run directory, the model and the prompts. Not measured: no TPU was at hand.
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}" "${RUN:?run directory on the shared disk}"

# A v5p-128 slice has 64 chips. fsdp cuts parameters and optimizer state, tensor cuts heads, MLP and vocabulary; their
# product with data is the number of chips. `ppo-jax plan` says beforehand what fits.
MESH=(--mesh.data 1 --mesh.fsdp 16 --mesh.tensor 4)

# --distributed.start on: the TPU runtime says who the other hosts are; jax.distributed.initialize() has no arguments.
# --resume auto: a slice that was pre-empted goes on from its last checkpoint when this script is run again.
COMMAND=(ppo-jax ppo
    --model /mnt/shared/models/Llama-3.1-8B-Instruct
    --prompts /mnt/shared/prompts.jsonl
    --reward /mnt/shared/runs/reward
    --run-dir "$RUN"
    --compute.dtype bfloat16 --compute.remat full
    --loop.batch-size 512 --ppo.num-minibatches 4 --ppo.accumulate 2
    --distributed.start on "${MESH[@]}" --resume auto "$@")

# Several slices (multislice) differ in nothing but the number of chips: the outer axis that the slices divide, data
# first, is laid over the data-centre network by itself.
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all \
    --command "cd ~/ppo_jax && $(printf '%q ' "${COMMAND[@]}")"
