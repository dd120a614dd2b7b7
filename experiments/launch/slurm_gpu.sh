#!/usr/bin/env bash
# PPO on GPUs under Slurm, one task per GPU:   sbatch experiments/launch/slurm_gpu.sh [OPTIONS OF ppo-jax ppo]
#
# Needed on every node: this repository installed with a CUDA build of jax (pip install 'jax[cuda13]' or the one of your
# driver), on a disk that all nodes see, as are run directory, model and prompts. Not measured: no GPU was at hand.
#SBATCH --job-name=ppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# Two minutes before the time limit every task is sent SIGTERM: the run saves its state and ends, and the requeued job
# goes on from there.
#SBATCH --signal=TERM@120
set -euo pipefail

# jax.distributed.initialize() reads Slurm's variables by itself (coordinator, number of tasks, this task), and gives
# each task one GPU. tensor stays inside a node (NVLink); data crosses nodes.
# XLA takes 75 % of a GPU's memory unless told otherwise.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92

# --kill-on-bad-exit: a task that dies takes the others along at once; without it they end after the heartbeat.
srun --kill-on-bad-exit=1 ppo-jax ppo \
    --model "$HOME/models/Qwen2.5-1.5B-Instruct" \
    --prompts "$HOME/data/prompts.jsonl" \
    --reward "$HOME/runs/reward" \
    --run-dir "$HOME/runs/ppo-$SLURM_JOB_NAME" \
    --compute.dtype bfloat16 \
    --mesh.data 2 --mesh.fsdp 4 --mesh.tensor 2 \
    --loop.batch-size 256 \
    --distributed.heartbeat 60 --resume auto "$@"
