#!/usr/bin/env bash
# PPO on GPUs under Slurm, one task per GPU:   sbatch experiments/launch/slurm_gpu.sh [OPTIONS OF ppo-jax ppo]
#
# Needed on every node: this repository installed with a CUDA build of jax (pip install 'jax[cuda13]' or the one of your
# driver), on a disk that all nodes see, as are run directory, model and prompts. Run under Slurm 22.05 with two tasks on
# one machine's CPUs (stopped by --signal, saved, queued again, resumed); not on GPUs: none was at hand.
#SBATCH --job-name=ppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# --requeue puts the job back in the queue when it is preempted or a node fails, but not when its time is over. For that,
# two minutes before the limit every task is sent SIGTERM: the run saves its state and ends with exit code 75, and
# the last lines of this script ask for the job to be queued again. It goes on from there (--resume auto).
#SBATCH --signal=TERM@120
set -euo pipefail

# jax.distributed.initialize() reads Slurm's variables by itself (coordinator, number of tasks, this task), and gives
# each task one GPU. tensor stays inside a node (NVLink); data crosses nodes.
# XLA takes 75 % of a GPU's memory unless told otherwise.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92

# When a task dies the others end after the heartbeat. --kill-on-bad-exit=1 would end them at once, but also those that
# are about to end with 75, and srun would return the code of a killed task.
code=0
srun --kill-on-bad-exit=0 ppo-jax ppo \
    --model "$HOME/models/Qwen2.5-1.5B-Instruct" \
    --prompts "$HOME/data/prompts.jsonl" \
    --reward "$HOME/runs/reward" \
    --run-dir "$HOME/runs/ppo-$SLURM_JOB_NAME" \
    --compute.dtype bfloat16 \
    --mesh.data 2 --mesh.fsdp 4 --mesh.tensor 2 \
    --loop.batch-size 256 \
    --distributed.heartbeat 60 --resume auto "$@" || code=$?
if ((code == 75)); then # stopped and saved: srun returns the highest exit code of its tasks
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
