#!/bin/bash
# One run on whole nodes with Slurm; submit it from the folder that the paths are relative to:
#
#   sbatch --nodes 2 recipes/launch/slurm.sh pretrain recipes/base.yaml data.train=audioset.jsonl data.global_batch=1536
#
# What stands behind the script are the words of cat-audio. It may be submitted again and again: a run that is there goes
# on, from its newest checkpoint. After a failure it starts again, on all nodes, unless that came at once. Two minutes
# before its time is up it saves, and puts itself into the queue again. Not yet run on a cluster: docs/scale.md says what
# was tried.
#
#SBATCH --job-name=cat-audio
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

at_once=${CAT_AT_ONCE:-600} # seconds; an error that comes sooner would come again
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90 # seconds to save in, where torchrun knows the variable; 30 elsewhere

over=
trap 'over=yes; kill -TERM "$step"' USR1 # not TERM, which is scancel's: that job is not wanted again
for attempt in 1 2 3 4 5; do
    began=$SECONDS
    srun --kill-on-bad-exit=1 torchrun \
        --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
        --rdzv-id "$SLURM_JOB_ID.$attempt" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
        -m cat "$@" --resume &
    step=$!
    wait "$step"
    code=$?
    if [ -n "$over" ]; then
        wait "$step" # the first one ended with the signal
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    if [ "$code" -eq 0 ] || [ $((SECONDS - began)) -lt "$at_once" ]; then
        break
    fi
    echo "attempt $attempt ended with exit code $code"
done
exit "$code"
