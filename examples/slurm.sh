#!/bin/bash
# A run as a Slurm job that requeues itself: at its time limit, after preemption or a lost node.
#
#     sbatch examples/slurm.sh --preset base --train-dir my_text --valid-fraction 0.01 \
#         --checkpoint-dir checkpoints/mine --checkpoint-interval 500 --keep-checkpoints 2
#
# Adapt the #SBATCH lines to your cluster, and activate your environment below. Without Slurm,
# `GPUS=2 bash examples/slurm.sh ...` runs the same with two processes.
#
#SBATCH --job-name=mpnet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# SIGTERM to this script 300 seconds before the limit: enough for an update and a checkpoint.
#SBATCH --signal=B:TERM@300

set -euo pipefail

# source .venv/bin/activate

# torchrun kills processes that take longer than this to stop (default: 30 seconds).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

if [[ -n ${SLURM_JOB_ID:-} ]]; then
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    launch=(
        srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}"
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID"
        --rdzv-endpoint "$host:$((20000 + SLURM_JOB_ID % 10000))"
    )
else
    launch=(torchrun --standalone --nproc-per-node "${GPUS:-1}")
fi

# In the background, so bash can handle the signal at once. --autoresume starts the run the first
# time and resumes it later.
"${launch[@]}" -m annotated_mpnet --autoresume "$@" &
training=$!
stopped=
trap 'stopped=yes; kill -TERM "$training" || true' TERM INT

code=0
wait "$training" || code=$?
if [[ -n $stopped ]]; then
    # The signal ended the first `wait`; this one lasts until the checkpoint is on disk.
    code=0
    wait "$training" || code=$?
    if [[ $code -ne 0 && -n ${SLURM_JOB_ID:-} ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
